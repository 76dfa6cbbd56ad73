"""Sampling beside the official code: `python -m benchmarks.sampling --reference VAR --out results/speed_cpu.json`.

Same random weights, same processors, in turns, on idle machines only (see `benchmarks.timing`). Tokens are compared
first: greedy ones, and ones drawn with the same uniforms.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.tables import measured
from benchmarks.timing import (
    Job,
    Stages,
    Timed,
    Worker,
    begin_timing,
    ceilings,
    end_timing,
    interleave,
    matmul_ceilings,
    median_stages,
    possible,
    ratios,
    spread,
    summary,
    undisturbed,
)
from evaluation.command import Parser, add_out
from sample.commands.plan_options import whole_numbers

OURS = {  # variant -> (dtype, fast)
    "plain_float32": ("float32", "off"),
    "fast_float32": ("float32", "on"),
    "fast_bfloat16": ("bfloat16", "on"),
}
THEIRS = {"official_float32": False, "official_autocast": True}  # variant -> autocast
SETTINGS = {"cfg": 1.5, "top_k": 900, "top_p": 0.96}
COLUMNS = ("variant", "batch", "seconds", "images_per_s", "times_official_float32", "times_official_autocast")
COLUMNS += ("times_plain_float32", "share_of_ceiling", "condition_s", "blocks_s", "head_s", "draw_s", "quantiser_s")
COLUMNS += (
    "decoder_s",
    "rest_s",
    "peak_rss_mib",
    "foreign_share",
    "rounds",
    "disturbed",
    "greedy_tokens_equal",
    "greedy_image_error",
)
COLUMNS += ("drawn_tokens_equal", "drawn_image_error", "forced_tokens_equal")


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m benchmarks.sampling", description=__doc__.split("\n")[0])
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a checkout of FoundationVision/VAR")
    parser.add_argument("--size", default="d16", help="published size, random weights (d16)")
    parser.add_argument("--schedule", default="var256", help="scales (var256)")
    parser.add_argument("--width", type=int, default=160, help="of the tokenizer's finest level (160)")
    parser.add_argument("--batches", default="1,4", help="images at once (1,4)")
    parser.add_argument("--rounds", default="5,3", help="timed runs of each variant, by batch (5,3)")
    parser.add_argument("--threads", type=int, default=2, help="of each process (2)")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for idle processors (60)")
    parser.add_argument("--work", type=Path, default=Path("cache/speed"), help="where the weights are kept")
    add_out(parser, "results/speed_cpu.json", "result, table and picture")
    return parser


def our_jobs(folder: Path, dtype: str, fast: str) -> dict[str, Job]:
    """Jobs "run" (labels, settings), "tokens" (labels, settings, greedy) and "ceilings" () of our pipeline."""
    from sample import draw, generate
    from sample import fast as fast_path
    from sample.load import load_pipeline

    pipeline = load_pipeline(folder, dtype=dtype, device="cpu", fast=fast)
    if fast == "on":
        fast_path.keep_freed_memory()
    pipeline.set_progress_bar_config(disable=True)
    model, quantizer, stages = pipeline.transformer, pipeline.vqvae.quantizer, Stages()
    for owner, name, stage in (
        (model, "condition", "condition"),
        (model, "forward", "blocks"),
        (model.head, "features", "head"),
        (model.head, "project", "head"),
        (draw.Filter, "__call__", "draw"),
        (generate, "draw", "draw"),
        (quantizer, "lookup", "quantiser"),
        (quantizer, "accumulate", "quantiser"),
        (quantizer, "next_input", "quantiser"),
        (pipeline.vqvae, "decode", "decoder"),
    ):
        stages.wrap(owner, name, stage)

    def call(labels: list[int], settings: Mapping[str, float], greedy: bool = False, hooks: Sequence = ()) -> Any:
        chosen = {"top_k": 1} if greedy else {"top_k": settings["top_k"], "top_p": settings["top_p"]}
        chosen |= {"guidance_scale": settings["cfg"], "output_type": "pt", "hooks": hooks}
        return pipeline(class_labels=labels, seed=0, **chosen)

    def run(labels: list[int], settings: Mapping[str, float]) -> dict[str, Any]:
        call(labels, settings)
        return {"stages": stages.take()}

    def tokens(labels: list[int], settings: Mapping[str, float], greedy: bool) -> dict[str, Any]:
        made = call(labels, settings, greedy)
        return {
            "tokens": np.concatenate([scale.numpy() for scale in made.tokens], axis=1),
            "images": made.images.numpy(),
        }

    def forced(labels: list[int], settings: Mapping[str, float], given: np.ndarray) -> dict[str, Any]:
        hook = forcing_hook(torch.from_numpy(given))
        call(labels, settings, hooks=[hook])
        return {"tokens": torch.cat(hook.drawn, dim=1).numpy()}

    return {"run": run, "tokens": tokens, "forced": forced, "ceilings": matmul_ceilings}


def forcing_hook(given_BL: torch.Tensor) -> Any:
    """A hook that goes on with given tokens and keeps what would have been drawn, in `drawn`."""
    from sample.state import Hook

    class Forced(Hook):
        def __init__(self):
            self.drawn: list[torch.Tensor] = []

        def on_tokens(self, state: Any, k: int, logits_BlV: torch.Tensor, tokens_Bl: torch.Tensor) -> torch.Tensor:
            schedule = state.plan.schedule
            self.drawn.append(tokens_Bl)
            return given_BL[:, schedule.begins[k] : schedule.ends[k]]

    return Forced()


def agreement(ours: Mapping[str, Any], theirs: Mapping[str, Any], kind: str) -> dict[str, float]:
    """Share of equal tokens and the largest difference of a pixel in [0, 1], for one kind of draw."""
    return {
        f"{kind}_tokens_equal": float((ours["tokens"] == theirs["tokens"]).mean()),
        f"{kind}_image_error": float(np.abs(ours["images"] - theirs["images"]).max()),
    }


def compare_tokens(workers: Mapping[str, Worker], batch: int, base: str) -> dict[str, dict[str, float]]:
    """Every variant of ours against `base`: greedy, drawn with the same uniforms, and drawn after the same tokens."""
    labels, found = labels_of(batch), {name: {} for name in workers if name in OURS}
    for kind, greedy in (("greedy", True), ("drawn", False)):
        expected = workers[base].call("tokens", labels, SETTINGS, greedy)
        for name in found:
            found[name] |= agreement(workers[name].call("tokens", labels, SETTINGS, greedy), expected, kind)
    for name in found:  # a tie of floats changes one token here, not all tokens after it
        drawn = workers[name].call("forced", labels, SETTINGS, expected["tokens"])["tokens"]
        found[name]["forced_tokens_equal"] = float((drawn == expected["tokens"]).mean())
    return found


def labels_of(batch: int) -> list[int]:
    """Classes 0, 1, ... of a batch."""
    return [i % 1000 for i in range(batch)]


def rows_of(timed: Timed, batch: int, flops: float, best: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row a variant: seconds, images a second, stages, share of the ceiling, memory, ratios to other variants."""
    rows = []
    for name, runs in timed.items():
        dtype = "float32" if name.endswith("float32") else "bfloat16"
        row = {"variant": name, "batch": batch, "dtype": dtype}
        row |= spread("seconds", [run["seconds"] for run in undisturbed(runs)])
        row["images_per_s"] = batch / row["seconds"]
        row["gflop_per_s"] = batch * flops / row["seconds"] / 1e9
        row["share_of_ceiling"] = row["gflop_per_s"] / best[dtype]
        for base in (*THEIRS, "plain_float32"):
            if base in timed and base != name:
                row |= ratios(f"times_{base}", timed[base], runs)
        row |= median_stages(undisturbed(runs))
        rows.append(row | summary(runs))
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build, compare tokens, time; the result as `report.result` makes it."""
    from contextlib import ExitStack

    from benchmarks.models import check_size, image_flops, kept_models
    from benchmarks.reference import check_checkout, sampling_jobs
    from evaluation.report import command_of, result
    from sample.load import load_pipeline

    size = check_size(options.size)
    checkout = check_checkout(options.reference) if options.reference is not None else None
    batches, rounds = whole_numbers("--batches", options.batches), whole_numbers("--rounds", options.rounds)
    if len(batches) != len(rounds):
        raise ValueError(f"--rounds must be one number a batch, got {options.rounds!r} for {options.batches!r}")
    folder = options.work / f"{size}-{options.schedule}-{options.width}"
    ours, official = kept_models(folder, size, options.schedule, width=options.width)
    shapes = load_pipeline(ours, dtype="float32", device="cpu")
    flops, configs = image_flops(shapes), (dict(shapes.transformer.config), dict(shapes.vqvae.config))
    del shapes
    variants, left_out = possible(THEIRS | OURS)
    makes = {name: partial(our_jobs, ours, *how) for name, how in variants.items() if name in OURS}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(make, options.threads)) for name, make in makes.items()}
        runs = {name: (worker, "run", ()) for name, worker in workers.items()}
        base = "plain_float32"
        if checkout is not None:
            theirs = Worker(partial(sampling_jobs, checkout, official, *configs), options.threads)
            workers["official"] = stack.enter_context(theirs)
            official_runs = {name: how for name, how in variants.items() if name in THEIRS}
            runs = {name: (workers["official"], "run", (how,)) for name, how in official_runs.items()} | runs
            base = "official"
        for worker in workers.values():
            worker.built()
        tokens = compare_tokens(workers, batches[0], base)
        begin_timing(workers.values())
        best = ceilings(workers["fast_float32"], options.patience)
        timed: dict[int, Timed] = {}
        for batch, count in zip(batches, rounds):
            prepared = {name: (w, job, (labels_of(batch), SETTINGS, *more)) for name, (w, job, more) in runs.items()}
            for worker, job, given in prepared.values():  # kernels and memory settle
                worker.call(job, *given)
            timed[batch] = interleave(prepared, count, patience=options.patience)
        best = ceilings(workers["fast_float32"], options.patience, best)
        end_timing()
    rows = [row for batch, runs in timed.items() for row in rows_of(runs, batch, sum(flops.values()), best)]
    for row in rows:
        row |= tokens.get(row["variant"], {}) if row["batch"] == batches[0] else {}
    settings = {"size": size, "schedule": options.schedule, "width": options.width, "threads": options.threads}
    settings |= {"compared_with": base, "sampling": SETTINGS, "ceiling_gflop_per_s": best, "left_out": left_out}
    settings |= {f"{part}_gflop_per_image": count / 1e9 for part, count in flops.items()}
    command = command_of(parser_of(), options)
    return result(rows, command=command, n=median(rounds), seeds=0, settings=settings)


def picture(content: dict, path: Path) -> None:
    """Time an image, by stage."""
    from benchmarks.speed_picture import draw_sampling

    of, machine = content["settings"], content["hardware"]
    draw_sampling(content["rows"], path, f"{of['size']}, {of['schedule']}: {machine['cpu']}, {of['threads']} threads")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result, its table and its picture."""
    parser = parser_of()
    return measured(parser, parser.parse_args(argv), measure, COLUMNS, picture)


if __name__ == "__main__":
    sys.exit(main())
