"""Sampling on a GPU beside the official code: `python -m benchmarks.sampling_gpu --reference VAR`.

Random weights, one process, in turns: A B A B. The official code runs as its own demo does, in float16 autocast; ours
in bfloat16: plainly, plainly as CUDA graphs ("graphs"), with joined kernels ("kernels"), and with both ("fast"). A run
is one call from labels to pixels on the GPU, on the wall clock. What the stages take is read from the device's own
clock in further calls of "kernels".
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu import (
    EventStages,
    ceiling,
    current_device,
    device_name,
    figures,
    in_turns,
    official_models,
    settled,
)
from benchmarks.tables import measured
from evaluation.command import Parser, add_out

SETTINGS = {"cfg": 1.5, "top_k": 900, "top_p": 0.96}
COLUMNS = ("size", "schedule", "batch", "variant", "seconds", "images_per_s", "times_official", "times_plain")
COLUMNS += ("share_of_ceiling", "same_tokens", "blocks_s", "head_s", "draw_s", "quantiser_s", "decoder_s")

Run = Callable[[int], Any]


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m benchmarks.sampling_gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a checkout of FoundationVision/VAR")
    parser.add_argument("--size", default="d30", help="published size, random weights (d30)")
    parser.add_argument("--schedule", default="var256", help="scales (var256)")
    parser.add_argument("--width", type=int, default=160, help="of the tokenizer's finest level (160)")
    parser.add_argument("--batches", default="1,64", help="images at once (1,64)")
    parser.add_argument("--rounds", default="9,4", help="timed runs of each variant, by batch (9,4)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of ours (bfloat16)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu only to try the command (cuda)")
    add_out(parser, "results/speed_gpu.json", "result, table and picture")
    return parser


def our_pipelines(size: str, schedule: str, width: int, device: str, dtype: str) -> dict[str, Any]:
    """Our pipeline of equal weights in every way that a device knows."""
    from dataclasses import replace

    from benchmarks.models import random_pipeline
    from sample.fast import FastSettings, accelerate, supported

    place, kind = torch.device(device), getattr(torch, dtype)
    settings = {"plain": None}
    if place.type == "cuda":
        everything = supported(place, kind)
        settings |= {"graphs": FastSettings(fold=True, channels_last=True, graphs=True)}
        settings |= {"kernels": replace(everything, graphs=False), "fast": everything}
    made = {}
    for name, fast in settings.items():
        with place:
            made[name] = random_pipeline(size, schedule, width=width).to(kind)
        if fast is not None:
            accelerate(made[name], fast)
    return made


def run_of(pipeline: Any) -> Run:
    """A call of a pipeline by batch size: its tokens and pixels."""
    chosen = {"top_k": SETTINGS["top_k"], "top_p": SETTINGS["top_p"], "guidance_scale": SETTINGS["cfg"]}

    def run(batch: int) -> Any:
        made = pipeline(class_labels=[i % 1000 for i in range(batch)], seed=0, output_type="latent", **chosen)
        return made.tokens, pipeline.decode(made.images, "pt")

    return run


def stage_seconds(pipeline: Any, batch: int, repeats: int = 3) -> dict[str, float]:
    """Median seconds of each stage of a call on the device's clock; only for a process that benchmarks."""
    from sample import draw, generate
    from sample.state import GenerationState

    model, stages = pipeline.transformer, EventStages()
    parts = [(model, "forward", "blocks"), (model.head, "features", "head"), (model.head, "project", "head")]
    parts += [(draw, "keep_likeliest", "draw"), (generate, "draw", "draw")]
    parts += [(GenerationState, "advance", "quantiser"), (pipeline.vqvae, "decode", "decoder")]
    with contextlib.ExitStack() as marks:
        for part in parts:
            marks.enter_context(stages.around(*part))
        runs = [stages.of(lambda: run_of(pipeline)(batch)) for _ in range(repeats)]
    return {f"{name}_s": median(run[name] for run in runs) for name in runs[0]}


def official_run(checkout: Path, pipeline: Any, device: str) -> Run:
    """The official code's own call, with a pipeline's weights in float32 as it keeps them."""
    _, var = official_models(checkout, pipeline, device)
    kind = torch.device(device).type
    half = torch.float16 if kind == "cuda" else torch.bfloat16

    def run(batch: int) -> Any:
        labels = torch.arange(batch, device=device) % 1000
        with torch.inference_mode(), torch.autocast(kind, dtype=half, cache_enabled=True):
            return var.autoregressive_infer_cfg(B=batch, label_B=labels, g_seed=0, more_smooth=False, **SETTINGS)

    return run


def rows_of(
    options: argparse.Namespace, runs: dict[str, Run], batch: int, rounds: int, flops: float, best: float
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row a variant: the median and range of its rounds, and ratios round by round; and what stopped the others."""
    calls, _, failed = settled({name: partial(run, batch) for name, run in runs.items()})
    found, stopped = in_turns(calls, rounds, options.device)
    rows = []
    for name in found:
        row = {"size": options.size, "schedule": options.schedule}
        row |= figures(found, name, batch, bases=("official", "plain"))
        row["share_of_ceiling"] = batch * flops / row["seconds"] / best
        rows.append(row)
    return rows, {f"{name}, batch {batch}": why for name, why in {**failed, **stopped}.items()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build, compare tokens, time; the result as `report.result` makes it."""
    from benchmarks.models import check_size, image_flops
    from evaluation.report import command_of, result
    from sample.commands.plan_options import whole_numbers

    check_size(options.size)
    current_device(options.device)
    batches, rounds = whole_numbers("--batches", options.batches), whole_numbers("--rounds", options.rounds)
    if len(batches) != len(rounds):
        raise ValueError(f"--rounds must be one number a batch, got {options.rounds!r} for {options.batches!r}")
    shape = (options.size, options.schedule, options.width, options.device)
    pipelines = our_pipelines(*shape, options.dtype)
    flops = sum(image_flops(pipelines["plain"]).values())
    runs = {name: run_of(pipeline) for name, pipeline in pipelines.items()}
    if options.reference is not None:
        runs = {"official": official_run(options.reference, pipelines["plain"], options.device)} | runs
    best, rows, failed = ceiling(options.device), [], {}
    for batch, count in zip(batches, rounds):
        made, stopped = rows_of(options, runs, batch, count, flops, best)
        failed |= stopped
        names = [row["variant"] for row in made]
        plain = torch.cat(runs["plain"](batch)[0], dim=1) if "plain" in names else None
        for row in made:
            if plain is not None and row["variant"] not in ("official", "plain"):
                tokens = torch.cat(runs[row["variant"]](batch)[0], dim=1)
                row["same_tokens"] = float((tokens == plain).float().mean())
            if row["variant"] == "kernels":
                row |= stage_seconds(pipelines["kernels"], batch)
        rows += made
    settings = {"device": device_name(options.device), "ceiling_tflop_per_s": best / 1e12, "sampling": SETTINGS}
    settings |= {"gflop_per_image": flops / 1e9, "dtype": options.dtype, "failed": failed}
    command = command_of(parser_of(), options)
    return result(rows, command=command, n=median(rounds), seeds=0, settings=settings)


def picture(content: dict, path: Path) -> None:
    """Time an image, by stage."""
    from benchmarks.speed_picture import draw_sampling

    row, settings = content["rows"][0], content["settings"]
    draw_sampling(content["rows"], path, f"{row['size']}, {row['schedule']}: {settings['device']}, {settings['dtype']}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result, its table and its picture."""
    parser = parser_of()
    return measured(parser, parser.parse_args(argv), measure, COLUMNS, picture)


if __name__ == "__main__":
    sys.exit(main())
