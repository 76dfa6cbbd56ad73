"""Scene score over training: `python -m benchmarks.score_curve --models 102000=OLD,200000=runs/mine --out FILE`.

Every model draws the same prompts with the same seeds. The same command again measures only what is new.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from evaluation.command import Parser, add_out, check_least, in_one_line
from evaluation.report import command_of, result, table, write_result
from evaluation.scenes import TAGS, prompt_suite
from sample.files import atomically
from sample.load import model_digest


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m benchmarks.score_curve", description=__doc__.split("\n")[0])
    parser.add_argument("--models", required=True, metavar="IMAGES=MODEL,...", help="images trained on, and a model")
    parser.add_argument("--per-tag", type=int, default=100, help="prompts of each tag (100), one image each")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and images (0)")
    parser.add_argument("--batch-size", type=int, default=50, help="images at once (50)")
    parser.add_argument("--top-p", help="of the draws, one or one a scale after commas; the models' own by default")
    parser.add_argument("--guidance", type=float, help="the same on every scale; the models' own by default")
    add_out(parser, "results/scenes_curve.json", "result, table and picture")
    return parser


def point(text: str) -> tuple[int, str]:
    """(images, model) of "IMAGES=MODEL".

    Raises:
        ValueError: if it is not of that form.
    """
    images, _, model = text.partition("=")
    if not images.isdigit() or not model:
        raise ValueError(f"a model must be given as IMAGES=MODEL, e.g. 102000=runs/mine, got {text!r}")
    return int(images), model


def measure(images: int, model: str, options: argparse.Namespace) -> dict:
    """One row: the judge's shares for one image of every prompt of the suite."""
    from evaluation.judge import judge_report
    from sample.images import image_stream, make_requests
    from sample.load import load_pipeline

    pipeline = load_pipeline(model, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    metadatas = prompt_suite(options.per_tag, options.seed)
    prompts = [metadata["prompt"] for metadata in metadatas]
    top_p = [float(p) for p in options.top_p.split(",")] if options.top_p else []
    settings = {"top_p": top_p if len(top_p) > 1 else top_p[0]} if top_p else {}
    if options.guidance is not None:
        settings |= {"guidance_scale": options.guidance, "guidance_ramp": "constant"}
    requests = make_requests(prompts, per_prompt=1, seed=options.seed)
    made = [picture for _, picture in image_stream(pipeline, requests, batch_size=options.batch_size, **settings)]
    return {"images": images, "model_digest": model_digest(model), **judge_report(made, metadatas)}


def kept_rows(options: argparse.Namespace) -> dict[tuple[int, str], dict]:
    """Rows that an earlier run with the same settings has left in `options.out`, by images and model."""
    if not options.out.exists():
        return {}
    kept = json.loads(options.out.read_text(encoding="utf-8"))
    same = kept["settings"] == settings_of(options)
    return {(row["images"], row["model_digest"]): row for row in kept["rows"]} if same else {}


def settings_of(options: argparse.Namespace) -> dict:
    """What all rows share."""
    return {name: getattr(options, name) for name in ("per_tag", "seed", "top_p", "guidance")}


def draw(rows: Sequence[dict], path: Path) -> None:
    """The score, and each tag's, over the images trained on."""
    with matplotlib.rc_context({"font.size": 11}):
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.subplots()
        images = [row["images"] / 1000 for row in rows]
        for tag in TAGS:
            axes.plot(images, [row[tag] for row in rows], lw=1, marker=".", label=tag.replace("_", " "))
        score, bounds = ([row[name] for row in rows] for name in ("overall", "overall_ci95"))
        reach = [[s - low for s, (low, _) in zip(score, bounds)], [high - s for s, (_, high) in zip(score, bounds)]]
        axes.errorbar(images, score, reach, color="black", lw=2.5, marker="o", capsize=3, label="overall, 95 %")
        axes.set(xlabel="thousand images trained on", ylabel="share of images the judge accepts", ylim=(0, 1))
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper")
    atomically(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the result, its table and its picture."""
    parser = parser_of()
    options = parser.parse_args(argv)
    command = command_of(parser_of(), options)
    with in_one_line(parser, kept="the same command measures only what is missing"):
        check_least(options, per_tag=1, batch_size=1, seed=0)
        points = sorted(map(point, options.models.split(",")))
        common = {"n": len(TAGS) * options.per_tag, "seeds": options.seed, "settings": settings_of(options)}
        done, rows = kept_rows(options), []
        for images, model in points:
            rows.append(done.get((images, model_digest(model))) or measure(images, model, options))
            print(f"{images} images: {rows[-1]['overall']:.3f}", flush=True)
            write_result(options.out, result(rows, command=command, **common))
        draw(rows, options.out.with_suffix(".png"))
        print(table(rows, ["images", "overall", *TAGS, "seen", "unseen"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
