"""How cost grows with side, batch, depth and processes: `python -m benchmarks.growth`, on a GPU with `--device cuda`.

Seconds of the transformer (no decoder), floating-point operations from shapes, and the exponents fitted to both:
cost ~ side ** exponent, and so on; over all points, and between the two largest, where fixed costs weigh least. Theory:
linear layers and the cache grow with the side's square, attention with its fourth power, all with batch and depth, and
the images a second of independent processes with their number.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.growth_runs import IMAGES, SIDES, Shape, operations, plan_of, timed, together
from benchmarks.models import random_transformer
from benchmarks.tables import lines, write_picture
from evaluation.command import Parser, check_least, in_one_line
from evaluation.report import command_of, result, write_result
from sample.files import write_text
from sample.load import resolve_device

SIDE = "256"  # of the other curves
CACHES = {"all": "100%"} | {f"{name} 20%": f"{name}:20%" for name in ("window", "streaming", "snapkv", "scalekv")}
FIGURES = ("seconds", "gflop", "linear_gflop", "attention_gflop", "peak_cache_mib", "images_per_s")
THEORY = {
    "side": {"linear_gflop": 2, "attention_gflop": 4, "peak_cache_mib": 2},
    "batch": dict.fromkeys(FIGURES[:-1], 1),
    "depth": dict.fromkeys(FIGURES[:-1], 1),
    "processes": {"images_per_s": 1},
}
PUBLISHED, PUBLISHED_CACHES = ("d16", "d30", "d36"), ("all", "window 20%")
POINTS = ("curve", "cache", "x", "tokens", "seconds", "linear_s", "attention_s", "gflop", "linear_gflop")
POINTS += ("attention_gflop", "peak_cache_mib", "wall_s", "images_per_s", "of_ideal")
CROSSINGS = ("model", "curve", "cache", "seconds_at_largest", "attention_share_of_gflop", "attention_share_of_seconds")
CROSSINGS += ("peak_cache_mib_at_largest", "attention_equals_linear_at_side", "in_seconds_at_side")
DEFAULTS = {
    "cpu": {
        "sides": "64,128,256,512,1024",
        "batches": "1,2,4,8",
        "depths": "2,4,8,16",
        "width": 256,
        "depth": 4,
        "batch": 1,
    },
    "cuda": {
        "sides": "256,512,1024",
        "batches": "1,4,16,64",
        "depths": "4,8,16,32",
        "width": 1024,
        "depth": 16,
        "batch": 8,
    },
}


def parser_of() -> argparse.ArgumentParser:
    """The options; those that depend on the device are None until `with_defaults`."""
    parser = Parser(prog="python -m benchmarks.growth", description=__doc__.split("\n")[0])
    cpu, cuda = DEFAULTS.values()
    for name, what in (
        ("sides", f"two or more of {','.join(SIDES)}"),
        ("batches", "images at once"),
        ("depths", "layers"),
        ("width", "of the model"),
        ("depth", "layers of the model, but for that curve"),
        ("batch", "images at once, but for that curve"),
    ):
        kind = int if isinstance(cpu[name], int) else str
        parser.add_argument(f"--{name}", type=kind, help=f"{what} ({cpu[name]}; on a GPU {cuda[name]})")
    parser.add_argument("--processes", help="at the same time, on a CPU (1,2,4,... up to its cores)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, the fastest counts (3)")
    parser.add_argument("--device", default="cpu", help="cpu (one thread), cuda, cuda:1, ... (cpu)")
    parser.add_argument("--out", type=Path, help="result, table, picture (overwrites results/growth_cpu.json or _gpu)")
    return parser


def with_defaults(options: argparse.Namespace) -> argparse.Namespace:
    """The options with those of their device where none were given.

    Raises:
        ValueError: if one makes no sense.
    """
    device = resolve_device(options.device)
    on_cpu = device.type == "cpu"
    cores = os.cpu_count() or 1
    counts = [2**i for i in range(cores.bit_length()) if 2**i < cores] + [cores]
    own = DEFAULTS["cpu" if on_cpu else "cuda"] | {"processes": ",".join(map(str, counts)) if on_cpu else ""}
    own["out"] = Path("results/growth_cpu.json" if on_cpu else "results/growth_gpu.json")
    filled = argparse.Namespace(**own | {name: value for name, value in vars(options).items() if value is not None})
    filled.device = str(device)
    if not set(filled.sides.split(",")) <= set(SIDES) or "," not in filled.sides:
        raise ValueError(f"--sides must be two or more of {', '.join(SIDES)}, got {filled.sides!r}")
    check_least(filled, width=1, depth=1, batch=1, repeats=1)
    return filled


def exponents(points: Sequence[dict[str, Any]], theory: dict[str, float]) -> dict[str, float]:
    """Exponents of every figure over x: by least squares on logarithms, between the last two points, and in theory."""
    found, x = {}, [log(point["x"]) for point in points]
    for name in (name for name in FIGURES if all(name in point for point in points)):
        y = [log(point[name]) for point in points]
        if len(points) > 1:
            found[f"{name}_exponent"] = float(np.polyfit(x, y, 1)[0])
            found[f"{name}_local_exponent"] = (y[-1] - y[-2]) / (x[-1] - x[-2])
        if name in theory:
            found[f"{name}_theory"] = theory[name]
    return found


def crossover(points: Sequence[dict[str, Any]], linear: str, attention: str) -> float | None:
    """The side at which attention costs as much as the linear layers, on a power law between neighbouring points.

    Beyond the points by the law of the last two, up to four times their side; None where that does not reach.
    """
    x, gap = zip(*((log(point["x"]), log(point[attention] / point[linear])) for point in points))
    crossed = [i for i in range(1, len(gap)) if gap[i - 1] < 0 <= gap[i]]
    place = crossed[-1] if crossed else len(gap) - 1
    slope = (gap[place] - gap[place - 1]) / (x[place] - x[place - 1])
    reach = -gap[place] / slope if slope > 0 else float("inf")
    return exp(x[place] + reach) if reach <= log(4) else None


def fit_of(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of a curve: its exponents and, over sides, what attention is of it."""
    curve, last = points[0]["curve"], points[-1]
    row = {"curve": curve, "cache": points[0]["cache"], "fit_over": [point["x"] for point in points]}
    row |= exponents(points, THEORY[curve])
    if curve != "side":
        return row
    row |= {"seconds_at_largest": last["seconds"], "peak_cache_mib_at_largest": last["peak_cache_mib"]}
    row["attention_share_of_gflop"] = last["attention_gflop"] / last["gflop"]
    row["attention_share_of_seconds"] = last["attention_s"] / last["watched_s"]
    row["attention_equals_linear_at_side"] = crossover(points, "linear_gflop", "attention_gflop")
    row["in_seconds_at_side"] = crossover(points, "linear_s", "attention_s")
    return row


def published_crossover(size: str, cache: str) -> dict[str, Any]:
    """The row of a published size, from shapes alone: schedules of 256, 512 and 1024 pixels."""
    points = []
    for side in ("256", "512", "1024"):
        with torch.device("meta"):
            model = random_transformer(size, SIDES[side])
        points.append({"x": int(side), **operations(plan_of(model, CACHES[cache]), 1)})
    crossing = crossover(points, "linear_gflop", "attention_gflop")
    share = points[-1]["attention_gflop"] / points[-1]["gflop"]
    return {
        "model": size,
        "curve": "side",
        "cache": cache,
        "attention_share_of_gflop": share,
        "attention_equals_linear_at_side": crossing,
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Points of side, batch and depth, a row of each curve, published sizes; then processes: points and their row."""
    from sample.commands.plan_options import whole_numbers

    sides = options.sides.split(",")
    batches, depths = whole_numbers("--batches", options.batches), whole_numbers("--depths", options.depths)
    counts = whole_numbers("--processes", options.processes) if options.processes else []
    usual = {
        "side": SIDE,
        "batch": options.batch,
        "depth": options.depth,
        "width": options.width,
        "device": options.device,
    }
    first, *others = CACHES
    curves = [("side", first, sides), ("batch", first, batches), ("depth", first, depths)]
    rows, fits = [], []
    for curve, cache, values in (*curves, *(("side", cache, sides) for cache in others)):
        points = []
        for value in values:
            point = {"curve": curve, "cache": cache, "x": int(value)}
            shape = Shape(**usual | {curve: value, "cache": CACHES[cache]})
            points.append(point | timed(shape, options.repeats, parts=curve == "side"))
            print(f"{curve} {value} ({cache}): {points[-1]['seconds']:.3f} s", file=sys.stderr, flush=True)
        rows += points
        fits.append(fit_of(points))
    fits += [published_crossover(size, cache) for size in PUBLISHED for cache in PUBLISHED_CACHES]
    return rows + fits + process_rows(Shape(**usual), counts, options.repeats)


def process_rows(shape: Shape, counts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Points of the processes and their fit; nothing without counts."""
    points = []
    for count in counts:
        points.append({"curve": "processes", "cache": "all", "x": count, **together(shape, count, repeats)})
        ideal = points[0]["images_per_s"] * count / points[0]["x"]
        points[-1]["of_ideal"] = points[-1]["images_per_s"] / ideal
        print(f"processes {count}: {points[-1]['images_per_s']:.2f} images/s", file=sys.stderr, flush=True)
    return [*points, fit_of(points)] if points else []


def fit_cells(row: dict[str, Any]) -> dict[str, Any]:
    """A curve's row for the table: `1.72, at the end 1.93, theory 2`."""
    cells = {"curve": row["curve"], "cache": row["cache"]}
    for name in (name for name in FIGURES if f"{name}_exponent" in row):
        cells[name] = f"{row[f'{name}_exponent']:.2f}, at the end {row[f'{name}_local_exponent']:.2f}"
        if f"{name}_theory" in row:
            cells[name] += f", theory {row[f'{name}_theory']}"
    return cells


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Three tables: the points, the exponents, and what attention is of the largest side."""
    fits = [fit_cells(row) for row in rows if "fit_over" in row]
    crossings = [row for row in rows if "attention_equals_linear_at_side" in row]
    made = ((row for row in rows if "x" in row), POINTS), (fits, ("curve", "cache", *FIGURES)), (crossings, CROSSINGS)
    return "\n\n".join(lines(list(part), names) for part, names in made) + "\n"


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What else the figures depend on."""
    from benchmarks.gpu import device_name

    settings = {"width": options.width, "depth": options.depth, "side": int(SIDE), "batch": options.batch}
    settings |= {"guided": True, "device": device_name(options.device)}
    if options.device != "cpu":
        return settings | {"dtype": "bfloat16", "clock": "wall clock, synchronised"}
    clock = "processor time of one thread; processes: wall clock"
    return settings | {"dtype": "float32", "clock": clock, "images_of_each_process": IMAGES}


def picture(content: dict, path: Path) -> None:
    """All curves."""
    from benchmarks.speed_picture import draw_growth

    of = content["settings"]
    model = f"transformer of {of['depth']} layers, {of['width']} wide, with guidance"
    where = "one CPU thread" if of["device"] == "cpu" else of["device"]
    draw_growth(content["rows"], path, f"Cost of drawing: {model}; {where}, {of['dtype']}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result, its table and its picture."""
    parser = parser_of()
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    with in_one_line(parser):
        options = with_defaults(given)
        rows = measure(options)
        command = command_of(parser_of(), given)
        content = result(rows, command=command, n=options.repeats, seeds=0, settings=settings_of(options))
        write_result(options.out, content)
        write_text(options.out.with_suffix(".md"), table(rows))
        print(table(rows))
        write_picture(picture, content, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
