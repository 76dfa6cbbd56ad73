"""The one training loop: every stage trains through `run`.

Progress is counted in images. Everything random is a function of (seed, progress), so resuming is the same command
again: the newest complete checkpoint is loaded, metrics.jsonl is cut back to it, and the run goes on as if never
stopped (bit-equal on CPU). A batch is the same for any split over processes and micro-batches.

    RUN_DIR/config.yaml        the resolved configuration
            metrics.jsonl      one JSON object per line; `kind` is train or validation
            images/            preview grids, PNG
            checkpoints/       step_00000123/: state.pt (all that resuming needs) and weights/ (averaged weights)
            latest             link to the newest weights/, in `save_pretrained` layout, swapped atomically
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from train.checkpoint import complete_checkpoints, point_link, write_atomically, write_checkpoint
from train.config import RunConfig
from train.optimizers import Branch, build_optimizers, set_rates
from train.order import KeyedDataset, KeyedSampler, uniforms

Batch = dict[str, Any]
Metrics = dict[str, torch.Tensor]


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


class Objective(nn.Module):
    """What a stage trains: a module whose forward is the loss.

    `forward(batch, clock)` returns (scalar loss, metrics): detached tensors, averaged over micro-batches, steps and
    processes; scalars are logged, others only reach `after_step`. In eval mode the same call validates.
    """

    find_unused = False  # whether some parameters may get no gradient in a step

    def branches(self) -> dict[str, Branch]:
        """Named parameter sets, each with its optimiser. The first one is averaged (EMA)."""
        raise TypeError(f"{type(self).__name__} has no branches")

    def after_step(self, batch: Batch, metrics: Metrics, clock: Clock, processes: Processes) -> None:
        """Called after every optimiser step with the last micro-batch and this process's mean metrics."""

    def statistics(self) -> dict[str, float]:
        """Figures that are not means over batches (usage, ...), logged beside the metrics."""
        return {}

    def compile_parts(self) -> None:
        """Compile the parts of fixed shape, in place."""


@dataclass(kw_only=True)
class Task:
    """One training stage, as `run` needs it.

    Attributes:
        objective: the module to train.
        train_data, val_data: map-style data sets of dicts.
        prepare: batch of collated items on the device to what `objective.forward` takes (frozen encoders live here).
        export: (folder, objective with averaged weights, None or its full state dict where parameters are sharded)
            writes `save_pretrained` folders.
        preview: objective with averaged weights to named grids, (n, 3, h, w) in [-1, 1].
        collate: items to a batch; torch's default when None.
    """

    objective: Objective
    train_data: Dataset
    val_data: Dataset
    prepare: Callable[[Batch], Batch]
    export: Callable[[Path, Objective, dict[str, torch.Tensor] | None], None]
    preview: Callable[[Objective], dict[str, torch.Tensor]] | None = None
    collate: Callable[[list], Batch] | None = None


@dataclass
class Meter:
    """Running float64 means of scalar metrics, kept on the device until they are asked for.

    Attributes:
        sums: per name, a (2,) tensor: the weighted sum and the weight.
    """

    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, torch.Tensor], weight: int = 1) -> None:
        """Add scalar metrics (others are left out) with a weight."""
        for name, value in metrics.items():
            if value.ndim == 0:
                value = value.detach().double()
                value = torch.stack([value * weight, torch.full_like(value, weight)])
                self.sums[name] = self.sums[name] + value if name in self.sums else value

    def means(self, processes: Processes) -> dict[str, float]:
        """Means over all processes, as floats."""
        if not self.sums:
            return {}
        totals = processes.reduce(torch.stack(list(self.sums.values()))).tolist()
        return {name: total / weight for name, (total, weight) in zip(self.sums, totals, strict=True)}


@dataclass
class Session:
    """The running state of `run`."""

    config: RunConfig
    accelerator: Accelerator
    task: Task
    model: nn.Module
    branches: dict[str, Branch]
    optimizers: dict[str, list[torch.optim.Optimizer]]
    ema: EMAModel | None
    step: int = 0
    meter: Meter = field(default_factory=Meter)
    stop_signal: int | None = None

    @property
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
    def averaged_parameters(self) -> list[nn.Parameter]:
        """Parameters of the first branch as they are now (sharded under FSDP)."""
        return [p for o in next(iter(self.optimizers.values())) for group in o.param_groups for p in group["params"]]

    @property
    def processes(self) -> Processes:
        """The collective operations."""
        return Processes(self.accelerator)

    @property
    def clock(self) -> Clock:
        """Where training is."""
        return Clock(self.step, self.progress, self.config.seed)


def run(task: Task, config: RunConfig) -> dict[str, float]:
    """Train until `config.total_images`, resuming from the run's newest checkpoint; returns the last validation.

    Raises:
        ValueError: on batch sizes that do not fit.
        NonFiniteError: if the loss or a gradient is not finite; nothing is written after it.
        Stopped: after SIGINT or SIGTERM, once the checkpoint is on disk.
    """
    session = start(task, config)
    resume(session)
    last: dict[str, float] = {}
    with catch_signals(session), progress_bar(session) as bar:
        loader = micro_batches(session)
        clock, logged_at = time.monotonic(), session.images
        while session.images < config.total_images:
            train_step(session, loader)
            bar.update(config.batch_size)
            done = session.images >= config.total_images
            stopping = must_stop(session)
            if session.step % config.log_every == 0 or done:
                check_finite(session)
                speed = (session.images - logged_at) / (time.monotonic() - clock)
                bar.set_postfix_str(log_training(session, speed))
                clock, logged_at = time.monotonic(), session.images
            if done or session.step % config.validate_every == 0:
                last = validate(session)
            if done or stopping or session.step % config.checkpoint_every == 0:
                check_finite(session)
                save(session)
            if stopping and not done:
                raise Stopped(
                    f"stopped by {signal.Signals(stopping).name} at {session.images} of {config.total_images} images; "
                    f"checkpoint written, run the same command to go on",
                    128 + stopping,
                )
    if session.accelerator.num_processes > 1:
        session.accelerator.end_training()
    return last


def start(task: Task, config: RunConfig) -> Session:
    """Set up precision, processes, optimisers and averaging; checks the arithmetic of batch sizes."""
    unused = DistributedDataParallelKwargs(find_unused_parameters=task.objective.find_unused, broadcast_buffers=False)
    try:
        accelerator = Accelerator(mixed_precision=config.precision, kwargs_handlers=[unused], cpu=config.cpu)
    except ValueError as error:
        if "fp16" in str(error):
            raise ValueError("precision fp16 needs a GPU: use bf16 or no") from None
        raise
    config.check_split(accelerator.num_processes)
    if config.compile:
        task.objective.compile_parts()
    task.objective.to(accelerator.device)
    branches = task.objective.branches()
    built = {name: build_optimizers(branch) for name, branch in branches.items()}
    flat = [optimizer for optimizers in built.values() for optimizer in optimizers]
    model, *flat = accelerator.prepare(task.objective, *flat)
    rest = iter(prepared.optimizer for prepared in flat)
    optimizers = {name: [next(rest) for _ in old] for name, old in built.items()}
    session = Session(config, accelerator, task, model, branches, optimizers, None)
    if config.ema:
        session.ema = EMAModel(session.averaged_parameters, decay=config.ema, foreach=True)
    return session


# --- one step ------------------------------------------------------------------------------------------------------


def micro_batches(session: Session) -> Iterator[Batch]:
    """This process's micro-batches from the session's present image on, on the device and prepared."""
    config, accelerator = session.config, session.accelerator
    world, rank, size = accelerator.num_processes, accelerator.process_index, config.micro(accelerator.num_processes)
    sampler = KeyedSampler(rank=rank, world=world, start=session.images)
    loader = DataLoader(
        KeyedDataset(session.task.train_data, seed=config.seed),
        batch_size=size,
        sampler=sampler,
        num_workers=config.workers,
        collate_fn=session.task.collate,
        pin_memory=accelerator.device.type == "cuda",
        prefetch_factor=4 if config.workers else None,
    )
    counter = session.images + rank
    for batch in loader:
        batch["counter"] = range(counter, counter + size * world, world)
        counter += size * world
        yield on_device(session, batch)


def on_device(session: Session, batch: Batch) -> Batch:
    """Move tensors to the device and apply the task's frozen encoders, without gradients."""
    device = session.accelerator.device
    batch = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    with torch.no_grad(), session.accelerator.autocast():
        return session.task.prepare(batch)


def train_step(session: Session, loader: Iterator[Batch]) -> None:
    """One optimiser step over `batch_size` images: accumulate, clip, step every branch, average."""
    accelerator, config = session.accelerator, session.config
    session.model.train()
    count = config.accumulation(accelerator.num_processes)
    means: Metrics = {}
    for index in range(count):
        batch = next(loader)
        # Dropout and stochastic depth draw from the global generator: keyed here, so that nothing needs storing.
        torch.manual_seed(keyed_seed(config.seed, session.step, index, accelerator.process_index))
        last = index == count - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(session.model):
            loss, metrics = session.model(batch, session.clock)
            accelerator.backward(loss / count)
        for name, value in {"loss": loss.detach(), **metrics}.items():
            means[name] = means[name] + value / count if name in means else value / count
    update(session, means)
    session.objective.after_step(batch, means, session.clock, session.processes)
    if session.ema is not None:
        session.ema.step(session.averaged_parameters)
    session.meter.add(means)
    session.step += 1


def update(session: Session, means: Metrics) -> None:
    """Clip and step every branch that has gradients; adds their norms and rates to `means`."""
    scaler = session.accelerator.scaler
    for name, optimizers in session.optimizers.items():
        config = session.branches[name].config
        parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        rates = [set_rates(optimizer, config, session.progress) for optimizer in optimizers]
        if all(p.grad is None for p in parameters):
            continue
        for optimizer in optimizers:
            if scaler is not None:
                scaler.unscale_(optimizer)
        norm = clip_gradients(parameters, config.clip)
        for optimizer in optimizers:
            scaler.step(optimizer) if scaler is not None else optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        suffix = "" if name == next(iter(session.optimizers)) else f"_{name}"
        means[f"grad_norm{suffix}"] = norm.detach()
        means[f"lr{suffix}"] = torch.tensor(rates[0], dtype=torch.float64, device=norm.device)
    if scaler is not None:
        scaler.update()


def clip_gradients(parameters: list[nn.Parameter], largest: float) -> torch.Tensor:
    """Scale the gradients in place to a joint norm of at most `largest` (0: leave them); returns the norm before."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(grads)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if largest > 0:
        nn.utils.clip_grads_with_norm_([p for p in parameters if p.grad is not None], largest, norm)
    return norm


def keyed_seed(*key: int) -> int:
    """A 53-bit seed from non-negative integers."""
    return int(uniforms(1, *key)[0] * 2**53)


# --- stopping ------------------------------------------------------------------------------------------------------


def check_finite(session: Session) -> None:
    """Raise NonFiniteError, in every process, if the loss or a gradient norm since the last log is not finite.

    Under fp16 an overflowing gradient is the scaler's business, so only the loss counts.
    """
    names = ["loss"] + [n for n in session.meter.sums if n.startswith("grad_norm") and not session.accelerator.scaler]
    values = [session.meter.sums[name][0] for name in names if name in session.meter.sums]
    if not values:
        return
    bad = session.processes.reduce((~torch.isfinite(torch.stack(values))).any().float())
    if bad.item():
        kept = complete_checkpoints(session.config.checkpoints)
        where = f"the last good checkpoint is {kept[-1].name}" if kept else "there is no checkpoint yet"
        culprits = [name for name, value in zip(names, values) if not torch.isfinite(value)]
        raise NonFiniteError(
            f"not finite near step {session.step}: {', '.join(culprits) or 'another process'}; {where}. "
            "Lower the learning rate, raise the warm-up, or train in bf16 or float32"
        )


def must_stop(session: Session) -> int | None:
    """The signal to stop for, agreed by all processes; on GPUs in several processes looked at only when logging.

    On CPU it also checks that the step was finite, which costs nothing there.
    """
    accelerator = session.accelerator
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu:
        check_finite(session)
    if accelerator.num_processes == 1:
        return session.stop_signal
    if not on_cpu and session.step % session.config.log_every:
        return None
    flags = torch.zeros(accelerator.num_processes, device=accelerator.device, dtype=torch.int64)
    flags[accelerator.process_index] = session.stop_signal or 0
    return int(session.processes.reduce(flags).max()) or None


@contextlib.contextmanager
def catch_signals(session: Session) -> Iterator[None]:
    """Note the first SIGINT or SIGTERM for the loop to see; a second one acts as it would have."""
    before = {}

    def note(number: int, frame: object) -> None:
        session.stop_signal = number
        for caught, handler in before.items():
            signal.signal(caught, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- reporting -----------------------------------------------------------------------------------------------------


def progress_bar(session: Session) -> tqdm:
    """Images done, images per second and time left, on the main process."""
    return tqdm(
        total=session.config.total_images,
        initial=session.images,
        unit="img",
        unit_scale=True,
        smoothing=0.05,
        desc=Path(session.config.run_dir).name,
        disable=not session.accelerator.is_main_process,
        mininterval=session.config.bar_every,
    )


def log_training(session: Session, images_per_s: float) -> str:
    """Write the means since the last log; returns the bar's text."""
    means = session.meter.means(session.processes)
    session.meter = Meter()
    figures = {**means, **session.objective.statistics()}
    write_metrics(session, "train", {**figures, "images_per_s": round(images_per_s, 3)})
    return f"loss {means['loss']:.4f}"


def write_metrics(session: Session, kind: str, figures: Mapping[str, float]) -> None:
    """Append one line to metrics.jsonl and to the tensorboard log, on the main process."""
    if not session.accelerator.is_main_process:
        return
    row = {"kind": kind, "step": session.step, "images": session.images, **figures}
    with session.config.metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if session.config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(Path(session.config.run_dir) / "tensorboard")) as writer:
            for name, value in figures.items():
                writer.add_scalar(f"{kind}/{name}", value, session.images)


@torch.no_grad()
def validate(session: Session) -> dict[str, float]:
    """Metrics of the averaged weights on the first `validation_images` of the validation data, and preview grids."""
    config, accelerator = session.config, session.accelerator
    world, rank = accelerator.num_processes, accelerator.process_index
    total = min(config.validation_images, len(session.task.val_data))
    meter = Meter()
    with averaged_weights(session):
        session.model.eval()
        # Every process runs the same number of batches (sharded models need it); the remainder is left out.
        share = list(range(rank, total - total % world, world)) if total >= world else [0]
        size = config.micro(world)
        for begin in range(0, len(share), size):
            items = [session.task.val_data[i] for i in share[begin : begin + size]]
            batch = (session.task.collate or torch.utils.data.default_collate)(items)
            batch["counter"] = range(len(items))
            loss, metrics = session.model(on_device(session, batch), session.clock)
            meter.add({"loss": loss, **metrics}, weight=len(items))
        means = meter.means(session.processes)
        write_metrics(session, "validation", means)
        if session.task.preview and accelerator.is_main_process and not is_sharded(session):
            with accelerator.autocast():
                pictures = session.task.preview(session.objective)
            write_pictures(session, pictures)
    session.model.train()
    return means


def write_pictures(session: Session, pictures: Mapping[str, torch.Tensor]) -> None:
    """Write (n, 3, h, w) pictures in [-1, 1] as one PNG grid each, 8 to a row."""
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.utils import make_image_grid

    folder = Path(session.config.run_dir) / "images"
    folder.mkdir(parents=True, exist_ok=True)
    processor = VaeImageProcessor()
    for name, images in pictures.items():
        columns = min(8, len(images))
        images = images[: len(images) // columns * columns].float().cpu().clamp(-1, 1)
        grid = make_image_grid(processor.postprocess(images, output_type="pil"), len(images) // columns, columns)
        grid.save(folder / f"{name}_{session.images:09d}.png")


# --- state ---------------------------------------------------------------------------------------------------------


def is_sharded(session: Session) -> bool:
    """Whether parameters are split over processes (FSDP)."""
    return any(hasattr(p, "full_tensor") for p in session.averaged_parameters)


@contextlib.contextmanager
def averaged_weights(session: Session) -> Iterator[None]:
    """The model with averaged weights, for the length of the block."""
    if session.ema is None:
        yield
        return
    parameters = session.averaged_parameters
    kept = [p.detach().clone() for p in parameters]
    session.ema.copy_to(parameters)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, kept)


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


def save(session: Session) -> None:
    """Write a checkpoint and swap `latest` to its averaged weights; every process must call it."""
    accelerator, config = session.accelerator, session.config
    optimizers = [
        get_optimizer_state_dict(session.model, optimizer, options=FULL) if optimizer.state else None
        for optimizer in all_optimizers(session)
    ]
    ema = None
    if session.ema is not None:
        ema = session.ema.state_dict()
        ema["shadow_params"] = [whole(p).cpu() for p in ema["shadow_params"]]
    sums = {name: session.processes.reduce(value.clone()).cpu() for name, value in session.meter.sums.items()}
    state = {
        "model": get_model_state_dict(session.model, options=FULL),
        "optimizers": optimizers,
        "ema": ema,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        "step": session.step,
        "batch_size": config.batch_size,
        "meter": sums,
    }
    with averaged_weights(session):
        weights = get_model_state_dict(session.model, options=FULL) if is_sharded(session) else None
        if accelerator.is_main_process:
            written = write_checkpoint(
                config.checkpoints,
                session.step,
                lambda folder: write_state(session, folder, state, weights),
                keep=config.keep,
            )
            point_link(Path(config.run_dir) / "latest", written / "weights")
    accelerator.wait_for_everyone()


def write_state(session: Session, folder: Path, state: dict, weights: dict | None) -> None:
    """Fill a checkpoint directory: state.pt, and the averaged weights as `weights/`."""
    torch.save(state, folder / "state.pt")
    session.task.export(folder / "weights", session.objective, weights)


def resume(session: Session) -> None:
    """Load the newest checkpoint if there is one, and cut metrics.jsonl back to it.

    Raises:
        ValueError: if the checkpoint is of another model or another batch size.
    """
    config = session.config
    found = complete_checkpoints(config.checkpoints)
    session.accelerator.wait_for_everyone()
    if found:
        state = torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=True, mmap=True)
        if state["batch_size"] != config.batch_size:
            raise ValueError(
                f"batch_size {config.batch_size} differs from {state['batch_size']} of the run in {config.run_dir}: "
                "resume with that, or give another run_dir"
            )
        try:
            load_state(session, state)
        except (RuntimeError, KeyError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise ValueError(f"run_dir {config.run_dir} holds a run of another model: {reason}") from None
    if session.accelerator.is_main_process:
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
        cut_metrics(config.metrics, session.step)


def load_state(session: Session, state: dict) -> None:
    """Bring the session to the state that `save` wrote."""
    set_model_state_dict(session.model, state["model"], options=FULL)
    for optimizer, saved in zip(all_optimizers(session), state["optimizers"], strict=True):
        if saved is not None:
            set_optimizer_state_dict(session.model, optimizer, saved, options=FULL)
    if session.ema is not None and state["ema"] is not None:
        shadow = state["ema"].pop("shadow_params")
        session.ema.load_state_dict(state["ema"])
        for mine, saved in zip(session.ema.shadow_params, shadow, strict=True):
            mine.copy_(like(saved, mine))
    if session.accelerator.scaler and state["scaler"]:
        session.accelerator.scaler.load_state_dict(state["scaler"])
    session.step = state["step"]
    # The saved sums are over all processes: one process holds them, so that they count once.
    share = 1 if session.accelerator.is_main_process else 0
    session.meter = Meter({name: share * v.to(session.accelerator.device) for name, v in state["meter"].items()})


def all_optimizers(session: Session) -> list[torch.optim.Optimizer]:
    """Optimisers of all branches, in a fixed order."""
    return [optimizer for optimizers in session.optimizers.values() for optimizer in optimizers]


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """The full tensor of a possibly sharded one; every process must call it."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def like(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A full tensor laid out as `target`, which may be sharded."""
    if not hasattr(target, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step`, and a last line that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_atomically(path, "".join(kept))
