"""The one training loop: every stage trains through `run`.

Progress is counted in images. Everything random is a function of (seed, progress), so resuming is the same command
again: the newest complete checkpoint is loaded, metrics.jsonl is cut back to it, and the run goes on as if never
stopped (bit-equal on CPU). A batch is the same for any split over processes and micro-batches.

    RUN_DIR/config.yaml        the resolved configuration
            metrics.jsonl      one JSON object per line; `kind` is train or validation
            images/            preview grids, PNG
            checkpoints/       step_00000123/: state.pt (all that resuming needs) and weights/ (averaged weights)
            latest             link to the newest weights/, in `save_pretrained` layout, swapped atomically (a folder
                               of the same files where there are no symbolic links)
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradScalerKwargs
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method
from torch.utils.data import DataLoader, default_collate

from sample.processes import check_group, works_on_cpu
from tokenizer.precision import set_product_precision
from train.checkpoint import held_alone
from train.config import RunConfig
from train.machine import can_compile, check_sharding, tell_of_emulation
from train.optimizers import build_optimizers, set_rates
from train.order import KeyedDataset, KeyedSampler, spread_index, uniforms
from train.report import log_training, open_tensorboard, progress_bar, write_metrics, write_pictures
from train.session import Batch, Meter, Metrics, Session, Task, averaged_weights, parameters_of
from train.state import hashes, resume, save
from train.stopping import catch_signals, check_finite, must_stop, stopped_by
from train.stream import StreamDataset, StreamLoader
from train.workers import leave_signals_to_parent

LARGEST_SCALE = 2.0**15  # of the loss under fp16, as VAR has it: gradients overflow above 65504
SCALE_CHECKED = 100  # steps: asking for it waits for the device


def run(task: Task, config: RunConfig) -> dict[str, float]:
    """Train until `config.total_images`, resuming from the run's newest checkpoint; returns the last validation.

    Raises:
        ValueError: on settings that do not fit the processes or the run already in `config.run_dir`.
        NonFiniteError: if the loss or a gradient is not finite; nothing is written after it.
        Stopped: after SIGINT or SIGTERM, once the checkpoint is on disk.
    """
    session = start(task, config)
    alone = held_alone(Path(config.run_dir)) if session.accelerator.is_main_process else contextlib.nullcontext()
    with alone:
        return train(session)


def train(session: Session) -> dict[str, float]:
    """As `run`, of a session that was started."""
    task, config = session.task, session.config
    resume(session)
    session.looked = (session.step, time.monotonic())
    if task.record is not None and session.images < config.total_images:  # a finished run keeps what made it
        task.record()
    elif session.accelerator.is_main_process and session.images >= config.total_images:
        print(
            f"{config.run_dir} has all its {session.images:,} images: nothing to train (a larger run.total_images "
            "continues it, another run.run_dir begins anew)",
            file=sys.stderr,
        )
    open_tensorboard(session)
    last: dict[str, float] = {}
    with catch_signals(session), progress_bar(session) as bar:
        batches = micro_batches(session)
        clock, logged_at = time.monotonic(), session.images
        while session.images < config.total_images:
            train_step(session, batches)
            bar.update(config.batch_size)
            done = session.images >= config.total_images
            stopping = must_stop(session)
            if session.step % config.log_every == 0 or done:
                check_finite(session)
                seconds = time.monotonic() - clock
                speed, wait = (session.images - logged_at) / seconds, session.waited / seconds
                bar.set_postfix_str(log_training(session, images_per_s=speed, data_wait=wait))
                clock, logged_at, session.waited = time.monotonic(), session.images, 0.0
            if done or session.step % config.validate_every == 0:
                last = validate(session)
            if done or stopping or session.step % config.checkpoint_every == 0:
                if session.meter.sums:
                    check_finite(session)
                save(session)
            if stopping and not done:
                raise stopped_by(session, stopping)
    tell_unreadable(session)
    return last


def tell_unreadable(session: Session) -> None:
    """One line on stderr about the images that were skipped, if there were any."""
    corrupt = getattr(session.task.train_data, "corrupt", None)
    if session.accelerator.is_main_process and corrupt is not None and corrupt.count:
        print(corrupt.summary(), file=sys.stderr)


def start(task: Task, config: RunConfig) -> Session:
    """Set up precision, processes, optimisers and averaging; checks the arithmetic of batch sizes."""
    handlers = [
        DistributedDataParallelKwargs(find_unused_parameters=task.objective.find_unused),
        GradScalerKwargs(init_scale=2.0**11, growth_interval=1000),  # VAR's, with `LARGEST_SCALE`
    ]
    on_cpu = config.cpu or works_on_cpu()
    accelerator = Accelerator(mixed_precision=config.precision, kwargs_handlers=handlers, cpu=on_cpu)
    check_group(accelerator)
    check_sharding(accelerator)
    config.check_split(accelerator.num_processes)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("run.precision fp16 needs a GPU: take bf16 or no")
    if config.half_stream and accelerator.mixed_precision == "no":
        raise ValueError("run.half_stream needs run.precision bf16 or fp16")
    tell_of_emulation(accelerator)
    if accelerator.mixed_precision != "no":
        set_product_precision("tf32")  # what stays float32, as the head, has more digits even so
    if accelerator.is_fsdp2 and not task.objective.shardable:
        raise ValueError(
            f"{type(task.objective).__name__} does not train sharded (FSDP): use configs/accelerate/ddp.yaml"
        )
    if accelerator.is_fsdp2:  # autocast says what is in half precision, as for whole parameters; sums stay float32
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    if config.gradient_checkpointing:
        task.objective.checkpoint_activations()
    if config.half_stream:
        task.objective.halve_stream()
    if config.compile and can_compile(accelerator):
        task.objective.compile_parts()
    task = replace(task, depends={**task.depends, **hashes(task.objective)})
    task.objective.to(accelerator.device)
    branches = task.objective.branches()
    built = {name: build_optimizers(branch) for name, branch in branches.items()}
    model, *prepared = accelerator.prepare(task.objective, *(o for group in built.values() for o in group))
    if accelerator.is_fsdp2:
        gather_apart(model)
    # The loop drives the plain optimisers: accelerate's wrappers each update the fp16 scaler, once too often for two.
    plain = iter(wrapper.optimizer for wrapper in prepared)
    optimizers = {name: [next(plain) for _ in group] for name, group in built.items()}
    session = Session(config, accelerator, task, model, branches, optimizers)
    begin_averaging(session)
    open_stream(session)
    session.model.train()
    return session


def gather_apart(model: nn.Module) -> None:
    """Let sharded modules (FSDP2) gather their parameters for the methods they name in `called_apart`, too."""
    for module in model.modules():
        for name in getattr(module, "called_apart", ()):
            register_fsdp_forward_method(module, name)


def begin_averaging(session: Session) -> None:
    """Start the averages (EMA, decay warmed up as (1 + t) / (10 + t)) at the present weights."""
    if session.config.ema:
        decay, fused = session.config.ema, not session.is_sharded  # sharded tensors have no fused copy
        session.ema = EMAModel(session.averaged_parameters, decay=decay, foreach=fused)


def open_stream(session: Session) -> None:
    """Give streamed training data a position of its own in every process."""
    if isinstance(session.task.train_data, StreamDataset):
        count = session.accelerator.num_processes
        part = session.task.train_data.for_rank(session.accelerator.process_index, count)
        workers = session.config.workers
        session.stream = StreamLoader(part, batch_size=session.config.micro(count), num_workers=workers)


# --- batches -------------------------------------------------------------------------------------------------------


def micro_batches(session: Session) -> Iterator[Batch]:
    """This process's micro-batches from the session's present image on, on the device and prepared.

    Each carries `counter`: the global image counters of its rows, which key whatever is drawn per image; and
    `training`, which the batches of validation lack.
    """
    accelerator = session.accelerator
    world, size = accelerator.num_processes, session.config.micro(accelerator.num_processes)
    counter = session.images + accelerator.process_index
    for batch in clocked(session, session.stream or map_loader(session)):
        batch |= {"counter": range(counter, counter + size * world, world), "training": True}
        counter += size * world
        yield on_device(session, batch)


def clocked(session: Session, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches; the seconds until each was there are added to `session.waited`."""
    begin = time.monotonic()
    for batch in batches:
        session.waited += time.monotonic() - begin
        yield batch
        begin = time.monotonic()


def map_loader(session: Session) -> Iterable[Batch]:
    """Batches of a map-style data set, in the order of the global image counter."""
    config, accelerator = session.config, session.accelerator
    sampler = KeyedSampler(
        rank=accelerator.process_index, world=accelerator.num_processes, start=session.images, stop=None
    )
    return DataLoader(
        KeyedDataset(session.task.train_data, seed=config.seed),
        batch_size=config.micro(accelerator.num_processes),
        sampler=sampler,
        num_workers=config.workers,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=accelerator.device.type == "cuda",
        prefetch_factor=4 if config.workers else None,
    )


def on_device(session: Session, batch: Batch) -> Batch:
    """Move tensors to the device and apply the task's frozen encoders, without gradients."""
    device = session.accelerator.device
    early = device.type == "cuda"  # from pinned memory; MPS may read what is freed by then
    batch = {k: v.to(device, non_blocking=early) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    with torch.no_grad(), session.accelerator.autocast():
        return session.task.prepare(batch)


# --- one step ------------------------------------------------------------------------------------------------------


def train_step(session: Session, batches: Iterator[Batch]) -> None:
    """One optimiser step over `batch_size` images: accumulate, clip, step every branch, average."""
    accelerator, config = session.accelerator, session.config
    count = config.accumulation(accelerator.num_processes)
    means: Metrics = {}
    for index in range(count):
        batch = next(batches)
        # A text encoder's dropout draws from the global generator: keyed here, so that nothing needs storing.
        key = (config.seed, session.step, index, accelerator.process_index)
        torch.manual_seed(int(uniforms(1, *key)[0] * 2**53))
        with contextlib.nullcontext() if index == count - 1 else accelerator.no_sync(session.model):
            loss, metrics = session.model(batch, session.clock)
            accelerator.backward(loss / count)
        for name, value in {"loss": loss.detach(), **metrics}.items():
            share = value / count if count > 1 else value
            means[name] = means[name] + share if name in means else share
    update(session, means)
    session.objective.after_step(batch, means, session.clock, session.processes)
    if session.ema is not None:
        session.ema.step(session.averaged_parameters)
    session.meter.add(means)
    session.step += 1


def update(session: Session, means: Metrics) -> None:
    """Clip and step every branch that has gradients; adds their gradient norms to `means`."""
    scaler = session.accelerator.scaler
    for name, optimizers in session.optimizers.items():
        branch = session.branches[name]
        config = branch.config
        for optimizer in optimizers:
            set_rates(optimizer, config, branch.progress(session.progress))
        parameters = [p for p in parameters_of(optimizers) if p.grad is not None]
        if not parameters:
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
    if scaler is not None:
        scaler.update()
        if session.step % SCALE_CHECKED == 0 and scaler.get_scale() > LARGEST_SCALE:
            scaler.update(LARGEST_SCALE)


def clip_gradients(parameters: list[nn.Parameter], largest: float) -> torch.Tensor:
    """Scale the gradients in place to a joint norm of at most `largest` (0: leave them); returns the norm before."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if largest > 0:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


# --- validation ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(session: Session) -> dict[str, float]:
    """Metrics of the averaged weights on `validation_images` of the validation data, and preview grids.

    It leaves the model in training mode.
    """
    meter = Meter()
    # Uncompiled: samples grow from scale to scale, and every new shape would compile again.
    with averaged_weights(session), torch.compiler.set_stance("force_eager"):
        session.model.eval()
        for items, counters, weight in validation_batches(session):
            batch = {**default_collate(items), "counter": counters}
            loss, metrics = session.model(on_device(session, batch), session.clock)
            meter.add({"loss": loss, **metrics}, weight=weight)
        means = meter.means(session.processes)
        write_metrics(session, "validation", means)
        # A sharded model runs only in all processes together: its pictures come from RUN_DIR/latest.
        if session.task.preview and session.accelerator.is_main_process and not session.is_sharded:
            with session.accelerator.autocast():
                pictures = session.task.preview(session.objective)
            write_pictures(session, pictures)
    session.model.train()
    return means


def validation_batches(session: Session) -> Iterator[tuple[list[dict], range, int]]:
    """This process's part of the validation images, their numbers among all of them (what is drawn for an image goes by
    it), and the weight of each batch; every process gets as many batches.

    Where images are left when each has got as many, the others run the first one along, with no weight.
    """
    config, accelerator, data = session.config, session.accelerator, session.task.val_data
    world, rank, size = accelerator.num_processes, accelerator.process_index, config.micro(accelerator.num_processes)
    left = 0
    if isinstance(data, StreamDataset):
        items = islice(data.for_rank(rank, world), max(1, config.validation_images // world))
    else:
        total = min(config.validation_images, len(data))
        left = total % world
        items = (data[spread_index(i, len(data))] for i in range(rank, total - left, world))
    number = rank
    while batch := list(islice(items, size)):
        yield batch, range(number, number + len(batch) * world, world), len(batch)
        number += len(batch) * world
    if left:
        number = total - left + rank if rank < left else 0
        yield [data[spread_index(number, len(data))]], range(number, number + 1), int(rank < left)
