"""`nextscale sample`: its options, and the job they describe. Torch is imported when the job starts, not to parse."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sample.plan_options import add_plan_options, by_scale, call_settings, how_options
from sample.search_options import add_search_options, images_of_each, make_search, search_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from sample.images import Job, PngFolder, Request, Sink
    from sample.pipeline import NextScaleOutput, NextScalePipeline
    from sample.plan import Plan

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


def add_sampling(parser: argparse.ArgumentParser, *, out: str) -> argparse._ArgumentGroup:
    """Declare how to draw, with which model and to where (the group that is returned); `out` describes --out."""
    take_negative_lists(parser)
    how = parser.add_argument_group("how (the model's own settings unless given)")
    how.add_argument("--guidance", type=by_scale(float), help="strength of guidance; 0 is none")
    how.add_argument("--top-k", type=by_scale(int), help="draw from the k likeliest tokens; 0 is all")
    how.add_argument("--top-p", type=by_scale(float), help="then from the likeliest that make up this probability")
    how.add_argument("--temperature", type=by_scale(float), help="below 1 draws likelier tokens; 1.1,1,1 is by scale")
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
    from sample.images import image_stream, make_requests, process_share
    from sample.ledger import Ledger
    from sample.load import made_by
    from sample.plan import untrained

    if args.out is not None:
        check_place("--out", args.out, folder=not to_npz)
    folder, pipeline = open_model(args)
    prompts = texts_or_classes(prompts, args.classes, pipeline)
    requests = make_requests(prompts, per_prompt=per_prompt, seed=args.seed, metadata=metadata)
    call, ledger = call_options(args), Ledger()
    plan = plan_of_call(args, pipeline, call)
    tell(unread(prompts) if args.model == "scenes" else None)
    tell(untrained(plan))
    settings = {"model": str(args.model), **made_by(pipeline, folder, how_options(args).get("refiner"), **call)}
    settings |= search_settings(args)
    sink, job = settle(args, lambda: make_sink(args, settings, requests))
    mine = process_share(requests, sink.block)
    todo = sink.missing(mine)
    there = len(requests) - of_all_processes(len(todo))
    search = make_search(args, pipeline, prompts, plan)
    if search is not None:
        call |= {"search": search, "hooks": [ledger], "on_output": lambda *made: write_trees(args, sink, *made)}
    stream = image_stream(pipeline, todo, batch_size=args.batch_size, every_scale=args.show_scales, **call)
    started = time.perf_counter()
    try:
        write_all(stream, sink, job, total=len(mine), done=len(mine) - len(todo))
        seconds = time.perf_counter() - started
        written = finish(args, sink, requests)
    except KeyboardInterrupt:
        left = len(sink.missing(requests))
        print(
            f"\nnextscale: stopped with {len(requests) - left} of {len(requests)} images done; "
            "the same command continues",
            file=sys.stderr,
        )
        return 130
    if written is not None:
        rate = f", {len(todo) / seconds:.1f} images/s" if todo else ""
        print(f"{written}: {len(requests)} images ({there} were there already){rate}")
        if ledger.images:
            print(f"{search}: {ledger}")
    return 0


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


def check_text(name: str, text: str) -> None:
    """Raise ValueError if a text of the command line is of bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be text in UTF-8, got {text!r}") from None


def check_out(out: Path | None, *, npz: bool) -> None:
    """Raise ValueError if --out looks like a file that is not made: it would become a folder of that name."""
    pictures = (".png", ".jpg", ".jpeg", ".webp", ".npz")
    if out is not None and out.suffix.lower() in pictures and not out.is_dir() and not (npz and out.suffix == ".npz"):
        raise ValueError(f"--out must be a folder{', or FILE.npz' if npz else ''}, got {out}")


def settle(args: argparse.Namespace, make: Callable[[], tuple[Any, Job]]) -> tuple[Any, Job]:
    """The sink and the job that `make` gives for --out; without one that becomes the first default folder that fits.

    Raises:
        ValueError: if what is in the named folder was made otherwise, or nothing can be written here.
    """
    from sample.files import check_place

    if args.out is not None:
        sink, job = make()
        job.check()
        return sink, job
    check_place("--out", Path(), folder=True)
    for number in count(1):
        args.out = Path("pictures" if number == 1 else f"pictures-{number}")
        if args.out.exists() and not args.out.is_dir():
            continue
        sink, job = make()
        try:
            job.check()
        except ValueError:
            continue
        return sink, job


def read_prompts(args: argparse.Namespace) -> tuple[list[str] | None, list[dict[str, Any]] | None]:
    """The texts to draw (None when classes are asked for), and their GenEval metadata if they have any.

    Raises:
        ValueError: if not exactly one of texts, file and classes is given, or a line cannot be read.
        FileNotFoundError: if there is no such file.
    """
    given = [bool(args.prompt), args.prompts is not None, args.classes is not None]
    if sum(given) != 1:
        raise ValueError(
            'give what to draw: a text ("a red star"), or --prompts FILE, or --class 3, and only one of them'
        )
    if args.prompts is None:
        for text in args.prompt:
            check_text("prompt", text)
        return args.prompt or None, None
    piped = str(args.prompts) == "-" or args.prompts.is_fifo()
    if piped and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(f"--prompts {args.prompts} can be read by one process only: give a file to several")
    if str(args.prompts) != "-" and (not args.prompts.exists() or args.prompts.is_dir()):  # a pipe will do
        raise FileNotFoundError(f"--prompts {args.prompts} is not a file")
    from sample.files import read_text

    text = read_text("--prompts", args.prompts)
    numbered = enumerate(re.split(r"\r\n|\r|\n", text), 1)  # not at what else Unicode takes for the end of a line
    lines = {number: line.strip() for number, line in numbered if line.strip()}
    if not lines:
        raise ValueError(f"--prompts {args.prompts} holds no line")
    if _is(list, text):
        raise ValueError(f"--prompts {args.prompts} is a list in JSON: give one text, or one JSON object, a line")
    if next(iter(lines.values())).startswith("{"):
        metadata = [_metadata(args.prompts, number, line) for number, line in lines.items()]
        return [entry["prompt"] for entry in metadata], metadata
    for number, line in lines.items():
        if _is(dict, line):
            raise ValueError(f"--prompts {args.prompts} line {number} is a JSON object, and the first line is a text")
    return list(lines.values()), None


def _is(kind: type, text: str) -> bool:
    """Whether a text is a list, or an object (dict), in JSON."""
    try:
        return isinstance(json.loads(text), kind)
    except json.JSONDecodeError:
        return False


def _metadata(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        if isinstance(entry["prompt"], str):
            return entry
    except (json.JSONDecodeError, KeyError, TypeError):
        pass
    raise ValueError(f"--prompts {path} line {number} is not a JSON object with a prompt, as the first line is")


def whole_numbers(name: str, text: str) -> list[int]:
    """The numbers of "1,4".

    Raises:
        ValueError: if one is not a whole number above 0.
    """
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{name} must be whole numbers above 0 with commas between them, got {text!r}")
    return [int(part) for part in parts]


def texts_or_classes(
    texts: list[str] | None, classes: str | None, pipeline: NextScalePipeline
) -> list[str] | list[int]:
    """What to draw: the texts, or if there are none the classes of `--class`.

    Raises:
        ValueError: if the model reads the other of the two, or knows no such classes.
    """
    if texts is None:
        return read_classes(classes, pipeline)
    if pipeline.by_class:
        raise ValueError("texts are for text models, and this model draws classes: give --class, e.g. --class 3")
    return texts


def read_classes(text: str, pipeline: NextScalePipeline) -> list[int]:
    """The classes of "3", "0,3,7", "0-9", "all", "null" or, where classes have names, "golden retriever".

    Raises:
        ValueError: if `text` is none of these, or the model knows no such classes.
    """
    from sample.classes import parse_classes
    from sample.pipeline import check_classes

    if not pipeline.by_class:
        raise ValueError('--class is for class models, and this model reads texts: give one, e.g. "a red star"')
    known = pipeline.transformer.config.num_classes
    labels = parse_classes(text, known, pipeline.config.class_names)
    try:
        return check_classes(labels, known)
    except ValueError as error:
        raise ValueError(f"--class {text}: {error}") from None


def unread(prompts: Sequence[str]) -> str | None:
    """What is wrong with captions of a kind that the bundled model was not trained on; None if there are none."""
    from sample.scene_reward import Caption

    strange = []
    for prompt in prompts:
        try:
            Caption.of(prompt)
        except ValueError:
            strange.append(prompt)
    if not strange:
        return None
    more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
    return (
        "the bundled model draws one to four plain shapes from captions like 'a red star left of a ring' or "
        f"'three circles'; {strange[0]!r}{more} it does not understand"
    )


def tell(caution: str | None) -> None:
    """A caution on stderr, if there is one, by one process; the work is done anyway."""
    from accelerate import PartialState

    if caution is not None and PartialState().is_main_process:
        print(f"nextscale: caution: {caution}", file=sys.stderr)


def call_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that go into the pipeline's call, without those left to the model."""
    options = {**call_settings(args), "negative_prompt": args.negative, "smooth": args.smooth or None}
    return {name: value for name, value in options.items() if value is not None}


def plan_of_call(args: argparse.Namespace, pipeline: NextScalePipeline, call: dict[str, Any]) -> Plan:
    """The plan of the settings in `call`. Raises ValueError if they make none, or an option could do nothing in it."""
    plan = pipeline.make_plan(**{name: v for name, v in call.items() if name not in ("negative_prompt", "smooth")})
    if call.get("guidance_until") and not plan.guided:
        raise ValueError(f"--guidance-until {call['guidance_until']}: none of these scales is guided, see --guidance")
    if call.get("negative_prompt") is not None and not plan.guided:
        raise ValueError("--negative acts through guidance, and no scale is guided: see --guidance")
    refiner = how_options(args).get("refiner")
    if refiner is not None and all(stage.model is not pipeline.refiner for stage in plan.stages):
        raise ValueError(f"--refiner {refiner} makes the scales after code:N: give --plan code:N")
    return plan


def make_sink(args: argparse.Namespace, settings: dict[str, Any], requests: list[Request]) -> tuple[Sink, Job]:
    """Where the images go, and what must not change between the runs of one job: `settings`, and what is asked for."""
    from sample.images import GenEvalTree, Job, NpzFile, PngFolder, metadata_digest, npz_job, requests_digest

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


def of_all_processes(count: int) -> int:
    """The sum of every process's count; all of them must ask."""
    from accelerate.utils import gather_object

    return sum(gather_object([count]))


def write_all(stream: Iterator[tuple[Request, np.ndarray]], sink: Sink, job: Job, *, total: int, done: int) -> None:
    """Write what comes under a progress bar: `total` images, of which `done` are there. The job's settings go first."""
    from accelerate import PartialState
    from tqdm import tqdm

    quiet = not PartialState().is_local_main_process or None  # None: also off where stderr is no terminal
    with tqdm(total=total, initial=done, unit="image", disable=quiet) as bar:
        for number, (request, image) in enumerate(stream):
            if number == 0:
                job.save()
            sink.write(request, image)
            bar.update()


def finish(args: argparse.Namespace, sink: Sink, requests: list[Request]) -> str | None:
    """Wait for the other processes, complete the output; what was written, in words (None in all but one process)."""
    from accelerate import PartialState

    state = PartialState()
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    sink.finish()
    if args.out.suffix == ".npz":
        return str(args.out)
    if args.prompts is not None:
        return f"{args.out} (GenEval tree)"
    overviews = [path.name for path in write_overviews(args, sink, requests)]
    return f"{args.out}" + (f" (see {', '.join(overviews)})" if overviews else "")


def write_trees(args: argparse.Namespace, sink: Sink, batch: list[Request], output: NextScaleOutput) -> None:
    """With --show-search, the family tree of each image of a batch: DIR/search/<its name>.png."""
    if not args.show_search:
        return
    from sample.files import write_png
    from sample.search_tree import family_tree

    for request, choices in zip(batch, output.search.choices):
        write_png(sink.tree_path(request), family_tree(choices, f"{request.prompt}, seed {request.seed}"))


def write_overviews(args: argparse.Namespace, sink: PngFolder, requests: list[Request]) -> list[Path]:
    """A grid of several images, and with --show-scales the rows of scales under each other; their paths."""
    from PIL import Image

    from sample.files import write_png
    from sample.images import file_stem, grid

    shown = requests[:GRID_LIMIT]
    stem = file_stem(requests[0].prompt) if len({r.prompt for r in requests}) == 1 else "all"
    sheets = []
    if len(shown) > 1:
        images = [Image.open(sink.path(request)).convert("RGB") for request in shown]
        sheets.append((sink.folder / f"{stem}_grid.png", grid(images)))
    if args.show_scales:
        rows = [Image.open(sink.scales_path(request)).convert("RGB") for request in shown]
        sheets.append((sink.folder / f"{stem}_scales.png", grid(rows, columns=1)))
    for path, sheet in sheets:
        write_png(path, sheet)
    return [path for path, _ in sheets]
