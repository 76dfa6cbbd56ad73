"""The picture of measured edits: a row a scene, a column a way of editing, the frame the judge's word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evaluation.sheet import RIGHT, WRONG

if TYPE_CHECKING:
    from evaluation.editing import Case

SIDE, FRAME, GAP, BETWEEN = 112, 3, 12, 26  # pixels: a picture, its frame, between pictures, between groups
HEAD, LINE = 104, 24  # of the page and of a row's text
INK, FAINT, BOX = (30, 30, 30), (110, 110, 110), (255, 0, 255)
LEGEND = (
    "Editing drawn scenes: the model repaints the magenta box so that the whole picture shows the text.",
    "Green: the judge sees exactly what the text says, in the box, and every pixel outside is unchanged. Red: not.",
)
GROUPS = {
    "replace": "the object is replaced",
    "add": "an object is added: the box was empty",
    None: "drawn afresh, without a picture",
}


@dataclass(frozen=True)
class Column:
    """One way of editing.

    Attributes:
        task: "replace", "add", or None for the text alone.
        words: what tells it from its neighbours.
        images: of the shown cases, (h, w, 3) uint8.
        right: the judge's word on each.
        share: right ones of all that were measured, in [0, 1].
    """

    task: str | None
    words: str
    images: Sequence[np.ndarray]
    right: Sequence[bool]
    share: float


def editing_sheet(cases: Sequence[Case], columns: Sequence[Column]) -> Image.Image:
    """A page of all `cases`; columns come in groups by task, in the order of `GROUPS`."""
    groups = [(task, [c for c in columns if c.task == task]) for task in GROUPS]
    groups = [(task, members) for task, members in groups if members]
    step, top = SIDE + 2 * FRAME + GAP, HEAD
    width = 2 * GAP + step + sum(BETWEEN + step * len(members) for _, members in groups)
    longest = max(_font(13).getlength(line) for line in LEGEND)
    row = SIDE + 2 * FRAME + LINE + GAP
    page = Image.new("RGB", (max(width, int(longest) + 3 * GAP), top + row * len(cases) + GAP), "white")
    draw = ImageDraw.Draw(page)
    for i, (line, colour) in enumerate(zip(LEGEND, (INK, FAINT))):
        draw.text((GAP, 8 + 20 * i), line, fill=colour, font=_font(13))
    draw.text((GAP, top - 36), "given", fill=INK, font=_font(13))
    for i, case in enumerate(cases):
        y = top + i * row + LINE
        draw.text((GAP, y - LINE + 4), f"“{case.metadata['prompt']}”", fill=INK, font=_font(13))
        page.paste(_given(case), (GAP + FRAME, y + FRAME))
    left = GAP + step
    for task, members in groups:
        left += BETWEEN
        draw.text((left, top - 56), GROUPS[task], fill=INK, font=_font(13))
        draw.line((left, top - 38, left + step * len(members) - GAP, top - 38), fill=FAINT)
        for column in members:
            draw.text((left, top - 34), column.words, fill=INK, font=_font(12))
            draw.text((left, top - 18), f"{100 * column.share:.0f} % right", fill=FAINT, font=_font(12))
            for i, (image, right) in enumerate(zip(column.images, column.right)):
                y = top + i * row + LINE
                page.paste(_framed(image, right), (left, y))
            left += step
    return page


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _given(case: Case) -> Image.Image:
    pixels = case.image("replace")
    given = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    zoom = SIDE / pixels.shape[0]
    x0, y0, x1, y1 = (round(v * zoom) - (j > 1) for j, v in enumerate(case.box))
    ImageDraw.Draw(given).rectangle((x0, y0, x1, y1), outline=BOX, width=2)
    return given


def _framed(image: np.ndarray, right: bool) -> Image.Image:
    framed = Image.new("RGB", (SIDE + 2 * FRAME,) * 2, RIGHT if right else WRONG)
    framed.paste(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.NEAREST), (FRAME, FRAME))
    return framed
