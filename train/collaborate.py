"""Specialised fine-tuning for collaborative decoding (CoDe, section 3.3): a drafter on its scales, a refiner distilled.

Shapes: B images, L tokens of all scales, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tokenizer.schedule import ScaleSchedule
from train.objectives import VarLossConfig, VarObjective, fast_cpu_attention, first_scales, token_weights
from train.optimizers import OptimizerConfig
from train.session import Batch, Clock, Metrics, brought
from var.transformer import NextScaleTransformer


@dataclass(kw_only=True)
class CollaborationConfig:
    """Which part of a collaboration is trained; neither when `role` is null.

    Args:
        role: drafter (cross-entropy on the scales before the hand-over, which alone are run) or refiner (distilled).
        handover: scales that the drafter makes.
        teacher: folder of a refiner's teacher, a larger model of the same tokens and texts.
        divergence: teacher for KL(teacher || student), as the released code; student for KL(student || teacher), as the
            paper writes.
    """

    role: str | None = None
    handover: int = 0
    teacher: str | None = None
    divergence: str = "teacher"

    def __post_init__(self) -> None:
        if self.role not in (None, "drafter", "refiner"):
            raise ValueError(f"code.role must be drafter or refiner, got {self.role!r}")
        if self.divergence not in ("teacher", "student"):
            raise ValueError(f"code.divergence must be teacher or student, got {self.divergence!r}")
        if self.role == "refiner" and self.teacher is None:
            raise ValueError("code.teacher must name the model that a refiner is distilled from")

    def check(self, schedule: ScaleSchedule) -> None:
        """Raise ValueError unless the hand-over leaves both something to do."""
        if self.role is not None and not 0 < self.handover < len(schedule):
            raise ValueError(f"code.handover must be in 1..{len(schedule) - 1} scales, got {self.handover}")


class DrafterObjective(VarObjective):
    """Cross-entropy on the scales before the hand-over; the others are not even run."""

    def __init__(
        self,
        transformer: NextScaleTransformer,
        config: VarLossConfig,
        optimizer: OptimizerConfig,
        text_encoder: nn.Module | None = None,
        *,
        code: CollaborationConfig,
    ):
        super().__init__(transformer, config, optimizer, text_encoder)
        code.check(transformer.schedule)
        self.drafted = ScaleSchedule(transformer.schedule.sides[: code.handover])
        self.find_unused = self.find_unused or code.handover == 1  # the first scale alone reads no inputs

    def passes(self, clock: Clock) -> dict[str, Any]:
        """The scales before the hand-over."""
        return {"scales": range(len(self.drafted))}

    def weights(self, clock: Clock) -> torch.Tensor:
        """Weight of each drafted token."""
        return token_weights(self.drafted, self.config.weights, self.transformer.device)

    def predict(self, batch: Batch, clock: Clock, **passes: Any) -> tuple[torch.Tensor, Metrics]:
        """As `VarObjective.predict`, of the drafted tokens."""
        cut = first_scales(batch, self.transformer.schedule, len(self.drafted))
        return super().predict(cut, clock, **passes)


class RefinerObjective(VarObjective):
    """KL divergence to a frozen teacher; scales before the hand-over fade out over training (lambda from 1 to 0).

    Training on the last scales alone ruins a model (CoDe: FID 3.30 to 21.93), hence the fading. Validation has
    lambda 0, and reports the divergence by scale.

    Args:
        teacher: moves to the batch's device, and is neither trained nor saved.

    Raises:
        ValueError: if the teacher works on other tokens or reads other prompts, or a text encoder trains along.
    """

    def __init__(
        self,
        transformer: NextScaleTransformer,
        config: VarLossConfig,
        optimizer: OptimizerConfig,
        text_encoder: nn.Module | None = None,
        *,
        code: CollaborationConfig,
        teacher: NextScaleTransformer,
    ):
        super().__init__(transformer, config, optimizer, text_encoder)
        code.check(transformer.schedule)
        if text_encoder is not None:
            raise ValueError("text.train must be false for a refiner: its teacher reads the same text encoder")
        if config.label_smoothing:
            raise ValueError("loss.label_smoothing must be 0 for a refiner: it learns its teacher's distributions")
        names = ("schedule", "vocab_size", "latent_channels", "bitwise", "conditioning")
        for name in (*names, "num_classes") if transformer.config.conditioning == "class" else names:
            mine, theirs = getattr(transformer.config, name), getattr(teacher.config, name)
            if mine != theirs:
                raise ValueError(f"code.teacher must have the refiner's {name} {mine}, got {theirs}")
        self.code = code
        self.frozen = (teacher.eval().requires_grad_(False),)  # a tuple: no submodule, so neither wrapped nor saved

    def weights(self, clock: Clock) -> torch.Tensor:
        """Weight of each token: times lambda before the hand-over."""
        whole = super().weights(clock)
        fading = 1 - clock.progress if self.training else 0.0
        begin = self.transformer.schedule.begins[self.code.handover]
        return torch.cat([whole[:begin] * fading, whole[begin:]])

    def predict(self, batch: Batch, clock: Clock, **passes: Any) -> tuple[torch.Tensor, Metrics]:
        """Weighted divergence, and divergence and accuracy by scale; of bitwise tokens a mean over the bits."""
        ids, inputs, (teacher,) = batch["ids"], batch["inputs"], self.frozen
        cond = self.transformer.condition(self.training_prompt(batch, clock))
        ours = self.transformer.logits(self.hidden(inputs, cond, **passes), cond).log_softmax(dim=-1)
        with torch.no_grad(), fast_cpu_attention(ids.device):
            teacher = brought(teacher, ids.device)
            their_cond = teacher.condition(self.training_prompt(batch, clock, teacher))
            theirs = teacher.logits(teacher(inputs, their_cond), their_cond).log_softmax(dim=-1)
        student, target = (ours, theirs) if self.code.divergence == "teacher" else (theirs, ours)
        all_but_tokens = (0, *range(2, ids.ndim))
        kl_L = F.kl_div(student, target, reduction="none", log_target=True).sum(dim=-1).mean(dim=all_but_tokens)
        loss = (kl_L * self.weights(clock)).sum()
        correct_L = (ours.argmax(dim=-1) == ids).float().mean(dim=all_but_tokens)
        by_scale = {**self.by_scale("kl", kl_L), **self.by_scale("accuracy", correct_L)}
        return loss, {"accuracy": correct_L.mean(), **by_scale}
