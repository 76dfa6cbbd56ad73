"""The options of a command that draws: how, with which model and where; and the pipeline and the call they describe."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sample.commands.plan_options import add_plan_options, call_settings, how_options
from sample.commands.prompts import check_text

if TYPE_CHECKING:
    from sample.pipeline import NextScalePipeline
    from sample.plan import Plan


def add_sampling(parser: argparse.ArgumentParser, *, out: str) -> argparse._ArgumentGroup:
    """Declare how to draw, with which model and to where (the group that is returned); `out` describes --out."""
    take_negative_lists(parser)
    how = parser.add_argument_group("how (the model's own settings unless given)")
    add_plan_options(how)
    how.add_argument("--smooth", action="store_true", help="blend codes: smoother pictures, not for measurements")

    where = parser.add_argument_group("with what, to where")
    add_model_options(where)
    where.add_argument("--out", type=Path, help=f"{out}; without it pictures, or the next of pictures-2, ... that fits")
    where.add_argument("--batch-size", type=int, default=16, help="images at once (16)")
    return where


def add_model_options(where: argparse._ActionsContainer) -> None:
    """Declare which model, and where and how fast it works."""
    where.add_argument(
        "--model",
        default="scenes",
        help="scenes (bundled), a model folder, a training run, or a Hub id (OWNER/NAME@REVISION)",
    )
    where.add_argument(
        "--dtype",
        default="auto",
        help="float32, bfloat16, float16; auto: bfloat16 on CUDA (float16 on Volta, Turing), on a CPU with --fast on",
    )
    where.add_argument(
        "--fast",
        choices=["auto", "on", "off"],
        default="auto",
        help="on: what is fastest here; auto: fast in the same dtype, as off up to its rounding; off: plain (auto)",
    )
    where.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    where.add_argument(
        "--offload",
        choices=["none", "model", "layers"],
        default="none",
        help="for a small GPU: weights wait in CPU memory, and come model by model or layer by layer (none)",
    )
    where.add_argument("--text-device", help="where the text encoder goes instead, e.g. cpu to save GPU memory")


def take_negative_lists(parser: argparse.ArgumentParser) -> None:
    """Let -5,-1 be the value of the option before it; argparse does so from Python 3.14 on."""
    parser._negative_number_matcher = re.compile(r"-\.?\d")


def open_model(args: argparse.Namespace) -> tuple[Path, NextScalePipeline]:
    """The folder of the options' model, and its pipeline, where and as they say.

    Raises:
        ValueError, FileNotFoundError: if there is none.
    """
    from sample.fast import keep_freed_memory
    from sample.load import load_pipeline, model_folder
    from sample.processes import process_group

    process_group(args.device)
    folder = model_folder(args.model)  # once: a training run may export a newer one while we work
    places = {"dtype": args.dtype, "device": args.device, "text_device": args.text_device}
    places |= {"fast": args.fast, "offload": args.offload}
    pipeline = load_pipeline(folder, **places, refiner=how_options(args).get("refiner"))
    if pipeline.accelerated is not None:
        keep_freed_memory()
    pipeline.set_progress_bar_config(disable=True)
    return folder, pipeline


def check_sampling(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the option, on what `add_sampling` declares and that no model could follow."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be 1 or more, got {args.batch_size}")
    if args.negative is not None:
        check_text("--negative", args.negative)


def call_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that go into the pipeline's call, without those left to the model."""
    options = {**call_settings(args), "negative_prompt": args.negative, "smooth": args.smooth or None}
    return {name: value for name, value in options.items() if value is not None}


def plan_of_call(args: argparse.Namespace, pipeline: NextScalePipeline, call: dict[str, Any]) -> Plan:
    """The plan of the settings in `call`. Raises ValueError if they make none, or an option could do nothing in it."""
    beside = ("negative_prompt", "smooth", "hooks")
    plan, how = pipeline.make_plan(**{name: v for name, v in call.items() if name not in beside}), how_options(args)
    if how.get("guidance_until") and not plan.guided:
        raise ValueError(f"--guidance-until {how['guidance_until']}: none of these scales is guided, see --guidance")
    if call.get("negative_prompt") is not None and not plan.guided:
        raise ValueError("--negative acts through guidance, and no scale is guided: see --guidance")
    refiner = how.get("refiner")
    if refiner is not None and all(stage.model is not pipeline.refiner for stage in plan.stages):
        raise ValueError(f"--refiner {refiner} makes the scales after code:N: give --plan code:N")
    return plan
