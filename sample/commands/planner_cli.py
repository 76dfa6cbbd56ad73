"""`nextscale plan`: which plan suits this machine. A short measurement fits a cost model; the choice is measured."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sample.commands.plan_options import add_place_options, whole_numbers
from sample.commands.prompts import read_prompts, texts_or_classes
from sample.processes import tell

if TYPE_CHECKING:
    from sample.measure import Run
    from sample.pipeline import NextScalePipeline
    from sample.planner import Choice, Settings

EXAMPLES = """examples:
  nextscale plan --model scenes --latency 200ms "a red star left of a blue heart"
  nextscale plan --model runs/my-var --memory 6GiB --latency 80ms --device cuda --class all --out plan.png
  nextscale plan --model runs/my-var --latency 80ms --quality results/elastic.json "a red star"

Without measured quality (--quality), settings are worth the share of the whole model's work that they keep. Fewer
layers are proposed of models that were trained for it (supernet training); of others with --depths."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `nextscale plan`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = "Choose plan, guidance, cache and batch for this machine.", EXAMPLES
    parser.add_argument("prompt", nargs="*", help="texts to measure with")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="texts, one a line")
    parser.add_argument("--class", dest="classes", metavar="LIST", help="classes to measure with: 0,3,7 or all")
    parser.add_argument("--model", default="scenes", help="scenes (bundled), a model folder, or a training run")
    parser.add_argument("--refiner", metavar="MODEL", help="another model for code:N plans")
    parser.add_argument("--depths", metavar="LIST", help="layers of subnets: 8,4 (those it was trained for)")
    parser.add_argument("--quality", type=Path, metavar="FILE", help="benchmarks.elastic's result: choose by score")
    parser.add_argument("--memory", metavar="SIZE", help="most memory in use: 6GiB, 500MB")
    parser.add_argument("--latency", metavar="TIME", help="most time from prompts to a batch of images: 80ms, 1.5s")
    parser.add_argument("--batch", type=int, help="images at once; chosen if left out")
    parser.add_argument("--measured", type=int, default=4, help="plans of the front to measure beside the choice (4)")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each measurement, the fastest counts (3)")
    parser.add_argument("--out", type=Path, help="picture of the front, e.g. plan.png")
    add_place_options(parser)
    parser.add_argument("--fast", choices=["auto", "off"], default="auto", help="what `sample` is to run with (auto)")
    parser.set_defaults(n=1)


def run(args: argparse.Namespace) -> int:
    """Do what the options say; 0.

    Raises:
        ValueError, FileNotFoundError: on options that make no sense, or limits that no plan keeps.
    """
    from sample.planner import BATCHES, read_size, read_time

    memory = read_size(args.memory) if args.memory is not None else None
    latency = read_time(args.latency) if args.latency is not None else None
    if args.out is not None and args.out.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out must end in .png, .pdf or .svg, got {args.out}")
    if args.out is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--out draws a picture and needs matplotlib: pip install 'nextscale[plots]'")
    for name, least in (("batch", 1), ("repeats", 1), ("measured", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name} must be {least} or more, got {getattr(args, name)}")
    prompts, _ = read_prompts(args)

    from sample.files import check_place
    from sample.load import load_pipeline
    from sample.measure import fit
    from sample.plan import untrained
    from sample.plan_text import PlanConfig
    from sample.planner import best, evaluate, fitting, pareto

    if args.out is not None:
        check_place("--out", args.out, folder=False)
    depths = [] if args.depths is None else whole_numbers("--depths", args.depths)
    where = {"dtype": args.dtype, "device": args.device, "fast": args.fast}
    pipeline = load_pipeline(args.model, refiner=args.refiner, **where)
    layers, scales = len(pipeline.transformer.blocks), len(pipeline.transformer.schedule)
    if not all(depth < layers for depth in depths):
        raise ValueError(f"--depths must be below the model's {layers} layers, got {args.depths}")
    prompts = texts_or_classes(prompts, args.classes, pipeline)
    looked_at = settings_of(args, pipeline, depths)
    half = [PlanConfig(plan="supernet:1", depth=max(1, layers // 2))] if scales > 1 else []
    plans = [pipeline.make_plan(words) for words in (PlanConfig(), *half)]
    costs, _ = fit(pipeline, cycle(prompts, 16), plans, (1, 4, 16), repeats=args.repeats)
    choices = evaluate(pipeline, costs, looked_at, BATCHES if args.batch is None else (args.batch,))
    inside = fitting(choices, memory=memory, latency=latency)
    chosen, front = best(inside), pareto(inside)
    shown = [chosen, *(choice for choice in spread(front, args.measured) if choice != chosen)]
    runs = [measured_run(pipeline, choice, prompts, args.repeats) for choice in shown]
    print(table(shown, runs))
    print(f"chosen: {chosen.settings.options} --batch-size {chosen.batch}")
    tell(untrained(chosen.settings.plan(pipeline)))
    tell_over(runs[0], memory, latency)
    if args.out is not None:
        draw(args.out, choices, front, shown, runs)
        print(f"written: {args.out}")
    return 0


def settings_of(args: argparse.Namespace, pipeline: NextScalePipeline, depths: Sequence[int]) -> list[Settings]:
    """What is looked at: the measured rows of --quality, else all that suits the model."""
    from sample.load import model_digest
    from sample.planner import candidates, read_measured

    if args.quality is None:
        return candidates(pipeline, depths, args.refiner)
    if depths:
        raise ValueError(f"--depths {args.depths} goes with no --quality, whose rows are looked at")
    refiner = args.refiner and model_digest(args.refiner)
    return read_measured(args.quality, model_digest(args.model), refiner, args.refiner)


def tell_over(run: Run, memory: float | None, latency: float | None) -> None:
    """A line on stderr if the choice, measured, exceeds a limit that it was predicted to keep."""
    over = []
    if latency is not None and run.total > latency:
        over.append(f"{run.total * 1e3:.0f}ms")
    if memory is not None and run.peak_bytes > memory:
        over.append(f"{run.peak_bytes / 2**20:.0f}MiB")
    if over:
        print(
            f"nextscale: caution: the choice took {' and '.join(over)} when it was measured, more than asked for: "
            "try a lower limit",
            file=sys.stderr,
        )


def cycle(prompts: list, count: int) -> list:
    """As many prompts, the given ones over and over."""
    return [prompts[i % len(prompts)] for i in range(count)]


def spread(front: list[Choice], count: int) -> list[Choice]:
    """About `count` choices of the front, evenly, its ends included."""
    if len(front) <= count or count < 2:
        return front[:count]
    return [front[round(i * (len(front) - 1) / (count - 1))] for i in range(count)]


def measured_run(pipeline: NextScalePipeline, choice: Choice, prompts: list, repeats: int) -> Run:
    """What a choice really costs."""
    from sample.measure import measure

    return measure(pipeline, cycle(prompts, choice.batch), choice.settings.plan(pipeline), repeats=repeats)


def table(choices: list[Choice], runs: list[Run]) -> str:
    """Predicted and measured figures side by side; the first line is the choice."""
    heads = [
        "plan",
        "batch",
        "work" if choices[0].settings.score is None else "score",
        "time ms",
        "measured",
        "off",
        "memory MiB",
        "measured",
        "off",
        "cache MiB",
        "measured",
    ]
    lines = [heads]
    for choice, run in zip(choices, runs):
        lines.append(
            [
                choice.settings.options.replace("--plan ", "").replace("--", ""),
                str(choice.batch),
                f"{100 * choice.work:.0f}%" if choice.settings.score is None else f"{choice.worth:.3f}",
                f"{choice.seconds * 1e3:.1f}",
                f"{run.total * 1e3:.1f}",
                f"{100 * (choice.seconds / run.total - 1):+.0f}%",
                f"{choice.peak_bytes / 2**20:.0f}",
                f"{run.peak_bytes / 2**20:.0f}",
                f"{100 * (choice.peak_bytes / run.peak_bytes - 1):+.0f}%",
                f"{choice.cache_bytes / 2**20:.2f}",
                f"{run.cache_bytes / 2**20:.2f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def draw(path: Path, choices: list[Choice], front: list[Choice], shown: list[Choice], runs: list[Run]) -> None:
    """The front of images a second and worth, what was measured of it, and the choice."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    from sample.files import atomically

    measured, chosen = shown[0].settings.score is not None, shown[0]

    def worth(choices: list[Choice]) -> list[float]:
        return [choice.worth if measured else 100 * choice.worth for choice in choices]

    with matplotlib.rc_context({"font.size": 11}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        axes.scatter(
            [c.images_per_s for c in choices], worth(choices), s=8, color="0.8", label="all that was looked at"
        )
        best = "best within the limits"
        axes.plot([c.images_per_s for c in front], worth(front), ".-", color="C0", label=best)
        speeds = [choice.batch / run.total for choice, run in zip(shown, runs)]
        axes.scatter(speeds, worth(shown), marker="x", color="C3", zorder=3, label="measured")
        axes.scatter(
            [chosen.images_per_s],
            worth([chosen]),
            s=140,
            facecolors="none",
            edgecolors="C1",
            linewidths=2,
            label="chosen",
        )
        axes.set(
            xlabel="images a second",
            ylabel="score" if measured else "share of the whole model's work, %",
            xscale="log",
            title=f"chosen: {chosen.settings.options}, batch {chosen.batch}",
        )
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(ScalarFormatter())
        axes.grid(alpha=0.3)
        axes.legend()
    atomically(path, lambda partial: figure.savefig(partial, dpi=120, format=path.suffix[1:] or "png"))
