"""The rows of the elastic benchmark: which model with which plan, and what each of them measures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from tqdm import tqdm

from evaluation.features import describe_all
from evaluation.frechet import frechet_distance, frechet_interval, moments
from evaluation.intervals import mean_interval
from evaluation.judge import judge, score
from evaluation.scene_features import load_scene_features, scene_reference
from sample.costs import parameter_bytes, plan_work
from sample.files import write_text
from sample.images import image_stream, make_requests
from sample.measure import measure_once
from sample.pipeline import NextScalePipeline
from sample.plan_text import PlanConfig

SHARES = ("50%", "20%", "10%", "4%")
BASELINES = ("window", "streaming", "snapkv", "pyramidkv")
PRUNES = ("25%", "50%", "75%", "100%", "25%,50%", "50%,75%", "50%,100%")  # of the last scales' tokens
PARTS = {"1/2": 2, "1/4": 4, "1/8": 8}  # of the depth


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        group: what it is compared with: full, subnet, code, cache, prune, guidance or composition.
        label: how it is trained: "plain" models, "supernet", "specialised" or "self"; a cache policy; "FastVAR".
        model, refiner: keys of the models given to the benchmark.
        plan, depth, cache, prune: the plan in words.
        until: scales that are guided; all where there is guidance when None.
    """

    group: str
    label: str
    model: str
    plan: str = "var"
    depth: int | None = None
    cache: str = "100%"
    refiner: str | None = None
    prune: str | None = None
    until: int | None = None

    @property
    def name(self) -> str:
        """The row in a word, for the table."""
        depth = "" if self.depth is None else f" depth {self.depth}"
        cache = "" if self.cache == "100%" else f" {self.cache}"
        prune = "" if self.prune is None else f" prune {self.prune}"
        until = "" if self.until is None else f" guided until {self.until}"
        label = f" ({self.label})" if self.group not in ("cache", "prune", "guidance") else ""
        return f"{self.plan}{depth}{cache}{prune}{until}{label}"

    @property
    def words(self) -> PlanConfig:
        """The plan."""
        return PlanConfig(plan=self.plan, depth=self.depth, cache=self.cache, prune=self.prune)

    @property
    def settings(self) -> dict:
        """What the pipeline is told besides the plan."""
        return {} if self.until is None else {"guidance_until": self.until}


def all_rows(depth: int, scales: int, bridge: int, models: Sequence[str], shares: Sequence[str] = SHARES) -> list[Row]:
    """Every row of the table that the given models allow.

    Args:
        depth, scales: of the full model.
        bridge: scales that subnets leave to all layers.
        models: of full, supernet, refiner, drafter (specialised) and specialised (the refiner).
        shares: of the cache; the smallest is not composed.
    """
    half = max(1, depth // 2)
    rows = [Row("full", "plain", "full"), Row("full", "supernet", "supernet")]
    for part in PARTS.values():
        for label, model in (("plain", "full"), ("supernet", "supernet")):
            rows.append(Row("subnet", label, model, f"supernet:{bridge}", max(1, depth // part)))
    for border in range(1, scales):
        rows.append(Row("code", "plain", "full", f"code:{border}", refiner="refiner"))
        rows.append(Row("code", "specialised", "drafter", f"code:{border}", refiner="specialised"))
        rows.append(Row("code", "self", "supernet", f"self:{border}", half))
    for share in shares:
        rows += [Row("cache", policy, "full", cache=f"{policy}:{share}") for policy in ("scalekv", *BASELINES)]
    rows += [Row("prune", "FastVAR", "full", prune=prune) for prune in PRUNES if prune.count(",") + 1 < scales]
    rows += [Row("guidance", "fewer scales", "full", until=until) for until in range(scales)]
    for share in shares[:-1]:
        cache = f"scalekv:{share}"
        rows.append(Row("composition", "supernet", "supernet", f"supernet:{bridge}", half, cache))
        rows.append(Row("composition", "self", "supernet", f"self:{bridge}", half, cache))
        rows.append(Row("composition", "specialised", "drafter", f"code:{bridge}", cache=cache, refiner="specialised"))
    allowed = (row for row in rows if row.model in models and row.refiner in (None, *models))
    return list(dict.fromkeys(allowed))


def ready(row: Row, pipelines: Mapping[str, NextScalePipeline]) -> NextScalePipeline:
    """The row's pipeline, with its refiner."""
    pipeline = pipelines[row.model]
    pipeline.register_modules(refiner=pipelines[row.refiner].transformer if row.refiner else None)
    return pipeline


def row_quality(
    row: Row,
    pipelines: Mapping[str, NextScalePipeline],
    metadatas: Sequence[dict],
    *,
    seed: int,
    batch_size: int,
    of: Mapping,
    folder: Path,
) -> dict:
    """What a row draws, kept in `folder`: found there it is not drawn again.

    One image a prompt, image i named seed + i in every row (common random numbers).

    Args:
        of: what else decides the figures: digests of the models, dtype, device.
    """
    settings = ["quality", asdict(row), len(metadatas), seed, batch_size, of]
    return once(folder, settings, lambda: quality(ready(row, pipelines), row, metadatas, seed, batch_size))


def row_speed(
    row: Row,
    pipelines: Mapping[str, NextScalePipeline],
    metadatas: Sequence[dict],
    *,
    batch_size: int,
    repeats: int,
    of: Mapping,
    folder: Path,
) -> dict:
    """What a row costs, kept as well: speed and memory of `repeats` calls of the first `batch_size` prompts."""
    prompts = [metadata["prompt"] for metadata in metadatas[:batch_size]]
    settings = ["speed", asdict(row), batch_size, repeats, of]
    return once(folder, settings, lambda: speed(ready(row, pipelines), row, prompts, repeats))


def once(folder: Path, settings: list, figures: Callable[[], dict]) -> dict:
    """What `figures` gives; kept in `folder` under `settings`, and not asked again."""
    kept = folder / f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}.json"
    if not kept.is_file():
        write_text(kept, json.dumps(figures()))
    return json.loads(kept.read_text("utf-8"))


def quality(pipeline: NextScalePipeline, row: Row, metadatas: Sequence[dict], seed: int, batch_size: int) -> dict:
    """Scene score and FD-scenes with intervals, and which images are right."""
    prompts = [metadata["prompt"] for metadata in metadatas]
    requests = make_requests(prompts, seed=seed, metadata=list(metadatas))
    stream = image_stream(pipeline, requests, batch_size=batch_size, plan=row.words, **row.settings)
    images = [image for _, image in tqdm(stream, total=len(requests), desc=row.name, leave=False, disable=None)]
    correct = [judge(image, metadata).correct for image, metadata in zip(images, metadatas)]
    scores = score(correct, metadatas)
    features, reference = describe_all(load_scene_features(), images).features, scene_reference()
    distance = frechet_distance(moments(features), reference)
    return {
        "score": scores["overall"],
        "score_ci95": scores["overall_ci95"],
        "fd_scenes": distance,
        "fd_scenes_ci95": frechet_interval(features, reference, distance, resamples=200, seed=seed),
        "correct": "".join("01"[good] for good in correct),
    }


def speed(pipeline: NextScalePipeline, row: Row, prompts: Sequence[str] | Sequence[int], repeats: int) -> dict:
    """Images a second without and with the decoder, with intervals over calls; GFLOP an image; peak memory, MiB.

    The peak memory is the weights of the plan's models, the decoder and the text encoder, and what a call adds.
    """
    plan = pipeline.make_plan(row.words, **row.settings)
    measure_once(pipeline, prompts, plan)
    runs = [measure_once(pipeline, prompts, plan) for _ in range(repeats)]
    figures: dict = {}
    for name, rates in (
        ("tokens_images_per_s", [len(prompts) / sum(run.scales) for run in runs]),
        ("images_per_s", [len(prompts) / run.total for run in runs]),
    ):
        figures[name] = fmean(rates)
        if repeats > 1:
            figures[f"{name}_ci95"] = mean_interval(np.array(rates))
    figures["gflop"] = sum(work.flops for work in plan_work(plan, len(prompts))) / len(prompts) / 1e9
    figures["peak_cache_mib"] = runs[0].cache_bytes / 2**20
    models = {stage.model for stage in plan.stages}
    weights = parameter_bytes(*models, pipeline.vqvae, pipeline.text_encoder)
    figures["peak_memory_mib"] = (weights + max(run.peak_bytes - run.base_bytes for run in runs)) / 2**20
    return figures


def against_full(rows: Sequence[dict]) -> list[dict]:
    """The rows with what they gain and lose against the first: ratios, and the paired difference of scores.

    The ceiling is the first row's operations over a row's own, those that attend to texts left out.
    """
    full = rows[0]
    base = np.array([int(bit) for bit in full.get("correct", "")])
    compared = []
    for row in rows:
        ratios = {
            "speed": row["tokens_images_per_s"] / full["tokens_images_per_s"],
            "ceiling": full["gflop"] / row["gflop"],
            "cache_of_full": row["peak_cache_mib"] / full["peak_cache_mib"],
        }
        if "correct" in row:
            difference = np.array([int(bit) for bit in row["correct"]]) - base
            ratios["fd"] = row["fd_scenes"] / full["fd_scenes"]
            ratios |= {"correct_minus_full": float(difference.mean())}
            ratios |= {"correct_minus_full_ci95": mean_interval(difference)}
        compared.append({name: value for name, value in row.items() if name != "correct"} | ratios)
    return compared
