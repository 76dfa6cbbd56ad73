"""What the GPU benchmarks share: timing, runs in turns in one process, stages, the official models with our weights."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.reference import official_pair
from benchmarks.timing import spread
from sample import adapters
from sample.load import resolve_device
from sample.pipeline import NextScalePipeline

Run = Callable[[], Any]
OFFICIAL = ("official_float32", "official_float16", "official_bfloat16")


def current_device(name: str) -> torch.device:
    """The device of that name; one with a number becomes the current one, on which the official code works."""
    device = resolve_device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def timed(run: Run, device: str) -> float:
    """Seconds of one run, until the device has done all of it."""
    wait = partial(torch.cuda.synchronize, device) if torch.device(device).type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def ceiling(device: str, size: int = 8192, repeats: int = 10) -> float:
    """The fastest bfloat16 matrix product of this device, in FLOP/s."""
    if torch.device(device).type != "cuda":
        size, repeats = 1024, 3
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    runs = [timed(lambda: a @ b, device) for _ in range(repeats)]
    return 2 * size**3 / min(runs)


def device_name(device: str) -> str:
    """What the device is called."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"


def settled(runs: dict[str, Run], times: int = 2) -> tuple[dict[str, Run], dict[str, Any], dict[str, str]]:
    """Every run done a few times, so that kernels are chosen, compiled and recorded.

    Returns:
        The runs that work; what each gave first; and by name what stopped the others, as too little memory does.
    """
    first, failed = {}, {}
    for name, run in runs.items():
        try:
            first[name] = run()
            for _ in range(times - 1):
                run()
        except RuntimeError as error:  # those of memory and of compilers are, too
            failed[name] = reason(error)
    return {name: run for name, run in runs.items() if name not in failed}, first, failed


def reason(error: Exception) -> str:
    """The first line of an error, which is printed whole."""
    traceback.print_exception(error)
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_turns(runs: dict[str, Run], rounds: int, device: str) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every run's rounds, A B A B; and by name what stopped those that are left out."""
    found, failed = {name: [] for name in runs}, {}
    for _ in range(rounds):
        for name in list(found):
            try:
                found[name].append(timed(runs[name], device))
            except RuntimeError as error:
                failed[name] = reason(error)
                del found[name]
    return found, failed


def figures(found: dict[str, list[float]], name: str, batch: int, bases: Collection[str] = OFFICIAL) -> dict[str, Any]:
    """A variant's seconds, images a second, and how many times each base's seconds, round by round."""
    row: dict[str, Any] = {"variant": name, "batch": batch, **spread("seconds", found[name])}
    row["images_per_s"] = batch / row["seconds"]
    for base in bases:
        if base in found and base != name:
            row |= spread(f"times_{base}", [theirs / ours for theirs, ours in zip(found[base], found[name])])
    return row


class EventStages:
    """Seconds of the device between the beginnings and ends of functions, without waiting for it in between."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def around(self, owner: Any, name: str, stage: str) -> Iterator[None]:
        """Mark the calls of attribute `name` of a module, class or object meanwhile."""
        function = getattr(owner, name)

        def marked(*args: Any, **kwargs: Any) -> Any:
            ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            ends[0].record()
            try:
                return function(*args, **kwargs)
            finally:
                ends[1].record()
                self.marks.append((stage, *ends))

        setattr(owner, name, marked)
        try:
            yield
        finally:
            setattr(owner, name, function)

    def of(self, job: Callable[[], Any]) -> dict[str, float]:
        """The stages of one job."""
        self.marks.clear()
        job()
        torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for stage, began, ended in self.marks:
            found[stage] += began.elapsed_time(ended) / 1e3
        return found


def official_models(checkout: Path, pipeline: NextScalePipeline, device: str) -> tuple[Any, Any]:
    """The official (tokenizer, transformer) with a pipeline's weights, on a device, in eval mode.

    Building them changes torch's own classes for good: build all of ours before.
    """
    ours = (pipeline.vqvae, pipeline.transformer)
    made = official_pair(checkout, pipeline.transformer.config, pipeline.vqvae.config, device)
    for theirs, model, adapter in zip(made, ours, (adapters.VQVAE, adapters.VAR)):
        config = {key: value for key, value in model.config.items() if not key.startswith("_")}
        weights = adapters.to_official(adapter, model.state_dict(), config)
        theirs.load_state_dict(weights | adapter.official_buffers(config, torch.float32))
        theirs.eval().requires_grad_(False)
    return made
