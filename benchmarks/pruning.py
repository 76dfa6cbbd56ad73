"""What leaving tokens out gains at a megapixel (FastVAR): `python -m benchmarks.pruning`.

Infinity's 13 scales: operations and cache from shapes, for the published 2B and for the size that is timed; that one
with random weights, whole and pruned in turns (A B A B). The ceiling of a row is the whole model's operations over its
own. On a CPU one thread is timed by its own clock, which stands still while others run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.gpu import device_name
from benchmarks.tables import measured
from benchmarks.timing import spread
from evaluation.command import Parser, add_out, check_least
from evaluation.report import command_of, result
from sample.commands.plan_options import add_place_options
from sample.costs import cache_peak, plan_work
from sample.draw import Filter
from sample.fast import accelerate_transformer, supported
from sample.generate import generate
from sample.guidance import Guidance
from sample.load import resolve_device, resolve_dtype
from sample.measure import now
from sample.plan import Plan
from sample.plan_text import PlanConfig
from tokenizer.aspects import SIZES, aspect_schedule
from tokenizer.bitwise import BinarySphericalQuantizer
from tokenizer.precision import cast
from var.conditioning import TextPrompt
from var.presets import PRESETS
from var.transformer import NextScaleTransformer

PRUNES = ("off", "50%,75%", "100%,100%", "40%,50%,100%,100%")  # the second of FastVAR for HART, the last for Infinity
PUBLISHED = "infinity-2b"
COLUMNS = ("model", "row", "computed", "gflop", "peak_cache_mib", "cache_of_full", "ceiling", "speed", "seconds")
COLUMNS += ("share_of_ceiling",)
TEXT = 20  # tokens of the prompt
GUIDED = {"guidance": Guidance(3.0, ramp="constant"), "filters": Filter(top_k=0)}


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m benchmarks.pruning", description=__doc__.split("\n")[0])
    known = [name for name in PRESETS if name.startswith("infinity")]
    parser.add_argument("--size", default="infinity-125m", choices=known, help="that is timed, random weights (125m)")
    parser.add_argument("--pixels", default="1M", choices=SIZES, help="scales (1M)")
    parser.add_argument("--rounds", type=int, default=3, help="timed images of each row (3)")
    add_place_options(parser)
    add_out(parser, "results/pruning_megapixel.json", "result and table")
    return parser


def plans_of(size: str, pixels: str) -> list[Plan]:
    """One of each row, for a model of random weights made on torch's default device."""
    sizes = {name: value for name, value in PRESETS[size].items() if name != "drop_path"}
    model = NextScaleTransformer(**sizes, schedule=aspect_schedule("1:1", pixels)).eval()
    return [PlanConfig(prune=prune).build(model, **GUIDED) for prune in PRUNES]


def computed(size: str, plans: Sequence[Plan], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Figures from shapes, for one guided image."""
    rows = []
    for prune, plan in zip(PRUNES, plans):
        stage, schedule = plan.stages[0], plan.schedule
        layers, scales = range(len(stage.model.blocks)), [k for k in stage.scales if stage.draws(k)]
        share = sum(stage.computed(layer, k) for layer in layers for k in scales) / (len(layers) * schedule.total)
        gflop = sum(work.flops for work in plan_work(plan, 1, text_tokens=TEXT)) / 1e9
        peak = cache_peak(plan, 1, dtype) / 2**20
        rows.append({"model": size, "row": prune, "computed": share, "gflop": gflop, "peak_cache_mib": peak})
    for row in rows:
        row["ceiling"] = rows[0]["gflop"] / row["gflop"]
        row["cache_of_full"] = row["peak_cache_mib"] / rows[0]["peak_cache_mib"]
    return rows


def drawing(plan: Plan) -> Callable[[], float]:
    """A call that draws one image's tokens, and says in how many seconds."""
    model = plan.stages[0].model
    quantizer = BinarySphericalQuantizer(channels=model.config.latent_channels)
    states = torch.randn(1, TEXT, model.config.text_width, dtype=model.dtype, device=model.device)
    prompt = TextPrompt(states, torch.ones(1, TEXT, dtype=torch.bool, device=model.device))

    def draw() -> float:
        began = now(model.device)
        generate(plan, quantizer, prompt, [0])
        return now(model.device) - began

    return draw


def timed(plans: Sequence[Plan], rounds: int) -> list[list[float]]:
    """Seconds of every plan in every round, after one round that is not counted."""
    draws, times = [drawing(plan) for plan in plans], [[] for _ in plans]
    for number in tqdm(range(rounds + 1), desc="rounds", disable=None):
        for own, draw in zip(times, draws):
            seconds = draw()
            if number:
                own.append(seconds)
    return times


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every row; the result as `report.result` makes it."""
    check_least(options, rounds=1)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    with device:
        plans = plans_of(options.size, options.pixels)
    model = plans[0].stages[0].model
    cast(model, dtype)
    accelerate_transformer(model, supported(device, dtype))
    rows, times = computed(options.size, plans, dtype), timed(plans, options.rounds)
    for row, own in zip(rows, times):
        row |= spread("seconds", own) | spread("speed", [full / mine for full, mine in zip(times[0], own)])
        row["share_of_ceiling"] = row["speed"] / row["ceiling"]
    with torch.device("meta"):
        rows += computed(PUBLISHED, plans_of(PUBLISHED, options.pixels), torch.bfloat16)
    settings = {"device": device_name(device.type), "dtype": str(dtype), "threads": torch.get_num_threads()}
    settings |= {"text_tokens": TEXT, "pixels": options.pixels}
    command = command_of(parser_of(), options)
    return result(rows, command=command, n=options.rounds, seeds=0, settings=settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result and its table."""
    parser = parser_of()
    options = parser.parse_args(argv)
    if options.out.suffix != ".json":
        parser.error(f"--out must be a .json file, got {options.out}")
    return measured(parser, options, measure, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
