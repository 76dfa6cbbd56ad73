"""Sampling on a GPU beside the official code: `python -m benchmarks.sampling_gpu --reference VAR`.

Random weights, one process, in turns: A B A B. The official code runs as its own demo does, in float16 autocast; ours
in bfloat16: plainly, plainly as CUDA graphs ("graphs"), with joined kernels ("kernels"), and with both ("fast"). A run
is one call from labels to pixels on the GPU, on the wall clock. What the stages take is read from the device's own
clock in further calls of "kernels".
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.tables import measured
from benchmarks.timing import spread

SETTINGS = {"cfg": 1.5, "top_k": 900, "top_p": 0.96}
COLUMNS = ("size", "schedule", "batch", "variant", "seconds", "images_per_s", "times_official", "times_plain")
COLUMNS += ("share_of_ceiling", "same_tokens", "blocks_s", "head_s", "draw_s", "quantiser_s", "decoder_s")

Run = Callable[[int], Any]


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling_gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a checkout of FoundationVision/VAR")
    parser.add_argument("--size", default="d30", help="published size, random weights (d30)")
    parser.add_argument("--schedule", default="var256", help="scales (var256)")
    parser.add_argument("--width", type=int, default=160, help="of the tokenizer's finest level (160)")
    parser.add_argument("--batches", default="1,64", help="images at once (1,64)")
    parser.add_argument("--rounds", default="9,4", help="timed runs of each variant, by batch (9,4)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of ours (bfloat16)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu only to try the command (cuda)")
    parser.add_argument("--out", type=Path, default=Path("results/speed_gpu.json"), help="result and table")
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


class EventStages:
    """Seconds of the device between the beginnings and ends of functions, without waiting for it in between."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def around(self, owner: Any, name: str, stage: str) -> Iterator[None]:
        """Mark the calls of attribute `name` of a module, class or object meanwhile."""
        function = getattr(owner, name)

        def marked(*args: Any, **kwargs: Any) -> Any:
            ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            ends[0].record()
            try:
                return function(*args, **kwargs)
            finally:
                ends[1].record()
                self.marks.append((stage, *ends))

        setattr(owner, name, marked)
        try:
            yield
        finally:
            setattr(owner, name, function)

    def of(self, job: Callable[[], Any]) -> dict[str, float]:
        """The stages of one job."""
        self.marks.clear()
        job()
        torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for stage, began, ended in self.marks:
            found[stage] += began.elapsed_time(ended) / 1e3
        return found


def official_run(checkout: Path, size: str, schedule: str, width: int, device: str) -> Run:
    """The official code's own call, weights as it initialises them."""
    from benchmarks.reference import check_checkout
    from tokenizer.schedule import ScaleSchedule
    from var.presets import PRESETS

    sys.path.insert(0, str(check_checkout(checkout).resolve()))
    shape = PRESETS[size]
    with contextlib.redirect_stdout(io.StringIO()), torch.device(device):
        vae, var = importlib.import_module("models").build_vae_var(
            device=device,
            patch_nums=tuple(h for h, _ in ScaleSchedule.of(schedule).sides),
            V=4096,
            Cvae=32,
            ch=width,
            num_classes=1000,
            depth=shape["depth"],
            shared_aln=shape.get("shared_ada", False),
            attn_l2_norm=shape.get("qk_norm", True),
        )
    for p in vae.parameters():  # the official code leaves its memory as it was
        p.data.normal_(std=0.05)
    for model in (vae, var):
        model.eval().requires_grad_(False)
    kind = torch.device(device).type
    half = torch.float16 if kind == "cuda" else torch.bfloat16

    def run(batch: int) -> Any:
        labels = torch.arange(batch, device=device) % 1000
        with torch.inference_mode(), torch.autocast(kind, dtype=half, cache_enabled=True):
            return var.autoregressive_infer_cfg(B=batch, label_B=labels, g_seed=0, more_smooth=False, **SETTINGS)

    return run


def timed(run: Run, batch: int, device: str) -> float:
    """Seconds of one run, until the device has done all of it."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    run(batch)
    wait()
    return time.perf_counter() - began


def ceiling(device: str, size: int = 8192, repeats: int = 10) -> float:
    """The fastest bfloat16 matrix product of this device, in FLOP/s."""
    if torch.device(device).type != "cuda":
        size, repeats = 1024, 3
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    runs = [timed(lambda _: a @ b, 1, device) for _ in range(repeats)]
    return 2 * size**3 / min(runs)


def rows_of(
    options: argparse.Namespace, runs: dict[str, Run], batch: int, rounds: int, flops: float, best: float
) -> list[dict[str, Any]]:
    """A row a variant: the median and range of its rounds, and ratios round by round."""
    for run in runs.values():  # kernels are chosen, graphs recorded
        for _ in range(2):
            run(batch)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(timed(run, batch, options.device))
    rows = []
    for name, seconds in found.items():
        row = {"size": options.size, "schedule": options.schedule, "batch": batch, "variant": name}
        row |= spread("seconds", seconds)
        row |= {"images_per_s": batch / row["seconds"], "share_of_ceiling": batch * flops / row["seconds"] / best}
        for base in ("official", "plain"):
            if base in found and base != name:
                row |= spread(f"times_{base}", [theirs / s for theirs, s in zip(found[base], seconds)])
        rows.append(row)
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build, compare tokens, time; the result as `report.result` makes it."""
    from benchmarks.models import check_size, image_flops
    from benchmarks.sampling import whole_numbers
    from evaluation.report import command_line, result
    from sample.load import resolve_device

    check_size(options.size)
    resolve_device(options.device)
    batches, rounds = whole_numbers("--batches", options.batches), whole_numbers("--rounds", options.rounds)
    if len(batches) != len(rounds):
        raise ValueError(f"--rounds must be one number a batch, got {options.rounds!r} for {options.batches!r}")
    shape = (options.size, options.schedule, options.width, options.device)
    pipelines = our_pipelines(*shape, options.dtype)
    flops = sum(image_flops(pipelines["plain"]).values())
    runs = {name: run_of(pipeline) for name, pipeline in pipelines.items()}
    if options.reference is not None:
        runs = {"official": official_run(options.reference, *shape)} | runs
    best, rows = ceiling(options.device), []
    for batch, count in zip(batches, rounds):
        made = rows_of(options, runs, batch, count, flops, best)
        plain = torch.cat(runs["plain"](batch)[0], dim=1)
        for row in made:
            if row["variant"] not in ("official", "plain"):
                tokens = torch.cat(runs[row["variant"]](batch)[0], dim=1)
                row["same_tokens"] = float((tokens == plain).float().mean())
            if row["variant"] == "kernels":
                row |= stage_seconds(pipelines["kernels"], batch)
        rows += made
    settings = {"device": device_name(options.device), "ceiling_tflop_per_s": best / 1e12, "sampling": SETTINGS}
    settings |= {"gflop_per_image": flops / 1e9, "dtype": options.dtype}
    command = command_line("python -m benchmarks.sampling_gpu", vars(options), vars(parser_of().parse_args([])))
    return result(rows, command=command, n=median(rounds), seeds=0, settings=settings)


def device_name(device: str) -> str:
    """What the device is called."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result and its table."""
    parser = parser_of()
    options = parser.parse_args(argv)
    measured(parser, options, measure, COLUMNS)
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
