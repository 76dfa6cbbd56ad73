"""What a running training consists of: the objective's contract, the task, the state that `train.loop.run` moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Dataset

from train.optimizers import Branch
from train.stream import StreamLoader

if TYPE_CHECKING:
    from train.config import RunConfig

Batch = dict[str, Any]
Metrics = dict[str, torch.Tensor]
Export = Callable[[Path, "Objective", dict[str, torch.Tensor] | None], None]


class NonFiniteError(RuntimeError):
    """The loss or a gradient stopped being a number; the last checkpoint is from before."""


class Stopped(Exception):
    """The user asked to stop (Ctrl-C or SIGTERM); a checkpoint was written. `code` is the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Clock:
    """Where training is; with it an objective keys whatever it draws.

    Attributes:
        step: optimiser steps done before this one.
        progress: fraction of training done, in [0, 1].
        seed: of the run.
    """

    step: int
    progress: float
    seed: int


@dataclass(frozen=True)
class Processes:
    """The two collective operations that training needs, trivial in one process."""

    accelerator: Accelerator

    def reduce(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over processes."""
        return self.accelerator.reduce(value, reduction="sum") if self.accelerator.num_processes > 1 else value

    def broadcast(self, value: torch.Tensor) -> torch.Tensor:
        """The tensor of process 0, in every process."""
        if self.accelerator.num_processes == 1:
            return value
        value = value.contiguous().clone()
        torch.distributed.broadcast(value, src=0)
        return value


def brought(module: nn.Module, device: torch.device) -> nn.Module:
    """`module.to(device)`, which looks at every weight, only where the first one is elsewhere: for every step."""
    return module if next(module.parameters()).device == device else module.to(device)


class Objective(nn.Module):
    """What a stage trains: a module whose forward is the loss.

    `forward(batch, clock)` returns (scalar loss, metrics): detached tensors, averaged over micro-batches, steps and
    processes; scalars are logged, others only reach `after_step`. In eval mode the same call validates.
    """

    find_unused = False  # whether some parameters may get no gradient in a step
    shardable = True  # whether it works with parameters split over processes (FSDP)

    def branches(self) -> dict[str, Branch]:
        """Named parameter sets, each with its optimiser. The first one is averaged (EMA)."""
        raise TypeError(f"{type(self).__name__} has no branches")

    def foundations(self) -> dict[str, list[tuple[str, torch.Tensor]]]:
        """What does not move and decides what is learned, by the option that names it: names and tensors."""
        frozen = [(name, p) for name, p in self.named_parameters() if not p.requires_grad]
        return {"start_from": frozen} if frozen else {}

    def after_step(self, batch: Batch, metrics: Metrics, clock: Clock, processes: Processes) -> None:
        """Called after every optimiser step with the last micro-batch and this process's mean metrics."""

    def statistics(self) -> dict[str, float]:
        """Figures that are not means over batches (usage, ...), logged beside the metrics."""
        return {}

    def compile_parts(self) -> None:
        """Compile the parts of fixed shape, in place.

        Raises:
            ValueError: if the objective has none.
        """
        raise ValueError(f"run.compile is not available for {type(self).__name__}")

    def halve_stream(self) -> None:
        """Keep what goes from block to block in half precision, too.

        Raises:
            ValueError: if the objective's model cannot.
        """
        raise ValueError(f"run.half_stream is not available for {type(self).__name__}")

    def checkpoint_activations(self) -> None:
        """Trade compute for memory: keep no activations inside blocks.

        Raises:
            ValueError: if the objective's model cannot.
        """
        raise ValueError(f"run.gradient_checkpointing is not available for {type(self).__name__}")


@dataclass(kw_only=True)
class Task:
    """One training stage, as `run` needs it.

    Attributes:
        objective: the module to train.
        train_data, val_data: data sets of dicts, map-style or streams.
        prepare: batch of collated items on the device to what `objective.forward` takes (frozen encoders live here).
        export: (folder, objective with averaged weights, None or its full state dict where parameters are sharded)
            writes `save_pretrained` folders.
        preview: objective with averaged weights to named grids, (n, 3, h, w) in [-1, 1].
        record: writes the configuration into the run's folder; called when the run is known to be the same.
        depends: by name, what the training builds on, as its tokenizer's hash: a run resumes with the same alone.
    """

    objective: Objective
    train_data: Dataset
    val_data: Dataset
    prepare: Callable[[Batch], Batch]
    export: Export
    preview: Callable[[Objective], dict[str, torch.Tensor]] | None = None
    record: Callable[[], None] | None = None
    depends: Mapping[str, Any] = field(default_factory=dict)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Of long sums: float64, which other accelerators than CUDA may lack (Apple's MPS does)."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


@dataclass
class Meter:
    """Running means of scalar metrics, kept on the device until they are asked for, in `sum_dtype`.

    Attributes:
        sums: by the names that come together, their weighted sums (n,) and the weight.
    """

    sums: dict[tuple[str, ...], tuple[torch.Tensor, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, totals: Mapping[str, torch.Tensor], device: torch.device) -> Meter:
        """The meter, on a device, with `totals` that an earlier one had."""
        by_weight: dict[float, dict[str, torch.Tensor]] = {}
        for name, (total, weight) in totals.items():
            by_weight.setdefault(float(weight), {})[name] = total
        found = ((tuple(own), torch.stack(list(own.values())), weight) for weight, own in by_weight.items())
        return cls({names: (sums_n.to(device, sum_dtype(device)), weight) for names, sums_n, weight in found})

    def add(self, metrics: Mapping[str, torch.Tensor], weight: int = 1) -> None:
        """Add scalar metrics (others are left out) with a weight, all at once: each launch takes its time."""
        scalars = {name: value.detach() for name, value in metrics.items() if value.ndim == 0}
        if not scalars:
            return
        values_n = torch.stack(list(scalars.values()))
        values_n = values_n.to(sum_dtype(values_n.device)) * weight
        sums_n, before = self.sums.get(tuple(scalars), (0, 0))
        self.sums[tuple(scalars)] = (sums_n + values_n, before + weight)

    def totals(self) -> dict[str, torch.Tensor]:
        """Per name, a (2,) tensor: the weighted sum and the weight."""
        found: dict[str, torch.Tensor] = {}
        for names, (sums_n, weight) in self.sums.items():
            for name, total in zip(names, sums_n):
                pair = torch.stack([total, torch.full_like(total, weight)])
                found[name] = found[name] + pair if name in found else pair
        return found

    def means(self, processes: Processes) -> dict[str, float]:
        """Means over all processes, as floats."""
        found = self.totals()
        if not found:
            return {}
        names = sorted(found)  # in one order everywhere: after a resume one process alone knows what came before
        totals = dict(zip(names, processes.reduce(torch.stack([found[name] for name in names])).tolist(), strict=True))
        return {name: totals[name][0] / totals[name][1] for name in found}


@dataclass
class Session:
    """The running state of `run`.

    Attributes:
        model: the objective inside its parallel wrapper.
        optimizers: per branch.
        ema: averages of the first branch's parameters; None without averaging.
        stream: position in streamed data; None for map-style data, whose position is the step.
        step: optimiser steps done.
        waited: seconds since the last log that the loop waited for data.
        meter: metrics since the last log.
        stop_signal: the first signal to stop that arrived.
        looked: step and time when the processes last agreed on signals; next_look: the step at which they do again.
        writer: tensorboard's, on the main process if asked for.
    """

    config: RunConfig
    accelerator: Accelerator
    task: Task
    model: nn.Module
    branches: dict[str, Branch]
    optimizers: dict[str, list[torch.optim.Optimizer]]
    ema: EMAModel | None = None
    stream: StreamLoader | None = None
    step: int = 0
    waited: float = 0.0
    meter: Meter = field(default_factory=Meter)
    stop_signal: int | None = None
    looked: tuple[int, float] = (0, 0.0)
    next_look: int = 0
    writer: Any = None

    @cached_property  # as every module is looked at to find it
    def objective(self) -> Objective:
        """The objective without its parallel wrapper."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def images(self) -> int:
        """Images seen."""
        return self.step * self.config.batch_size

    @property
    def progress(self) -> float:
        """Fraction of training done, in [0, 1]."""
        return min(1.0, self.images / self.config.total_images)

    @property
    def clock(self) -> Clock:
        """Where training is."""
        return Clock(self.step, self.progress, self.config.seed)

    @property
    def processes(self) -> Processes:
        """The collective operations."""
        return Processes(self.accelerator)

    @property
    def all_optimizers(self) -> list[torch.optim.Optimizer]:
        """Optimisers of all branches, in a fixed order."""
        return [optimizer for optimizers in self.optimizers.values() for optimizer in optimizers]

    @property
    def averaged_parameters(self) -> list[nn.Parameter]:
        """Parameters of the first branch as they are now (sharded under FSDP)."""
        return parameters_of(next(iter(self.optimizers.values())))

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are split over processes (FSDP)."""
        return any(hasattr(p, "full_tensor") for p in self.averaged_parameters)


def parameters_of(optimizers: list[torch.optim.Optimizer]) -> list[nn.Parameter]:
    """Every parameter of some optimisers."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


@contextmanager
def averaged_weights(session: Session) -> Iterator[None]:
    """The model with averaged weights, for the length of the block."""
    if session.ema is None:
        yield
        return
    parameters = session.averaged_parameters
    kept = [p.detach().clone() for p in parameters]
    session.ema.copy_to(parameters)
    forget_gathered(session.model)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
        forget_gathered(session.model)


def forget_gathered(model: nn.Module) -> None:
    """Let sharded modules (FSDP2) gather their parameters anew: some stay gathered after a forward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
