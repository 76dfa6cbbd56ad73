"""Training masked prediction on a finished next-scale transformer that stays as it is (HMAR, section 4.2, phase 2).

Shapes: B images, N tokens of all scales but the first, L all tokens, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from tokenizer.schedule import ScaleSchedule
from train.order import image_draws
from train.part_objective import PartObjective
from train.session import Batch, Clock, Metrics
from var.transformer import NextScaleTransformer


@dataclass(kw_only=True)
class MaskedConfig:
    """Masked prediction for the block_diagonal transformer of `start_from`.

    Args:
        layers: last layers that get a second set (HMAR: 8); 0 trains the transformer.
    """

    layers: int = 0

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise ValueError(f"masked.layers must be 0 or more, got {self.layers}")


class MaskedObjective(PartObjective):
    """The cross-entropy of masked tokens, given the other tokens of their scale.

    Every scale of an image is masked by the share that is drawn for it, evenly from 0 to 1; scale 0 never is. Each
    image weighs the same, and in it the masked tokens as `loss.weights` says (token, as HMAR, or what favours coarse
    scales). HMAR draws one share and the same places for a whole batch; here they are keyed by image, so that training
    does not depend on how images are split over processes.
    """

    part = "masked"

    def predict(self, batch: Batch, clock: Clock, **passes: Any) -> tuple[torch.Tensor, Metrics]:
        """Loss, and loss and accuracy of masked tokens by scale."""
        model, first = self.transformer, self.transformer.schedule.lengths[0]
        masked_BN = draw_masked(batch["counter"], model.schedule, seed=clock.seed, device=batch["ids"].device)
        cond = self.condition(batch, clock)
        with self.attending(masked_BN.device) as how:
            logits_BLV = model.masked_logits(batch["inputs"], batch["codes"], masked_BN, cond, **how)
        targets_BN, logits_BNV = batch["ids"][:, first:], logits_BLV[:, first:]
        smoothing = self.config.label_smoothing if self.training else 0.0
        loss_BN = F.cross_entropy(logits_BNV.mT, targets_BN, reduction="none", label_smoothing=smoothing) * masked_BN
        correct_BN = (logits_BNV.detach().argmax(dim=-1) == targets_BN) & masked_BN
        weights_N = self.weights(clock)[first:]
        loss_B = (loss_BN * weights_N).sum(dim=1) / (masked_BN * weights_N).sum(dim=1)
        found = {"accuracy": correct_BN.sum() / masked_BN.sum()}
        for scale, *parts in zip(
            model.schedule.names[1:], *(self.of_scales(x) for x in (loss_BN, correct_BN, masked_BN))
        ):
            loss, correct, count = (part_Bl.detach().sum() for part_Bl in parts)  # every scale has a masked token
            found |= {f"loss_{scale}": loss / count, f"accuracy_{scale}": correct / count}
        return loss_B.mean(), found

    def of_scales(self, value_BN: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Values of the tokens of scales 1.., (B, l) of each."""
        return value_BN.split(self.transformer.schedule.lengths[1:], dim=1)


def draw_masked(
    counters: torch.Tensor, schedule: ScaleSchedule, *, seed: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Which tokens of scales 1.. are masked: bool (B, N), keyed by (seed, image counter).

    Of a scale of n tokens ceil(p n) are, at least one, with one p for all scales of an image.
    """
    lengths = schedule.lengths[1:]
    u_BN = image_draws(counters, 1 + sum(lengths), seed, 7, device=device)
    share_B1, parts = u_BN[:, :1], u_BN[:, 1:].split(lengths, dim=1)
    ranks = [part_Bl.argsort(dim=1).argsort(dim=1) for part_Bl in parts]
    return torch.cat([rank_Bl < (share_B1 * n).ceil().clamp(min=1) for rank_Bl, n in zip(ranks, lengths)], dim=1)


def with_masked(model: NextScaleTransformer, layers: int) -> NextScaleTransformer:
    """The transformer with new masked prediction that begins as its own last layers; itself if it has such.

    Raises:
        ValueError: if it has other masked prediction, or reads earlier scales.
    """
    if model.config.masked_layers == layers:
        return model
    if model.config.masked_layers:
        raise ValueError(f"masked.layers is {layers}, and start_from has {model.config.masked_layers}")
    made = model.resized(masked_layers=layers)
    made.masked.init_weights(made.blocks[-layers:], made.head)
    return made


def without_masked(model: NextScaleTransformer) -> NextScaleTransformer:
    """The transformer alone: masked prediction does not go with other weights below it."""
    return model if model.masked is None else model.resized(masked_layers=0)
