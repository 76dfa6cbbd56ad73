"""Speed of elastic decoding beside its ceiling: `python -m benchmarks.elastic_speed --size d30 --refiner d16`.

A published size with random weights: the whole model, its subnets after six scales and its hand-overs to a smaller one,
in turns (A B A B), on the fast path. The ceiling of a plan is the whole model's floating-point operations over its own,
so a plan at 90 % of it gains nine tenths of what it could if every operation took the same time. On a CPU one thread is
timed by its own clock, which stands still while others run; on a GPU whole graphs on the wall clock.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.elastic_rows import Row
from benchmarks.gpu import device_name
from benchmarks.models import check_size, random_transformer
from benchmarks.tables import measured
from benchmarks.timing import spread
from evaluation.command import Parser, check_least
from evaluation.report import command_of, result
from sample.commands.plan_options import whole_numbers
from sample.costs import plan_work
from sample.fast import accelerate, supported
from sample.load import resolve_device, resolve_dtype
from sample.measure import measure_once, now
from sample.pipeline import NextScalePipeline
from sample.plan import Plan
from tokenizer.model import MultiScaleVQ
from var.presets import VAR_SAMPLING

COLUMNS = ("row", "tokens_images_per_s", "images_per_s", "speed", "ceiling", "share_of_ceiling", "speed_with_decoder")
COLUMNS += ("peak_cache_mib", "cache_of_full")


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m benchmarks.elastic_speed", description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="d30", help="published size, random weights (d30)")
    parser.add_argument("--refiner", default="d16", help="the smaller one (d16)")
    parser.add_argument("--schedule", default="var256", help="scales (var256)")
    parser.add_argument("--bridge", type=int, default=6, help="scales that subnets leave to all layers (6)")
    parser.add_argument("--depths", default="16,8,2", help="of the subnets (16,8,2)")
    parser.add_argument("--batch-size", type=int, default=1, help="images at once (1)")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each (3)")
    parser.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 or float16 (bfloat16)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...")
    parser.add_argument("--out", type=Path, help="result, table, picture (overwrites results/elastic_d30.json or _gpu)")
    return parser


def build(options: argparse.Namespace) -> NextScalePipeline:
    """The two models and VAR's tokenizer on the fast path."""
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    torch.manual_seed(0)
    with device:
        models = [random_transformer(size, options.schedule) for size in (options.size, options.refiner)]
        vqvae = MultiScaleVQ(schedule=options.schedule).eval()
    pipeline = NextScalePipeline(models[0], vqvae, refiner=models[1], sampling=VAR_SAMPLING).to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return accelerate(pipeline, supported(device, dtype))


def all_rows(options: argparse.Namespace, scales: int) -> list[Row]:
    """The whole model, then every subnet and hand-over."""
    rows = [Row("full", options.size, "full")]
    for depth in whole_numbers("--depths", options.depths):
        rows.append(Row("subnet", f"of {options.size}", "full", f"supernet:{options.bridge}", depth))
    return rows + [Row("code", f"+ {options.refiner}", "full", f"code:{n}") for n in range(options.bridge, scales)]


def seconds_of(pipeline: NextScalePipeline, plan: Plan, batch: int) -> float:
    """Of drawing all tokens of a batch."""
    device = pipeline.transformer.device
    began = now(device)
    pipeline(class_labels=[i % 1000 for i in range(batch)], seed=0, plan=plan, output_type="latent")
    return now(device) - began


def decoder_seconds(pipeline: NextScalePipeline, batch: int, repeats: int = 3) -> float:
    """Of decoding a batch: the median of some calls after two others."""
    device, latent_hw = pipeline.transformer.device, pipeline.vqvae.schedule.latent_hw
    f_hat = torch.randn(batch, pipeline.vqvae.config.latent_channels, *latent_hw, device=device)
    found = []
    for _ in range(2 + repeats):
        began = now(device)
        pipeline.decode(f_hat, "pt")
        found.append(now(device) - began)
    return median(found[2:])


def row_of(
    row: Row, times: Sequence[float], full_times: Sequence[float], ceiling: float, batch: int, decoder: float
) -> dict[str, Any]:
    """What a plan's rounds say beside the whole model's, round by round."""
    found: dict[str, Any] = {"row": row.name, "group": row.group, "label": row.label}
    found |= spread("tokens_images_per_s", [batch / seconds for seconds in times])
    found |= spread("speed", [full / seconds for full, seconds in zip(full_times, times)])
    found |= {"ceiling": ceiling, "share_of_ceiling": found["speed"] / ceiling}
    found["images_per_s"] = batch / (median(times) + decoder)
    found["speed_with_decoder"] = (median(full_times) + decoder) / (median(times) + decoder)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every row, in turns; the result as `report.result` makes it."""
    for size in (options.size, options.refiner):
        check_size(size)
    check_least(options, batch_size=1, rounds=1, bridge=1)
    if resolve_device(options.device).type == "cpu":
        torch.set_num_threads(1)
    pipeline, batch = build(options), options.batch_size
    rows = all_rows(options, len(pipeline.transformer.schedule))
    plans = [pipeline.make_plan(row.words) for row in rows]
    if pipeline.graphed:
        pipeline.graphed.recorder.kept = len(plans)
    caches = [measure_once(pipeline, list(range(batch)), plan).cache_bytes / 2**20 for plan in plans]
    for plan in plans * (2 if pipeline.graphed else 1):  # kernels are chosen, graphs recorded
        seconds_of(pipeline, plan, batch)
    times: list[list[float]] = [[] for _ in rows]
    for _ in tqdm(range(options.rounds), desc="rounds", disable=None):
        for own, plan in zip(times, plans):
            own.append(seconds_of(pipeline, plan, batch))
    flops = [sum(work.flops for work in plan_work(plan, batch)) for plan in plans]
    decoder = decoder_seconds(pipeline, batch)
    made = [row_of(row, own, times[0], flops[0] / f, batch, decoder) for row, own, f in zip(rows, times, flops)]
    for found, cache in zip(made, caches):
        found |= {"peak_cache_mib": cache, "cache_of_full": cache / caches[0]}
    settings = {"device": device_name(pipeline.transformer.device.type), "batch_size": batch, "dtype": options.dtype}
    settings |= {"threads": torch.get_num_threads(), "decoder_s": decoder}
    command = command_of(parser_of(), options)
    return result(made, command=command, n=options.rounds, seeds=0, settings=settings)


def picture(content: dict, path: Path) -> None:
    """Speed against its ceiling and against the cache."""
    from benchmarks.elastic_picture import draw_speed

    draw_speed(content["rows"], path)


def out_of(options: argparse.Namespace) -> Path:
    """Where results of a device go."""
    return Path(f"results/elastic_d30{'' if resolve_device(options.device).type == 'cpu' else '_gpu'}.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result, its table and its picture."""
    parser = parser_of()
    return measured(parser, parser.parse_args(argv), measure, COLUMNS, picture, out_of)


if __name__ == "__main__":
    sys.exit(main())
