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
from train.optimizers import OptimizerConfig
from train.session import Batch, Clock, Metrics, brought
from train.var_objective import VarLossConfig, VarObjective, fast_cpu_attention, first_scales, token_weights
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

    def trained_scales(self, scales: int) -> list[int] | None:
        """[begin, end) of the scales, of so many, that the model is for; None for all."""
        return {"drafter": [0, self.handover], "refiner": [self.handover, scales]}.get(self.role)


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


def distillation_scores(
    ours: torch.Tensor, theirs: torch.Tensor, ids_BL: torch.Tensor, divergence: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence and accuracy of each place, (L,) float32 both, as means over the images.

    Args:
        ours, theirs: logits (B, L, V) or, bitwise, (B, L, n, 2), of the student and of the teacher.
        ids_BL: (B, L) or (B, L, n) int64; bits are averaged.
        divergence: as `CollaborationConfig` has it.
    """
    means, correct = (0, *range(2, ids_BL.ndim)), ours.detach().argmax(dim=-1) == ids_BL
    student, teacher = ours.log_softmax(dim=-1), theirs.log_softmax(dim=-1)
    given, target = (student, teacher) if divergence == "teacher" else (teacher, student)
    kl_BL = F.kl_div(given, target, reduction="none", log_target=True).sum(dim=-1)
    return kl_BL.mean(dim=means), correct.float().mean(dim=means)


class RefinerObjective(VarObjective):
    """KL divergence to a frozen teacher; scales before the hand-over fade out over training (lambda from 1 to 0).

    Training on the last scales alone ruins a model (CoDe: FID 3.30 to 21.93), hence the fading. Validation has
    lambda 0, and reports the divergence by scale.

    Args:
        teacher: moves to the batch's device, and is neither trained nor saved.

    Attributes:
        score: `distillation_scores`, or what it was compiled to.

    Raises:
        ValueError: if the teacher works on other tokens or reads other prompts, or a text encoder trains along.
    """

    score = staticmethod(distillation_scores)

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

    def foundations(self) -> dict[str, list[tuple[str, torch.Tensor]]]:
        """The teacher, too."""
        return {**super().foundations(), "code.teacher": list(self.frozen[0].named_parameters())}

    def weights(self, clock: Clock) -> torch.Tensor:
        """Weight of each token: times lambda before the hand-over."""
        whole = super().weights(clock)
        fading = 1 - clock.progress if self.training else 0.0
        begin = self.transformer.schedule.begins[self.code.handover]
        return torch.cat([whole[:begin] * fading, whole[begin:]])

    def predict(self, batch: Batch, clock: Clock, **passes: Any) -> tuple[torch.Tensor, Metrics]:
        """Weighted divergence, and divergence and accuracy by scale; of bitwise tokens a mean over the bits."""
        ids, inputs, (teacher,) = batch["ids"], batch["inputs"], self.frozen
        cond = self.condition(batch, clock)
        ours = self.transformer.logits(self.hidden(inputs, cond, **passes), cond)
        with torch.no_grad(), fast_cpu_attention(ids.device):
            teacher = brought(teacher, ids.device)
            their_cond = teacher.condition(self.training_prompt(batch, clock, teacher))
            theirs = teacher.logits(teacher(inputs, their_cond), their_cond)
        kl_L, correct_L = self.score(ours, theirs, ids, self.code.divergence)
        loss = (kl_L * self.weights(clock)).sum()
        by_scale = {**self.by_scale("kl", kl_L), **self.by_scale("accuracy", correct_L)}
        return loss, {"accuracy": correct_L.mean(), **by_scale}

    def compile_parts(self) -> None:
        """As `VarObjective.compile_parts`; the teacher's blocks, too."""
        super().compile_parts()
        self.frozen[0].compile_repeated_blocks(dynamic=False)
