"""The scales of a token pyramid as pure integers: sides, token counts, offsets, level ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class ScaleSchedule:
    """Sides (h, w) of every scale, coarse to fine; the last one is the latent grid (VAR, section 3.2).

    Args:
        sides: one (height, width) pair in latent cells per scale; neither side may shrink from scale to scale.
        grid: (height, width) of the reference grid that 2-D positions are measured on; the last scale when None.
    """

    sides: tuple[tuple[int, int], ...]
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.sides:
            raise ValueError("schedule has no scale: give at least one side, e.g. 1,2,3,4")
        for (h0, w0), (h1, w1) in zip(self.sides, self.sides[1:]):
            if h1 < h0 or w1 < w0:
                raise ValueError(f"schedule must not shrink, but {h0}x{w0} is followed by {h1}x{w1}")
        if min(min(side) for side in self.sides) < 1:
            raise ValueError(f"schedule sides must be 1 or more, got {self.text}")

    @classmethod
    def of(cls, spec: ScaleSchedule | str | Sequence) -> ScaleSchedule:
        """Read a schedule from "1,2,3", "1x2,2x4", a preset's name, [1, 2, 3] or [[1, 2], [2, 4]].

        Raises:
            ValueError: if `spec` is none of these; the message shows it.
        """
        if isinstance(spec, ScaleSchedule):
            return spec
        if isinstance(spec, str) and spec in SCHEDULES:
            return SCHEDULES[spec]
        items = spec.split(",") if isinstance(spec, str) else spec
        try:
            return cls(tuple(_side(item) for item in items))
        except (TypeError, ValueError) as error:
            if "schedule" in str(error):
                raise
            names = ", ".join(SCHEDULES)
            raise ValueError(f"schedule {spec!r} is not readable: give '1,2,3', '1x2,2x4' or one of {names}") from None

    def __len__(self) -> int:
        return len(self.sides)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(h * w for h, w in self.sides)

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens of scales 0..k, for every k."""
        return tuple(accumulate(self.lengths))

    @property
    def begins(self) -> tuple[int, ...]:
        """Tokens before each scale."""
        return (0, *self.ends[:-1])

    @property
    def total(self) -> int:
        """Tokens of the whole pyramid, L."""
        return self.ends[-1]

    @property
    def latent_hw(self) -> tuple[int, int]:
        """(height, width) of the latent grid: the last scale."""
        return self.sides[-1]

    @property
    def grid_hw(self) -> tuple[int, int]:
        """(height, width) of the grid that 2-D positions are measured on."""
        return self.grid or self.latent_hw

    @property
    def level_ids(self) -> tuple[int, ...]:
        """Scale of each of the L tokens."""
        return tuple(k for k, n in enumerate(self.lengths) for _ in range(n))

    @property
    def spec(self) -> list[list[int]]:
        """The sides as JSON-able lists; `of` reads them back."""
        return [[h, w] for h, w in self.sides]

    @property
    def names(self) -> tuple[str, ...]:
        """What to call each scale in a report: 4x4, and 4x4-2, 4x4-3 where the same sides come again."""
        names = [f"{h}x{w}" for h, w in self.sides]
        again = [names[:k].count(name) + 1 for k, name in enumerate(names)]
        return tuple(name if n == 1 else f"{name}-{n}" for name, n in zip(names, again))

    @property
    def text(self) -> str:
        """The sides as text: 1,2,3 or 1x2,2x4; `of` reads it back."""
        return ",".join(str(h) if h == w else f"{h}x{w}" for h, w in self.sides)


def _side(item: int | str | Sequence[int]) -> tuple[int, int]:
    if isinstance(item, str):
        item = [int(part) for part in item.lower().split("x")]
    if isinstance(item, int):
        item = [item]
    h, w = (item[0], item[0]) if len(item) == 1 else item
    if int(h) != h or int(w) != w:
        raise ValueError(item)
    return int(h), int(w)


def _square(*sides: int) -> ScaleSchedule:
    return ScaleSchedule(tuple((side, side) for side in sides))


SCHEDULES = {
    "scenes64": _square(1, 2, 3, 4, 5, 6, 8),  # 64 px at stride 8
    "var256": _square(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),  # 256 px at stride 16
    "var512": _square(1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    "var1024": _square(1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
