"""The published searches as steps: how many candidates go on after which scale, chosen how; and what they cost."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from numbers import Integral

SLACK = 1.05  # a search may cost so many times its budget: best-of-N has N rewards to pay besides N images
HOWS = ("cluster", "resample", "random", "best")

# TTS-VAR (section 4, for Infinity's 13 scales), candidates in units of N: 8 N run scales 0 to 2, then 6 N, ...
PAPER_SCALES = 13
PAPER_START = 8
PAPER_STEPS = ((2, "cluster", 6), (5, "cluster", 4), (6, "resample", 2), (9, "resample", 1))


@dataclass(frozen=True)
class Step:
    """After scale `scale`, `keep` of an image's candidates go on.

    Attributes:
        how: "cluster" (the member nearest to each centre), "resample" (drawn by exp(lambda * potential), with
            replacement), "random", or "best" (by the reward).
    """

    scale: int
    keep: int
    how: str

    def __str__(self) -> str:
        return f"{self.how}@{self.scale}:{self.keep}"


def check_steps(candidates: int, steps: Sequence[Step], num_scales: int | None = None) -> None:
    """Raise ValueError unless the steps lead from `candidates` to one at the last scale, in order.

    Raises TypeError, too, if they are no steps.
    """
    if candidates < 1:
        raise ValueError(f"candidates must be 1 or more, got {candidates}")
    if isinstance(steps, str) or not isinstance(steps, Sequence) or not all(isinstance(step, Step) for step in steps):
        raise TypeError(f"steps must be those that make_steps gives, or Steps of your own, got {steps!r:.80}")
    if not isinstance(candidates, Integral):
        raise TypeError(f"candidates must be a whole number, got {candidates!r}")
    if not steps or steps[-1].keep != 1 or steps[-1].how == "cluster":
        last = str(steps[-1]) if steps else "none"
        raise ValueError(f"the last step must leave 1 candidate by best, resample or random; got {last}")
    for step in steps:
        if step.how not in HOWS or step.keep < 1 or step.scale < 0:
            raise ValueError(f"a step is one of {', '.join(HOWS)} at a scale, keeping 1 or more; got {step}")
    for earlier, later in pairwise(steps):
        if later.scale <= earlier.scale or later.keep > earlier.keep:
            raise ValueError(f"steps must go on to later scales with no more candidates, got {earlier} {later}")
    if steps[0].keep > candidates:
        raise ValueError(f"steps cannot keep more than the {candidates} candidates there are, got {steps[0]}")
    if num_scales is not None and steps[-1].scale != num_scales - 1:
        raise ValueError(f"the last step must be at the last scale, {num_scales - 1}; got {steps[-1]}")


def descending(n: float, num_scales: int, how: str | None = None) -> tuple[int, tuple[Step, ...]]:
    """TTS-VAR's schedule: candidates to start with, and steps that leave `n` to the last scale, then the best.

    The paper's steps are at scales 2, 5, 6 and 9 of 13; other pyramids have them at the same share of their scales,
    one a scale. Counts are n times the paper's, rounded, at least 1.

    Args:
        how: do all steps this way, instead of the paper's.
    """
    last = num_scales - 1
    steps: list[Step] = []
    for scale, way, keep in PAPER_STEPS:
        place = scale * last // (PAPER_SCALES - 1)
        place = max(place, steps[-1].scale + 1) if steps else place
        if place < last:
            steps.append(Step(place, max(1, round(n * keep)), how or way))
    return max(1, round(n * PAPER_START)), (*steps, Step(last, 1, "best"))


def constant(n: float, num_scales: int, how: str) -> tuple[int, tuple[Step, ...]]:
    """`n` candidates from the first scale to the last, then one of them."""
    return max(1, int(n)), (Step(num_scales - 1, 1, how),)


def halving(n: float, num_scales: int) -> tuple[int, tuple[Step, ...]]:
    """Successive halving (Jamieson and Talwalkar 2016) late in the pyramid: 4 n candidates, the best 2 n after two
    thirds of the scales, n after five sixths, then the best. Nothing is drawn and nothing goes on twice.
    """
    last = num_scales - 1
    steps = {last * 2 // 3: max(1, round(2 * n)), last * 5 // 6: max(1, round(n)), last: 1}
    return max(1, round(4 * n)), tuple(Step(scale, keep, "best") for scale, keep in steps.items())


METHODS: dict[str, Callable[[float, int], tuple[int, tuple[Step, ...]]]] = {
    "tts": descending,
    "resample": lambda n, K: descending(n, K, "resample"),
    "cluster": lambda n, K: descending(n, K, "cluster"),
    "random": lambda n, K: descending(n, K, "random"),
    "best": lambda n, K: constant(n, K, "best"),
    "halving": halving,
    "importance": lambda n, K: constant(n, K, "resample"),
}


def make_steps(method: str, n: float, num_scales: int) -> tuple[int, tuple[Step, ...]]:
    """Candidates to start with, and the steps, of a method; N = 1 is plain generation whatever the method.

    Args:
        method: "tts" (TTS-VAR), "resample", "cluster" or "random" (its schedule with one way of choosing), "best"
            (best-of-N), "importance" (one of N drawn by its weight), "halving". Or the steps themselves, as in "16
            cluster@1:12 resample@3:4 best": 16 candidates, 12 after scale 1, 4 after scale 3, one at the end.
        n: N of the method, ignored where steps are given; candidates that reach the last scale.

    Raises:
        ValueError: if there is no such method, or `n` is not above 0.
    """
    if not n > 0:
        raise ValueError(f"n must be above 0 for a search, got {n}")
    if method in METHODS:
        return METHODS[method](n, num_scales) if n != 1 else constant(1, num_scales, "best")
    words = method.replace(",", " ").split()
    matches = [re.fullmatch(r"(\w+)@(\d+):(\d+)", word) for word in words[1:-1]]
    if len(words) < 2 or not words[0].isdecimal() or not all(matches) or words[-1] not in HOWS:
        names = ", ".join(METHODS)
        raise ValueError(f'search must be {names}, or steps like "16 cluster@1:12 resample@3:4 best"; got {method!r}')
    steps = [Step(int(match[2]), int(match[3]), match[1]) for match in matches]
    made = int(words[0]), (*steps, Step(num_scales - 1, 1, words[-1]))
    check_steps(*made, num_scales)
    return made


def fit_budget(
    method: str, budget: float, num_scales: int, cost: Callable[[int, tuple[Step, ...]], float]
) -> tuple[int, tuple[Step, ...]]:
    """The largest search of a method that costs at most `SLACK` times `budget`: its schedule for some N in eighths.

    At N = 1 that is the paper's, 8 candidates to begin with and one at the end, and not plain generation.

    Args:
        cost: of (candidates, steps), in the budget's units; one candidate must cost no more than the budget.

    Raises:
        ValueError: if not even one candidate fits.
    """
    if not 0 < budget < inf:
        raise ValueError(f"budget must be a number above 0, got {budget}")
    found = constant(1, num_scales, "best")
    if cost(*found) > SLACK * budget:
        raise ValueError(f"budget {budget:g} is below the cost of one candidate, {cost(*found):g}")
    if method not in METHODS:
        raise ValueError(f"budget chooses the schedule of {', '.join(METHODS)}; {method!r} is one already")
    for eighths in range(1, 8 * 1024):
        made = METHODS[method](eighths / 8, num_scales)
        if cost(*made) > SLACK * budget:
            break
        found = made
    return found
