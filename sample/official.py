"""Official checkpoints in, our models out, and back: one engine, a small adapter for each kind of network.

An adapter names our model class, reads its config off the official tensors and maps our keys to theirs; everything
else (splitting fused projections, refusing keys by name, streaming) is here. Families say which files belong together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers.models.modeling_utils import ModelMixin

from sample.checkpoints import State
from tokenizer import convert as tokenizer_keys
from tokenizer.model import MultiScaleVQ
from var import convert as var_keys
from var.transformer import NextScaleTransformer


@dataclass(frozen=True)
class Adapter:
    """How one official network maps to one of our models.

    Attributes:
        what: its name in messages.
        model: our class.
        roots: what its official keys begin with.
        buffers: official keys that hold no weights; they are left out here.
        read_config: (official shapes, **flags) to our config.
        official_name: (our key, config) to the official key; several of ours may share one, in order.
        official_shape: (official key, our shape) to the official shape.
        official_buffers: (config, dtype) to the tensors that `buffers` matches.
    """

    what: str
    model: type[ModelMixin]
    roots: Sequence[str]
    buffers: re.Pattern
    read_config: Callable[..., dict]
    official_name: Callable[[str, Mapping], str]
    official_shape: Callable[[str, Sequence[int]], tuple[int, ...]]
    official_buffers: Callable[[Mapping, torch.dtype], State]


VQVAE = Adapter(
    "VAR tokenizer (VQVAE)",
    MultiScaleVQ,
    tokenizer_keys.ROOTS,
    tokenizer_keys.BUFFERS,
    tokenizer_keys.read_config,
    tokenizer_keys.official_name,
    tokenizer_keys.official_shape,
    tokenizer_keys.official_buffers,
)
VAR = Adapter(
    "VAR transformer",
    NextScaleTransformer,
    var_keys.ROOTS,
    var_keys.BUFFERS,
    var_keys.read_config,
    var_keys.official_name,
    var_keys.official_shape,
    var_keys.official_buffers,
)


class _Shapes(dict):
    """Shapes by official key; a key that is not there is reported as missing from the checkpoint."""

    def __init__(self, state: Mapping[str, torch.Tensor], what: str):
        super().__init__({key: tuple(tensor.shape) for key, tensor in state.items()})
        self.what = what

    def __missing__(self, key: str) -> tuple[int, ...]:
        raise ValueError(f"{self.what} checkpoint lacks {key}")


def read_config(adapter: Adapter, state: Mapping[str, torch.Tensor], **flags: object) -> dict:
    """The config of our model that an official state dict belongs to.

    Raises:
        ValueError: if a tensor needed to tell is missing, or `flags` contradict the tensors.
    """
    return adapter.read_config(_Shapes(state, adapter.what), **flags)


def key_table(adapter: Adapter, config: Mapping) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """For every official key: which of our tensors, with their shapes, it holds one after the other."""
    with torch.device("meta"):
        ours = adapter.model(**config).state_dict()
    table: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for key, tensor in ours.items():
        table.setdefault(adapter.official_name(key, config), []).append((key, tuple(tensor.shape)))
    return table


def from_official(adapter: Adapter, state: Mapping[str, torch.Tensor], config: Mapping) -> State:
    """An official state dict as ours: views of the same memory, nothing is copied.

    Raises:
        ValueError: naming the keys that are missing, unknown or of another shape.
    """
    table = key_table(adapter, config)
    weights = {key: tensor for key, tensor in state.items() if not adapter.buffers.fullmatch(key)}
    _check_keys(adapter.what, weights, table)
    ours: State = {}
    for official, targets in table.items():
        _check_shape(adapter, official, weights[official], targets)
        for (key, shape), part in zip(targets, weights[official].chunk(len(targets))):
            ours[key] = part.reshape(shape)
    return ours


def to_official(adapter: Adapter, state: Mapping[str, torch.Tensor], config: Mapping) -> State:
    """Our state dict (or gradients by our keys) under official keys and shapes, without the official buffers."""
    official: State = {}
    for name, targets in key_table(adapter, config).items():
        parts = [state[key] for key, _ in targets]
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        official[name] = joined.reshape(adapter.official_shape(name, joined.shape))
    return official


def build(adapter: Adapter, state: Mapping[str, torch.Tensor], **flags: object) -> ModelMixin:
    """Our model, in eval mode, with the weights of an official state dict (which it takes over without copying).

    Raises:
        ValueError: if keys are missing, unknown or of another shape, or `flags` contradict the tensors.
    """
    config = read_config(adapter, state, **flags)
    with torch.device("meta"):
        model = adapter.model(**config)
    model.load_state_dict(from_official(adapter, state, config), assign=True)
    return model.eval()


def _check_keys(what: str, state: Mapping[str, torch.Tensor], table: Mapping[str, object]) -> None:
    for problem, keys in (("lacks", table.keys() - state.keys()), ("has unknown", state.keys() - table.keys())):
        if keys:
            named, more = sorted(keys)[:8], len(keys) - 8
            raise ValueError(
                f"{what} checkpoint {problem} {', '.join(named)}" + (f" and {more} more" if more > 0 else "")
            )


def _check_shape(
    adapter: Adapter, official: str, tensor: torch.Tensor, targets: list[tuple[str, tuple[int, ...]]]
) -> None:
    shape = targets[0][1]
    wanted = adapter.official_shape(official, (len(targets) * shape[0], *shape[1:]) if len(targets) > 1 else shape)
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{adapter.what} checkpoint: {official} is {tuple(tensor.shape)}, expected {wanted}")
