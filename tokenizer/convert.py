"""The official VAR tokenizer's checkpoint, read as ours: what its tensors say, and what each of them is called there.

Source: FoundationVision/VAR, models/vqvae.py and models/quant.py (`VQVAE`, `VectorQuantizer2`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

ROOTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
BUFFERS = re.compile(r"quantize\.ema_vocab_hit_SV")  # usage statistics of training

_PHI_STYLES = {  # how the official code keeps its phis -> num_phis here (None: as many as there are)
    re.compile(r"quantize\.quant_resi\.qresi_ls\.(\d+)\.weight"): None,
    re.compile(r"quantize\.quant_resi\.qresi\.weight"): 1,
    re.compile(r"quantize\.quant_resi\.(\d+)\.weight"): 0,
}

_TO_OFFICIAL = [
    (r"^quantizer\.codebook\.", "quantize.embedding."),
    (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d+)\.attentions\.", r"down.\1.attn."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.(\d+)\.resnets\.", r"up.\1.block."),
    (r"up_blocks\.(\d+)\.attentions\.", r"up.\1.attn."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.", r"up.\1.upsample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"conv_shortcut\.", "nin_shortcut."),
    (r"conv_norm_out\.", "norm_out."),
    (r"group_norm\.", "norm."),
    (r"to_[qkv]\.", "qkv."),
    (r"to_out\.0\.", "proj_out."),
]


def read_config(
    shapes: Mapping[str, Sequence[int]],
    *,
    schedule: list[list[int]],
    phi_ratio: float = 0.5,
    cosine: bool = False,
    beta: float = 0.25,
) -> dict:
    """The config of our `MultiScaleVQ` that an official state dict belongs to.

    Widths, depths, vocabulary and the sharing of the phi convolutions come from the tensors. They do not show the
    scales, the phi ratio, a cosine codebook or beta: those are arguments, with the official defaults.

    Args:
        shapes: shape of every official tensor; a missing key raises from the mapping itself.

    Raises:
        ValueError: if there is one phi per scale, but for another number of scales; or phis, but a `phi_ratio` of 0.
    """
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    vocab_size, latent_channels = shapes["quantize.embedding.weight"]
    channels = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    stem = shapes["encoder.conv_in.weight"][0]
    num_phis, count = _phi_sharing(shapes)
    if num_phis == 0 and count != len(schedule):
        raise ValueError(f"the tokenizer has one phi for each of {count} scales, the schedule has {len(schedule)}")
    if count and abs(phi_ratio) <= 1e-6:
        raise ValueError(f"phi_ratio is {phi_ratio:g}, the tokenizer has {count} phi convolutions")
    return {
        "channels": channels,
        "stem_channels": None if stem == channels[0] else stem,
        "layers_per_block": _count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "attention": any(key.startswith("encoder.mid.attn_1.") for key in shapes),
        "latent_channels": latent_channels,
        "vocab_size": vocab_size,
        "schedule": schedule,
        "quant_conv_kernel": shapes["quant_conv.weight"][-1],
        "phi_ratio": phi_ratio if count else 0.0,
        "num_phis": num_phis,
        "cosine": cosine,
        "beta": beta,
    }


def official_name(key: str, config: Mapping) -> str:
    """The official key that holds our `key`; q, k and v of an attention share one."""
    phi = re.fullmatch(r"quantizer\.phis\.(\d+)\.(weight|bias)", key)
    if phi:
        inner = {0: f"{phi[1]}", 1: "qresi"}.get(config["num_phis"], f"qresi_ls.{phi[1]}")
        return f"quantize.quant_resi.{inner}.{phi[2]}"
    key = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up_blocks.{len(config['channels']) - 1 - int(m[1])}.", key)
    for pattern, replacement in _TO_OFFICIAL:
        key = re.sub(pattern, replacement, key)
    return key


def official_shape(key: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The official shape of a tensor of ours: attention projections are 1x1 convolutions there."""
    is_projection = re.search(r"\.(qkv|proj_out)\.weight$", key)
    return (*shape, 1, 1) if is_projection else tuple(shape)


def official_buffers(config: Mapping, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of an official state dict that hold no weights: usage counts of each code at each scale, all zero."""
    return {"quantize.ema_vocab_hit_SV": torch.zeros(len(config["schedule"]), config["vocab_size"], dtype=dtype)}


def _count(shapes: Mapping[str, Sequence[int]], pattern: str) -> int:
    return 1 + max((int(m[1]) for key in shapes if (m := re.match(pattern, key))), default=-1)


def _phi_sharing(shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """(num_phis as in our config, convolutions present)."""
    for pattern, num_phis in _PHI_STYLES.items():
        found = sum(bool(pattern.fullmatch(key)) for key in shapes)
        if found:
            return (found if num_phis is None else num_phis), found
    return 4, 0
