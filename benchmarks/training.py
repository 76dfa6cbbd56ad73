"""The training step beside the official one: `python -m benchmarks.training --reference VAR`.

Forward, cross-entropy and backward of one batch, random weights, as each project trains: ours as `train.train_var`
does, the official code as its trainer does. No optimizer step: both use torch's AdamW.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.tables import measured
from benchmarks.timing import (
    Job,
    Timed,
    Worker,
    begin_timing,
    ceilings,
    end_timing,
    interleave,
    matmul_ceilings,
    possible,
    ratios,
    spread,
    summary,
    undisturbed,
)
from evaluation.command import Parser, add_out, check_least

COLUMNS = ("variant", "batch", "seconds", "images_per_s", "times_official_float32", "times_official_bfloat16")
COLUMNS += ("gflop_per_s", "share_of_ceiling", "loss", "peak_rss_mib", "foreign_share", "rounds", "disturbed")
OURS = {  # variant -> (autocast, checkpointing)
    "float32": (False, False),
    "bfloat16": (True, False),
    "bfloat16_checkpointed": (True, True),
}
THEIRS = {"official_float32": False, "official_bfloat16": True}


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m benchmarks.training", description=__doc__.split("\n")[0])
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a checkout of FoundationVision/VAR")
    parser.add_argument("--size", default="d8", help="published size, random weights (d8)")
    parser.add_argument("--schedule", default="var256", help="scales (var256)")
    parser.add_argument("--batch", type=int, default=4, help="images of a step (4)")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each variant (3)")
    parser.add_argument("--threads", type=int, default=2, help="of each process (2)")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for idle processors (60)")
    parser.add_argument("--work", type=Path, default=Path("cache/speed"), help="where the weights are kept")
    add_out(parser, "results/training_cpu.json", "result and table")
    return parser


def random_batch(config: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Tokens and inputs as a tokenizer would give them, from seed 0."""
    import torch

    from tokenizer.schedule import ScaleSchedule

    schedule, generator = ScaleSchedule.of(config["schedule"]), torch.Generator().manual_seed(0)
    return {
        "ids": torch.randint(config["vocab_size"], (batch, schedule.total), generator=generator),
        "inputs": torch.randn(
            batch, schedule.total - schedule.lengths[0], config["latent_channels"], generator=generator
        ),
        "label": torch.arange(batch),
        "counter": list(range(batch)),
    }


def our_jobs(folder: Path, batch: int) -> dict[str, Job]:
    """Jobs "step" (autocast, checkpointed) and "ceilings" () of `VarObjective`."""
    import torch

    from train.optimizers import OptimizerConfig
    from train.session import Clock
    from train.var_objective import VarLossConfig, VarObjective
    from var.transformer import NextScaleTransformer

    model = NextScaleTransformer.from_pretrained(folder / "transformer").train()
    objective = VarObjective(model, VarLossConfig(drop=0.0), OptimizerConfig())
    given, clock = random_batch(model.config, batch), Clock(step=0, progress=0.0, seed=0)

    def step(autocast: bool, checkpointed: bool) -> dict[str, Any]:
        model.enable_gradient_checkpointing() if checkpointed else model.disable_gradient_checkpointing()
        objective.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = objective(given, clock)
        loss.backward()
        return {"loss": float(loss.detach())}

    return {"step": step, "ceilings": matmul_ceilings}


def their_jobs(
    checkout: Path, weights: Path, config: Mapping[str, Any], vqvae: Mapping[str, Any], batch: int
) -> dict[str, Job]:
    """Job "step" (autocast) of the official transformer, with its trainer's loss."""
    import torch

    from benchmarks.reference import build

    _, var = build(checkout, weights, config, vqvae)
    without_drops(var)
    given = random_batch(config, batch)

    def step(autocast: bool) -> dict[str, Any]:
        var.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = official_loss(var, given)
        loss.backward()
        return {"loss": float(loss.detach())}

    return {"step": step}


def without_drops(var: Any) -> None:
    """The official transformer ready to train, without stochastic depth (as ours is loaded) and dropped labels."""
    import torch

    var.train().requires_grad_(True)
    var.cond_drop_rate = 0.0
    for block in var.blocks:
        block.drop_path = torch.nn.Identity()


def official_loss(var: Any, given: Mapping[str, Any]) -> tuple[Any, Any]:
    """The loss of the official trainer, and the logits (B, L, V)."""
    from torch.nn import functional as F

    logits_BLV = var(given["label"], given["inputs"])
    loss_N = F.cross_entropy(logits_BLV.view(-1, logits_BLV.shape[-1]), given["ids"].view(-1), reduction="none")
    return loss_N.view(len(given["ids"]), -1).mean(dim=-1).mean(), logits_BLV


def step_flops(config: Mapping[str, Any], batch: int) -> float:
    """Operations of forward and backward (twice the forward's) of a batch; masked attention is counted in full."""
    from tokenizer.schedule import ScaleSchedule

    D, L, depth = config["width"], ScaleSchedule.of(config["schedule"]).total, config["depth"]
    hidden = round(D * config["mlp_ratio"])
    linear = 2 * L * (4 * D * D + 2 * D * hidden) * depth + 2 * L * D * config["vocab_size"]
    return 3.0 * batch * (linear + 4 * L * L * D * depth)


def rows_of(timed: Timed, batch: int, flops: float, best: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row a variant."""
    rows = []
    for name, runs in timed.items():
        row = {"variant": name, "batch": batch, **spread("seconds", [run["seconds"] for run in undisturbed(runs)])}
        row["images_per_s"] = batch / row["seconds"]
        row["gflop_per_s"] = flops / row["seconds"] / 1e9
        row["share_of_ceiling"] = row["gflop_per_s"] / best["float32" if "float32" in name else "bfloat16"]
        for base in THEIRS:
            if base in timed and base != name:
                row |= ratios(f"times_{base}", timed[base], runs)
        rows.append(row | {"loss": runs[0]["loss"], **summary(runs)})
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build and time; the result as `report.result` makes it."""
    from benchmarks.models import check_size, kept_models
    from benchmarks.reference import check_checkout
    from evaluation.report import command_of, result
    from tokenizer.model import MultiScaleVQ
    from var.transformer import NextScaleTransformer

    check_least(options, batch=1, rounds=1, threads=1)
    size = check_size(options.size)
    checkout = check_checkout(options.reference) if options.reference is not None else None
    ours, official = kept_models(options.work / f"{size}-{options.schedule}-32", size, options.schedule, width=32)
    configs = [dict(kind.load_config(ours / name)) for kind, name in ((NextScaleTransformer, "transformer"),)]
    configs += [dict(MultiScaleVQ.load_config(ours / "vqvae"))]
    variants, left_out = possible(THEIRS | OURS)
    with ExitStack() as stack:
        worker = stack.enter_context(Worker(partial(our_jobs, ours, options.batch), options.threads))
        runs = {name: (worker, "step", how) for name, how in variants.items() if name in OURS}
        if checkout is not None:
            make = partial(their_jobs, checkout, official, *configs, options.batch)
            theirs = stack.enter_context(Worker(make, options.threads))
            official_runs = {name: how for name, how in variants.items() if name in THEIRS}
            runs = {name: (theirs, "step", (how,)) for name, how in official_runs.items()} | runs
        workers = {id(one): one for one, _, _ in runs.values()}.values()
        for one in workers:
            one.built()
        begin_timing(workers)
        for one, job, args in runs.values():  # kernels and memory settle
            one.call(job, *args)
        best = ceilings(worker, options.patience)
        timed = interleave(runs, options.rounds, patience=options.patience)
        best = ceilings(worker, options.patience, best)
        end_timing()
    rows = rows_of(timed, options.batch, step_flops(configs[0], options.batch), best)
    settings = {"size": size, "schedule": options.schedule, "threads": options.threads, "ceiling_gflop_per_s": best}
    settings["left_out"] = left_out
    command = command_of(parser_of(), options)
    return result(rows, command=command, n=options.rounds, seeds=0, settings=settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result and its table."""
    parser = parser_of()
    return measured(parser, parser.parse_args(argv), measure, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
