"""Weights that wait in CPU memory and come to the device when they are needed, for GPUs that are too small.

What comes and goes together is a unit, and one unit is on the device at a time. accelerate's hooks sit on the modules
whose weights count, not on whole models, because the loop calls parts of a model: the linear layers of the
transformers' blocks, the two halves of the tokenizer, the text encoder. What is left of a transformer and of the
quantiser (embeddings, norms, head) stays on the device: a few per cent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn

if TYPE_CHECKING:
    from sample.pipeline import NextScalePipeline
    from tokenizer.model import MultiScaleVQ
    from var.transformer import NextScaleTransformer

OFFLOADS = ("none", "model", "layers")


def keep_on_cpu(pipeline: NextScalePipeline, how: str, device: torch.device) -> NextScalePipeline:
    """Keep a pipeline's weights in CPU memory, in place; it stays in its dtype, and computes on `device`.

    Its tokens are those it draws without. It can still be saved. Adapters (LoRA) must be loaded before.

    Args:
        how: "model": all blocks of a transformer come at once; "layers": one linear layer after the other.

    Raises:
        ValueError: if the pipeline is on another device already, accelerated or offloaded.
    """
    if pipeline.accelerated is not None or pipeline.offloaded is not None or pipeline.device.type != "cpu":
        raise ValueError("offload takes a pipeline as it was loaded: on the CPU, with fast=off")
    models = [model for model in (pipeline.transformer, pipeline.refiner) if model is not None]
    groups = [*drawing_units(models, how), *decoding_units(pipeline.vqvae)]
    if pipeline.text_encoder is not None:
        groups.append([pipeline.text_encoder])
    room, moving = Room(device), set()
    for modules in groups:
        unit = Unit(modules, pin=device.type == "cuda")
        moving |= {id(tensor) for tensor, _ in unit.homes}
        for module in modules:
            add_hook_to_module(module, Visit(unit, room))
    for tensor in tensors_of([*models, pipeline.vqvae]):
        if id(tensor) not in moving:
            tensor.data = tensor.data.to(device)
    pipeline.offloaded = how
    return pipeline


def drawing_units(models: Iterable[NextScaleTransformer], how: str) -> list[list[nn.Module]]:
    """The units of transformers; see `keep_on_cpu`."""
    of_model = [
        [part for block in model.all_blocks for part in block.modules() if isinstance(part, nn.Linear)]
        for model in models
    ]
    return of_model if how == "model" else [[linear] for linears in of_model for linear in linears]


def decoding_units(vqvae: MultiScaleVQ) -> list[list[nn.Module]]:
    """The units of a tokenizer: its encoder and its decoder."""
    return [[vqvae.encoder], [vqvae.decoder]]


def tensors_of(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Parameters and buffers of some modules, shared ones once."""
    found = (tensor for module in modules for tensor in chain(module.parameters(), module.buffers()))
    return list({id(tensor): tensor for tensor in found}.values())


class Unit:
    """Weights that come and go together.

    Args:
        pin: lock their memory, so that a GPU reads it at full speed and nobody waits for the copy.

    Attributes:
        homes: each parameter or buffer, and its data in CPU memory, which it has while it is not on the device.
    """

    def __init__(self, modules: Sequence[nn.Module], *, pin: bool):
        self.homes = [(own, own.data.pin_memory() if pin else own.data) for own in tensors_of(modules)]
        self.leave()

    def come(self, device: torch.device) -> None:
        """Copy the weights to the device, in its order of work."""
        for own, home in self.homes:
            own.data = home.to(device, non_blocking=device.type == "cuda", copy=True)

    def leave(self) -> None:
        """Free the weights on the device; they do not change, so nothing is copied back."""
        for own, home in self.homes:
            own.data = home


class Room:
    """The place on a device that one unit has at a time."""

    def __init__(self, device: torch.device):
        self.device, self.guest = device, None

    def enter(self, unit: Unit) -> None:
        """Bring a unit in, and send the one before home."""
        if unit is self.guest:
            return
        if self.guest is not None:
            self.guest.leave()
        self.guest = unit
        unit.come(self.device)


class Visit(ModelHook):
    """Brings a module's unit, and what the module is called with, to the device."""

    def __init__(self, unit: Unit, room: Room):
        self.unit, self.room = unit, room

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        """Before the module runs."""
        self.room.enter(self.unit)
        return send_to_device(args, self.room.device), send_to_device(kwargs, self.room.device)
