"""Which layers run: the equidistant subnets of a model, and depths that change over the scales (VARiant, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def equidistant(depth: int, active: int) -> tuple[int, ...]:
    """The subnet of `active` layers of `depth`: floor(i (depth - 1) / (active - 1)), first and last included.

    One active layer is the first. Subnets of different sizes need not be nested (of 30 layers, 8 are not in 16).

    Raises:
        ValueError: if `active` is not in 1..depth.
    """
    if not 1 <= active <= depth:
        raise ValueError(f"depth must be in 1..{depth} layers, got {active}")
    if active == 1:
        return (0,)
    return tuple(i * (depth - 1) // (active - 1) for i in range(active))


def is_trained(subnets: Mapping[str, Any] | None, active: int, begin: int) -> bool:
    """Whether a model learned to run so many of its layers from a scale on.

    Args:
        subnets: of the model's configuration, see `NextScaleTransformer`.
    """
    return subnets is not None and active in subnets["depths"] and begin >= subnets["bridge"]


def runs_of_depth(depths: Sequence[int]) -> list[tuple[range, int]]:
    """One depth a scale to (scales, depth) of equal neighbours: [8, 8, 4] is [(0..1, 8), (2..2, 4)]."""
    runs: list[tuple[range, int]] = []
    for k, depth in enumerate(depths):
        if runs and runs[-1][1] == depth:
            runs[-1] = (range(runs[-1][0].start, k + 1), depth)
        else:
            runs.append((range(k, k + 1), depth))
    return runs
