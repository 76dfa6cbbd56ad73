"""Time and memory of a pipeline on this machine, and a model of both fitted to a few short runs."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch

from sample.costs import cache_peak, plan_work
from sample.ledger import wait_for
from sample.plan import Plan
from sample.state import GenerationState, Hook

if TYPE_CHECKING:
    from sample.pipeline import NextScalePipeline

Prompts = Sequence[str] | Sequence[int]


class Stopwatch(Hook):
    """Seconds of every scale, a stage's prefill with its first, and the peak bytes of the caches."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.cache_bytes, self.last = device, [], 0, 0.0

    def on_start(self, state: GenerationState) -> None:
        """Before the first scale."""
        self.last = now(self.device)

    def on_scale_end(self, state: GenerationState, k: int) -> None:
        """After scale k."""
        moment = now(self.device)
        self.seconds.append(moment - self.last)
        self.cache_bytes = max(self.cache_bytes, state.cache.peak_nbytes)
        self.last = moment


@dataclass(frozen=True)
class Run:
    """One measured call of the pipeline.

    Attributes:
        scales: seconds of every scale.
        decode: seconds of the decoder.
        total: seconds from prompts to images.
        base_bytes: memory in use before the call.
        cache_bytes: peak of the key/value caches.
        drawing_bytes, peak_bytes: most memory in use while tokens were drawn, and over the whole call; of the process
            on a CPU, of the device otherwise.
    """

    scales: tuple[float, ...]
    decode: float
    total: float
    base_bytes: int
    cache_bytes: int
    drawing_bytes: int
    peak_bytes: int


def now(device: torch.device) -> float:
    """Seconds on a clock, after the device has done what it was given.

    One CPU thread is timed by its own clock, which stands still while the machine does something else.
    """
    wait_for(device)
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def measure(pipeline: NextScalePipeline, prompts: Prompts, plan: Plan, *, repeats: int = 3) -> Run:
    """The fastest of some calls, part by part; other work on the machine only ever adds time.

    Args:
        prompts: one a picture of the batch.
    """
    runs = [measure_once(pipeline, prompts, plan) for _ in range(repeats)]
    return Run(
        scales=tuple(map(min, zip(*(run.scales for run in runs)))),
        decode=min(run.decode for run in runs),
        total=min(run.total for run in runs),
        base_bytes=runs[0].base_bytes,
        cache_bytes=runs[0].cache_bytes,
        drawing_bytes=max(run.drawing_bytes for run in runs),
        peak_bytes=max(run.peak_bytes for run in runs),
    )


def measure_once(pipeline: NextScalePipeline, prompts: Prompts, plan: Plan) -> Run:
    """One call of the pipeline, seeds 0, 1, ..."""
    device, name = pipeline.transformer.device, "class_labels" if pipeline.by_class else "prompt"
    watch = Stopwatch(device)
    base = reset_peak(device)
    started = now(device)
    output = pipeline(**{name: list(prompts)}, seed=0, plan=plan, hooks=[watch], output_type="latent")
    drawn, drawing = now(device), peak_memory(device)
    reset_peak(device)
    pipeline.decode(output.images, "pt")
    ended = now(device)
    peak = max(drawing, peak_memory(device))
    return Run(tuple(watch.seconds), ended - drawn, ended - started, base, watch.cache_bytes, drawing, peak)


def reset_peak(device: torch.device) -> int:
    """Let `peak_memory` count from now on; returns the bytes in use now, memory that was freed given back first."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    return peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use since `reset_peak`: allocated on CUDA, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text("utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class CostModel:
    """Seconds and bytes of any plan at any batch, fitted to measured runs.

    Attributes:
        rates: seconds per unit of each feature of `Work`.
        decode: seconds of the decoder: per call, per image.
        around: seconds of the rest (prompts, start): per call, per image.
        memory: bytes in use: always, per drawn image beside its cache, per decoded image.
        dtype: of the cache.
        text_tokens: length of the prompts it was fitted with.
    """

    rates: tuple[float, ...]
    decode: tuple[float, float]
    around: tuple[float, float]
    memory: tuple[float, float, float]
    dtype: torch.dtype
    text_tokens: int = 0

    def scale_seconds(self, plan: Plan, batch: int) -> list[float]:
        """Predicted seconds of every scale."""
        works = plan_work(plan, batch, text_tokens=self.text_tokens)
        return [float(np.dot(self.rates, astuple(work))) for work in works]

    def seconds(self, plan: Plan, batch: int) -> float:
        """Predicted seconds from prompts to images."""
        once = sum(self.scale_seconds(plan, batch))
        return once + sum(fixed + each * batch for fixed, each in (self.decode, self.around))

    def cache_bytes(self, plan: Plan, batch: int) -> int:
        """Peak bytes of the key/value caches; exact."""
        return cache_peak(plan, batch, self.dtype)

    def peak_bytes(self, cache_bytes: int, batch: int) -> int:
        """Predicted peak memory in use, with so large caches: while drawing or while decoding."""
        always, drawn, decoded = self.memory
        return round(always + max(cache_bytes + drawn * batch, decoded * batch))


def fit(
    pipeline: NextScalePipeline, prompts: Prompts, plans: Sequence[Plan], batches: Sequence[int], *, repeats: int = 3
) -> tuple[CostModel, list[tuple[Plan, int, Run]]]:
    """A cost model of a pipeline from short runs of some plans at some batch sizes; and the runs.

    Args:
        prompts: at least as many as the largest batch.
    """
    pipeline.set_progress_bar_config(disable=True)
    measure(pipeline, prompts[: batches[0]], plans[0], repeats=1)  # caches, kernels and memory settle
    runs = [
        (plan, batch, measure(pipeline, prompts[:batch], plan, repeats=repeats)) for plan in plans for batch in batches
    ]
    tokens = text_tokens(pipeline, prompts)
    features, seconds = [], []
    for plan, batch, run in runs:
        for work, measured in zip(plan_work(plan, batch, text_tokens=tokens), run.scales):
            features.append(astuple(work))
            seconds.append(measured)
    dtype = pipeline.transformer.dtype
    model = CostModel(
        rates=tuple(nonnegative_fit(np.array(features), np.array(seconds))),
        decode=line_fit([(batch, run.decode) for _, batch, run in runs]),
        around=line_fit([(batch, run.total - run.decode - sum(run.scales)) for _, batch, run in runs]),
        memory=memory_fit([(batch, run.drawing_bytes - run.cache_bytes, run.peak_bytes) for _, batch, run in runs]),
        dtype=dtype,
        text_tokens=tokens,
    )
    return model, runs


def text_tokens(pipeline: NextScalePipeline, prompts: Prompts) -> int:
    """Tokens of the prompts as a batch; 0 of classes."""
    return 0 if pipeline.by_class else pipeline.encode_prompt(list(prompts)).mask_BT.shape[1]


def nonnegative_fit(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Non-negative rates that explain the seconds with the least relative error."""
    from scipy.optimize import nnls

    size = np.maximum(features.max(axis=0), 1e-30)
    weighted = features / size / seconds[:, None]
    rates, _ = nnls(weighted, np.ones(len(seconds)))
    return rates / size


def line_fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(fixed, each) of y = fixed + each x, neither below 0, with the least relative error."""
    x, y = (np.array(column, dtype=float) for column in zip(*points))
    fixed, each = nonnegative_fit(np.stack([np.ones_like(x), x], axis=1), np.maximum(y, 1e-9))
    return float(fixed), float(each)


def memory_fit(points: Sequence[tuple[int, int, int]]) -> tuple[float, float, float]:
    """(always, per drawn image, per decoded image) bytes from (batch, drawing without cache, peak)."""
    always, drawn = line_fit([(batch, drawing) for batch, drawing, _ in points])
    largest = max(batch for batch, _, _ in points)
    decoded = max((peak - always) / batch for batch, _, peak in points if batch == largest)
    return always, drawn, decoded
