"""nextscale: next-scale ("visual autoregressive") image generation. The public names, and the `nextscale` command.

Names are imported when they are first used, so that `import nextscale` and `nextscale --help` are quick.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from sample.commands.parser import Parser

__version__ = "0.1.0"

NAMES = {
    "ScaleSchedule": "tokenizer.schedule",
    "BinarySphericalQuantizer": "tokenizer.bitwise",
    "MultiScaleQuantizer": "tokenizer.quantizer",
    "MultiScaleVQ": "tokenizer.model",
    "NextScaleTransformer": "var.transformer",
    "ClassPrompt": "var.conditioning",
    "TextPrompt": "var.conditioning",
    "KVCache": "var.cache",
    "Filter": "sample.draw",
    "Guidance": "sample.guidance",
    "Plan": "sample.plan",
    "Stage": "sample.plan",
    "plain": "sample.plan",
    "collaborative": "sample.plan",
    "PlanConfig": "sample.plan_text",
    "GenerationState": "sample.state",
    "Hook": "sample.state",
    "generate": "sample.generate",
    "NextScalePipeline": "sample.pipeline",
    "NextScaleOutput": "sample.pipeline",
    "load_pipeline": "sample.load",
    "Search": "sample.search",
    "Ledger": "sample.ledger",
    "image_stream": "sample.images",
    "EditHook": "sample.edit",
    "extend": "sample.edit",
    "make_requests": "sample.images",
}

# command -> (module with configure(parser) and run(args) -> exit code, what it does)
COMMANDS = {
    "sample": ("sample.commands.sample_cli", "draw images of texts or classes"),
    "edit": ("sample.commands.edit_cli", "repaint a part of a picture, or draw more around it"),
    "info": ("sample.commands.info", "what a model is, and what it can be asked for"),
    "demo": ("sample.commands.demo_cli", "a page in your browser to draw and edit on"),
    "evaluate": ("evaluation.evaluate_cli", "measure images or a model"),
    "compare": ("evaluation.compare_cli", "two measured models under common seeds"),
    "scaling": ("train.scaling", "train a ladder of sizes, fit scaling laws"),
    "report": ("evaluation.report_cli", "one page about runs and results"),
    "plan": ("sample.commands.planner_cli", "choose plan, guidance, cache and batch for this machine"),
    "calibrate": ("sample.commands.calibrate", "measure a model's layers once, for --cache"),
    "convert": ("sample.commands.convert_cli", "official checkpoints to a model folder, and back"),
}
PLACES = ("--out", "--model", "--work", "--prompts", "--config", "--reference")  # options that name a file or folder

__all__ = [*NAMES, "main"]


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module 'nextscale' has no attribute {name!r}")
    return getattr(importlib.import_module(NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *NAMES})


def main(argv: Sequence[str] | None = None) -> int:
    """The `nextscale` command.

    Returns:
        The exit code: 0; 1 if a measurement says no; 2 on a mistake, told in one line; 130 when interrupted.
    """
    try:
        return run_command(sys.argv[1:] if argv is None else list(argv))
    except BrokenPipeError:  # whoever reads has seen enough (`| head`); what is buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        from sample.processes import line_about, process_name, speaks

        line = line_about(error)
        if line is None:
            raise
        if speaks():
            print(f"nextscale: error{process_name()}: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nextscale: stopped", file=sys.stderr)
        return 130


def run_command(argv: list[str]) -> int:
    """Read the command's name, then let its module read the rest and run."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items())
    parser = Parser(
        prog="nextscale",
        description="Next-scale (visual autoregressive) image generation.",
        epilog=f"commands:\n{listed}\n\nnextscale COMMAND --help shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nextscale {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    if not argv:
        parser.print_help()
        return 0
    command = parser.parse_args(argv[:1]).command
    module = importlib.import_module(COMMANDS[command][0])
    options = Parser(prog=f"nextscale {command}", allow_abbrev=False)
    module.configure(options)
    for word, value in zip(argv[1:], [*argv[2:], None]):  # an empty path would be the current folder
        if (value == "" and word in PLACES) or word in [f"{place}=" for place in PLACES]:
            raise ValueError(f"{word.rstrip('=')} must not be empty")
    return module.run(options.parse_words(argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
