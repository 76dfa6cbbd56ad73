"""Learning rate and weight decay as pure functions of progress: nothing to store, nothing to resume.

Progress is the fraction of training done, in [0, 1]: images seen so far over images in all.
"""

from __future__ import annotations

import math

SCHEDULES = ("lin0", "cosine", "constant")  # and "lin0.5" and the like, see `bend`
WARMUP_START = 0.005  # the warm-up's first learning rate over the peak (VAR's official recipe)
FLAT = 0.05  # `lin0` stays at the peak for this share of what follows the warm-up


def lr_factor(progress: float, *, schedule: str, warmup: float, end: float) -> float:
    """Learning rate over its peak.

    A linear warm-up from `WARMUP_START` over the first `warmup` of training, then: "lin0" (VAR) flat for 5 % of the
    rest, then linear down to `end`; "lin" and a share T, e.g. "lin0.5" (VAR's for progressive training until T), linear
    to a bend at T of the rest and linear from there to `end`; "cosine" half a cosine down to `end`; "constant" 1.

    Args:
        progress: fraction of training done, in [0, 1].
        warmup: fraction of training, in [0, 1); 0 is no warm-up.
        end: the factor at progress 1, in [0, 1] (VAR's `wpe`); "constant" ignores it.

    Raises:
        ValueError: on an unknown schedule.
    """
    share = bend(schedule)
    if progress < warmup:
        return WARMUP_START + (1 - WARMUP_START) * progress / warmup
    rest = (progress - warmup) / (1 - warmup)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return end + (1 - end) * (0.5 + 0.5 * math.cos(math.pi * rest))
    if share:
        middle = (1 + end + (1 - end) * (1 - share)) / 2
        return 1 + (middle - 1) * rest / share if rest < share else end + (middle - end) * (1 - rest) / (1 - share)
    return 1.0 if rest < FLAT else end + (1 - end) * (1 - rest) / (1 - FLAT)


def bend(schedule: str) -> float:
    """The share T of a schedule "linT", 0 < T < 1; 0 for the other schedules.

    Raises:
        ValueError: on an unknown schedule.
    """
    if schedule in SCHEDULES:
        return 0.0
    try:
        share = float(schedule.removeprefix("lin")) if schedule.startswith("lin") else 0.0
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, or lin0.5 or the like, got {schedule!r}")
    return share


def weight_decay_at(progress: float, *, start: float, end: float) -> float:
    """Weight decay on its half cosine from `start` to `end` (VAR: 0.05 to 0.08 for its largest models)."""
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * progress))
