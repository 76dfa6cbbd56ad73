"""Classifier-free guidance: how strongly each scale is pushed away from the unconditional prediction.

A schedule gives a weight t, and guided = (1 + t) * conditional - t * unconditional; t = 0 is no guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from tokenizer.schedule import ScaleSchedule

LARGEST = 1000  # beyond it logits are infinite sooner or later


@dataclass(frozen=True)
class Guidance:
    """Guidance weights over the scales.

    Attributes:
        scale: the weight t at the end of the ramp, or one weight a scale.
        ramp: "linear" (VAR: t = scale * k / (K - 1), nothing at scale 0) or "constant" (Infinity, whose cfg is 1 + t).
        blocks: after these blocks both halves go on from the guided hidden states; -1 is the last block.
        on_logits: guide the logits; without it the conditional half's are taken as they are.
        until: scales from this one on are not guided; None guides all.
    """

    scale: float | Sequence[float] = 1.5
    ramp: str = "linear"
    blocks: tuple[int, ...] = ()
    on_logits: bool = True
    until: int | None = None

    def __post_init__(self) -> None:
        if self.ramp not in ("linear", "constant"):
            raise ValueError(f"guidance ramp must be linear or constant, got {self.ramp!r}")
        weights = self.scale if isinstance(self.scale, Sequence) and not isinstance(self.scale, str) else [self.scale]
        for weight in weights:
            if not isinstance(weight, Real):
                kind = type(weight).__name__
                raise TypeError(f"guidance must be a number, or a list of one for each scale, got {weight!r} ({kind})")
            if not 0 <= weight <= LARGEST:
                raise ValueError(f"guidance must be in [0, {LARGEST}], 0 being none, got {weight}")

        whole = isinstance(self.until, Integral) and not isinstance(self.until, bool)
        if self.until is not None and (not whole or self.until < 0):
            raise ValueError(f"guidance_until must be a number of scales, got {self.until!r}")
        if not all(isinstance(block, int) for block in self.blocks):
            raise TypeError(f"guidance blocks must be whole numbers, -1 being the last block, got {self.blocks!r}")

    def weight(self, k: int, num_scales: int) -> float:
        """t of scale k."""
        if self.until is not None and k >= self.until:
            return 0.0
        if isinstance(self.scale, Sequence):
            return float(self.scale[k])
        if self.ramp == "constant" or num_scales == 1:
            return float(self.scale)
        return self.scale * k / (num_scales - 1)

    def inside(
        self, scales: range, schedule: ScaleSchedule, depth: int
    ) -> dict[int, Callable[[torch.Tensor], torch.Tensor]]:
        """What becomes of the doubled hidden states (2B, l, D) of some scales, by the block of `depth` it follows."""
        weights = [self.weight(k, len(schedule)) for k in scales]
        if not self.blocks or not any(weights):
            return {}
        if len(weights) == 1:
            return {block % depth: lambda h: mix(h, weights[0]).repeat(2, 1, 1) for block in self.blocks}

        def guide(h_RlD: torch.Tensor) -> torch.Tensor:
            parts = [h_RlD.new_full((schedule.lengths[k], 1), weight) for k, weight in zip(scales, weights)]
            weight_l1 = torch.cat(parts)
            conditional, unconditional = h_RlD.chunk(2)
            mixed_RlD = torch.lerp(unconditional, conditional, 1 + weight_l1).repeat(2, 1, 1)
            return torch.where(weight_l1 > 0, mixed_RlD, h_RlD)  # without a weight, each half goes on by itself

        return {block % depth: guide for block in self.blocks}


def mix(doubled: torch.Tensor, weight: float) -> torch.Tensor:
    """Rows [conditional; unconditional] (2B, ...) to guided rows (B, ...)."""
    conditional, unconditional = doubled.chunk(2)
    return conditional if weight == 0 else torch.lerp(unconditional, conditional, 1 + weight)
