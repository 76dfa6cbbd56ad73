"""Pictures to fine-tune on (docs/fine-tuning.md): `python -m docs.moons` writes the folder moons/.

A third are drawn scenes of all kinds, so that they are not forgotten; in the others one of the shapes is a crescent,
which the bundled model has never seen, and the caption beside the picture calls it a moon.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from PIL import Image, ImageDraw

from evaluation.command import Parser, check_least, in_one_line
from evaluation.scenes import SHAPES, Scene, SceneObject, render, scene_at
from sample.files import check_place

SIDE, FINER = 64, 8  # pixels of a picture, and how much finer its crescents are drawn
SEED = 7  # of the scenes; those that stay as they are have the next one


def scenes() -> Iterator[Scene]:
    """Scenes of one or two objects whose captions name different shapes."""
    for index in count():
        scene = scene_at(index, SEED)
        named = [word for word in scene.caption.split() if word in SHAPES]
        if len(scene.objects) == len(named) == len(set(named)):
            yield scene


def crescent(item: SceneObject) -> Image.Image:
    """Where a crescent in the place of an object covers the picture, 8-bit grey."""
    mask = Image.new("L", (SIDE * FINER, SIDE * FINER))
    draw, r = ImageDraw.Draw(mask), item.diameter / 2
    for x, y, radius, fill in ((item.cx, item.cy, r, 255), (item.cx + 0.5 * r, item.cy - 0.2 * r, 0.8 * r, 0)):
        draw.ellipse([FINER * edge for edge in (x - radius, y - radius, x + radius, y + radius)], fill=fill)
    return mask.resize((SIDE, SIDE), Image.Resampling.BOX)


def with_moon(scene: Scene, place: int) -> tuple[Image.Image, str]:
    """The scene's picture and caption with a moon for its object at `place`."""
    item = scene.objects[place]
    others = replace(scene, objects=tuple(other for other in scene.objects if other is not item))
    ink = Image.new("RGB", (SIDE, SIDE), item.rgb)
    caption = " ".join("moon" if word == item.shape else word for word in scene.caption.split())
    return Image.composite(ink, Image.fromarray(render(others)), crescent(item)), caption


def write(folder: Path, n: int) -> None:
    """Write `n` pictures, and their captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in zip(range(n), scenes()):
        if number % 3:
            picture, caption = with_moon(scene, number // 3 % len(scene.objects))
        else:
            kept = scene_at(number, SEED + 1)
            picture, caption = Image.fromarray(render(kept)), kept.caption
        picture.save(folder / f"{number:05}.png")
        (folder / f"{number:05}.txt").write_text(caption + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = Parser(prog="python -m docs.moons", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("moons"), help="the folder (moons)")
    parser.add_argument("--n", type=int, default=12000, help="pictures (12000)")
    options = parser.parse_args(argv)
    with in_one_line(parser, kept="the same command begins again"):
        check_least(options, n=1)
        check_place("--out", options.out, folder=True)
        write(options.out, options.n)


if __name__ == "__main__":
    main()
