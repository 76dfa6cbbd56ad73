"""What next-scale prediction minimises: the cross-entropy of all tokens of all scales, weighted by scale.

Shapes: B images, K scales, L tokens of all scales, V codes, n bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenizer.schedule import ScaleSchedule
from train.optimizers import Branch, OptimizerConfig
from train.order import image_draws
from train.session import Batch, Clock, Metrics, Objective
from var.conditioning import ClassPrompt, Conditioning, Prompt, TextPrompt
from var.transformer import NextScaleTransformer

DROP_STREAM = 8  # keeps the draws of stochastic depth apart from those of other purposes


@dataclass(kw_only=True)
class VarLossConfig:
    """The loss of next-scale prediction.

    Args:
        drop: share of prompts replaced by the null prompt, for classifier-free guidance.
        label_smoothing: of the cross-entropy, in training only.
        weights: token (every token alike, VAR), scale (every scale alike), side (a token weighs one over the side of
            its scale, Infinity) or lognorm (HMAR's).
    """

    drop: float = 0.1
    label_smoothing: float = 0.0
    weights: str = "token"

    def __post_init__(self) -> None:
        if self.weights not in ("token", "scale", "side", "lognorm"):
            raise ValueError(f"loss.weights must be token, scale, side or lognorm, got {self.weights!r}")
        for name in ("drop", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"loss.{name} must be in [0, 1), got {getattr(self, name)}")


def token_weights(schedule: ScaleSchedule, kind: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """Weight of each of the L tokens in the loss, summing to 1: (L,) float32, not to be written to.

    "lognorm" is HMAR's: a normal density over the scales' relative sides, coarse and fine swapped (HMAR, section 4.1).
    """
    return _token_weights(schedule, kind, str(device))


@cache  # a copy to a GPU would wait, in every step, for all that it has been given to do
@torch.inference_mode(False)
def _token_weights(schedule: ScaleSchedule, kind: str, device: str) -> torch.Tensor:
    K = len(schedule)
    side_K = torch.tensor([(h * w) ** 0.5 for h, w in schedule.sides], dtype=torch.float64)
    r_K = side_K / side_K[-1]
    if kind == "lognorm" and K > 1 and r_K.std() > 0:
        scale_K = torch.exp(-0.5 * ((r_K.flip(0) - r_K.mean()) / r_K.std()) ** 2)
    elif kind == "token":
        scale_K = torch.tensor(schedule.lengths, dtype=torch.float64)
    elif kind == "side":
        scale_K = side_K  # h w tokens of weight 1 / sqrt(h w) each
    else:
        scale_K = torch.ones(K, dtype=torch.float64)
    scale_K = scale_K / scale_K.sum()
    return torch.cat([torch.full((n,), float(w) / n) for n, w in zip(schedule.lengths, scale_K)]).to(device)


@cache
@torch.inference_mode(False)
def _own_tokens(lengths: tuple[int, ...], device: str) -> torch.Tensor:
    """Which tokens are each scale's: (K, L) bool."""
    level_L = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (level_L == torch.arange(len(lengths))[:, None]).to(device)


def token_scores(
    logits_BLV: torch.Tensor, ids_BL: torch.Tensor, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and accuracy of each place, (L,) float32 both, as means over the images.

    Args:
        logits_BLV: (B, L, V) or, bitwise, (B, L, n, 2).
        ids_BL: (B, L) or (B, L, n) int64; bits are averaged.
    """
    means = (0, *range(2, ids_BL.ndim))
    loss_N = F.cross_entropy(
        logits_BLV.flatten(0, -2), ids_BL.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    correct = logits_BLV.detach().argmax(dim=-1) == ids_BL
    return loss_N.view_as(ids_BL).mean(dim=means), correct.float().mean(dim=means)


class VarObjective(Objective):
    """Cross-entropy of all tokens given all coarser scales (VAR, equation 3).

    A batch is {"ids": (B, L) int64 or, bitwise, (B, L, n), "inputs": (B, L - l of scale 0, C), "counter": B image
    counters} and the prompt; with self-correction, ids and inputs are of tokens that went wrong now and then. A
    "schedule" is that of images of another shape than the model's own. The prompt is {"label": (B,)}, or {"states":
    (B, T, E), "mask": (B, T) bool} from a frozen text encoder, or {"input_ids": (B, T), "mask"} for the one that trains
    along.

    Attributes:
        attention: backend of self-attention in training, one of `var.masks.BACKENDS`; validation takes sdpa.
        score: `token_scores`, or what it was compiled to.
    """

    attention = "grouped"
    score = staticmethod(token_scores)

    def __init__(
        self,
        transformer: NextScaleTransformer,
        config: VarLossConfig,
        optimizer: OptimizerConfig,
        text_encoder: nn.Module | None = None,
    ):
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder
        self.config, self.optimizer = config, optimizer
        # Then the null prompt learns nothing, or a part of the encoder that makes no states, as BERT's pooler.
        self.find_unused = config.drop == 0 or text_encoder is not None

    def branches(self) -> dict[str, Branch]:
        """One branch: the transformer, and the text encoder if it trains."""
        return {"main": Branch(self.optimizer, self.named_parameters())}

    def prompt(self, batch: Batch) -> Prompt:
        """What the batch is conditioned on."""
        if "label" in batch and self.transformer.config.conditioning == "class":
            return ClassPrompt(batch["label"])
        if self.text_encoder is None:
            return TextPrompt(batch["states"], batch["mask"])
        states = self.text_encoder(input_ids=batch["input_ids"], attention_mask=batch["mask"]).last_hidden_state
        return TextPrompt(states, batch["mask"])

    def hidden(self, inputs: torch.Tensor | None, cond: Conditioning, **passes: Any) -> torch.Tensor:
        """Hidden states (B, L, D) of all tokens."""
        with self.attending(cond.start_BD.device) as how:
            return self.transformer(inputs, cond, **{**passes, **how})

    @contextlib.contextmanager
    def attending(self, device: torch.device) -> Iterator[dict[str, str]]:
        """What the transformer is told about attention, and PyTorch meanwhile.

        Raises:
            ValueError: if flex attention is to train on a CPU.
        """
        how = {}
        if self.attention != "sdpa" and torch.is_grad_enabled():
            if self.attention == "flex" and device.type == "cpu":
                raise ValueError("attention flex cannot train on a CPU (PyTorch has no backward pass of it): take sdpa")
            how = {"attention_backend": self.attention}
        if self.transformer.gradient_checkpointing:  # the backward pass recomputes outside of any block of code here
            yield how
            return
        with fast_cpu_attention(device):
            yield how

    def passes(self, clock: Clock) -> dict[str, Any]:
        """What the transformer is called with beside inputs and condition: an objective of subnets chooses layers."""
        return {}

    def weights(self, clock: Clock) -> torch.Tensor:
        """Weight of each token in the loss, (L,) on the device; progressive training changes it over time."""
        return token_weights(self.transformer.schedule, self.config.weights, self.transformer.device)

    def training_prompt(self, batch: Batch, clock: Clock, reader: NextScaleTransformer | None = None) -> Prompt:
        """The batch's prompt; in training, for a share of the images, the null prompt of who reads it (the model)."""
        prompt, reader = self.prompt(batch), reader or self.transformer
        if not self.training or self.config.drop == 0:
            return prompt
        u_B = image_draws(batch["counter"], 1, clock.seed, 2, device=reader.device)[:, 0]
        return drop_prompts(prompt, reader.null_prompt(prompt), u_B < self.config.drop)

    def condition(self, batch: Batch, clock: Clock) -> Conditioning:
        """All that the blocks need of the batch's prompt, and which branches stochastic depth leaves to each image."""
        cond, blocks = self.transformer.condition(self.training_prompt(batch, clock)), self.transformer.all_blocks
        if not any(block.drops for block in blocks):
            return cond
        u_BN = image_draws(batch["counter"], 2 * len(blocks), clock.seed, DROP_STREAM, device=cond.start_BD.device)
        kept = (block.kept(u_2B) for block, u_2B in zip(blocks, u_BN.T.unflatten(0, (-1, 2))))
        return replace(cond, kept=tuple(kept))

    def forward(self, batch: Batch, clock: Clock) -> tuple[torch.Tensor, Metrics]:
        """Loss, and loss and accuracy by scale; in eval mode no prompt is dropped and no label smoothed."""
        return self.predict(batch, clock, **self.passes(clock))

    def predict(self, batch: Batch, clock: Clock, **passes: Any) -> tuple[torch.Tensor, Metrics]:
        """`forward` with other arguments of the transformer."""
        ids_BL, schedule = batch["ids"], batch.get("schedule")
        if schedule is not None:
            passes = {**passes, "schedule": schedule}
        cond = self.condition(batch, clock)
        logits_BLV = self.transformer.logits(self.hidden(batch["inputs"], cond, **passes), cond)
        loss_L, correct_L = self.score(logits_BLV, ids_BL, self.config.label_smoothing if self.training else 0.0)
        if schedule is None:
            weights_L = self.weights(clock)
        else:
            weights_L = token_weights(schedule, self.config.weights, loss_L.device)
        loss = (loss_L * weights_L).sum()
        if schedule is not None:  # its scales are not the model's own
            return loss, {"accuracy": correct_L.mean()}
        by_scale = {**self.by_scale("loss", loss_L), **self.by_scale("accuracy", correct_L)}
        return loss, {"accuracy": correct_L.mean(), **by_scale}

    def by_scale(self, name: str, value_L: torch.Tensor) -> Metrics:
        """Means over the tokens of each scale that there is."""
        schedule = self.transformer.schedule
        own_KL = _own_tokens(tuple(schedule.lengths[: schedule.ends.index(len(value_L)) + 1]), str(value_L.device))
        mean_K = torch.where(own_KL, value_L.detach(), 0.0).sum(dim=1) / own_KL.sum(dim=1)
        return {f"{name}_{scale}": mean for scale, mean in zip(schedule.names, mean_K)}

    def compile_parts(self) -> None:
        """Compile every block, and what is made of the logits: it would read and write them several times."""
        settings = torch._dynamo.config  # each number of scales, with gradients and without, is compiled by itself
        limit = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"  # torch 2.6
        setattr(settings, limit, max(getattr(settings, limit), 4 * len(self.transformer.schedule)))
        self.transformer.compile_repeated_blocks(dynamic=False)
        self.score = torch.compile(self.score, dynamic=False)

    def halve_stream(self) -> None:
        """Keep the hidden states between blocks in half precision, too."""
        self.transformer.half_stream = True

    def checkpoint_activations(self) -> None:
        """Keep only the activations between blocks."""
        self.transformer.enable_gradient_checkpointing()


def first_scales(batch: Batch, schedule: ScaleSchedule, count: int) -> Batch:
    """The batch with the ids and inputs of its first `count` scales alone; no inputs (None) for the first scale."""
    end, first = schedule.ends[count - 1], schedule.lengths[0]
    inputs = batch["inputs"][:, : end - first] if end > first else None
    return {**batch, "ids": batch["ids"][:, :end], "inputs": inputs}


@contextlib.contextmanager
def fast_cpu_attention(device: torch.device) -> Iterator[None]:
    """On a CPU, attention as plain matrix products in the compute dtype: the fused backward is slower there."""
    if device.type != "cpu":
        yield
        return
    flags = torch.backends.cuda  # the flag is the CPU's as well
    before = flags.fp16_bf16_reduction_math_sdp_allowed()
    flags.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        flags.allow_fp16_bf16_reduction_math_sdp(before)


def drop_prompts(prompt: Prompt, null: Prompt, drop_B: torch.Tensor) -> Prompt:
    """The prompt with the rows where `drop_B` (bool) replaced by the null prompt's."""
    if isinstance(prompt, ClassPrompt):
        return ClassPrompt(torch.where(drop_B.to(prompt.classes_B.device), null.classes_B, prompt.classes_B))
    drop_B = drop_B.to(prompt.mask_BT.device)
    states = torch.where(drop_B[:, None, None], null.states_BTE, prompt.states_BTE)
    return TextPrompt(states, torch.where(drop_B[:, None], null.mask_BT, prompt.mask_BT))
