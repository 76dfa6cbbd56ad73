"""The official VAR transformer's checkpoint, read as ours: what its tensors say, and what each is called there.

CoDe's drafters and refiners are the same model. Source: FoundationVision/VAR, models/var.py and models/basic_var.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import isqrt

import torch

from tokenizer.schedule import SCHEDULES, ScaleSchedule

ROOTS = (
    "blocks.",
    "word_embed.",
    "class_emb.",
    "lvl_embed.",
    "pos_start",
    "pos_1LC",
    "head.",
    "head_nm.",
    "shared_ada",
)
BUFFERS = re.compile(r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias")  # all follow from the config

_TO_OFFICIAL = [
    (r"^conditioner\.embedding\.", "class_emb."),
    (r"^start_position_1lD$", "pos_start"),
    (r"^position_1LD$", "pos_1LC"),
    (r"^input_proj\.", "word_embed."),
    (r"^level_embedding\.", "lvl_embed."),
    (r"^ada_shared\.", "shared_ada_lin."),
    (r"^head\.ada\.", "head_nm.ada_lin."),
    (r"^head\.proj\.", "head."),
    (r"\.ada\.", ".ada_lin."),
    (r"\.ada_offset_6D$", ".ada_gss"),
    (r"\.to_[qkv]\.weight$", ".mat_qkv.weight"),
    (r"\.to_([qv])\.bias$", r".\1_bias"),
    (r"\.to_out\.", ".proj."),
    (r"\.log_scale_H11$", ".scale_mul_1H11"),
]


def read_schedule(shapes: Mapping[str, Sequence[int]], level_ids: torch.Tensor | None) -> list[list[int]]:
    """The scales: from the tokens of each level where the checkpoint records them, else by the sequence length.

    Raises:
        ValueError: if the scales are not square, or the length is that of no known schedule.
    """
    total = shapes["pos_1LC"][1]
    if level_ids is None:
        fits = [s for s in SCHEDULES.values() if s.total == total and len(s) == shapes["lvl_embed.weight"][0]]
        if len(fits) != 1:
            raise ValueError(f"the transformer's {total} tokens fit no known schedule: give --schedule")
        return fits[0].spec
    counts = Counter(level_ids.flatten().tolist())
    sides = [isqrt(counts[k]) for k in range(len(counts))]
    if any(side**2 != counts[k] for k, side in enumerate(sides)):
        raise ValueError(f"the transformer's scales have {list(counts.values())} tokens, not squares: give --schedule")
    return ScaleSchedule.of(sides).spec


def count_blocks(keys: Iterable[str], name: str = "blocks") -> int:
    """One more than the largest number of a block among the keys; 0 without any.

    Raises:
        ValueError: if far more are left out than are there: such a model would be built before anything is missing.
    """
    found = {int(m[1]) for key in keys if (m := re.match(rf"{name}\.(\d+)\.", key))}
    if found and max(found) > 10 * len(found):
        raise ValueError(f"{name} are numbered up to {max(found)}, and there are only {len(found)}")
    return 1 + max(found, default=-1)


def read_config(
    shapes: Mapping[str, Sequence[int]],
    *,
    schedule: list[list[int]],
    heads: int | None = None,
    norm_eps: float = 1e-6,
) -> dict:
    """The config of our `NextScaleTransformer` that an official state dict belongs to.

    Everything comes from the tensors, but for `norm_eps` and the number of heads of a model without QK-norm: `heads`,
    or one per 64 channels as in all official sizes.

    Args:
        shapes: shape of every official tensor; a missing key raises from the mapping itself.

    Raises:
        ValueError: if `heads` or `schedule` contradict the tensors.
    """
    depth = count_blocks(shapes)
    width, latent_channels = shapes["word_embed.weight"]
    shared_ada = any(key.startswith("shared_ada_lin.") for key in shapes)
    qk_norm = any(key.endswith(".attn.scale_mul_1H11") for key in shapes)
    total, own = shapes["pos_1LC"][1], ScaleSchedule.of(schedule)
    if own.total != total:
        raise ValueError(f"schedule {own.text} has {own.total} tokens, the transformer was built for {total}")
    if qk_norm:
        detected = shapes["blocks.0.attn.scale_mul_1H11"][1]
        if heads not in (None, detected):
            raise ValueError(f"heads is {heads}, the transformer has {detected}")
        heads = detected
    elif heads is None and width % 64:
        raise ValueError(
            f"a transformer without QK-norm, {width} wide, does not tell its heads: give heads (or refiner_heads)"
        )
    hidden = shapes["blocks.0.ffn.fc1.weight"][0]
    return {
        "depth": depth,
        "width": width,
        "heads": heads or max(width // 64, 1),
        "vocab_size": shapes["head.weight"][0],
        "latent_channels": latent_channels,
        "schedule": schedule,
        "conditioning": "class",
        "num_classes": shapes["class_emb.weight"][0] - 1,
        "mlp_ratio": hidden / width,
        "qk_norm": qk_norm,
        "shared_ada": shared_ada,
        "norm_eps": norm_eps,
    }


def official_name(key: str, config: Mapping) -> str:
    """The official key that holds our `key`; the weights of q, k and v share one."""
    for pattern, replacement in _TO_OFFICIAL:
        key = re.sub(pattern, replacement, key)
    return key


def official_shape(key: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The official shape of a tensor of ours: two of them carry leading ones there."""
    leading = {"scale_mul_1H11": 1, "ada_gss": 2}.get(key.rsplit(".", 1)[-1], 0)
    return (1,) * leading + tuple(shape)


def official_buffers(config: Mapping, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of an official state dict that hold no weights: levels, the additive mask, zero key biases."""
    levels_L = torch.tensor(ScaleSchedule.of(config["schedule"]).level_ids)
    allowed_LL = levels_L[:, None] >= levels_L[None]
    mask_LL = torch.zeros(allowed_LL.shape, dtype=dtype).masked_fill(~allowed_LL, -torch.inf)
    zeros = {f"blocks.{i}.attn.zero_k_bias": torch.zeros(config["width"], dtype=dtype) for i in range(config["depth"])}
    return {"lvl_1L": levels_L[None], "attn_bias_for_masking": mask_LL[None, None], **zeros}
