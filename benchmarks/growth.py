"""How cost grows with side, batch and depth: `python -m benchmarks.growth`.

Seconds of the transformer (no decoder) by one thread's own clock, floating-point operations from shapes, and the
exponents fitted to both: cost ~ side ** exponent, and so on. Theory: linear layers grow with the side's square,
attention with its fourth power, both with batch and depth.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.tables import write_lines
from evaluation.report import command_line, result, write_result
from sample.costs import cache_peak, plan_work
from sample.generate import generate
from sample.plan_text import PlanConfig
from tokenizer.quantizer import MultiScaleQuantizer
from var.conditioning import ClassPrompt
from var.transformer import NextScaleTransformer

SIDES = {"64": "1,2,3,4", "128": "1,2,3,4,6,8", "256": "var256", "512": "var512", "1024": "var1024"}
WIDTH, DEPTH, SIDE = 256, 4, "256"
CACHES = {"all": None, "window 20%": "window:20%"}
COLUMNS = ("curve", "cache", "x", "tokens", "seconds", "gflop", "linear_gflop", "attention_gflop", "peak_cache_mib")


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.split("\n")[0])
    parser.add_argument("--sides", default="64,128,256,512", help=f"of {','.join(SIDES)} (64,128,256,512)")
    parser.add_argument("--batches", default="1,2,4,8", help="images at once (1,2,4,8)")
    parser.add_argument("--depths", default="2,4,8,16", help="layers (2,4,8,16)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each, the fastest counts (2)")
    parser.add_argument("--out", type=Path, default=Path("results/growth_cpu.json"), help="result, table and picture")
    return parser


def timed(side: str, batch: int, depth: int, cache: str | None, repeats: int) -> dict[str, Any]:
    """One point: seconds, operations and the cache's peak."""
    torch.manual_seed(0)
    model = NextScaleTransformer(depth=depth, width=WIDTH, heads=WIDTH // 64, schedule=SIDES[side]).eval()
    quantizer = MultiScaleQuantizer(vocab_size=4096, channels=32, num_scales=len(model.schedule))
    plan = PlanConfig(**({} if cache is None else {"cache": cache})).build(model)
    prompt, seeds, best = ClassPrompt(torch.arange(batch)), list(range(batch)), float("inf")
    for _ in range(repeats):
        began = time.process_time()
        generate(plan, quantizer, prompt, seeds)
        best = min(best, time.process_time() - began)
    works = plan_work(plan, batch)
    linear, attention = (sum(getattr(work, name) for work in works) / 1e9 for name in ("linear", "attention"))
    return {
        "tokens": model.schedule.total,
        "seconds": best,
        "gflop": linear + attention,
        "linear_gflop": linear,
        "attention_gflop": attention,
        "peak_cache_mib": cache_peak(plan, batch, torch.float32) / 2**20,
    }


def exponents(points: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Exponents of every figure over x, by least squares on logarithms of the points."""
    x = [log(point["x"]) for point in points]
    names = ("seconds", "gflop", "linear_gflop", "attention_gflop", "peak_cache_mib")
    return {f"{name}_exponent": float(np.polyfit(x, [log(point[name]) for point in points], 1)[0]) for name in names}


def crossover(points: Sequence[dict[str, Any]]) -> float:
    """The side at which attention costs as much as the linear layers, from the two fitted lines."""
    x = [log(point["x"]) for point in points]
    lines = [np.polyfit(x, [log(p[name]) for p in points], 1) for name in ("linear_gflop", "attention_gflop")]
    (slope, start), (steep, low) = lines
    return float(np.exp((start - low) / (steep - slope)))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All points, then a row a curve with its exponents."""
    from benchmarks.sampling import whole_numbers

    sides = options.sides.split(",")
    if not set(sides) <= set(SIDES) or len(sides) < 2:
        raise ValueError(f"--sides must be two or more of {', '.join(SIDES)}, got {options.sides!r}")
    batches, depths = whole_numbers("--batches", options.batches), whole_numbers("--depths", options.depths)
    rows, fits = [], []
    for cache, words in CACHES.items():
        for curve, values in (("side", sides), ("batch", batches), ("depth", depths)):
            if curve != "side" and words is not None:
                continue
            points = []
            for value in values:
                where = {"side": SIDE, "batch": 1, "depth": DEPTH} | {curve: value}
                points.append({"curve": curve, "cache": cache, "x": int(value)})
                points[-1] |= timed(where["side"], where["batch"], where["depth"], words, options.repeats)
                print(f"{curve} {value} ({cache}): {points[-1]['seconds']:.3f} s", file=sys.stderr, flush=True)
            rows += points
            fits.append({"curve": curve, "cache": cache, "fit_over": [p["x"] for p in points], **exponents(points)})
            if curve == "side":
                fits[-1]["attention_equals_linear_at_side"] = crossover(points)
    return rows + fits


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result, its table and its picture."""
    from benchmarks.speed_picture import draw_growth

    parser = parser_of()
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        rows = measure(options)
    except ValueError as error:
        parser.error(str(error))
    command = command_line("python -m benchmarks.growth", vars(options), vars(parser_of().parse_args([])))
    settings = {"width": WIDTH, "depth": DEPTH, "side": int(SIDE), "batch": 1, "guided": True, "threads": 1}
    settings["clock"] = "processor time of one thread"
    write_result(options.out, result(rows, command=command, n=options.repeats, seeds=0, settings=settings))
    names = dict.fromkeys(name for row in rows for name in row if "exponent" in name)
    write_lines(options.out.with_suffix(".md"), rows, (*COLUMNS, *names, "attention_equals_linear_at_side"))
    draw_growth(rows, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
