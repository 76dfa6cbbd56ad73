"""Official networks in, our models out, and back: one engine, and a small adapter for each kind of network.

An adapter names our model class, reads its config off the official tensors and maps our keys to theirs; splitting
fused projections and refusing keys by name is done here. Which files belong together is told in `sample.official`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from diffusers.models.modeling_utils import ModelMixin

from sample.checkpoints import State
from tokenizer import convert as tokenizer_keys
from tokenizer import convert_bitwise as bitwise_keys
from tokenizer.model import MultiScaleVQ
from tokenizer.schedule import ScaleSchedule
from var import convert as var_keys
from var import convert_hmar as hmar_keys
from var import convert_infinity as infinity_keys
from var.transformer import NextScaleTransformer

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what weights may be


@dataclass(frozen=True)
class Adapter:
    """How one official network maps to one of our models.

    Attributes:
        what: its name in messages.
        model: our class.
        roots: what its official keys begin with.
        buffers: official keys that hold no weights and are not part of our state dict.
        read_config: (official shapes, **flags) to our config.
        official_name: (our key, config) to the official key; several of ours may share one, in order.
        official_shape: (official key, our shape) to the official shape.
        official_buffers: (config, dtype) to the tensors `buffers` matches, as a fresh official model has them.
        keeps_buffers: buffers may differ from the fresh ones, and are kept for the way back.
        needs: what a config of ours must say for the official code to be able to run it.
        square: whether the official code knows square scales only.
    """

    what: str
    model: type[ModelMixin]
    roots: Sequence[str]
    buffers: re.Pattern
    read_config: Callable[..., dict]
    official_name: Callable[[str, Mapping], str]
    official_shape: Callable[[str, Sequence[int]], tuple[int, ...]]
    official_buffers: Callable[[Mapping, torch.dtype], State]
    keeps_buffers: bool = False
    needs: Mapping[str, object] = field(default_factory=dict)
    square: bool = False


VQVAE = Adapter(
    "VAR tokenizer (VQVAE)",
    MultiScaleVQ,
    tokenizer_keys.ROOTS,
    tokenizer_keys.BUFFERS,
    tokenizer_keys.read_config,
    tokenizer_keys.official_name,
    tokenizer_keys.official_shape,
    tokenizer_keys.official_buffers,
    keeps_buffers=True,
    needs={"patch": 1, "norm_groups": 32, "bitwise": False, "normalize_scales": False},
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
    needs={
        "conditioning": "class",
        "positions": "learned",
        "mask": "block_causal",
        "level_table": None,
        "level_every": 0,
        "bitwise": False,
        "sequential_layers": 0,
        "masked_layers": 0,
    },
    square=True,
)

HMAR = Adapter(
    "HMAR transformer",
    NextScaleTransformer,
    hmar_keys.ROOTS,
    hmar_keys.BUFFERS,
    hmar_keys.read_config,
    hmar_keys.official_name,
    var_keys.official_shape,
    hmar_keys.official_buffers,
    needs={name: wanted for name, wanted in VAR.needs.items() if name != "masked_layers"} | {"mask": "block_diagonal"},
    square=True,
)


BSQ = Adapter(
    "Infinity tokenizer (MultiScaleBSQ)",
    MultiScaleVQ,
    bitwise_keys.ROOTS,
    bitwise_keys.BUFFERS,
    bitwise_keys.read_config,
    bitwise_keys.official_name,
    bitwise_keys.official_shape,
    bitwise_keys.official_buffers,
    keeps_buffers=True,
    needs={"bitwise": True, "patch": 1, "norm_groups": 32, "attention": False},
)
INFINITY = Adapter(
    "Infinity transformer",
    NextScaleTransformer,
    infinity_keys.ROOTS,
    infinity_keys.BUFFERS,
    infinity_keys.read_config,
    infinity_keys.official_name,
    infinity_keys.official_shape,
    infinity_keys.official_buffers,
    needs={
        "bitwise": True,
        "conditioning": "text",
        "positions": "rope",
        "mask": "block_causal",
        "qk_norm": True,
        "level_table": 15,  # as many rows as there are, whatever the scales
    },
)


class _Shapes(dict):
    """Shapes by official key; a key that is not there is reported as missing from the checkpoint."""

    def __init__(self, state: Mapping[str, torch.Tensor], what: str):
        super().__init__({key: tuple(tensor.shape) for key, tensor in state.items()})
        self.what = what

    def __getitem__(self, key: str) -> tuple[int, ...]:
        return _Shape(super().__getitem__(key), f"{self.what} checkpoint: {key}")

    def __missing__(self, key: str) -> tuple[int, ...]:
        raise ValueError(f"{self.what} checkpoint lacks {key}")


class _Shape(tuple):
    """A tensor's shape; a dimension that it does not have is reported with the tensor's name, as one of length 0 is."""

    def __new__(cls, shape: Sequence[int], name: str):
        made = super().__new__(cls, shape)
        made.name = name
        if 0 in made:
            raise ValueError(f"{name} is {tuple(made)}, and holds nothing")
        return made

    def __getitem__(self, place: int) -> int:
        try:
            return super().__getitem__(place)
        except IndexError:
            raise ValueError(f"{self.name} is {tuple(self)}, and has too few dimensions") from None


def read_config(
    adapter: Adapter, state: Mapping[str, torch.Tensor], *, schedule: ScaleSchedule | Sequence | str, **flags: object
) -> dict:
    """The config of our model that an official state dict belongs to.

    Args:
        schedule: the scales, anything `ScaleSchedule.of` reads.
        flags: what tensors cannot tell, see the adapter's `read_config`.

    Raises:
        ValueError: if a tensor needed to tell is missing, or `flags` contradict the tensors.
    """
    shapes = _Shapes(state, adapter.what)
    return adapter.read_config(shapes, schedule=ScaleSchedule.of(schedule).spec, **flags)


def read_schedule(state: Mapping[str, torch.Tensor]) -> ScaleSchedule:
    """The scales that a VAR transformer's state dict was made for; they must be square.

    Raises:
        ValueError: if they cannot be told.
    """
    return ScaleSchedule.of(var_keys.read_schedule(_Shapes(state, VAR.what), state.get("lvl_1L")))


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
    for key, tensor in weights.items():
        plain = tensor.layout == torch.strided and not tensor.is_quantized
        if tensor.dtype not in FLOATS or not plain:
            kind = f"{tensor.dtype}".removeprefix("torch.") + ("" if plain else ", not plain numbers")
            raise ValueError(f"{adapter.what} checkpoint: {key} must be float16, bfloat16, float32 or 64, got {kind}")
    ours: State = {}
    for official, targets in table.items():
        _check_shape(adapter, official, weights[official], targets)
        for (key, shape), part in zip(targets, weights[official].chunk(len(targets))):
            ours[key] = part.reshape(shape)
    return ours


def to_official(adapter: Adapter, state: Mapping[str, torch.Tensor], config: Mapping) -> State:
    """Our state dict (or gradients by our keys) under official keys and shapes, without the official buffers.

    Raises:
        ValueError: if the official code has no such model, e.g. of a text model.
    """
    for name, value in adapter.needs.items():
        if config.get(name, value) != value:
            raise ValueError(f"only a model with {name} {value} can be a {adapter.what}; this one has {config[name]}")
    schedule = ScaleSchedule.of(config["schedule"])
    if adapter.square and any(h != w for h, w in schedule.sides):
        raise ValueError(f"only a model of square scales can be a {adapter.what}; these are {schedule.text}")
    official: State = {}
    for name, targets in key_table(adapter, config).items():
        parts = [state[key] for key, _ in targets]
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        official[name] = joined.reshape(adapter.official_shape(name, joined.shape))
    return official


def kept_buffers(adapter: Adapter, state: Mapping[str, torch.Tensor], config: Mapping) -> State:
    """The official buffers that differ from those of a fresh official model.

    Raises:
        ValueError: naming one, if they should follow from the config: the checkpoint is of another model.
    """
    found = {key: tensor for key, tensor in state.items() if adapter.buffers.fullmatch(key)}
    dtype = next((tensor.dtype for tensor in found.values() if tensor.is_floating_point()), torch.float32)
    fresh = adapter.official_buffers(config, dtype)
    kept = {key: t for key, t in found.items() if key not in fresh or not torch.equal(t, fresh[key])}
    if kept and not adapter.keeps_buffers:
        schedule = ScaleSchedule.of(config["schedule"]).text
        raise ValueError(f"{adapter.what} checkpoint: {min(kept)} is not what the scales {schedule} give")
    return kept


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
