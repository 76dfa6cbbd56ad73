"""Sizes as data: `NextScaleTransformer(**PRESETS["d16"], ...)`."""

from __future__ import annotations


def _var(depth: int) -> dict:
    """VAR's rule: width 64 x depth, as many heads as layers, stochastic depth 0.1 x depth / 24."""
    return {"depth": depth, "width": 64 * depth, "heads": depth, "drop_path": round(0.1 * depth / 24, 6)}


def _infinity(depth: int, width: int, heads: int, bits: int = 32) -> dict:
    """Infinity's rule: feed-forward of about 4 x width in steps of 256, everything of Infinity's block switched on."""
    hidden = round(4 * width / 256) * 256
    sizes = {"depth": depth, "width": width, "heads": heads, "mlp_ratio": hidden / width, "drop_path": 0.1}
    tokens = {"bitwise": True, "latent_channels": bits, "positions": "rope", "level_table": 15, "shared_ada": True}
    return {**sizes, **tokens, "conditioning": "text", "text_width": 2048, "text_length": 512, "pool_heads": 16}


PRESETS: dict[str, dict] = {
    "tiny": {"depth": 2, "width": 64, "heads": 2},  # tests
    "scenes": {"depth": 8, "width": 224, "heads": 4, "shared_ada": True},  # the bundled model
    **{f"d{depth}": _var(depth) for depth in (6, 8, 10, 12, 16, 20, 24, 30)},
    "d36": {**_var(36), "shared_ada": True},  # 512 px
    "infinity-125m": _infinity(12, 768, 8),
    "infinity-361m": _infinity(16, 1152, 12),
    "infinity-1b": _infinity(24, 1536, 16),
    "infinity-2b": _infinity(32, 2048, 16),
    "infinity-2.2b": _infinity(32, 2080, 20),
    "infinity-4.7b": _infinity(40, 2688, 24),
    "infinity-8b": _infinity(40, 3584, 28, bits=56),  # tokens of 2 x 2 latent cells
}

# How VAR's published figures are drawn (its README); t of guidance grows linearly over the scales.
VAR_SAMPLING = {"guidance_scale": 1.5, "top_k": 900, "top_p": 0.96}
