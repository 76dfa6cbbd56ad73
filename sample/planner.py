"""Choosing a plan for a machine: candidates in words, what each costs, which are worth it, which fits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sample.costs import plan_work
from sample.plan_text import PlanConfig

if TYPE_CHECKING:
    from sample.measure import CostModel
    from sample.pipeline import NextScalePipeline
    from sample.plan import Plan

SHARES = ("100%", "50%", "20%", "10%")
BATCHES = (1, 2, 4, 8, 16, 32)
UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


@dataclass(frozen=True)
class Choice:
    """A plan in words at a batch size, and its figures.

    Attributes:
        words: the plan.
        batch: images at once.
        work: operations that make the scales, per image, over those of the whole model, each scale's at most as many
            as there; what quality costs, for want of a measured one.
        seconds, peak_bytes, cache_bytes: predicted, of a whole call and of its caches.
    """

    words: PlanConfig
    batch: int
    work: float
    seconds: float
    peak_bytes: int
    cache_bytes: int

    @property
    def images_per_s(self) -> float:
        """Images a second."""
        return self.batch / self.seconds


def candidates(pipeline: NextScalePipeline) -> list[PlanConfig]:
    """The plans worth looking at: the whole model, subnets after every bridge, hand-overs; with every cache share.

    ScaleKV shares are among them where the model is calibrated. Subnets are of 3/4, 1/2, 1/4 and 1/8 of the layers.
    """
    depth, K = len(pipeline.transformer.blocks), len(pipeline.transformer.schedule)
    depths = sorted({max(1, round(depth * part)) for part in (0.75, 0.5, 0.25, 0.125)} - {depth}, reverse=True)
    plans = [PlanConfig()]
    for border in range(1, K):
        plans += [PlanConfig(plan=f"supernet:{border}", depth=d) for d in depths]
        if pipeline.refiner is not None:
            plans.append(PlanConfig(plan=f"code:{border}"))
    models = [pipeline.transformer] + ([pipeline.refiner] if pipeline.refiner is not None else [])
    shares = SHARES if all(model.config.selectivity is not None for model in models) else SHARES[:1]
    return [replace(plan, cache=share) for plan in plans for share in shares]


def evaluate(
    pipeline: NextScalePipeline, costs: CostModel, plans: Sequence[PlanConfig], batches: Sequence[int] = BATCHES
) -> list[Choice]:
    """The predicted figures of every plan at every batch size."""
    whole, made = _scale_flops(pipeline.make_plan("var"), costs), []
    for words in plans:
        try:
            plan = pipeline.make_plan(words)
        except ValueError:  # a cache share that leaves nothing of so short a history
            continue
        kept = (min(own, most) for own, most in zip(_scale_flops(plan, costs), whole, strict=True))
        work = sum(kept) / sum(whole)
        for batch in batches:
            figures = (costs.seconds(plan, batch), costs.peak_bytes(plan, batch), costs.cache_bytes(plan, batch))
            made.append(Choice(words, batch, work, *figures))
    return made


def _scale_flops(plan: Plan, costs: CostModel) -> list[float]:
    """What makes each scale; reading earlier ones again, as a refiner does that joins, makes none better."""
    works = plan_work(plan, 1, text_tokens=costs.text_tokens, head=False, prefill=False)
    return [work.flops for work in works]


def fitting(choices: Sequence[Choice], *, memory: float | None, latency: float | None) -> list[Choice]:
    """The choices within the limits, in bytes and seconds; None is no limit.

    Raises:
        ValueError: if there are none, saying which limit is too tight and what the least is.
    """
    in_memory = [choice for choice in choices if memory is None or choice.peak_bytes <= memory]
    if not in_memory:
        least = min(choice.peak_bytes for choice in choices)
        raise ValueError(
            f"--memory {memory / 2**20:g}MiB is too little: every plan takes {least / 2**20:.0f}MiB or more"
        )
    inside = [choice for choice in in_memory if latency is None or choice.seconds <= latency]
    if not inside:
        least = min(choice.seconds for choice in in_memory)
        raise ValueError(f"--latency {latency * 1e3:g}ms is too short: every plan takes {least * 1e3:.0f}ms or more")
    return inside


def best(choices: Sequence[Choice]) -> Choice:
    """The choice that keeps most: work first (within 1 %), then the cache, then images a second."""
    most = max(choice.work for choice in choices)
    kept = [choice for choice in choices if choice.work >= most - 0.01]
    share = max(_share(choice) for choice in kept)
    return max((c for c in kept if _share(c) == share), key=lambda choice: choice.images_per_s)


def pareto(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that no other beats in both images a second and work kept, fastest last."""
    front: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (-c.images_per_s, -c.work, -_share(c))):
        if not front or choice.work > front[-1].work:
            front.append(choice)
    return front[::-1]


def _share(choice: Choice) -> float:
    from sample.plan_text import read_cache

    return read_cache(choice.words.cache)[1]


def read_size(text: str) -> float:
    """Bytes of "6GiB", "500MB" or a bare number.

    Raises:
        ValueError: if it is none of these.
    """
    return _read(text, UNITS, "memory", "6GiB or 500MB")


def read_time(text: str) -> float:
    """Seconds of "80ms" or "1.5s".

    Raises:
        ValueError: if it is none of these.
    """
    return _read(text, TIMES, "latency", "80ms or 1.5s")


def _read(text: str, units: dict[str, float], name: str, example: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].lower() not in units or float(found[1]) <= 0:
        raise ValueError(f"--{name} must be like {example}, got {text!r}")
    return float(found[1]) * units[found[2].lower()]
