"""The family tree of a search as a picture: which candidates went on after which scale, and why."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from sample.search import Choice

THUMB, FRAME, TEXT, GAP, LINKS = 64, 3, 14, 6, 46  # pixels: picture, its frame, its line of text, between, columns
KEPT, DROPPED, INK = (40, 150, 70), (205, 205, 205), (60, 60, 60)
CELL = THUMB + 2 * FRAME
WHY = {"cluster": "nearest to its cluster", "resample": "drawn by reward", "random": "at random", "best": "the best"}


def family_tree(choices: Sequence[Choice], title: str = "") -> Image.Image:
    """One image's decisions: a column of candidates for each, those that went on in green, lines to their places.

    Under a candidate is its score, or the number of its cluster (c0, c1, ...), where it has one. The last column is
    the image that was given.

    Raises:
        ValueError: if the decisions hold no pictures (`Search.pictures`).
    """
    if not choices or any(choice.images is None for choice in choices):
        raise ValueError("a family tree needs a search with pictures=True")
    tallest = max(len(choice.images) for choice in choices)
    top = 40 if title else 24
    height = top + tallest * (CELL + TEXT + GAP) + GAP
    sheet = Image.new("RGB", (GAP + (len(choices) + 1) * (CELL + LINKS + 60), height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    if title:
        draw.text((GAP, 4), title, fill=INK, font=ImageFont.load_default(size=13))
    places = [_places(i, len(choice.images), top, height) for i, choice in enumerate(choices)]
    places.append(_places(len(choices), 1, top, height))
    for i, choice in enumerate(choices):
        head = f"after scale {choice.scale}: {len(choice.images)} to {len(choice.kept)}, {WHY[choice.how]}"
        draw.multiline_text((places[i][0][0], top - 18), head.replace(", ", ",\n", 1), fill=INK, font=font, spacing=1)
        for child, parent in enumerate(choice.kept):
            draw.line([_right(places[i][parent]), _left(places[i + 1][child])], fill=KEPT, width=2)
        for number, corner in enumerate(places[i]):
            _candidate(sheet, draw, font, choice, number, corner)
    winner = choices[-1].kept[0]
    _paste(sheet, draw, choices[-1].images[winner], places[-1][0], KEPT)
    draw.text((places[-1][0][0], top - 18), "given", fill=INK, font=font)
    return sheet


def _places(column: int, count: int, top: int, height: int) -> list[tuple[int, int]]:
    """Corners of `count` candidates, spread over the height."""
    left = GAP + column * (CELL + LINKS + 60)
    room = (height - top - GAP) / count
    return [(left, int(top + 10 + room * (i + 0.5) - (CELL + TEXT) / 2)) for i in range(count)]


def _candidate(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont, choice: Choice, number: int, corner: tuple
) -> None:
    times = choice.kept.count(number)
    _paste(sheet, draw, choice.images[number], corner, KEPT if times else DROPPED)
    words = []
    if choice.scores is not None:
        words.append(f"{choice.scores[number]:.3g}")
    if choice.clusters is not None:
        words.append(f"c{choice.clusters[number]}")
    if times > 1:
        words.append(f"x{times}")
    draw.text((corner[0], corner[1] + CELL), " ".join(words), fill=KEPT if times else INK, font=font)


def _paste(sheet: Image.Image, draw: ImageDraw.ImageDraw, image: object, corner: tuple, frame: tuple) -> None:
    x, y = corner
    draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=frame)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    sheet.paste(picture.resize((THUMB, THUMB), Image.Resampling.LANCZOS), (x + FRAME, y + FRAME))


def _right(corner: tuple[int, int]) -> tuple[int, int]:
    return corner[0] + CELL, corner[1] + CELL // 2


def _left(corner: tuple[int, int]) -> tuple[int, int]:
    return corner[0], corner[1] + CELL // 2
