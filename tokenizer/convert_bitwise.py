"""Infinity's tokenizer checkpoints, read as ours: what their tensors say, and what each is called there.

Source: FoundationVision/Infinity, infinity/models/bsq_vae/flux_vqgan.py and multiscale_bsq.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from tokenizer import convert as indexed

ROOTS = ("encoder.", "decoder.", "quantizer.", "quantize.")
BUFFERS = re.compile(r"quantizer?\.lfq\.mask")  # powers of two; one tensor under two names

# Every convolution and norm sits in a wrapper of its own; files of plain autoencoders lack that level.
_WRAPPED = [
    (
        re.compile(r"(conv_in|conv_out|conv[12]|nin_shortcut|(?:down|up)sample\.conv)\.(weight|bias)$"),
        r"\1.conv.\2",
    ),
    (re.compile(r"(norm[12]|norm_out)\.(weight|bias)$"), r"\1.norm.\2"),
]


def normalized(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An official state dict with the wrappers of convolutions and norms in every name."""
    return {_wrapped(key): tensor for key, tensor in state.items()}


def read_config(shapes: Mapping[str, Sequence[int]], *, schedule: list[list[int]], token_patch: int = 1) -> dict:
    """The config of our bitwise `MultiScaleVQ` that a normalised official state dict belongs to.

    Args:
        shapes: shape of every official tensor; a missing key raises from the mapping itself.
        schedule: the scales in tokens.
        token_patch: latent cells along a token's side; the transformer's bits a token tell it.
    """
    levels = 1 + max((int(m[1]) for key in shapes if (m := re.match(r"encoder\.down\.(\d+)\.", key))), default=-1)
    blocks = (int(m[1]) for key in shapes if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", key)))
    channels = [shapes[f"encoder.down.{i}.block.0.conv1.conv.weight"][0] for i in range(levels)]
    stem = shapes["encoder.conv_in.conv.weight"][0]
    return {
        "channels": channels,
        "stem_channels": None if stem == channels[0] else stem,
        "layers_per_block": 1 + max(blocks, default=-1),
        "attention": False,
        "latent_channels": shapes["encoder.conv_out.conv.weight"][0],
        "vocab_size": 2,
        "schedule": schedule,
        "beta": 0.0,
        "bitwise": True,
        "token_patch": token_patch,
    }


def official_name(key: str, config: Mapping) -> str:
    """The official key that holds our `key`."""
    return _wrapped(indexed.official_name(key, config))


def official_shape(key: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The official shape of a tensor of ours: the same."""
    return tuple(shape)


def official_buffers(config: Mapping, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of an official state dict that hold no weights: the value of each bit in an index."""
    mask = 2 ** torch.arange(config["latent_channels"] - 1, -1, -1)
    return {"quantizer.lfq.mask": mask, "quantize.lfq.mask": mask.clone()}


def _wrapped(key: str) -> str:
    for pattern, replacement in _WRAPPED:
        key = pattern.sub(replacement, key)
    return key
