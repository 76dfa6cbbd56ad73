"""`nextscale edit`: its options, and the edit they describe. Torch is imported when the work starts, not to parse."""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sample.commands.job import carry_out, check_out, write_trees
from sample.commands.plan_options import how_options, plugins_of
from sample.commands.prompts import check_text, read_classes
from sample.commands.sampling_options import add_sampling, call_options, check_sampling, open_model, plan_of_call
from sample.commands.search_options import add_search_options, images_of_each, make_search, search_settings
from sample.own_code import plugin_settings
from sample.processes import tell

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from sample.images import Request
    from sample.pipeline import NextScalePipeline
    from sample.sinks import PngFolder

EXAMPLES = """examples:
  nextscale edit scene.png "a red star and a blue heart" --box 4,20,34,50 --n 4 --out edits/
  nextscale edit photo.png --model var-d36 --class "golden retriever" --mask mask.png --feather 8
  nextscale edit photo.png --model var-d36 --extend 64,64,64,64    draw 64 more pixels around a square picture
  nextscale edit photo.png --model var-d36 --mask mask.png         class models fill in without a class, too
  nextscale edit scene.png "a red star and a blue heart" --box 4,20,34,50 --search best --n 8      the best of 8 edits

White in a mask is repainted, black stays bit by bit, grey is blended. A text says what the whole picture is to show.
The same command again continues where it stopped; finished images are kept."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `nextscale edit`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = "Repaint a part of a picture, or draw more around it.", EXAMPLES
    parser.add_argument("image", type=Path, help="the picture, of any size")
    what = parser.add_argument_group("what to draw")
    what.add_argument("prompt", nargs="?", help="a text, for text models")
    what.add_argument(
        "--class", dest="label", metavar="CLASS", help='a class, for class models: 207, "golden retriever"'
    )
    what.add_argument("--n", type=int, help="how many (1); with --search, the N of the search (2)")
    what.add_argument("--seed", type=int, default=0, help="the name of the first; the next ones get seed + 1, ... (0)")
    what.add_argument("--negative", metavar="TEXT", help="what to steer away from")

    part = parser.add_argument_group("where in the picture (one of)")
    part.add_argument("--mask", type=Path, metavar="FILE", help="a picture, white where to repaint; any size")
    part.add_argument(
        "--box", action="append", metavar="X0,Y0,X1,Y1", help="repaint a box, in pixels; several are allowed"
    )
    part.add_argument(
        "--extend",
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        help="draw so many pixels more on each side; all that is new must fit into one window of the model's shape",
    )

    edge = parser.add_argument_group("its edge")
    edge.add_argument("--invert", action="store_true", help="repaint all but that part")
    edge.add_argument("--feather", type=float, default=0, metavar="PIXELS", help="blend so far into the kept part (0)")
    edge.add_argument(
        "--mask-rule",
        choices=("corrected", "official", "whole"),
        default="corrected",
        help="which tokens are kept, see docs/editing.md (corrected)",
    )
    add_sampling(parser, out="a folder")
    add_search_options(parser)


def run(args: argparse.Namespace) -> int:
    """Do what the options say.

    Returns:
        0; 130 when interrupted.

    Raises:
        ValueError, FileNotFoundError: on options that make no sense, naming them.
    """
    check_out(args.out, npz=False)
    image, mask = read_pictures(args)
    count = images_of_each(args)
    check_sampling(args)
    if args.prompt is not None:
        check_text("prompt", args.prompt)

    from sample.commands.job import Job
    from sample.files import check_place
    from sample.images import image_stream, make_requests
    from sample.ledger import Ledger
    from sample.load import made_by
    from sample.plan import untrained
    from sample.plugins import plugged
    from sample.sinks import PngFolder

    if args.out is not None:
        check_place("--out", args.out, folder=True)
    folder, pipeline = open_model(args)
    prompt = read_prompt(args, pipeline)
    given, plugins = call_options(args), plugins_of(args)
    call = plugged(pipeline, given, plugins)
    plan = plan_of_call(args, pipeline, call)
    tell(untrained(plan))
    settings = {"image": digest(image), "mask": digest(mask), "mask_rule": args.mask_rule, **search_settings(args)}
    settings |= {"model": str(args.model), **made_by(pipeline, folder, how_options(args).get("refiner"), **given)}
    settings |= plugin_settings(plugins, call, args.batch_size)
    requests = make_requests([prompt], per_prompt=count, seed=args.seed)
    informal = ("model",)  # a folder may have moved

    def make_sink() -> tuple[PngFolder, Job]:
        sink = PngFolder(args.out, settings, informal=informal, trees=args.show_search)
        return sink, Job(args.out / "settings.json", settings, informal)

    search, ledger = make_search(args, pipeline, [prompt], plan), Ledger()
    call |= {"image": image, "mask_image": mask, "mask_rule": args.mask_rule, "search": search}
    call["hooks"] = (*call.get("hooks", ()), *([] if search is None else [ledger]))

    def draw(sink: PngFolder, todo: list[Request]) -> Iterator[tuple[Request, np.ndarray]]:
        how = call | {"on_output": lambda *made: write_trees(args, sink, *made)}
        return image_stream(pipeline, todo, batch_size=args.batch_size, each_once=True, **how)

    made = carry_out(args, requests, make_sink, draw, noun="edits")
    if made is None:
        return 130
    finish(made.sink, requests, image, mask, done=made.there)
    if ledger.images:
        print(f"{search}: {ledger}")
    return 0


def read_prompt(args: argparse.Namespace, pipeline: NextScalePipeline) -> str | int:
    """The text to draw, or the class; the null class where a class model is given none.

    Raises:
        ValueError: if the model reads the other of the two, or a text model is given none.
    """
    if not pipeline.by_class:
        if args.label is not None:
            raise ValueError("--class is for class models, and this model reads texts: leave it out")
        if args.prompt is None:
            raise ValueError('this model reads texts: say what the whole picture is to show, e.g. "a red star"')
        return args.prompt
    if args.prompt is not None:
        raise ValueError("this model knows classes, not texts: give --class, or nothing to fill in without one")
    if args.label is None:
        return pipeline.transformer.config.num_classes
    labels = read_classes(args.label, pipeline)
    if len(labels) != 1:
        raise ValueError(f"--class must be one class, got {args.label!r}, which are {len(labels)}")
    return labels[0]


def read_pictures(args: argparse.Namespace) -> tuple[Image.Image, Image.Image]:
    """The picture, extended if it is to be, and its mask.

    Raises:
        ValueError: unless exactly one of mask, boxes and borders is given, and it can be read.
        FileNotFoundError: if a file is missing.
    """
    from PIL import Image, ImageOps

    from sample.pixels import to_rgb

    given = [args.mask is not None, args.box is not None, args.extend is not None]
    if sum(given) != 1:
        how = "--mask FILE, or --box X0,Y0,X1,Y1, or --extend LEFT,TOP,RIGHT,BOTTOM"
        raise ValueError(f"say where to repaint{', in one way only' if any(given) else ''}: {how}")
    image = in_eight_bits(to_rgb, args.image, "image")
    if args.extend is not None:
        from sample.edit import extend

        left, top, right, bottom = four_numbers("--extend", args.extend)
        if min(left, top, right, bottom) < 0 or not any((left, top, right, bottom)):
            raise ValueError(f"--extend must be 0 or more pixels, and one above 0, got {args.extend}")
        image, mask = extend(image, left=left, top=top, right=right, bottom=bottom)
    elif args.mask is not None:
        from sample.edit import grey

        mask = in_eight_bits(grey, args.mask, "--mask")
        mask = mask if mask.size == image.size else mask.resize(image.size, Image.Resampling.BILINEAR)
    else:
        mask = box_mask(image.size, [four_numbers("--box", box) for box in args.box])
    mask = ImageOps.invert(mask) if args.invert else mask
    return image, feathered(mask, args.feather)


def in_eight_bits(convert: Callable[[Image.Image], Image.Image], path: Path, name: str) -> Image.Image:
    """A picture file as `convert` makes it; raises ValueError, naming it, for levels of no stated range."""
    from sample.pixels import CorruptImage

    try:
        return convert(open_picture(path, name))
    except CorruptImage as error:
        raise ValueError(f"{name} {path}: {error}") from None


def open_picture(path: Path, name: str) -> Image.Image:
    """A picture file, turned upright.

    Raises:
        FileNotFoundError, ValueError: if there is none, or it cannot be read.
    """
    from PIL import Image, ImageOps

    if not path.is_file():
        raise FileNotFoundError(f"{name} {path} is not a file")
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)
    except Exception as error:  # Pillow's plug-ins raise what they like
        reason = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{name} {path} cannot be read as a picture: {reason[0]}") from None


def four_numbers(name: str, text: str) -> tuple[int, int, int, int]:
    """The four whole numbers of "4,20,34,50"; raises ValueError naming the option."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"{name} must be four numbers of pixels, 0 or more, like 4,20,34,50; got {text!r}")
    return tuple(map(int, parts))


def box_mask(size: tuple[int, int], boxes: list[tuple[int, int, int, int]]) -> Image.Image:
    """A mask of a picture of (width, height), white in the boxes (x0, y0, x1, y1); x1 and y1 are outside.

    Raises:
        ValueError: if a box is empty or not inside the picture.
    """
    from PIL import Image

    mask = Image.new("L", size, 0)
    for box in boxes:
        x0, y0, x1, y1 = box
        if not (x0 < x1 <= size[0] and y0 < y1 <= size[1]):
            raise ValueError(
                f"--box {x0},{y0},{x1},{y1} must have x0 < x1 and y0 < y1 inside {size[0]}x{size[1]} pixels"
            )
        mask.paste(255, box)
    return mask


def feathered(mask: Image.Image, pixels: float) -> Image.Image:
    """The mask with a soft edge that reaches `pixels` into the kept part; all that was white stays white.

    Raises:
        ValueError: if `pixels` is negative or infinite.
    """
    import numpy as np
    from PIL import Image
    from scipy.ndimage import distance_transform_edt

    if not 0 <= pixels < math.inf:
        raise ValueError(f"--feather must be a number of pixels, 0 or more, got {pixels:g}")
    levels = np.asarray(mask)
    if pixels == 0 or not (levels >= 128).any():
        return mask
    away = distance_transform_edt(levels < 128)
    return Image.fromarray(np.maximum(levels, (255 * np.clip(1 - away / (pixels + 1), 0, 1)).astype(np.uint8)))


def digest(picture: Image.Image) -> str:
    """Twelve hexadecimal digits that change with any pixel."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()[:12]


def finish(sink: PngFolder, requests: list[Request], image: Image.Image, mask: Image.Image, *, done: int) -> None:
    """Write the overview (the picture, what is repainted, the edits) and say what there is, in one process."""
    from accelerate import PartialState
    from PIL import Image

    from sample.files import write_png
    from sample.sinks import file_stem, grid

    if PartialState().is_main_process:
        hidden = Image.composite(Image.new("RGB", image.size, (255, 0, 255)), image, mask)
        edits = [Image.open(sink.path(request)).convert("RGB") for request in requests[:30]]
        overview = sink.folder / f"{file_stem(requests[0].prompt)}_grid.png"
        write_png(overview, grid([image, hidden, *edits], columns=min(len(edits) + 2, 8)))
        print(f"{sink.folder} (see {overview.name}): {len(requests)} edits ({done} were there already)")
