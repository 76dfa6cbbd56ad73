"""What attention within each scale is worth (HMAR), beside VAR's: `python -m benchmarks.markov --size d16`.

Two transformers of a published size with random weights, one block-causal (VAR) and one block-diagonal with masked
prediction by as many last layers as HMAR has (8), in turns (A B A B): drawing all tokens of images, once in a pass a
scale and once with HMAR's masked passes, and one step of training forwards and backwards. On a CPU one thread is timed
by its own clock, which stands still while others run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.gpu import device_name
from benchmarks.models import check_size, random_transformer
from benchmarks.tables import measured
from benchmarks.timing import spread
from benchmarks.training import random_batch
from evaluation.command import Parser, check_least
from evaluation.report import command_of, result
from sample.costs import cache_peak, plan_work
from sample.fast import accelerate_transformer, supported
from sample.generate import generate
from sample.load import resolve_device, resolve_dtype
from sample.measure import now
from sample.plan import Plan
from sample.plan_text import PlanConfig
from tokenizer.precision import cast
from tokenizer.quantizer import MultiScaleQuantizer
from train.masked import with_masked
from train.optimizers import OptimizerConfig
from train.session import Clock
from train.var_objective import VarLossConfig, VarObjective
from var.conditioning import ClassPrompt
from var.transformer import NextScaleTransformer

LAYERS = 8  # of HMAR's masked prediction
COLUMNS = ("row", "seconds", "speed", "gflops", "flops_ceiling", "peak_cache_mib")


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m benchmarks.markov", description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="d16", help="published size, random weights (d16)")
    parser.add_argument("--schedule", default="var256", help="scales (var256)")
    parser.add_argument("--batch-size", type=int, default=2, help="images at once (2)")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each (3)")
    parser.add_argument("--dtype", default="float32", help="of drawing: float32, bfloat16 or float16 (float32)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...")
    parser.add_argument("--out", type=Path, help="result and table (results/markov_cpu.json or _gpu)")
    return parser


def pair(options: argparse.Namespace) -> tuple[NextScaleTransformer, NextScaleTransformer]:
    """The same random weights under VAR's mask and under HMAR's, the latter with masked prediction."""
    causal = random_transformer(options.size, options.schedule)
    diagonal = NextScaleTransformer.from_config(causal.config, mask="block_diagonal")
    diagonal.load_state_dict(causal.state_dict())
    return causal, with_masked(diagonal, min(LAYERS, len(causal.blocks) - 1)).eval()


def drawing(plan: Plan, batch: int) -> Callable[[], object]:
    """A job: draw all tokens of a batch."""
    model = plan.stages[0].model
    config, device = model.config, model.device
    quantizer = MultiScaleQuantizer(vocab_size=config.vocab_size, channels=config.latent_channels).to(device)
    prompt = ClassPrompt(torch.arange(batch, device=device) % config.num_classes)
    return lambda: generate(plan, quantizer, prompt, range(batch))


def training(model: NextScaleTransformer, batch: int) -> Callable[[], object]:
    """A job: loss and gradients of a batch, all scales at once."""
    objective = VarObjective(model.train(), VarLossConfig(drop=0.0), OptimizerConfig())
    moved = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in random_batch(model.config, batch).items()
    }

    def step() -> None:
        objective.zero_grad(set_to_none=True)
        objective(moved, Clock(step=0, progress=0.0, seed=0))[0].backward()

    return step


def timed(jobs: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every job, in turns, after one run of each that does not count."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in tqdm(range(rounds + 1), desc="rounds", disable=None):
        for name, job in jobs.items():
            began = now(device)
            job()
            if round_:
                times[name].append(now(device) - began)
    return times


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every row, in turns; the result as `report.result` makes it."""
    check_size(options.size)
    check_least(options, batch_size=1, rounds=1)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = options.batch_size
    trained = [model.to(device) for model in pair(options)]
    models = [model.to(device) for model in pair(options)]
    for model in models:
        cast(model, dtype)
        accelerate_transformer(model, supported(device, dtype))
    causal, diagonal = models
    plans = {
        "VAR": PlanConfig().build(causal),
        "HMAR, one pass a scale": PlanConfig().build(diagonal, mask_schedule="off"),
        "HMAR": PlanConfig().build(diagonal),
    }
    jobs = {name: drawing(plan, batch) for name, plan in plans.items()}
    steps = {f"training step, {name}": training(m, batch) for name, m in zip(("VAR", "HMAR"), trained)}
    times = timed(jobs | steps, options.rounds, device)
    rows = [row_of(name, own, times["VAR" if name in plans else "training step, VAR"]) for name, own in times.items()]
    for row, plan in zip(rows, plans.values()):
        row["gflops"] = sum(work.flops for work in plan_work(plan, batch)) / batch / 1e9
        row |= {"flops_ceiling": rows[0]["gflops"] / row["gflops"]}
        row["peak_cache_mib"] = cache_peak(plan, batch, dtype) / 2**20
    settings = {"device": device_name(device.type), "size": options.size, "batch_size": batch, "dtype": options.dtype}
    settings |= {"threads": torch.get_num_threads(), "masked_layers": diagonal.config.masked_layers}
    return result(rows, command=command_of(parser_of(), options), n=options.rounds, seeds=0, settings=settings)


def row_of(name: str, times: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Seconds of a job, and how many times as fast it is as VAR's, round by round."""
    return {"row": name, **spread("seconds", times), **spread("speed", [b / t for b, t in zip(base, times)])}


def out_of(options: argparse.Namespace) -> Path:
    """Where results of a device go."""
    return Path(f"results/markov_{'cpu' if resolve_device(options.device).type == 'cpu' else 'gpu'}.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result and its table."""
    parser = parser_of()
    return measured(parser, parser.parse_args(argv), measure, COLUMNS, None, out_of)


if __name__ == "__main__":
    sys.exit(main())
