"""`nextscale sample`: its options, and the job they describe. Torch is imported when the job starts, not to parse."""

from __future__ import annotations

import argparse
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sample.commands.job import carry_out, check_out, write_trees
from sample.commands.plan_options import how_options, plugins_of
from sample.commands.prompts import read_prompts, texts_or_classes, unread
from sample.commands.sampling_options import add_sampling, call_options, check_sampling, open_model, plan_of_call
from sample.commands.search_options import add_search_options, images_of_each, make_search, search_settings
from sample.own_code import plugin_settings
from sample.processes import tell

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from sample.commands.job import Job
    from sample.images import Request
    from sample.sinks import PngFolder, Sink

EXAMPLES = """examples:
  nextscale sample "a red star left of a blue heart" --n 4 --seed 7 --out pictures/
  nextscale sample "two green rings" --n 2 --show-scales
  nextscale sample --prompts prompts.txt --n 4 --out geneval/      a line is a prompt, or one JSON object of GenEval's
  nextscale sample --model runs/cifar10 --class all --n 100 --out samples.npz
  nextscale sample "a red star" --cache 20%                                 a fifth of the key/value cache
  nextscale sample --class 3 --model runs/supernet --plan supernet:4 --depth 4      fewer layers from scale 4 on
  nextscale sample "two green rings" --search tts --n 2 --show-search       several candidates, the best goes on
  accelerate launch -m nextscale sample --prompts prompts.txt --out geneval/    the same images, by several processes

The same command again continues where it stopped; finished images are kept."""

GRID_LIMIT = 64  # pictures in the overview
WIDEST = 12  # pictures in a row of it


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `nextscale sample`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = "Draw images of texts or classes.", EXAMPLES
    what = parser.add_argument_group("what to draw (one of)")
    what.add_argument("prompt", nargs="*", help="a text, or several")
    what.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="texts or GenEval's JSON, one a line, - for standard input; makes a GenEval tree",
    )
    what.add_argument(
        "--class",
        dest="classes",
        metavar="LIST",
        help="classes: 3 or 0,3,7 or 0-9 or all, or names, ImageNet's or your folders': \"golden retriever\"",
    )
    what.add_argument("--n", type=int, help="images of each (1); with --search, the N of the search (2)")
    what.add_argument("--seed", type=int, default=0, help="the name of the first image; image i gets seed + i (0)")
    what.add_argument("--negative", metavar="TEXT", help="what to steer away from")

    where = add_sampling(parser, out="a folder, or FILE.npz for ADM's format")
    where.add_argument("--show-scales", action="store_true", help="also show each image from coarse to fine")
    add_search_options(parser)


def run(args: argparse.Namespace) -> int:
    """Do what the options say.

    Returns:
        0; 130 when interrupted.

    Raises:
        ValueError, FileNotFoundError: on options that make no sense, naming them.
    """
    prompts, metadata = read_prompts(args)
    check_sampling(args)
    check_out(args.out, npz=True)
    to_npz = args.out is not None and args.out.suffix == ".npz"
    if to_npz and args.show_scales:
        raise ValueError("--show-scales needs a folder to write to, and --out is an npz file")
    if args.search is not None and (args.show_scales or (args.show_search and (to_npz or args.prompts is not None))):
        raise ValueError("--show-scales goes with no --search, and --show-search with neither --prompts nor npz files")
    per_prompt = images_of_each(args)

    from sample.files import check_place
    from sample.images import image_stream, make_requests
    from sample.ledger import Ledger
    from sample.load import made_by
    from sample.plan import untrained
    from sample.plugins import plugged

    if args.out is not None:
        check_place("--out", args.out, folder=not to_npz)
    folder, pipeline = open_model(args)
    prompts = texts_or_classes(prompts, args.classes, pipeline)
    requests = make_requests(prompts, per_prompt=per_prompt, seed=args.seed, metadata=metadata)
    given, plugins, ledger = call_options(args), plugins_of(args), Ledger()
    call = plugged(pipeline, given, plugins)
    plan = plan_of_call(args, pipeline, call)
    tell(unread(prompts) if args.model == "scenes" else None)
    tell(untrained(plan))
    settings = {"model": str(args.model), **made_by(pipeline, folder, how_options(args).get("refiner"), **given)}
    settings |= plugin_settings(plugins, call, args.batch_size) | search_settings(args)
    search = make_search(args, pipeline, prompts, plan)

    def draw(sink: Sink, todo: list[Request]) -> Iterator[tuple[Request, np.ndarray]]:
        trees = {"hooks": [*call.get("hooks", ()), ledger], "on_output": lambda *made: write_trees(args, sink, *made)}
        how = call if search is None else call | trees | {"search": search}
        return image_stream(
            pipeline, todo, batch_size=args.batch_size, every_scale=args.show_scales, each_once=True, **how
        )

    made = carry_out(args, requests, lambda: make_sink(args, settings, requests), draw)
    if made is None:
        return 130
    written = finish(args, made.sink, requests)
    if written is not None:
        rate = f", {made.new / made.seconds:.1f} images/s" if made.new else ""
        print(f"{written}: {len(requests)} images ({made.there} were there already){rate}")
        if ledger.images:
            print(f"{search}: {ledger}")
    return 0


def make_sink(args: argparse.Namespace, settings: dict[str, Any], requests: list[Request]) -> tuple[Sink, Job]:
    """Where the images go, and what must not change between the runs of one job: `settings`, and what is asked for."""
    from sample.commands.job import Job, metadata_digest, npz_job, requests_digest
    from sample.sinks import GenEvalTree, NpzFile, PngFolder

    informal = ("model",)  # a folder may have moved
    if args.out.suffix == ".npz":
        of_job = {**settings, "images": len(requests), "requests": requests_digest(requests)}
        sink = NpzFile(args.out, requests)
        return sink, Job(npz_job(args.out), of_job, informal, outputs=(sink.path, sink.parts))
    if args.prompts is not None:
        of_job = {**settings, "n": images_of_each(args), "requests": requests_digest(requests)}
        of_job["metadata"] = metadata_digest(requests)
        tree = GenEvalTree(args.out, settings, informal=informal, every_scale=args.show_scales)
        return tree, Job(args.out / "settings.json", of_job, informal, later=("metadata",))
    pictures = PngFolder(args.out, settings, informal=informal, every_scale=args.show_scales, trees=args.show_search)
    return pictures, Job(args.out / "settings.json", settings, informal)


def finish(args: argparse.Namespace, sink: Sink, requests: list[Request]) -> str | None:
    """Complete the output; what was written, in words (None in all but one process)."""
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return None
    sink.finish()
    if args.out.suffix == ".npz":
        return str(args.out)
    if args.prompts is not None:
        return f"{args.out} (GenEval tree)"
    overviews = [path.name for path in write_overviews(args, sink, requests)]
    return f"{args.out}" + (f" (see {', '.join(overviews)})" if overviews else "")


def write_overviews(args: argparse.Namespace, sink: PngFolder, requests: list[Request]) -> list[Path]:
    """A grid of several images, those of a prompt in one row; with --show-scales the rows of scales; their paths."""
    from PIL import Image

    from sample.files import write_png
    from sample.sinks import file_stem, grid

    each = min(images_of_each(args), max(1, GRID_LIMIT // len({request.group for request in requests})))
    shown = [request for request in requests if request.place < each][:GRID_LIMIT]
    stem = file_stem(requests[0].prompt) if len({r.prompt for r in requests}) == 1 else "all"
    sheets = []
    if len(shown) > 1:
        images = [Image.open(sink.path(request)).convert("RGB") for request in shown]
        columns = each * max(1, round(sqrt(len(shown)) / each)) if stem == "all" and 1 < each <= WIDEST else None
        sheets.append((sink.folder / f"{stem}_grid.png", grid(images, columns=columns)))
    if args.show_scales:
        rows = [Image.open(sink.scales_path(request)).convert("RGB") for request in shown]
        sheets.append((sink.folder / f"{stem}_scales.png", grid(rows, columns=1)))
    for path, sheet in sheets:
        write_png(path, sheet)
    return [path for path, _ in sheets]
