"""Training a model and its subnets as one (VARiant, section 3): which layers run in which step.

A subnet runs its layers on the scales after the bridge; the scales of the bridge always run all layers, so every layer
goes on learning from them. There is no distillation: sharing weights and progressive shares are the method.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from train.optimizers import OptimizerConfig
from train.order import uniforms
from train.session import Batch, Clock, Metrics
from train.var_objective import VarLossConfig, VarObjective
from var.supernet import equidistant
from var.transformer import NextScaleTransformer

DEPTH_STREAM = 5  # keeps these draws apart from those of other purposes


@dataclass(kw_only=True)
class SupernetConfig:
    """Which subnets train along, and when.

    Args:
        depths: layers of each subnet; none trains the whole model alone. A step draws one of them, or the whole.
        bridge: scales that always run all layers.
        joint: share of subnet steps in the first phase (VARiant: 2 of 10), in [0, 1].
        phases: shares of training at which the first phase ends and the last begins; the share of subnet steps grows
            linearly between them, to 1. VARiant's 5 + 15 + 5 epochs are 0.2 and 0.8.
    """

    depths: list[int] = field(default_factory=list)
    bridge: int = 0
    joint: float = 0.2
    phases: tuple[float, float] = (0.2, 0.8)

    def __post_init__(self) -> None:
        if not 0 <= self.joint <= 1:
            raise ValueError(f"supernet.joint is a share in [0, 1], got {self.joint}")
        if not 0 <= self.phases[0] <= self.phases[1] <= 1:
            raise ValueError(f"supernet.phases are two shares of training in ascending order, got {self.phases}")

    @property
    def subnets(self) -> dict[str, Any] | None:
        """What a transformer's configuration says of it, see `NextScaleTransformer`."""
        return {"depths": list(self.depths), "bridge": self.bridge} if self.depths else None

    def share(self, progress: float) -> float:
        """Probability that a step trains a subnet, at a point of training in [0, 1]."""
        first, last = self.phases
        if progress < first:
            return self.joint
        if progress >= last:
            return 1.0
        return self.joint + (1 - self.joint) * (progress - first) / (last - first)


class SupernetObjective(VarObjective):
    """The loss of VAR, in every step by the whole model or by one of its subnets; the same one in all processes.

    Validation reports the whole model, and `loss_depthD` and `accuracy_depthD` of every subnet.

    Raises:
        ValueError: if the model has no such subnets or scales.
    """

    def __init__(
        self,
        transformer: NextScaleTransformer,
        config: VarLossConfig,
        optimizer: OptimizerConfig,
        text_encoder: nn.Module | None = None,
        *,
        supernet: SupernetConfig,
    ):
        super().__init__(transformer, config, optimizer, text_encoder)
        layers, scales = len(transformer.blocks), len(transformer.schedule)
        for depth in supernet.depths:
            if not 1 <= depth < layers:
                raise ValueError(f"supernet.depths must be in 1..{layers - 1} of the model's layers, got {depth}")
        if not 0 <= supernet.bridge < scales:
            raise ValueError(f"supernet.bridge must be in 0..{scales - 1} scales, got {supernet.bridge}")
        self.supernet = supernet
        self.find_unused = self.find_unused or supernet.bridge == 0  # a skipped layer learns nothing then

    def depth(self, clock: Clock) -> int | None:
        """Layers that run in a step after the bridge; None is all. Depends on (seed, step) alone."""
        whether, which = uniforms(2, clock.seed, clock.step, DEPTH_STREAM)
        if whether >= self.supernet.share(clock.progress):
            return None
        return self.supernet.depths[int(which * len(self.supernet.depths))]

    def passes(self, clock: Clock) -> dict[str, Any]:
        """The layers of the step's subnet; all of them in eval mode."""
        depth = self.depth(clock) if self.training else None
        return {} if depth is None else self.subnet(depth)

    def subnet(self, depth: int) -> dict[str, Any]:
        """The transformer's arguments for a subnet."""
        return {"layers": equidistant(len(self.transformer.blocks), depth), "bridge": self.supernet.bridge}

    def forward(self, batch: Batch, clock: Clock) -> tuple[torch.Tensor, Metrics]:
        """As `VarObjective.forward`; in eval mode also every subnet's loss and accuracy."""
        loss, metrics = super().forward(batch, clock)
        if not self.training:
            for depth in self.supernet.depths:
                own, of_depth = self.predict(batch, clock, **self.subnet(depth))
                metrics |= {f"loss_depth{depth}": own, f"accuracy_depth{depth}": of_depth["accuracy"]}
        return loss, metrics
