"""The points of `benchmarks.growth`: one draw by a random model, and processes that draw at the same time."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.synchronize import Barrier
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.timing import Job, Worker
from sample.costs import cache_peak, plan_work
from sample.fast import accelerate_transformer, supported
from sample.generate import generate
from sample.graphs import GraphedSampler
from sample.measure import now
from sample.plan import Plan
from sample.plan_text import PlanConfig
from tokenizer.precision import cast
from tokenizer.quantizer import MultiScaleQuantizer
from var.conditioning import ClassPrompt
from var.transformer import NextScaleTransformer

SIDES = {"64": "1,2,3,4", "128": "1,2,3,4,6,8", "256": "var256", "512": "var512", "1024": "var1024"}
IMAGES = 12  # that each process draws


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is drawn, and by which model."""

    side: str
    batch: int
    depth: int
    width: int
    cache: str = "100%"
    device: str = "cpu"
    plain: bool = False  # not on the fast path


def plan_of(model: NextScaleTransformer, cache: str) -> Plan:
    """The guided plan of a model; for ScaleKV, every layer looks around more widely than the next one."""
    selectivity = [[float(layer)] * len(model.schedule) for layer in range(len(model.blocks))]
    model.register_to_config(selectivity=selectivity)
    return PlanConfig(cache=cache).build(model)


def drawing(shape: Shape) -> tuple[Plan, Callable[[], Any]]:
    """The plan of a random model and a call that draws by it; on a GPU bfloat16 on the fast path, replayed as a graph.

    Caches that evict decide as they go and are not recorded.
    """
    torch.manual_seed(0)
    sizes = {"depth": shape.depth, "width": shape.width, "heads": max(1, shape.width // 64)}
    with torch.device(shape.device):
        model = NextScaleTransformer(**sizes, schedule=SIDES[shape.side]).eval()
        quantizer = MultiScaleQuantizer(vocab_size=4096, channels=32, num_scales=len(model.schedule))
        prompt = ClassPrompt(torch.arange(shape.batch))
    on_cpu, seeds = model.device.type == "cpu", list(range(shape.batch))
    cast(model, torch.float32 if on_cpu else torch.bfloat16)
    plan = plan_of(model, shape.cache)
    fast = not on_cpu and not shape.plain
    if fast:
        accelerate_transformer(model, supported(model.device, model.dtype))
    if not fast or shape.cache != "100%":
        return plan, lambda: generate(plan, quantizer, prompt, seeds)
    sampler = GraphedSampler(SimpleNamespace(quantizer=quantizer))
    for _ in range(2):  # plainly, then recorded
        sampler.generate(plan, prompt, seeds)
    return plan, lambda: sampler.generate(plan, prompt, seeds)


def timed(shape: Shape, repeats: int, *, parts: bool = False) -> dict[str, Any]:
    """One point: seconds (the fastest of some runs), operations and the cache's peak.

    Args:
        parts: also the seconds inside attention and inside linear layers, of one more run, and all of that run's.
    """
    plan, draw = drawing(shape)
    model, seconds = plan.stages[0].model, []
    for _ in range(repeats + (model.device.type == "cuda")):  # there, one for kernels to be chosen
        began = now(model.device)
        draw()
        seconds.append(now(model.device) - began)
    inside = seconds_inside(shape) if parts else {}
    return {"tokens": model.schedule.total, "seconds": min(seconds), **operations(plan, shape.batch), **inside}


def operations(plan: Plan, batch: int) -> dict[str, float]:
    """Floating-point operations and the cache's peak, from shapes."""
    works, model = plan_work(plan, batch), plan.stages[0].model
    linear, attention = (sum(getattr(work, name) for work in works) / 1e9 for name in ("linear", "attention"))
    peak = cache_peak(plan, batch, model.dtype) / 2**20
    gflop = {"gflop": linear + attention, "linear_gflop": linear, "attention_gflop": attention}
    return gflop | {"peak_cache_mib": peak}


def seconds_inside(shape: Shape) -> dict[str, float]:
    """Seconds of a draw by the plain path, every call waited for: all, inside attention and inside linear layers."""
    plan, draw = drawing(replace(shape, plain=True))
    model = plan.stages[0].model
    inside = {"linear_s": 0.0, "attention_s": 0.0}

    def watched(function: Callable, name: str) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = now(model.device)
            made = function(*args, **kwargs)
            inside[name] += now(model.device) - began
            return made

        return run

    for block in model.blocks:
        block.attn.attend = watched(block.attn.attend, "attention_s")
    for linear in (part for part in model.modules() if isinstance(part, nn.Linear)):
        linear.forward = watched(linear.forward, "linear_s")
    if model.device.type == "cuda":  # there, kernels are chosen first
        draw()
    inside |= dict.fromkeys(inside, 0.0)
    began = now(model.device)
    draw()
    return inside | {"watched_s": now(model.device) - began}


def drawing_jobs(shape: Shape, barrier: Barrier) -> dict[str, Job]:
    """Job "draw" (images): that many single images, begun when all processes are ready."""
    _, draw = drawing(shape)

    def run(images: int) -> dict[str, float]:
        draw()
        barrier.wait()
        began = time.perf_counter()
        for _ in range(images):
            draw()
        return {"began": began, "ended": time.perf_counter()}

    return {"draw": run}


def together(shape: Shape, processes: int, repeats: int) -> dict[str, float]:
    """The point of some processes with one thread each: seconds on the wall clock until the last one is done."""
    jobs = partial(drawing_jobs, shape, multiprocessing.get_context("spawn").Barrier(processes, timeout=600))
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(processes))  # first: it ends when no worker has its threads wait
        workers = [stack.enter_context(Worker(jobs, threads=1)) for _ in range(processes)]
        for worker in workers:
            worker.built()
        seconds = []
        for _ in range(repeats):
            runs = list(pool.map(lambda worker: worker.call("draw", IMAGES), workers))
            seconds.append(max(run["ended"] for run in runs) - min(run["began"] for run in runs))
    return {"wall_s": min(seconds), "images_per_s": processes * shape.batch * IMAGES / min(seconds)}
