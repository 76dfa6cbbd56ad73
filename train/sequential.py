"""Training the head that draws a scale's tokens one after the other, on a finished transformer that stays as it is.

Shapes: B images, L tokens of the scales that are drawn so, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tokenizer.quantizer import MultiScaleQuantizer
from train.part_objective import PartObjective
from train.session import Batch, Clock, Metrics
from train.var_objective import first_scales
from var.transformer import NextScaleTransformer


@dataclass(kw_only=True)
class SequentialConfig:
    """Which head is trained on the transformer of `start_from`.

    Args:
        layers: of a new head, or of the one that `start_from` has; 0 trains the transformer.
        scales: the first so many are drawn token by token.
    """

    layers: int = 0
    scales: int = 4

    def __post_init__(self) -> None:
        if self.layers < 0 or self.scales < 1:
            given = f"{self.layers} and {self.scales}"
            raise ValueError(f"sequential.layers must be 0 or more and sequential.scales 1 or more, got {given}")


class SequentialObjective(PartObjective):
    """The cross-entropy of the first scales' tokens, each given all coarser scales and those before it in its own.

    Only the head learns; what the loss is without it is in the metrics of validation as `loss_at_once`.
    """

    part = "sequential"

    def weights(self, clock: Clock) -> torch.Tensor:
        """Weight of each token of these scales."""
        whole = super().weights(clock)[: self.transformer.schedule.ends[self.transformer.config.sequential_scales - 1]]
        return whole / whole.sum()

    def predict(self, batch: Batch, clock: Clock, **passes: Any) -> tuple[torch.Tensor, Metrics]:
        """Loss, and loss and accuracy by scale; the transformer runs without gradients."""
        model, count = self.transformer, self.transformer.config.sequential_scales
        cut = first_scales(batch, model.schedule, count)
        with torch.no_grad():
            cond = self.condition(batch, clock)
            features_BLD = model.head.features(
                self.hidden(cut["inputs"], cond, scales=range(count), **passes), cond.head_B2D
            )
            logits_BLV = model.head.project(features_BLD)
        corrected_BLV = logits_BLV + model.sequential(features_BLD, cut["ids"], model.schedule.lengths[:count])
        smoothing = self.config.label_smoothing if self.training else 0.0
        loss_L, correct_L = self.score(corrected_BLV, cut["ids"], smoothing)
        weights_L = self.weights(clock)
        found = {"accuracy": correct_L.mean(), **self.by_scale("loss", loss_L), **self.by_scale("accuracy", correct_L)}
        if not self.training:
            found["loss_at_once"] = (self.score(logits_BLV, cut["ids"], 0.0)[0] * weights_L).sum()
        return (loss_L * weights_L).sum(), found


def with_head(
    model: NextScaleTransformer, config: SequentialConfig, quantizer: MultiScaleQuantizer
) -> NextScaleTransformer:
    """The transformer with a new head for `config`; the model itself where it has that head.

    Codes that are alike begin alike: their vectors are those of the codebook, turned into the head's width at random.

    Raises:
        ValueError: if the model has another head.
    """
    own, wanted = (model.config.sequential_layers, model.config.sequential_scales), (config.layers, config.scales)
    if own == wanted:
        return model
    if own[0]:
        raise ValueError(f"sequential.layers and scales are {wanted}, and the head of start_from has {own}")
    made = model.resized(sequential_layers=config.layers, sequential_scales=config.scales)
    if quantizer.has_codebook:
        codes_VC = quantizer.codebook.weight.detach().float().cpu()
        turn_CD = torch.randn(codes_VC.shape[1], model.config.width, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            made.sequential.before.weight[:-1] = 0.5 * codes_VC / codes_VC.std() @ turn_CD / codes_VC.shape[1] ** 0.5
    return made


def without_head(model: NextScaleTransformer) -> NextScaleTransformer:
    """The transformer alone: what its head knows does not go with new weights below it."""
    return model if model.sequential is None else model.resized(sequential_layers=0, sequential_scales=0)
