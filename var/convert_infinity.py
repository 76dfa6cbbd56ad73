"""Infinity's transformer checkpoints, read as ours: what their tensors say, and what each is called there.

Source: FoundationVision/Infinity, infinity/models/infinity.py and basic.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from var.convert import count_blocks

ROOTS = (
    "block_chunks.",
    "blocks.",
    "cfg_uncond",
    "text_norm.",
    "text_proj_for_",
    "pos_start",
    "lvl_embed.",
    "word_embed.",
    "shared_ada_lin.",
    "head_nm.",
    "head.",
)
BUFFERS = re.compile(r".*\.zero_k_bias")
_UNREAD = re.compile(r"lvl_1L|attn_bias_for_masking|Infinity_(visible_kvlen|invisible_qlen)")  # of older files

_TO_OFFICIAL = [
    (r"^conditioner\.null_text_TE$", "cfg_uncond"),
    (r"^conditioner\.norm\.", "text_norm."),
    (r"^conditioner\.pool\.query_Hd$", "text_proj_for_sos.ca.mat_q"),
    (r"^conditioner\.pool\.", "text_proj_for_sos.ca."),
    (r"^conditioner\.memory\.", "text_proj_for_ca."),
    (r"^start_position_1lD$", "pos_start"),
    (r"^input_proj\.", "word_embed."),
    (r"^level_embedding\.", "lvl_embed."),
    (r"^ada_shared\.", "shared_ada_lin."),
    (r"^head\.ada\.", "head_nm.ada_lin."),
    (r"^head\.proj\.", "head."),
    (r"\.attn\.to_[qkv]\.weight$", ".sa.mat_qkv.weight"),
    (r"\.attn\.", ".sa."),
    (r"\.cross\.to_q\.", ".ca.mat_q."),
    (r"\.cross\.", ".ca."),
    (r"\.cross_norm\.", ".ca_norm."),
    (r"\.cross_gate_D$", ".ca_gamma"),
    (r"\.ada\.", ".ada_lin."),
    (r"\.ada_offset_6D$", ".ada_gss"),
    (r"\.to_[kv]\.weight$", ".mat_kv.weight"),
    (r"\.to_([qv])\.bias$", r".\1_bias"),
    (r"\.to_out\.", ".proj."),
    (r"\.log_scale_H11$", ".scale_mul_1H11"),
]
_LEADING_ONES = {"scale_mul_1H11": 1, "ada_gss": 2, "mat_q": 1}


def normalized(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An official state dict with blocks counted through the chunks, head scales as (1, H, 1, 1), no unread tensor."""
    chunks = _chunk_size(state)
    renamed = {}
    for key, tensor in state.items():
        if _UNREAD.fullmatch(key):
            continue
        found = re.fullmatch(r"block_chunks\.(\d+)\.(?:module\.)+(\d+)\.(.+)", key)
        name = f"blocks.{int(found[1]) * chunks + int(found[2])}.{found[3]}" if found else key
        if name.endswith(".scale_mul_1H11"):  # (1, 1, H, 1) with the official flash attention kernel
            tensor = tensor.reshape(1, -1, 1, 1)
        renamed[name] = tensor
    return renamed


def chunked(state: Mapping[str, torch.Tensor], chunks: int) -> dict[str, torch.Tensor]:
    """The other way: `blocks.i` as `block_chunks.c.module.j`; unchanged for one chunk.

    Raises:
        ValueError: if the blocks do not divide into so many chunks.
    """
    depth = count_blocks(state)
    if chunks < 1 or depth % chunks:
        raise ValueError(f"chunks must divide the {depth} blocks, got {chunks}")
    if chunks == 1:
        return dict(state)
    size, renamed = depth // chunks, {}
    for key, tensor in state.items():
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
        chunk, inner = divmod(int(found[1]), size) if found else (0, 0)
        renamed[f"block_chunks.{chunk}.module.{inner}.{found[2]}" if found else key] = tensor
    return renamed


def read_config(
    shapes: Mapping[str, Sequence[int]],
    *,
    schedule: list[list[int]],
    rope_grid: Sequence[int] | None = None,
    heads: int | None = None,
    level_every: int = 0,
    norm_eps: float = 1e-6,
) -> dict:
    """The config of our `NextScaleTransformer` that a normalised official state dict belongs to.

    Args:
        shapes: shape of every official tensor; a missing key raises from the mapping itself.
        schedule: the scales in tokens; Infinity draws any of its templates, this is where ours begins.
        rope_grid: (height, width) of the last scale at 1M.
        heads: attention heads, to be checked.
        level_every: blocks of a chunk, where the level embedding is added before every chunk.
        norm_eps: of the layer norms.
    """
    width, bits = shapes["word_embed.weight"]
    qk_norm = any(key.endswith(".sa.scale_mul_1H11") for key in shapes)
    if not qk_norm:
        raise ValueError("the transformer has no cosine attention (scale_mul_1H11), as every published one does")
    detected = shapes["blocks.0.sa.scale_mul_1H11"][1]
    if heads not in (None, detected):
        raise ValueError(f"heads is {heads}, the transformer has {detected}")
    outputs = shapes["head.weight"][0]
    if outputs != 2 * bits:
        raise ValueError(f"the transformer reads {bits} bits a token and predicts {outputs} logits: not a bitwise one")
    return {
        "depth": count_blocks(shapes),
        "width": width,
        "heads": detected,
        "vocab_size": 2,
        "latent_channels": bits,
        "schedule": schedule,
        "conditioning": "text",
        "text_width": shapes["text_norm.weight"][0],
        "text_length": shapes["cfg_uncond"][0],
        "mlp_ratio": shapes["blocks.0.ffn.fc1.weight"][0] / width,
        "qk_norm": qk_norm,
        "shared_ada": any(key.startswith("shared_ada_lin.") for key in shapes),
        "positions": "rope",
        "norm_eps": norm_eps,
        "level_table": shapes["lvl_embed.weight"][0],
        "level_every": level_every,
        "bitwise": True,
        "pool_heads": shapes["text_proj_for_sos.ca.mat_q"][1],
        "cross_gate": 1.0 if "blocks.0.ca_gamma" in shapes else None,
        "rope_grid": None if rope_grid is None else list(rope_grid),
    }


def official_name(key: str, config: Mapping) -> str:
    """The official key, blocks counted through, that holds our `key`; fused projections share one."""
    for pattern, replacement in _TO_OFFICIAL:
        key = re.sub(pattern, replacement, key)
    return key


def official_shape(key: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The official shape of a tensor of ours: some carry leading ones there."""
    return (1,) * _LEADING_ONES.get(key.rsplit(".", 1)[-1], 0) + tuple(shape)


def official_buffers(config: Mapping, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of an official state dict that hold no weights: zero key biases."""
    names = [f"blocks.{i}.{part}.zero_k_bias" for i in range(config["depth"]) for part in ("sa", "ca")]
    return {name: torch.zeros(config["width"], dtype=dtype) for name in [*names, "text_proj_for_sos.ca.zero_k_bias"]}


def _chunk_size(state: Mapping[str, object]) -> int:
    inner = (m[1] for key in state if (m := re.match(r"block_chunks\.\d+\.(?:module\.)+(\d+)\.", key)))
    return 1 + max(map(int, inner), default=0)
