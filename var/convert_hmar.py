"""HMAR's checkpoints, read as ours: the layout of its whole model, and how its two trainings' files make one.

HMAR is two trainings. The first gives a next-scale transformer, with VAR's keys. The second trains the last blocks and
the head of a copy for masked prediction; all else stays, so its file differs in these. The whole model has the shared
first blocks as base_blocks, the last ones as ns_blocks and mask_blocks, and a head of each.

Source: HMAR (arXiv 2506.04421), section 4; key names of its models/nsp.py, models/mp.py and models/hmar.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from tokenizer.schedule import ScaleSchedule
from var import convert as var_keys

BLOCKS = ("base_blocks", "ns_blocks", "mask_blocks")
ROOTS = (*var_keys.ROOTS, *(f"{name}." for name in BLOCKS), "ns_head", "mask_head", "mask_embed", "word_embed_bias")
BUFFERS = re.compile(rf"lvl_1L|attn_bias_for_masking|(blocks|{'|'.join(BLOCKS)})\.\d+\.attn\.zero_k_bias")

_HEADS = [
    (r"^masked\.head\.ada\.", "mask_head_nm.ada_lin."),
    (r"^masked\.head\.proj\.", "mask_head."),
    (r"^head\.ada\.", "ns_head_nm.ada_lin."),
    (r"^head\.proj\.", "ns_head."),
    (r"^masked\.mask_1D$", "mask_embed.weight"),
    (r"^masked\.blocks\.", "mask_blocks."),
    (r"^input_proj\.bias$", "word_embed_bias"),
]
_OF_VAR = {  # what VAR's reader asks for: where it is in the whole model
    "word_embed.weight": "word_embed.weight",
    "pos_1LC": "pos_1LC",
    "class_emb.weight": "class_emb.weight",
    "head.weight": "ns_head.weight",
    "blocks.0.ffn.fc1.weight": "base_blocks.0.ffn.fc1.weight",
}

State = dict[str, torch.Tensor]


def normalized(
    state: Mapping[str, torch.Tensor], masked: Mapping[str, torch.Tensor] | None = None, shared: int | None = None
) -> State:
    """The whole model's state dict: `state` itself, or made of the files of the first training and of the second.

    Args:
        state: of the whole model, or of the first training (VAR's keys).
        masked: of the second training, whole or only what it changed; None for the whole model, or for a model without
            masked prediction, which keeps VAR's keys.
        shared: `shared_blocks` of the two, where they were compared before.

    Raises:
        ValueError: if the two do not belong together, or a second file is given beside the whole model.
    """
    if masked is None:
        return dict(state)
    if any(key.startswith("base_blocks.") for key in state):
        raise ValueError("the transformer's file has masked prediction already: leave the second one out")
    depth = var_keys.count_blocks(state, "blocks")
    shared = shared_blocks(state, masked) if shared is None else shared
    own = re.compile(rf"blocks\.({'|'.join(map(str, range(shared, depth)))})\.|head\.|head_nm\.|mask_embed\.")
    whole = {_whole_name(key, shared): tensor for key, tensor in state.items()}
    return whole | {_masked_name(key, shared): tensor for key, tensor in masked.items() if own.match(key)}


def shared_blocks(state: Mapping[str, torch.Tensor], masked: Mapping[str, torch.Tensor]) -> int:
    """How many first blocks the second training left alone; it may have changed only the last ones, and the head.

    Raises:
        ValueError: if it changed anything else, or the two are of different models.
    """
    changed, depth = set(), var_keys.count_blocks(state, "blocks")
    for key, tensor in masked.items():
        first = state.get({"word_embed_bias": "word_embed.bias"}.get(key, key))
        block = re.match(r"blocks\.(\d+)\.", key)
        if key.startswith(("head.", "head_nm.", "mask_embed.")) or (first is not None and torch.equal(tensor, first)):
            continue
        if first is not None and tensor.dtype != first.dtype:
            raise ValueError(f"the files of the two trainings must be of one precision: {tensor.dtype}, {first.dtype}")
        if block is None or int(block[1]) >= depth:
            raise ValueError(f"the files of the two trainings do not belong together: {key} differs")
        changed.add(int(block[1]))
    if changed != set(range(depth - len(changed), depth)) or len(changed) == depth or not changed:
        raise ValueError(f"the second training must have changed the last blocks of {depth}, got {sorted(changed)}")
    return depth - len(changed)


def _whole_name(key: str, shared: int) -> str:
    block = re.match(r"blocks\.(\d+)\.(.+)", key)
    if block:
        i = int(block[1])
        return f"base_blocks.{i}.{block[2]}" if i < shared else f"ns_blocks.{i - shared}.{block[2]}"
    return re.sub(r"^word_embed\.bias$", "word_embed_bias", re.sub(r"^head", "ns_head", key))


def _masked_name(key: str, shared: int) -> str:
    block = re.match(r"blocks\.(\d+)\.(.+)", key)
    return f"mask_blocks.{int(block[1]) - shared}.{block[2]}" if block else re.sub(r"^head", "mask_head", key)


def read_config(
    shapes: Mapping[str, Sequence[int]],
    *,
    schedule: list[list[int]],
    heads: int | None = None,
    norm_eps: float = 1e-6,
) -> dict:
    """The config of our `NextScaleTransformer` that a whole model's state dict belongs to; see `var.convert`.

    Raises:
        ValueError: if there are not as many blocks of masked prediction as last blocks, or as `var.convert`.
    """
    base, last, own = (var_keys.count_blocks(shapes, name) for name in BLOCKS)
    if not base:  # of the first training alone
        config = var_keys.read_config(shapes, schedule=schedule, heads=heads, norm_eps=norm_eps)
        return config | {"mask": "block_diagonal", "masked_layers": 0}
    if last != own:
        raise ValueError(f"masked prediction must have as many blocks as there are ns_blocks, {last}, got {own}")
    as_var = {name: shapes[key] for name, key in _OF_VAR.items()}
    as_var |= {key: shape for key, shape in shapes.items() if key.startswith("shared_ada_lin.")}
    as_var |= {key.removeprefix("base_"): shape for key, shape in shapes.items() if "scale_mul" in key}
    config = var_keys.read_config(as_var, schedule=schedule, heads=heads, norm_eps=norm_eps)
    return config | {"depth": base + last, "mask": "block_diagonal", "masked_layers": own}


def official_name(key: str, config: Mapping) -> str:
    """The official key that holds our `key`; the weights of q, k and v share one."""
    if config["masked_layers"]:
        for pattern, replacement in _HEADS:
            key = re.sub(pattern, replacement, key)
        if key.startswith("blocks."):
            key = _whole_name(key, config["depth"] - config["masked_layers"])
    return var_keys.official_name(key, config)


def official_buffers(config: Mapping, dtype: torch.dtype) -> State:
    """The tensors of an official state dict that hold no weights: levels, the additive mask, zero key biases."""
    levels_L = torch.tensor(ScaleSchedule.of(config["schedule"]).level_ids)
    allowed_LL = levels_L[:, None] == levels_L[None]
    mask_LL = torch.zeros(allowed_LL.shape, dtype=dtype).masked_fill(~allowed_LL, -torch.inf)
    own, depth = config["masked_layers"], config["depth"]
    counts = zip(BLOCKS, (depth - own, own, own)) if own else [("blocks", depth)]
    names = [f"{name}.{i}.attn.zero_k_bias" for name, count in counts for i in range(count)]
    zeros = {name: torch.zeros(config["width"], dtype=dtype) for name in names}
    return {"lvl_1L": levels_L[None], "attn_bias_for_masking": mask_LL[None, None], **zeros}
