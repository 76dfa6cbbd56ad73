"""A whole training step on a GPU beside the official code: `python -m benchmarks.training_gpu --reference VAR`.

Forward, loss, backward, clipping and fused AdamW of one batch that lies on the device; random weights, one process, in
turns: A B A B. A turn is a few steps, and only then the device is waited for, as training does. Ours is
`train.loop.train_step` of what `train.train_var` builds, in bfloat16; the official step does what its trainer does, in
float16 with a gradient scaler (its default, which waits for the device in every step) and in bfloat16. Prompts and
branches are not dropped; float32 products take TensorFloat-32 in both. The learning rate is 0: a step does all its
work, yet the weights stay, so losses can be compared.

Peak memory is what a step allocates above what lay there before, plus its own weights and optimizer state: what other
variants keep does not count. Operations are counted from shapes, masked attention in full, recomputing not at all.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import Run, ceiling, current_device, device_name, figures, in_turns, official_models, settled
from benchmarks.tables import measured
from benchmarks.training import official_loss, random_batch, step_flops, without_drops
from evaluation.command import Parser, add_out, check_least

CLIP = 2.0
COLUMNS = ("variant", "batch", "seconds", "images_per_s", "times_official_float16", "times_official_bfloat16")
COLUMNS += ("share_of_ceiling", "peak_mib", "loss")


class Way(NamedTuple):
    """How a variant of ours trains."""

    attention: str = "grouped"
    compiled: bool = False
    checkpointed: bool = False
    half_stream: bool = False


OURS = {
    "sdpa": Way("sdpa"),
    "flex": Way("flex"),
    "grouped": Way(),
    "compiled_flex": Way("flex", compiled=True),
    "compiled": Way(compiled=True),
    "compiled_half_stream": Way(compiled=True, half_stream=True),
    "compiled_checkpointed": Way(compiled=True, checkpointed=True),
}
THEIRS = {"official_float16": torch.float16, "official_bfloat16": torch.bfloat16}


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m benchmarks.training_gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a checkout of FoundationVision/VAR")
    parser.add_argument("--size", default="d16", help="published size, random weights (d16)")
    parser.add_argument("--schedule", default="var256", help="scales (var256)")
    parser.add_argument("--batch", type=int, default=64, help="images of a step (64)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant (5)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn (4)")
    parser.add_argument("--variants", default="all", help=f"some of {', '.join([*THEIRS, *OURS])}, by commas (all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only to try the command (cuda)")
    add_out(parser, "results/training_gpu.json", "result and table")
    return parser


def chosen(options: argparse.Namespace) -> list[str]:
    """The variants to run: those asked for that can be.

    Raises:
        ValueError: on an unknown one, or when none is left.
    """
    known = [*THEIRS, *OURS]
    asked = known if options.variants == "all" else options.variants.split(",")
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"--variants must be some of {', '.join(known)}, got {unknown[0]!r}")
    possible = {*OURS, *THEIRS} if options.device == "cuda" else {"sdpa", "grouped", "official_bfloat16"}
    possible -= set(() if options.reference else THEIRS)
    if not possible.intersection(asked):
        raise ValueError(f"--variants {options.variants} need --device cuda or --reference")
    return [name for name in known if name in asked and name in possible]


def our_steps(names: Sequence[str], transformer: torch.nn.Module, given: Mapping[str, Any], device: str) -> dict:
    """Steps by variant, each with the optimizers it moves; plain and compiled blocks share weights and optimizer."""
    from train.config import RunConfig
    from train.loop import start
    from train.optimizers import OptimizerConfig
    from train.session import Session, Task
    from train.var_objective import VarLossConfig, VarObjective

    config = OptimizerConfig(clip=CLIP)
    config.lr = 0.0  # which no configuration may ask for
    plain = VarObjective(transformer.train(), VarLossConfig(drop=0.0), config)
    batch = len(given["ids"])

    def session_of(objective: VarObjective, compiled: bool) -> Session:
        run = {"batch_size": batch, "precision": "bf16", "ema": 0.0, "compile": compiled, "cpu": device == "cpu"}
        task = Task(objective=objective, train_data=[], val_data=[], prepare=dict, export=lambda *_: None)
        return start(task, RunConfig(total_images=10**9, **run))

    twin = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})
    sessions = {False: session_of(plain, False)}
    if any(OURS[name].compiled for name in names):
        sessions[True] = session_of(twin, True)
        sessions[True].optimizers = sessions[False].optimizers
    return {
        name: (step_of(sessions[OURS[name].compiled], given, name), sessions[False].all_optimizers) for name in names
    }


def step_of(session: Any, given: Mapping[str, Any], name: str) -> Run:
    """One step of the training loop; it gives the loss."""
    from train.loop import train_step
    from train.session import Meter

    way = OURS[name]

    def step() -> torch.Tensor:
        model = session.objective.transformer
        model.enable_gradient_checkpointing() if way.checkpointed else model.disable_gradient_checkpointing()
        session.objective.attention, model.half_stream = way.attention, way.half_stream
        train_step(session, repeat(given))
        ((names, (sums_n, _)),) = session.meter.sums.items()
        session.meter = Meter()
        return sums_n[names.index("loss")]

    return step


def their_steps(names: Sequence[str], var: Any, given: Mapping[str, Any], device: str) -> dict:
    """The same of the official transformer."""
    without_drops(var)
    parameters = list(var.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def official_step(dtype: torch.dtype) -> Run:
        halves = dtype == torch.float16
        scaler = torch.amp.GradScaler(device, init_scale=2.0**11, growth_interval=1000, enabled=halves)

        def step() -> torch.Tensor:
            with torch.autocast(device, dtype, cache_enabled=True):
                loss, logits_BLV = official_loss(var, given)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            scaler.step(optimizer)
            scaler.get_scale()  # it waits for the device, as its trainer does
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            logits_BLV.data.argmax(dim=-1)  # its trainer's predictions
            return loss.detach()

        return step

    return {name: (official_step(THEIRS[name]), [optimizer]) for name in names}


def repeated(run: Run, times: int) -> None:
    """A run, a number of times."""
    for _ in range(times):
        run()


def peak_mib(run: Run, optimizers: Sequence[torch.optim.Optimizer]) -> float:
    """The largest memory of a step with its own weights and optimizer state, in MiB."""
    kept = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    kept += [v for optimizer in optimizers for state in optimizer.state.values() for v in state.values()]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before + sum(tensor.nbytes for tensor in kept)) / 2**20


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build and time; the result as `report.result` makes it."""
    from benchmarks.models import check_size, random_pipeline
    from benchmarks.reference import check_checkout
    from evaluation.report import command_of, result

    check_least(options, batch=1, rounds=1, steps=1)
    size, names, device = check_size(options.size), chosen(options), options.device
    current_device(device)
    if options.reference is not None:
        check_checkout(options.reference)
    with torch.device(device):
        pipeline = random_pipeline(size, options.schedule, width=32)
    config = dict(pipeline.transformer.config)
    given = {k: v.to(device) if torch.is_tensor(v) else v for k, v in random_batch(config, options.batch).items()}
    steps = our_steps([name for name in names if name in OURS], pipeline.transformer, given, device)
    if theirs := [name for name in names if name in THEIRS]:
        _, var = official_models(options.reference, pipeline, device)
        steps = their_steps(theirs, var, given, device) | steps
    runs, losses, failed = settled({name: step for name, (step, _) in steps.items()})
    turns = {name: partial(repeated, run, options.steps) for name, run in runs.items()}
    best, (found, stopped) = ceiling(device), in_turns(turns, options.rounds, device)
    found = {name: [turn / options.steps for turn in seconds] for name, seconds in found.items()}
    rows = [figures(found, name, options.batch) for name in found]
    for row in rows:
        row["share_of_ceiling"] = step_flops(config, options.batch) / row["seconds"] / best
        row["loss"] = float(losses[row["variant"]])
        if torch.device(device).type == "cuda":
            row["peak_mib"] = peak_mib(*steps[row["variant"]])
    settings = {"size": size, "schedule": options.schedule, "steps": options.steps, "device": device_name(device)}
    settings |= {"ceiling_tflop_per_s": best / 1e12, "step_gflop": step_flops(config, options.batch) / 1e9}
    settings["failed"] = {**failed, **stopped}
    command = command_of(parser_of(), options)
    return result(rows, command=command, n=options.rounds, seeds=0, settings=settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result and its table."""
    parser = parser_of()
    return measured(parser, parser.parse_args(argv), measure, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
