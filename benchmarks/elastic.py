"""The table of elastic decoding: `python -m benchmarks.elastic --full RUN --supernet RUN --refiner RUN ...`.

Quality against speed and memory of the full model, its subnets, collaborations, compressed caches and compositions,
with common random numbers. The same command again goes on where it stopped. Speed alone, of the published sizes:
`benchmarks.elastic_speed`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from evaluation.command import Parser, add_out, check_least, in_one_line
from evaluation.report import command_of, figure, result, write_result
from sample.commands.plan_options import add_place_options

MODELS = ("full", "supernet", "refiner", "drafter", "specialised")
QUALITY = ("score", "fd_scenes", "fd", "correct_minus_full")
COLUMNS = (
    "row",
    *QUALITY,
    "tokens_images_per_s",
    "images_per_s",
    "speed",
    "ceiling",
    "peak_cache_mib",
    "cache_of_full",
    "peak_memory_mib",
)


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m benchmarks.elastic", description=__doc__.split("\n")[0])
    parser.add_argument("--full", metavar="MODEL", help="the full model, calibrated (nextscale calibrate)")
    parser.add_argument("--supernet", metavar="MODEL", help="the same after supernet training, calibrated")
    parser.add_argument("--refiner", metavar="MODEL", help="a smaller model of the same tokens and texts")
    parser.add_argument("--drafter", metavar="MODEL", help="the full model specialised on its scales, calibrated")
    parser.add_argument("--specialised", metavar="MODEL", help="the refiner specialised by distillation, calibrated")
    parser.add_argument("--bridge", type=int, help="scales that subnets leave to all layers (about 3/5 of them)")
    parser.add_argument("--shares", default="50%,20%,10%,4%", help="of the cache (50%%,20%%,10%%,4%%)")
    parser.add_argument("--groups", help="only these rows: full,subnet,code,cache,prune,guidance,composition")
    parser.add_argument("--per-tag", type=int, default=92, help="prompts of each tag (92: 552 images a row)")
    parser.add_argument("--batch-size", type=int, default=16, help="images at once (16)")
    parser.add_argument("--quality-only", action="store_true", help="leave speed to a later run, on an idle machine")
    parser.add_argument("--repeats", type=int, default=5, help="calls that speed is measured over (5)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and images (0)")
    add_place_options(parser)
    parser.add_argument("--work", type=Path, help="where finished rows are kept (cache/elastic/...)")
    add_out(parser, "results/elastic.json", "result, table and picture")
    return parser


def measure(options: argparse.Namespace) -> dict | None:
    """Every row; the result as `report.result` makes it, or None if only quality was asked for."""
    from benchmarks.elastic_rows import against_full, all_rows, ready, row_quality, row_speed
    from evaluation.scenes import prompt_suite
    from sample.load import load_pipeline, model_digest

    folders = {name: getattr(options, name) for name in MODELS if getattr(options, name) is not None}
    if "full" not in folders:
        raise ValueError("--full must name the model that all others are compared with")
    pipelines = {name: load_pipeline(m, dtype=options.dtype, device=options.device) for name, m in folders.items()}
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    model = pipelines["full"].transformer
    depth, scales = len(model.blocks), len(model.schedule)
    bridge = options.bridge or max(1, round(0.6 * scales))
    rows = all_rows(depth, scales, bridge, list(folders), options.shares.split(","))
    groups = options.groups.split(",") if options.groups else None
    rows = [row for row in rows if groups is None or row.group in ("full", *groups)]
    for row in rows:  # what cannot be run is told before anything is
        ready(row, pipelines).make_plan(row.words, **row.settings)
    digests = {name: model_digest(folder) for name, folder in folders.items()}
    made = {"models": digests, "dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
    settings = made | {"bridge": bridge, "per_tag": options.per_tag, "batch_size": options.batch_size}
    work = options.work or Path("cache/elastic") / "-".join(digest[:6] for digest in digests.values())
    common = {"batch_size": options.batch_size, "folder": work, "of": made}
    metadatas = prompt_suite(options.per_tag, options.seed)
    found = []
    for row in rows:
        drawn = row_quality(row, pipelines, metadatas, seed=options.seed, **common)
        found.append({"row": row.name, **asdict(row), **drawn})
        print(f"{row.name}: score {drawn['score']:.3f}", flush=True)
    if options.quality_only:
        return None
    for row, figures in zip(rows, found):
        figures |= row_speed(row, pipelines, metadatas, repeats=options.repeats, **common)
        print(f"{row.name}: {figures['images_per_s']:.1f} images/s", flush=True)
    command = command_of(parser_of(), options)
    return result(against_full(found), command=command, n=len(metadatas), seeds=options.seed, settings=settings)


def as_table(rows: Sequence[dict]) -> str:
    """A Markdown table, a line a configuration."""
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(figure(row, name) if name in row else "" for name in names) + " |" for row in rows]
    return "\n".join(lines)


def picture(content: dict, path: Path) -> None:
    """Quality against speed and cache."""
    from benchmarks.elastic_picture import draw

    draw(content["rows"], path)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result, its table and its picture."""
    parser = parser_of()
    options = parser.parse_args(argv)
    with in_one_line(parser, kept="the same command continues"):
        check_least(options, per_tag=1, batch_size=1, repeats=1, seed=0)
        content = measure(options)
        if content is None:
            return 0
        from benchmarks.tables import write_picture
        from sample.files import write_text

        write_result(options.out, content)
        write_text(options.out.with_suffix(".md"), as_table(content["rows"]) + "\n")
        write_picture(picture, content, options.out)
        print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
