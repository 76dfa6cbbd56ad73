"""Sizes as data: `NextScaleTransformer(**PRESETS["d16"], ...)`."""

from __future__ import annotations


def _var(depth: int) -> dict:
    """VAR's rule: width 64 x depth, as many heads as layers, stochastic depth 0.1 x depth / 24."""
    return {"depth": depth, "width": 64 * depth, "heads": depth, "drop_path": round(0.1 * depth / 24, 6)}


PRESETS: dict[str, dict] = {
    "tiny": {"depth": 2, "width": 64, "heads": 2},  # tests
    "scenes": {"depth": 10, "width": 256, "heads": 4, "shared_ada": True},  # the bundled model
    **{f"d{depth}": _var(depth) for depth in (6, 8, 10, 12, 16, 20, 24, 30)},
    "d36": {**_var(36), "shared_ada": True},  # 512 px
}
