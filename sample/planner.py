"""Choosing settings for a machine: candidates, what each costs, which are worth it, which fits."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from sample.costs import plan_work
from sample.plan_text import PlanConfig, read_cache
from var.supernet import is_trained

if TYPE_CHECKING:
    from sample.measure import CostModel
    from sample.pipeline import NextScalePipeline
    from sample.plan import Plan

SHARES = ("100%", "50%", "20%", "10%")
PRUNES = ("50%,75%", "40%,50%,100%,100%")  # FastVAR's of HART and of Infinity
LONG = 13  # scales, as these have: shorter pyramids have fewer tokens to spare
BATCHES = (1, 2, 4, 8, 16, 32)
UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


@dataclass(frozen=True)
class Settings:
    """How images are drawn, as options of `nextscale sample`.

    Attributes:
        words: the plan.
        until: scales that are guided; all that the model guides when None.
        refiner: the model of a hand-over.
        score, least: what was measured of these settings, larger being better, and the lower end of its interval; None
            if nothing was.
    """

    words: PlanConfig
    until: int | None = None
    refiner: str | None = None
    score: float | None = None
    least: float | None = None

    @property
    def options(self) -> str:
        """As they are written on the command line."""
        words = self.words
        given = {"plan": words.plan, "refiner": self.refiner, "depth": words.depth, "cache": words.cache}
        given |= {"prune": words.prune, "guidance-until": self.until}
        return " ".join(f"--{name} {value}" for name, value in given.items() if value is not None)

    def plan(self, pipeline: NextScalePipeline) -> Plan:
        """The plan of a pipeline that is told so."""
        return pipeline.make_plan(self.words, **({} if self.until is None else {"guidance_until": self.until}))


@dataclass(frozen=True)
class Choice:
    """Settings at a batch size, and their figures.

    Attributes:
        batch: images at once.
        work: operations that make the scales, per image, over those of the whole model, each scale's at most as many
            as there.
        seconds, peak_bytes, cache_bytes: predicted, of a whole call and of its caches.
    """

    settings: Settings
    batch: int
    work: float
    seconds: float
    peak_bytes: int
    cache_bytes: int

    @property
    def worth(self) -> float:
        """The measured score; for want of one, the work."""
        return self.work if self.settings.score is None else self.settings.score

    @property
    def images_per_s(self) -> float:
        """Images a second."""
        return self.batch / self.seconds


def candidates(pipeline: NextScalePipeline, depths: Sequence[int] = (), refiner: str | None = None) -> list[Settings]:
    """What is worth looking at, each with every cache share: the whole model, with all its guidance and with less;
    subnets after every bridge, and hand-overs; of long pyramids, the published shares of left-out tokens.

    ScaleKV shares are among them where the model is calibrated.

    Args:
        depths: layers of the subnets; those that the model was trained for when empty.
        refiner: name of the pipeline's refiner, where it is not the model's own.
    """
    model, K = pipeline.transformer, len(pipeline.transformer.schedule)
    subnets, made = model.config.subnets, [Settings(PlanConfig())]
    for border in range(K):
        plan = f"supernet:{border}" if border else "var"
        for depth in depths or (subnets["depths"] if subnets is not None else ()):
            if is_trained(subnets, depth, border) or (depths and border):
                made.append(Settings(PlanConfig(plan=plan, depth=depth)))
        if border and pipeline.refiner is not None:
            made.append(Settings(PlanConfig(plan=f"code:{border}"), refiner=refiner))
    made += [Settings(PlanConfig(), until) for until in range(pipeline.make_plan("var").guided_scales)]
    models = [model] + ([pipeline.refiner] if pipeline.refiner is not None else [])
    shares = SHARES if all(model.config.selectivity is not None for model in models) else SHARES[:1]
    made = [replace(one, words=replace(one.words, cache=share)) for one in made for share in shares]
    return made + [Settings(PlanConfig(prune=prune)) for prune in PRUNES if K >= LONG]


def read_measured(path: Path, model: str, refiner: str | None = None, name: str | None = None) -> list[Settings]:
    """The settings that `benchmarks.elastic` measured of a model, with their scores.

    Args:
        path: its result.
        model, refiner: digests of the models at hand (`sample.load.model_digest`).
        name: of the refiner.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is another file, or of other models.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--quality {path} is not a file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digests = content["settings"]["models"]
        own = [row for row in content["rows"] if digests[row["model"]] == model]
        found = {row["row"]: row for row in own if row["refiner"] is None or digests[row["refiner"]] == refiner}
        made = [_measured(row, name) for row in found.values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"--quality {path} is no result of benchmarks.elastic with scores") from None
    if own and not made:
        raise ValueError(f"--quality {path} has rows of this model with another refiner only: see --refiner")
    if not made:
        known = ", ".join(sorted({f"{row['model']} {digests[row['model']]}" for row in content["rows"]}))
        raise ValueError(f"--quality {path} has rows of other models ({known}), none of {model}")
    return made


def _measured(row: dict, refiner: str | None) -> Settings:
    words = PlanConfig(**{name: row.get(name) for name in ("plan", "depth", "cache", "prune")})
    score, (least, _) = float(row["score"]), row["score_ci95"]
    if not isfinite(score) or not isfinite(least):
        raise ValueError("score is not a number")
    return Settings(words, row.get("until"), None if row["refiner"] is None else refiner, score, least)


def evaluate(
    pipeline: NextScalePipeline, costs: CostModel, made: Sequence[Settings], batches: Sequence[int] = BATCHES
) -> list[Choice]:
    """The predicted figures of all settings at every batch size.

    Raises:
        ValueError: if settings that were measured make no plan of this pipeline.
    """
    whole, choices = _scale_flops(pipeline.make_plan("var"), costs), []
    for settings in made:
        try:
            plan = settings.plan(pipeline)
        except (ValueError, TypeError) as error:
            if settings.score is None:  # a cache share that leaves nothing of so short a history
                continue
            raise ValueError(f"--quality: {settings.options} makes no plan of this model: {error}") from None
        kept = (min(own, most) for own, most in zip(_scale_flops(plan, costs), whole, strict=True))
        work, cache = sum(kept) / sum(whole), costs.cache_bytes(plan, 1)
        for batch in batches:
            figures = (costs.seconds(plan, batch), costs.peak_bytes(batch * cache, batch), batch * cache)
            choices.append(Choice(settings, batch, work, *figures))
    return choices


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
    """The choice that keeps most: work first (within 0.01), then the cache, then images a second.

    Of measured settings, among those whose score is within the interval of the best one: chance alone makes no smaller
    cache or less work look better.
    """
    top = max(choices, key=lambda choice: choice.worth).settings
    tied = choices if top.least is None else [c for c in choices if c.settings.score >= top.least]
    most = max(choice.work for choice in tied)
    kept = [choice for choice in tied if choice.work >= most - 0.01]
    share = max(_share(choice) for choice in kept)
    return max((c for c in kept if _share(c) == share), key=lambda choice: choice.images_per_s)


def pareto(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that no other beats in both images a second and worth, fastest last."""
    front: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (-c.images_per_s, -c.worth, -_share(c))):
        if not front or choice.worth > front[-1].worth:
            front.append(choice)
    return front[::-1]


def _share(choice: Choice) -> float:
    return read_cache(choice.settings.words.cache)[1]


def read_size(text: str) -> float:
    """Bytes of "6GiB" or "500MB".

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
