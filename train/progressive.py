"""Progressive training: coarse scales first, finer ones join one after the other (the official code's `pg`).

Coarse steps (ours) go further: a share of all steps trains only the first scales. Those hold few of the tokens but the
whole layout, and no scale reads a finer one, so such a step is exact and costs a fraction of a whole one.

Shapes: B images, L tokens of all scales, C latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from train.optimizers import OptimizerConfig
from train.order import uniforms
from train.session import Batch, Clock, Metrics
from train.var_objective import VarLossConfig, VarObjective, first_scales
from var.transformer import NextScaleTransformer

LEAST = 0.01  # weight of a scale in the step it joins
COARSE_STREAM = 6  # keeps these draws apart from those of other purposes


@dataclass(kw_only=True)
class ProgressiveConfig:
    """When the scales join.

    Args:
        until: share of training after which all scales are trained (`pg`); 0 trains all of them from the start.
        first: scales trained until the end of the warm-up (5: `pg0` 4 counts from 0).
        ramp: share of training over which the weight of a scale that joins grows from 0.01 to 1 (`pgwp`).
        coarse: scales of a coarse step; 0 makes no such steps.
        coarse_share: share of all steps that are coarse, drawn step by step.
    """

    until: float = 0.0
    first: int = 5
    ramp: float = 1 / 300
    coarse: int = 0
    coarse_share: float = 0.75

    def __post_init__(self) -> None:
        for name in ("until", "ramp", "coarse_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"progressive.{name} is a share of training in [0, 1], got {getattr(self, name)}")
        if self.first < 1:
            raise ValueError(f"progressive.first must be 1 scale or more, got {self.first}")
        if self.coarse < 0:
            raise ValueError(f"progressive.coarse must be 0 (none) or more scales, got {self.coarse}")

    @property
    def is_on(self) -> bool:
        """Whether any step leaves scales out."""
        return self.until > 0 or (self.coarse > 0 and self.coarse_share > 0)

    def stage(self, progress: float, warmup: float, scales: int) -> tuple[int, float]:
        """How many of the model's scales are trained, and the weight of the newest one.

        They join at equal distances between the end of the warm-up and `until`, the last one half a distance before.
        As in the official code the last scale joins with its whole weight, the others by a ramp.

        Args:
            progress, warmup: fractions of training, in [0, 1].
        """
        more = scales - self.first
        if more <= 0 or progress >= self.until:
            return scales, 1.0
        if progress <= warmup:
            return self.first, 1.0
        span = self.until - warmup
        joined = round((progress - warmup) / span * more)
        if joined in (0, more):
            return self.first + joined, 1.0
        since = progress - (warmup + (joined - 0.5) / more * span)
        return self.first + joined, min(max(since / self.ramp if self.ramp else 1.0, LEAST), 1.0)


class ProgressiveObjective(VarObjective):
    """The loss of VAR over the scales that have joined; the others are not even run. Validation takes all scales.

    A token weighs what it weighs when all scales are trained, so the loss grows as scales join.
    """

    def __init__(
        self,
        transformer: NextScaleTransformer,
        config: VarLossConfig,
        optimizer: OptimizerConfig,
        text_encoder: nn.Module | None = None,
        *,
        progressive: ProgressiveConfig,
    ):
        super().__init__(transformer, config, optimizer, text_encoder)
        scales = len(transformer.schedule)
        if progressive.coarse >= scales:
            raise ValueError(f"progressive.coarse must be below the model's {scales} scales, got {progressive.coarse}")
        if progressive.until > 0 and progressive.first > scales:
            raise ValueError(
                f"progressive.first must be at most the model's {scales} scales, or none joins; got {progressive.first}"
            )
        self.progressive = progressive
        if 1 in (progressive.coarse, progressive.first):  # the first scale alone reads no inputs
            self.find_unused = True

    def stage(self, clock: Clock) -> tuple[int, float]:
        """Scales trained in this step, and the weight of the newest one."""
        scales, config = len(self.transformer.schedule), self.progressive
        if not self.training:
            return scales, 1.0
        joined, newest = config.stage(clock.progress, self.optimizer.warmup, scales)
        if 0 < config.coarse < joined and uniforms(1, clock.seed, clock.step, COARSE_STREAM)[0] < config.coarse_share:
            return config.coarse, 1.0
        return joined, newest

    def passes(self, clock: Clock) -> dict[str, Any]:
        """The scales that have joined."""
        return {"scales": range(self.stage(clock)[0])}

    def weights(self, clock: Clock) -> torch.Tensor:
        """Weight of each token of these scales."""
        schedule, (scales, newest) = self.transformer.schedule, self.stage(clock)
        begin, end = schedule.begins[scales - 1], schedule.ends[scales - 1]
        whole = super().weights(clock)
        return torch.cat([whole[:begin], whole[begin:end] * newest])

    def predict(self, batch: Batch, clock: Clock, **passes: Any) -> tuple[torch.Tensor, Metrics]:
        """As `VarObjective.predict`, of these scales' tokens."""
        cut = first_scales(batch, self.transformer.schedule, self.stage(clock)[0])
        return super().predict(cut, clock, **passes)
