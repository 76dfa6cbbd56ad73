"""Drawn scenes with one object drawn wrongly, in the ways generated pictures go wrong: what the scenes reward learns
to mistrust.

A spoiled object is none of the eight shapes any more. Shapes: 64 x 64 pixels, canvas units are pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from evaluation.scenes import CANVAS, SHAPES, Scene, SceneObject, coverage, render

SIDE = int(CANVAS)


def spoil(rng: np.random.Generator, scene: Scene) -> tuple[np.ndarray, Scene, str]:
    """The render with one object wiped, stretched, skewed, spliced or smeared; the scene without it; what was done.

    Returns:
        uint8 (64, 64, 3); the scene of the objects that are whole; a name of `WAYS`.
    """
    item, rest = pick(rng, scene)
    way = list(WAYS)[rng.integers(len(WAYS))]
    return paint(render(rest, SIDE), WAYS[way](rng, item), item.rgb), rest, way


def roughen(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """The render with one object a little too wide or too high, by up to 8 %: still right, uint8 (64, 64, 3)."""
    item, rest = pick(rng, scene)
    return paint(render(rest, SIDE), mask_of(item, stretch=_along(rng, rng.uniform(1.0, 1.08))), item.rgb)


def pick(rng: np.random.Generator, scene: Scene) -> tuple[SceneObject, Scene]:
    """One of the objects, and the scene without it."""
    victim = int(rng.integers(len(scene.objects)))
    rest = tuple(item for i, item in enumerate(scene.objects) if i != victim)
    return scene.objects[victim], replace(scene, objects=rest)


def paint(image: np.ndarray, mask_hw: np.ndarray, rgb: tuple[int, int, int]) -> np.ndarray:
    """An image (h, w, 3) with a colour over it, as opaque as the mask says."""
    levels = image + mask_hw[..., None] * (np.array(rgb) - image.astype(np.float64))
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def mask_of(item: SceneObject, *, shape: str | None = None, stretch: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """How much of each pixel an object covers, (64, 64) in [0, 1]; perhaps of another shape, or stretched in (x, y)."""
    edges, radius = np.arange(SIDE + 1), item.diameter / 2
    x_edges = (edges - item.cx) / (radius * stretch[0])
    return coverage(shape or item.shape, x_edges, (edges - item.cy) / (radius * stretch[1]))


def _wiped(rng: np.random.Generator, item: SceneObject) -> np.ndarray:
    """A third to two thirds of it gone, from one side."""
    mask, (x0, y0, x1, y1) = mask_of(item), item.box
    share, side = rng.uniform(1 / 3, 2 / 3), rng.integers(4)
    if side < 2:
        cut = int(y0 + share * (y1 - y0))
        mask[slice(None, cut) if side == 0 else slice(cut, None)] = 0
    else:
        cut = int(x0 + share * (x1 - x0))
        mask[:, slice(None, cut) if side == 2 else slice(cut, None)] = 0
    return mask


def _stretched(rng: np.random.Generator, item: SceneObject) -> np.ndarray:
    """1.35 to 2 times as long as it is wide, or the other way round."""
    return mask_of(item, stretch=_along(rng, rng.uniform(1.35, 2.0)))


def _along(rng: np.random.Generator, ratio: float) -> tuple[float, float]:
    return (ratio**0.5, ratio**-0.5) if rng.random() < 0.5 else (ratio**-0.5, ratio**0.5)


def _skewed(rng: np.random.Generator, item: SceneObject) -> np.ndarray:
    """Every row further to one side than the one above it, by 0.4 to 0.9 of a pixel."""
    mask, slope = mask_of(item), rng.choice((-1, 1)) * rng.uniform(0.4, 0.9)
    shifts = np.rint(slope * (np.arange(SIDE) - item.cy)).astype(int)
    places = np.arange(SIDE)[None, :] - shifts[:, None]
    inside = (places >= 0) & (places < SIDE)
    return np.take_along_axis(mask, np.clip(places, 0, SIDE - 1), axis=1) * inside


def _spliced(rng: np.random.Generator, item: SceneObject) -> np.ndarray:
    """One half of it is of another shape."""
    others = [shape for shape in SHAPES if shape != item.shape]
    mask, other = mask_of(item), mask_of(item, shape=others[rng.integers(len(others))])
    middles = np.arange(SIDE) + 0.5
    first = (middles < item.cx)[None, :] if rng.random() < 0.5 else (middles < item.cy)[:, None]
    return np.where(first, mask, other)


def _smeared(rng: np.random.Generator, item: SceneObject) -> np.ndarray:
    """With a paler copy beside it that touches it."""
    angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 0.8) * item.diameter
    moved = replace(item, cx=item.cx + far * np.cos(angle), cy=item.cy + far * np.sin(angle))
    return np.maximum(mask_of(item), rng.uniform(0.5, 1.0) * mask_of(moved))


WAYS: dict[str, Callable[[np.random.Generator, SceneObject], np.ndarray]] = {
    "wiped": _wiped,
    "stretched": _stretched,
    "skewed": _skewed,
    "spliced": _spliced,
    "smeared": _smeared,
}
