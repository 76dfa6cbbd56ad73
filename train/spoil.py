"""Drawn scenes with objects drawn wrongly, more or less, in the ways generated pictures go wrong: what the scenes
reward learns to mistrust. `damage` says how wrong an object came out, by comparison with the clean drawing.

Shapes: 64 x 64 pixels, canvas units are pixels; B images, K objects of a scene.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage

from evaluation.scenes import CANVAS, COLOURS, SHAPES, Scene, SceneObject, coverage, other_of, render
from tokenizer.schedule import ScaleSchedule

SIDE = int(CANVAS)
FURTHER = 0.25  # chance that each further object of a scene is spoiled too
REACH = 3  # pixels around an object's box in which damage counts as its own
TOLERATED, SOFTNESS = 0.15, 0.03  # damage at which an object is as likely whole as not, and how sharp that limit is


def spoil(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """The render with one object (or more, see `FURTHER`) drawn wrongly, slightly or badly: uint8 (64, 64, 3)."""
    first = rng.integers(len(scene.objects))
    chosen = [i == first or rng.random() < FURTHER for i in range(len(scene.objects))]
    kept = [item for item, gone in zip(scene.objects, chosen) if not gone]
    image = render(replace(scene, objects=tuple(kept)), SIDE).astype(np.float64)
    for item, gone in zip(scene.objects, chosen):
        if gone:
            way = list(WAYS)[rng.integers(len(WAYS))]
            mask, rgb = WAYS[way](rng, item), np.array(item.rgb, dtype=np.float64)
            if rng.random() < 0.15:
                rgb = _two_toned(rng, item)
            image += mask[..., None] * (rgb - image)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def scramble(
    rng: np.random.Generator,
    ids: Sequence[torch.Tensor],
    schedule: ScaleSchedule,
    scenes: Sequence[Scene],
    chosen: Sequence[int],
) -> list[torch.Tensor]:
    """Tokens with some of one object's replaced, from some scale on, by those of any scene at any place.

    Args:
        ids: of every scale, (B, l) or (B, l, n).
        scenes: what they show, B of them.
        chosen: which of them to touch.
    """
    touched = [tokens.clone() for tokens in ids]
    for i in chosen:
        item = scenes[i].objects[rng.integers(len(scenes[i].objects))]
        first, share = rng.integers(1, len(ids)), rng.uniform(0.1, 1.0)
        for k in range(first, len(ids)):
            if k > first and rng.random() < 0.5:
                continue
            for place in _tokens_at(item, schedule.sides[k], ids[k].shape[1]):
                if rng.random() < share:
                    touched[k][i, place] = ids[k][rng.integers(len(scenes)), rng.integers(ids[k].shape[1])]
    return touched


def _tokens_at(item: SceneObject, side: tuple[int, int], tokens: int) -> list[int]:
    """The tokens of a scale, of `tokens` on a latent grid of `side`, whose cells an object's box touches."""
    patch = round((side[0] * side[1] / tokens) ** 0.5)
    h, w = side[0] // patch, side[1] // patch
    x0, y0, x1, y1 = (edge / CANVAS for edge in item.box)
    rows, columns = range(int(y0 * h), min(int(np.ceil(y1 * h)), h)), range(int(x0 * w), min(int(np.ceil(x1 * w)), w))
    return [row * w + column for row in rows for column in columns]


def damage(image: np.ndarray, clean: np.ndarray, scene: Scene) -> np.ndarray:
    """How wrong each object of a scene is in an image: its pixels' summed difference from the clean drawing, as a share
    of what the object differs from the background in all.

    Args:
        image, clean: uint8 (64, 64, 3), both as drawn or both reconstructed.

    Returns:
        float64 (K,): 0 as drawn, 1 if the object is missing, more if other things are there as well.
    """
    wrong = np.abs(image.astype(np.float64) - clean).mean(-1)
    grey, found = np.mean(scene.levels), []
    for item in scene.objects:
        x0, y0, x1, y1 = (int(np.clip(edge, 0, SIDE)) for edge in _grown(item.box, REACH))
        contrast = np.abs(np.array(item.rgb) - grey).mean()
        found.append(wrong[y0:y1, x0:x1].sum() / (mask_of(item).sum() * contrast))
    return np.array(found)


def wholeness(damages: np.ndarray) -> np.ndarray:
    """Damage to the probability that an object counts as what was drawn: 1/2 at `TOLERATED`."""
    return 1 / (1 + np.exp((np.asarray(damages) - TOLERATED) / SOFTNESS))


def mask_of(item: SceneObject, *, shape: str | None = None, stretch: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """How much of each pixel an object covers, (64, 64) in [0, 1]; perhaps of another shape, or stretched in (x, y)."""
    edges, radius = np.arange(SIDE + 1), item.diameter / 2
    x_edges = (edges - item.cx) / (radius * stretch[0])
    return coverage(shape or item.shape, x_edges, (edges - item.cy) / (radius * stretch[1]))


def _grown(box: Sequence[float], by: float) -> tuple[float, float, float, float]:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def _ramp(rng: np.random.Generator, item: SceneObject, softness: float) -> np.ndarray:
    """0 on one side of a line near the object's middle and 1 on the other, (64, 64); `softness` in pixels."""
    angle, shift = rng.uniform(0, 2 * np.pi), rng.uniform(-0.4, 0.4) * item.diameter
    middles = np.arange(SIDE) + 0.5
    along = np.cos(angle) * (middles[None, :] - item.cx) + np.sin(angle) * (middles[:, None] - item.cy)
    return 1 / (1 + np.exp(-(along - shift) / softness))


def _two_toned(rng: np.random.Generator, item: SceneObject) -> np.ndarray:
    """Its colour running over into another one, more or less: levels (64, 64, 3)."""
    other = np.array(list(COLOURS.values())[rng.integers(len(COLOURS))], dtype=np.float64)
    share = rng.uniform(0.2, 1.0) * _ramp(rng, item, rng.uniform(0.5, 6.0))
    return np.array(item.rgb) + share[..., None] * (other - np.array(item.rgb))


# --- ways: what an object covers when it is drawn wrongly, (64, 64) in [0, 1] ----------------------------------------


def _missing(rng: np.random.Generator, item: SceneObject) -> np.ndarray:
    """Gone, or pale."""
    return mask_of(item) * rng.choice((0.0, rng.uniform(0.2, 0.9)))


def _wiped(rng: np.random.Generator, item: SceneObject) -> np.ndarray:
    """Up to 60 % of it gone, from one side."""
    mask, (x0, y0, x1, y1) = mask_of(item), item.box
    share, side = rng.uniform(0.0, 0.6), rng.integers(4)
    low, high = (y0, y1) if side < 2 else (x0, x1)
    cut = low + share * (high - low) if side % 2 == 0 else high - share * (high - low)
    line = np.clip((np.arange(SIDE) + 0.5 - cut) * (1 if side % 2 == 0 else -1) + 0.5, 0, 1)
    return mask * (line[:, None] if side < 2 else line[None, :])


def _faded(rng: np.random.Generator, item: SceneObject) -> np.ndarray:
    """Paler towards one side."""
    return mask_of(item) * (1 - rng.uniform(0.2, 1.0) * _ramp(rng, item, rng.uniform(1.0, 6.0)))


def _stretched(rng: np.random.Generator, item: SceneObject) -> np.ndarray:
    """Up to 1.8 times as long as it is wide, or the other way round."""
    ratio = rng.uniform(1.0, 1.8) ** rng.choice((-0.5, 0.5))
    return mask_of(item, stretch=(ratio, 1 / ratio))


def _skewed(rng: np.random.Generator, item: SceneObject) -> np.ndarray:
    """Every row further to one side than the one above it, by up to 0.9 of a pixel."""
    slope = rng.uniform(-0.9, 0.9)
    return _moved(mask_of(item), np.broadcast_to((slope * (np.arange(SIDE) + 0.5 - item.cy))[:, None], (SIDE, SIDE)), 0)


def _warped(rng: np.random.Generator, item: SceneObject) -> np.ndarray:
    """Its outline uneven: every point moved by up to some pixels, neighbours alike."""
    amplitude, smoothness = rng.uniform(0.3, 3.5), rng.uniform(2.0, 6.0)
    dx, dy = (ndimage.gaussian_filter(rng.standard_normal((SIDE, SIDE)), smoothness) for _ in range(2))
    return _moved(mask_of(item), amplitude * dx / dx.std(), amplitude * dy / dy.std())


def _mixed(rng: np.random.Generator, item: SceneObject) -> np.ndarray:
    """Between its own shape and another one, as a square with round corners is."""
    other = mask_of(item, shape=other_of(rng, SHAPES, (item.shape,)))
    share = rng.uniform(0.0, 1.0)
    return np.clip(0.5 + (1 - share) * _distance(mask_of(item)) + share * _distance(other), 0, 1)


def _spliced(rng: np.random.Generator, item: SceneObject) -> np.ndarray:
    """A part of it of another shape."""
    share = _ramp(rng, item, rng.uniform(0.2, 2.0))
    return mask_of(item) + share * (mask_of(item, shape=other_of(rng, SHAPES, (item.shape,))) - mask_of(item))


def _smeared(rng: np.random.Generator, item: SceneObject) -> np.ndarray:
    """With a paler copy beside it that touches it, or of a part of it."""
    angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.8) * item.diameter
    moved = replace(item, cx=item.cx + far * np.cos(angle), cy=item.cy + far * np.sin(angle))
    copy = mask_of(moved, shape=item.shape if rng.random() < 0.7 else other_of(rng, SHAPES, (item.shape,)))
    return np.maximum(mask_of(item), rng.uniform(0.2, 1.0) * copy)


def _bumped(rng: np.random.Generator, item: SceneObject) -> np.ndarray:
    """With a lump on its outline, or a bite out of it."""
    angle, size = rng.uniform(0, 2 * np.pi), rng.uniform(0.08, 0.4) * item.diameter
    far = rng.uniform(0.3, 0.65) * item.diameter
    lump = replace(item, cx=item.cx + far * np.cos(angle), cy=item.cy + far * np.sin(angle), diameter=2 * size)
    disc = rng.uniform(0.4, 1.0) * ndimage.gaussian_filter(mask_of(lump, shape="circle"), rng.uniform(0.3, 1.5))
    return np.maximum(mask_of(item), disc) if rng.random() < 0.5 else mask_of(item) * (1 - disc)


def _blurred(rng: np.random.Generator, item: SceneObject) -> np.ndarray:
    """One side of it, or all, out of focus."""
    soft, share = ndimage.gaussian_filter(mask_of(item), rng.uniform(0.5, 4.0)), 1.0
    if rng.random() < 0.7:
        share = _ramp(rng, item, rng.uniform(0.5, 3.0))
    return mask_of(item) + share * (soft - mask_of(item))


def _moved(mask: np.ndarray, dx: np.ndarray, dy: np.ndarray | float) -> np.ndarray:
    """A mask read (dx, dy) pixels away from each place."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return ndimage.map_coordinates(mask, (rows + dy, columns + dx), order=1, mode="constant")


def _distance(mask: np.ndarray) -> np.ndarray:
    """Signed distance from a mask's outline in pixels, above 0 inside."""
    inside = mask > 0.5
    return np.where(inside, ndimage.distance_transform_edt(inside) - 0.5, 0.5 - ndimage.distance_transform_edt(~inside))


WAYS: dict[str, Callable[[np.random.Generator, SceneObject], np.ndarray]] = {
    "missing": _missing,
    "wiped": _wiped,
    "faded": _faded,
    "stretched": _stretched,
    "skewed": _skewed,
    "warped": _warped,
    "mixed": _mixed,
    "spliced": _spliced,
    "smeared": _smeared,
    "bumped": _bumped,
    "blurred": _blurred,
}
