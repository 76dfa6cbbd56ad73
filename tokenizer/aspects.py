"""Schedules for any aspect ratio: Infinity's templates of 13 scales, from 3:1 to 1:3, at four sizes."""

from __future__ import annotations

import re

from tokenizer.schedule import ScaleSchedule

STRIDE = 16  # pixels per token of the finest scale along a side

SIZES = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
"""Scales of each size class; the square ones are 256, 512, 768 and 1024 pixels."""

# Height and width of every scale, by height over width; landscapes are these turned.
_TEMPLATES = {
    1.0: "1,2,4,6,8,12,16,20,24,32,40,48,64",
    1.25: "1,2,3,5x4,10x8,15x12,20x16,25x20,30x24,35x28,45x36,55x44,70x56",
    1.333: "1,2,4x3,8x6,12x9,16x12,20x15,24x18,28x21,36x27,48x36,60x45,72x54",
    1.5: "1,2,3x2,6x4,9x6,15x10,21x14,27x18,33x22,39x26,48x32,63x42,78x52",
    1.75: "1,2,3,7x4,11x6,14x8,21x12,28x16,35x20,42x24,56x32,70x40,84x48",
    2.0: "1,2,4x2,6x3,10x5,16x8,22x11,30x15,38x19,46x23,60x30,74x37,90x45",
    2.5: "1,2,5x2,10x4,15x6,20x8,25x10,30x12,40x16,50x20,65x26,80x32,100x40",
    3.0: "1,2,6x2,9x3,15x5,21x7,27x9,36x12,45x15,54x18,72x24,90x30,111x37",
}


def _all_templates() -> dict[float, ScaleSchedule]:
    portrait = {ratio: ScaleSchedule.of(text) for ratio, text in _TEMPLATES.items()}
    turned = {
        int(1000 / ratio) / 1000: ScaleSchedule(tuple((w, h) for h, w in schedule.sides))
        for ratio, schedule in portrait.items()
    }
    return dict(sorted((turned | portrait).items()))


TEMPLATES = _all_templates()
"""The full schedule of every template, by height over width."""


def nearest_template(height_over_width: float) -> float:
    """The key of `TEMPLATES` nearest to a ratio, by their difference as in the official code."""
    return min(TEMPLATES, key=lambda ratio: abs(ratio - height_over_width))


def aspect_schedule(aspect: str | float, size: str = "1M") -> ScaleSchedule:
    """The schedule of an aspect ratio at a size: the first scales of the nearest template.

    Its `grid`, which 2-D positions are measured on, is the last scale at 1M whatever the size, so that a cell means
    the same place at all of them.

    Args:
        aspect: "16:9", width to height; or a float, height over width.
        size: 0.06M, 0.25M, 0.60M or 1M, in pixels.

    Raises:
        ValueError: on an unreadable aspect, one beyond 3:1 and 1:3, or an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    ratio = read_aspect(aspect)
    whole = TEMPLATES[nearest_template(ratio)]
    return ScaleSchedule(whole.sides[: SIZES[size]], grid=whole.latent_hw)


def read_aspect(aspect: str | float) -> float:
    """Height over width of "16:9" (width to height), or of a float (not of a text) that is it already.

    Raises:
        ValueError: if it cannot be read, or is beyond 3:1 and 1:3.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[:/x]\s*(\d+(?:\.\d+)?)\s*", str(aspect))
    try:
        ratio = float(found[2]) / float(found[1]) if isinstance(aspect, str) else float(aspect)
    except (TypeError, ValueError, ZeroDivisionError):  # TypeError: not of that form
        raise ValueError(f"aspect must be width:height, e.g. 16:9, got {aspect!r}") from None
    if not 0.33 <= ratio <= 3.01:
        raise ValueError(f"aspect must be between 3:1 and 1:3, got {aspect!r}")
    return ratio


def schedule_of(h: int, w: int) -> ScaleSchedule:
    """The schedule, of all templates at all sizes, that ends with a grid of h x w tokens.

    Raises:
        ValueError: if none does.
    """
    for ratio in TEMPLATES:
        for size in SIZES:
            schedule = aspect_schedule(ratio, size)
            if schedule.latent_hw == (h, w):
                return schedule
    raise ValueError(f"no template ends with {h}x{w} tokens: images must have the size of an aspect and size class")
