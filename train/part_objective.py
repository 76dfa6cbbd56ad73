"""Training a part that stands on a finished transformer, which stays as it is."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from train.optimizers import OptimizerConfig
from train.var_objective import VarLossConfig, VarObjective
from var.transformer import NextScaleTransformer


class PartObjective(VarObjective):
    """The loss of one submodule of the transformer: all else is frozen, and in eval mode.

    Raises:
        ValueError: if the transformer has no such part, or the text encoder is to train along.
    """

    part: ClassVar[str]  # its name in the transformer, and that of its options: `part.layers`

    def __init__(
        self,
        transformer: NextScaleTransformer,
        config: VarLossConfig,
        optimizer: OptimizerConfig,
        text_encoder: nn.Module | None = None,
    ):
        super().__init__(transformer, config, optimizer, text_encoder)
        if getattr(transformer, self.part) is None:
            raise ValueError(f"{self.part}.layers trains a part of a finished transformer: give start_from")
        if text_encoder is not None:
            raise ValueError(f"{self.part}.layers trains a part alone: it needs text.train=false")
        transformer.requires_grad_(False)
        getattr(transformer, self.part).requires_grad_(True)
        self.find_unused = False

    def train(self, mode: bool = True) -> PartObjective:
        """The rest of the transformer stays in eval mode."""
        super().train(mode)
        self.transformer.eval()
        getattr(self.transformer, self.part).train(mode)
        return self
