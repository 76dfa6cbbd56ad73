"""Memory of the published sizes: `python -m benchmarks.memory`.

Computed from shapes (`sample.memory`); the rows of a small model are also measured, tensor by tensor
(`benchmarks.live`) and as the memory of a process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.live import LiveBytes
from benchmarks.models import random_pipeline, random_transformer
from benchmarks.tables import write_lines
from benchmarks.timing import Job, Worker
from evaluation.report import command_line, result, write_result
from sample.memory import official_cache_bytes, predict
from sample.pipeline import NextScalePipeline
from sample.plan import Plan
from tokenizer.model import MultiScaleVQ

MIB = 2**20
PUBLISHED = [("d16", "var256", 64), ("d30", "var256", 64), ("d36", "var512", 8)]
SMALL = ("d6", "var256", 32)  # size, scales, the tokenizer's width: what is measured
SETTINGS = {"guidance_scale": 1.5, "top_k": 900, "top_p": 0.96}
COLUMNS = ("model", "batch", "decode_batch", "stored_cache_mib", "peak_cache_mib", "official_cache_mib")
COLUMNS += (
    "stored_of_official",
    "peak_of_official",
    "weights_mib",
    "step_mib",
    "decoder_mib",
    "drawing_mib",
    "peak_mib",
)
COLUMNS += ("live_drawing_mib", "live_decoder_mib", "drawing_predicted_of_live", "decoder_predicted_of_live")
COLUMNS += ("process_mib", "process_of_predicted")


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--batches", default="1,4", help="of the model that is measured (1,4)")
    parser.add_argument("--out", type=Path, default=Path("results/memory_cpu.json"), help="result and table")
    return parser


def row_of(plan: Plan, vqvae: MultiScaleVQ, batch: int, dtype: torch.dtype, decode_batch: int | None) -> dict[str, Any]:
    """What the formulas say."""
    found = predict(plan, vqvae, batch, dtype, decode_batch=decode_batch)
    model, size = plan.stages[0].model, torch.empty((), dtype=dtype).element_size()
    stored = 2 * batch * len(model.blocks) * plan.schedule.begins[-1] * model.config.width * 2 * size
    official = official_cache_bytes(plan, batch)
    parts = {"stored_cache": stored, "peak_cache": found.cache, "official_cache": official, "weights": found.weights}
    parts |= {"step": found.step, "decoder": found.decoder, "drawing": found.drawing, "peak": found.peak}
    row: dict[str, Any] = {"batch": batch, "decode_batch": decode_batch or batch}
    row |= {f"{name}_mib": value / MIB for name, value in parts.items()}
    return row | {"stored_of_official": stored / official, "peak_of_official": found.cache / official}


def published(size: str, schedule: str, batch: int, decode_batch: int | None) -> dict[str, Any]:
    """The row of a published size in bfloat16, without its weights."""
    with torch.device("meta"):
        model, vqvae = random_transformer(size, schedule), MultiScaleVQ(schedule=schedule)
    plan = NextScalePipeline(model, vqvae).make_plan(**SETTINGS)
    return {"model": f"{size} {schedule} bfloat16", **row_of(plan, vqvae, batch, torch.bfloat16, decode_batch)}


def small_jobs() -> dict[str, Job]:
    """Job "draw" (batch): a call of the small model in a process of its own."""
    pipeline = random_pipeline(*SMALL[:2], width=SMALL[2])
    plan = pipeline.make_plan(**SETTINGS)
    return {"draw": lambda batch: {"made": len(pipeline(class_labels=[0] * batch, seed=0, plan=plan).images)}}


def measured(batch: int) -> dict[str, Any]:
    """The row of the small model in float32: formulas, live tensors, and the growth of a process."""
    pipeline = random_pipeline(*SMALL[:2], width=SMALL[2])
    plan = pipeline.make_plan(**SETTINGS)
    row = {"model": f"{SMALL[0]} {SMALL[1]} float32", **row_of(plan, pipeline.vqvae, batch, torch.float32, None)}
    with LiveBytes() as live, torch.no_grad():
        made = pipeline(class_labels=[0] * batch, seed=0, plan=plan, output_type="latent")
        row["live_drawing_mib"] = live.peak / MIB
        live.restart()
        pipeline.vqvae.decode(made.images)
        row["live_decoder_mib"] = live.peak / MIB
    row["drawing_predicted_of_live"] = (row["drawing_mib"] - row["weights_mib"]) / row["live_drawing_mib"]
    row["decoder_predicted_of_live"] = row["decoder_mib"] / row["live_decoder_mib"]
    with Worker(small_jobs, threads=1) as worker:
        worker.built()
        before = worker.call("draw", 1)  # libraries and the smallest call are in it
        row["process_mib"] = worker.call("draw", batch)["peak_mib"]
    one = predict(plan, pipeline.vqvae, 1, torch.float32).peak / MIB
    if batch > 1:
        row["process_of_predicted"] = (row["process_mib"] - before["peak_mib"]) / (row["peak_mib"] - one)
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Compute, measure, write the result and its table."""
    from benchmarks.sampling import whole_numbers

    parser = parser_of()
    options = parser.parse_args(argv)
    try:
        batches = whole_numbers("--batches", options.batches)
    except ValueError as error:
        parser.error(str(error))
    rows = [published(*which, slices) for which in PUBLISHED for slices in (None, 1)]
    rows += [measured(batch) for batch in batches]
    command = command_line("python -m benchmarks.memory", vars(options), vars(parser_of().parse_args([])))
    settings = {"sampling": SETTINGS, "guided": True, "measured": " ".join(map(str, SMALL))}
    write_result(options.out, result(rows, command=command, n=1, seeds=0, settings=settings))
    write_lines(options.out.with_suffix(".md"), rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
