"""Optimisers of one branch of an objective: AdamW, or Muon for hidden matrices with AdamW for the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from train.schedules import bend, lr_factor, weight_decay_at

# Embedding-like tables that keep their size: positions, levels, start tokens, head temperatures, AdaLN offsets.
UNDECAYED = re.compile(
    r"(^|\.)(start_position|position|level_embedding|log_scale|ada_offset|null_text|query_|codebook|relative_attention)"
)
HIDDEN = re.compile(r"(^|\.)blocks?\.\d+\.")


@dataclass(kw_only=True)
class OptimizerConfig:
    """How the weights of one branch move.

    Args:
        name: adamw, or muon (matrices inside the blocks; AdamW takes everything else). Muon needs torch 2.9.
        lr: peak learning rate. Muon's update is scaled to AdamW's size, so one rate serves both.
        betas: AdamW's.
        weight_decay: at the start; never on vectors, biases, position and level tables.
        weight_decay_end: at the end of a half cosine; equal to `weight_decay` when null.
        schedule: lin0 (VAR), lin0.5 and the like (VAR's progressive training), cosine or constant.
        warmup: share of training spent on the linear warm-up, in [0, 1).
        end: last learning rate over the peak.
        clip: largest gradient norm of the branch; 0 does not clip.
        momentum: Muon's.
    """

    name: str = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    schedule: str = "lin0"
    warmup: float = 0.02
    end: float = 0.1
    clip: float = 2.0
    momentum: float = 0.95

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"optimizer name must be adamw or muon, got {self.name!r}")
        bend(self.schedule)
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of training in [0, 1), got {self.warmup}")
        if not 0 <= self.end <= 1:
            raise ValueError(f"end is the last rate over the peak, in [0, 1], got {self.end}")
        for name, value in (("betas", max(self.betas)), ("betas", min(self.betas)), ("momentum", self.momentum)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        for name in ("clip", "weight_decay", "weight_decay_end"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")


@dataclass
class Branch:
    """Parameters that move together, e.g. the generator, or its adversary.

    Attributes:
        config: how they move.
        named_parameters: (name, parameter) pairs; frozen ones are left out.
        begin: share of training after which they move; their schedules are over the rest.
    """

    config: OptimizerConfig
    named_parameters: Iterable[tuple[str, nn.Parameter]] = field(repr=False)
    begin: float = 0.0

    def __post_init__(self) -> None:
        self.named_parameters = [(name, p) for name, p in self.named_parameters if p.requires_grad]

    def progress(self, whole: float) -> float:
        """How far its own schedules are, in [0, 1], of the training's progress."""
        return max(whole - self.begin, 0.0) / (1 - self.begin) if self.begin < 1 else 0.0


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to vectors and scalars, biases, position or level tables (as VAR's trainer)."""
    return parameter.ndim > 1 and not name.endswith("bias") and not UNDECAYED.search(name)


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon may take it: a 2-D weight inside a numbered block."""
    return parameter.ndim == 2 and bool(HIDDEN.search(name)) and is_decayed(name, parameter)


def build_optimizers(branch: Branch) -> list[torch.optim.Optimizer]:
    """One AdamW, or Muon and AdamW. Every parameter group carries `peak_lr` and whether it is `decayed`.

    Raises:
        ValueError: if Muon is asked for and torch is too old, or the branch has no matrix inside a block.
    """
    config, everything = branch.config, branch.named_parameters
    matrices = [(n, p) for n, p in everything if config.name == "muon" and is_hidden_matrix(n, p)]
    taken = {name for name, _ in matrices}
    rest = [(n, p) for n, p in everything if n not in taken]
    optimizers: list[torch.optim.Optimizer] = []
    if config.name == "muon":
        optimizers.append(_muon(config, [p for _, p in matrices]))
    groups = [
        {"params": [p for n, p in rest if is_decayed(n, p)], "decayed": True},
        {"params": [p for n, p in rest if not is_decayed(n, p)], "decayed": False},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        fused = rest[0][1].device.type in ("cuda", "cpu")
        optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused))
    return optimizers


def _muon(config: OptimizerConfig, matrices: list[nn.Parameter]) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optimizer name muon needs torch 2.9 or newer, this is {torch.__version__}: use adamw")
    if not matrices:
        raise ValueError("optimizer name muon finds no 2-D weight inside a block of this model: use adamw")
    from train.muon import StackedMuon

    groups = [{"params": matrices, "decayed": True}]
    return StackedMuon(groups, lr=config.lr, momentum=config.momentum, adjust_lr_fn="match_rms_adamw")


def set_rates(optimizer: torch.optim.Optimizer, config: OptimizerConfig, progress: float) -> None:
    """Set the learning rate and weight decay of every group for a point of training in [0, 1]."""
    lr = config.lr * lr_factor(progress, schedule=config.schedule, warmup=config.warmup, end=config.end)
    last = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
    decay = weight_decay_at(progress, start=config.weight_decay, end=last)
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = decay if group["decayed"] else 0.0
