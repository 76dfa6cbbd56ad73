"""95 % intervals of what is measured: of a mean, of a proportion, of any statistic of a set of images."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np
import torch

Z95 = 1.959964  # standard deviations on either side


def mean_interval(values: np.ndarray) -> list[float]:
    """95 % interval [low, high] of a mean of (N,) values, by the normal approximation."""
    half = Z95 * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.inf
    return [float(values.mean() - half), float(values.mean() + half)]


def wilson(successes: int, n: int, z: float = Z95) -> list[float]:
    """Wilson's score interval [low, high] of a proportion (95 % by default); [0, 1] for n = 0."""
    if n == 0:
        return [0.0, 1.0]
    share, spread = successes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return [float(max(min(centre - half, share), 0.0)), float(min(max(centre + half, share), 1.0))]


def bootstrap_interval(
    statistic: Callable[[torch.Tensor], float], value: float, n: int, *, resamples: int, seed: int = 0
) -> list[float]:
    """95 % interval [low, high] around `value`: +-1.96 standard deviations of `statistic` over resampled images.

    `statistic` maps row indices (n,), drawn with replacement, to a float. The spread is used and not the quantiles:
    resampled sets have fewer distinct images, which pushes a Frechet distance up. The interval tells how far another
    sample of `n` images might land, not how far `n` is from infinity.
    """
    rng = np.random.default_rng((seed, n))
    drawn = [statistic(torch.from_numpy(rng.integers(n, size=n))) for _ in range(resamples)]
    half = Z95 * float(np.std(drawn, ddof=1))
    return [max(value - half, 0.0), value + half]
