"""Memory of the published sizes: `python -m benchmarks.memory`, measured on a GPU with `--device cuda`.

Computed from shapes (`sample.memory`). On a CPU the rows of a small model are also measured, tensor by tensor
(`benchmarks.live`) and as the memory of a process. On a GPU the published sizes are measured, random weights in
bfloat16: plainly, by the fast path (its graphs keep memory of their own, which shows in what is reserved), and with
weights that wait in CPU memory (`sample.offload`).
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.live import LiveBytes
from benchmarks.models import random_pipeline, random_transformer
from benchmarks.tables import lines, write_lines
from benchmarks.timing import Job, Worker
from evaluation.command import Parser, in_one_line
from evaluation.report import command_of, result, write_result
from sample.fast import accelerate
from sample.graphs import shared_pool
from sample.load import resolve_device
from sample.measure import now, peak_memory, reset_peak
from sample.memory import official_cache_bytes, predict
from sample.offload import OFFLOADS, keep_on_cpu
from sample.pipeline import NextScalePipeline
from sample.plan import Plan
from tokenizer.model import MultiScaleVQ
from var.presets import VAR_SAMPLING

MIB = 2**20
PUBLISHED = [("d16", "var256", 64), ("d30", "var256", 64), ("d36", "var512", 8)]
SMALL = ("d6", "var256", 32)  # size, scales, the tokenizer's width: what is measured
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
VARIANTS = ("plain", "fast", "model", "layers")  # the last two are kinds of offload
MEASURED = [("d30", "var256", 64, ("plain", "fast")), ("d36", "var512", 8, VARIANTS)]
DECODED = (1, 8)  # images at once
ON_GPU = ("model", "variant", "batch", "decode_batch", "official_cache_mib", "peak_cache_mib", "weights_mib")
ON_GPU += (
    "loaded_mib",
    "drawing_mib",
    "allocated_drawing_mib",
    "reserved_drawing_mib",
    "drawing_predicted_of_measured",
)
ON_GPU += ("decoding_mib", "allocated_decoding_mib", "reserved_decoding_mib", "decoding_predicted_of_measured")
ON_GPU += ("kept_allocated_mib", "kept_reserved_mib", "drawing_s")


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m benchmarks.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--batches", default="1,4", help="of the model that is measured on a CPU (1,4)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (cpu)")
    parser.add_argument("--out", type=Path, help="result and table (overwrites results/memory_cpu.json or _gpu)")
    return parser


def row_of(
    plan: Plan,
    vqvae: MultiScaleVQ,
    batch: int,
    dtype: torch.dtype,
    decode_batch: int | None,
    offload: str = "none",
) -> dict[str, Any]:
    """What the formulas say."""
    found = predict(plan, vqvae, batch, dtype, decode_batch=decode_batch, offload=offload)
    model, size = plan.stages[0].model, torch.empty((), dtype=dtype).element_size()
    stored = 2 * batch * len(model.blocks) * plan.schedule.begins[-1] * model.config.width * 2 * size
    official = official_cache_bytes(plan, batch)
    parts = {"stored_cache": stored, "peak_cache": found.cache, "official_cache": official, "weights": found.weights}
    parts |= {"step": found.step, "decoder": found.decoder, "drawing": found.drawing, "peak": found.peak}
    parts["decoding"] = found.decoder_weights + found.decoder
    row: dict[str, Any] = {"batch": batch, "decode_batch": decode_batch or batch}
    row |= {f"{name}_mib": value / MIB for name, value in parts.items()}
    return row | {"stored_of_official": stored / official, "peak_of_official": found.cache / official}


def published(size: str, schedule: str, batch: int, decode_batch: int | None) -> dict[str, Any]:
    """The row of a published size in bfloat16, without its weights."""
    with torch.device("meta"):
        model, vqvae = random_transformer(size, schedule), MultiScaleVQ(schedule=schedule)
    plan = NextScalePipeline(model, vqvae).make_plan(**VAR_SAMPLING)
    return {"model": f"{size} {schedule} bfloat16", **row_of(plan, vqvae, batch, torch.bfloat16, decode_batch)}


def small_jobs() -> dict[str, Job]:
    """Job "draw" (batch): a call of the small model in a process of its own."""
    pipeline = random_pipeline(*SMALL[:2], width=SMALL[2])
    plan = pipeline.make_plan(**VAR_SAMPLING)
    return {"draw": lambda batch: {"made": len(pipeline(class_labels=[0] * batch, seed=0, plan=plan).images)}}


def measured(batch: int) -> dict[str, Any]:
    """The row of the small model in float32: formulas, live tensors, and the growth of a process."""
    pipeline = random_pipeline(*SMALL[:2], width=SMALL[2])
    plan = pipeline.make_plan(**VAR_SAMPLING)
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


def loaded(size: str, schedule: str, width: int, device: torch.device, variant: str) -> NextScalePipeline:
    """A random pipeline in bfloat16, ready to draw on a device in one of the `VARIANTS`."""
    with device:
        pipeline = random_pipeline(size, schedule, width=width).to(torch.bfloat16)
    if variant == "fast":
        return accelerate(pipeline)
    return pipeline if variant == "plain" else keep_on_cpu(pipeline.to("cpu"), variant, device)


def restart(device: torch.device) -> None:
    """Give back what is free, and let peaks count from now on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak(device)


def peaks(device: torch.device, stage: str) -> dict[str, float]:
    """Most memory since `restart`, in tensors and in the allocator's hands."""
    found = {f"allocated_{stage}_mib": peak_memory(device) / MIB}
    if device.type == "cuda":
        found[f"reserved_{stage}_mib"] = torch.cuda.max_memory_reserved(device) / MIB
    return found


def on_device(
    size: str, schedule: str, batch: int, variant: str, device: torch.device, *, width: int = 160
) -> list[dict[str, Any]]:
    """Rows of a published size, by images decoded at once: measured beside the formulas.

    The fast path is called three times: plainly, recording, replaying.
    """
    pipeline = loaded(size, schedule, width, device, variant)
    plan, calls = pipeline.make_plan(**VAR_SAMPLING), 3 if variant == "fast" else 1
    found: dict[str, Any] = {"model": f"{size} {schedule} bfloat16", "variant": variant}
    restart(device)
    found["loaded_mib"] = peak_memory(device) / MIB
    for _ in range(calls):
        began = now(device)
        made = pipeline(class_labels=[0] * batch, seed=0, plan=plan, output_type="latent")
        found["drawing_s"] = now(device) - began
    found |= peaks(device, "drawing")
    rows = []
    for count in DECODED if variant == "plain" else DECODED[-1:]:
        pipeline.vqvae.enable_slicing(count)
        restart(device)
        for _ in range(calls):
            pipeline.decode(made.images, "pt")
        offload = variant if variant in OFFLOADS else "none"
        row = row_of(plan, pipeline.vqvae, batch, torch.bfloat16, count, offload) | found | peaks(device, "decoding")
        for stage in ("drawing", "decoding"):
            row[f"{stage}_predicted_of_measured"] = row[f"{stage}_mib"] / row[f"allocated_{stage}_mib"]
        rows.append(row)
    restart(device)
    return [row | peaks(device, "kept") for row in rows]


def published_on(device: torch.device, write: Callable[[list[dict[str, Any]]], None]) -> None:
    """All rows of a GPU, written again and again as there are more of them: the whole takes minutes."""
    rows = []
    for *which, variants in MEASURED:
        for variant in variants:
            rows += on_device(*which, variant, device)
            shared_pool.cache_clear()  # else what graphs worked in stays
            print(lines(rows[-1:], ON_GPU).splitlines()[-1], file=sys.stderr, flush=True)
            write(rows)


def measure(options: argparse.Namespace) -> None:
    """Compute, measure, write the result and its table; on a GPU after every variant."""
    from benchmarks.gpu import device_name
    from sample.commands.plan_options import whole_numbers

    batches, device = whole_numbers("--batches", options.batches), resolve_device(options.device)
    on_cpu = device.type == "cpu"
    settings = {"sampling": VAR_SAMPLING, "guided": True, "device": device_name(str(device))}
    settings |= {"measured": " ".join(map(str, SMALL))} if on_cpu else {}
    out = options.out or Path(f"results/memory_{'cpu' if on_cpu else 'gpu'}.json")
    command = command_of(parser_of(), options)

    def write(rows: list[dict[str, Any]]) -> None:
        write_result(out, result(rows, command=command, n=1, seeds=0, settings=settings))
        write_lines(out.with_suffix(".md"), rows, COLUMNS if on_cpu else ON_GPU)

    if on_cpu:
        rows = [published(*which, slices) for which in PUBLISHED for slices in (None, 1)]
        write(rows + [measured(batch) for batch in batches])
    else:
        published_on(device, write)


def main(argv: Sequence[str] | None = None) -> int:
    """Compute, measure, write the result and its table."""
    parser = parser_of()
    options = parser.parse_args(argv)
    with in_one_line(parser, kept="what was written is kept"):
        measure(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
