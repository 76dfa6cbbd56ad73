"""Multi-scale residual vector quantisation (VAR, section 3.2, algorithms 1 and 2).

Shapes: B images, C latent channels, H W the latent grid, h w the grid of one scale, l = h*w its tokens,
L all tokens, V codes, N vectors in a row.

A quantiser is an empty reconstruction and four verbs: `encode` (latents to tokens), `lookup` (tokens of a scale to a
code map), `accumulate` (add a code map to the running reconstruction), `next_input` (what the transformer sees before
predicting a scale). Editing and soft tokens ask for `choose` and `blend` besides. All arithmetic is float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from tokenizer.precision import product_precision
from tokenizer.resize import average, enlarge
from tokenizer.schedule import ScaleSchedule

USED_SHARE = 0.08  # a code is in use at a scale from this share of an equal split of its hits; VAR splits the finest's


@dataclass
class QuantizerOutput:
    """What quantising for training gives.

    Attributes:
        f_hat_BCHW: the sum of all scales, with a straight-through gradient to the encoder.
        loss: scalar VQ loss, the mean over scales of codebook and commitment terms (VAR, equation 5).
        ids: one int64 tensor per scale, (B, l) or, of n bits a token, (B, l, n).
        residuals_NC: per scale, the vectors the codebook was searched for, detached (for restarting dead codes).
        sums_BCHW: the sum after each scale with its gradient, where the quantiser can give one (bitwise).
    """

    f_hat_BCHW: torch.Tensor
    loss: torch.Tensor
    ids: list[torch.Tensor]
    residuals_NC: list[torch.Tensor]
    sums_BCHW: list[torch.Tensor] = field(default_factory=list)


def phi_index(num_phis: int, k: int, num_scales: int) -> int:
    """Which of `num_phis` shared convolutions serves scale `k`.

    The official rule: the tick nearest to k / (num_scales - 1), ticks spread over [0, 1]. With one convolution
    per scale that is the scale's own, and for a schedule of fewer or more scales still an answer. Exact midpoints exist
    (10 scales with 4 convolutions), and float64 rounding of this very expression decides them.
    """
    margin = 1 / 3 / num_phis if num_phis == 4 else 1 / 2 / num_phis
    ticks = np.linspace(margin, 1 - margin, num_phis)
    return int(np.argmin(np.abs(ticks - k / max(num_scales - 1, 1))))


class Phi(nn.Conv2d):
    """The blend that repairs what up-sampling loses: phi(h) = (1 - r) h + r conv3x3(h)."""

    def __init__(self, channels: int, ratio: float):
        super().__init__(channels, channels, kernel_size=3, padding=1)
        self.ratio = abs(ratio)

    def forward(self, h_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) float32 to the same, in whatever dtype the weights are."""
        convolved = F.conv2d(h_BCHW, self.weight.float(), self.bias.float(), padding=1)
        return torch.lerp(h_BCHW, convolved, self.ratio)


class PyramidQuantizer(nn.Module, ABC):
    """What the generation loop knows of a quantiser, whatever a token is to it.

    Attributes:
        vocab_size: values of a token or, bitwise, of each bit.
        channels: what the transformer reads of a token.
        draws_per_token: random draws that make one token.
        has_codebook: whether there are codes to learn.
    """

    vocab_size: int
    channels: int
    draws_per_token = 1
    has_codebook = True

    @abstractmethod
    def start(self, batch: int, schedule: ScaleSchedule, device: torch.device | str | None = None) -> torch.Tensor:
        """The empty reconstruction: zeros (batch, C, H, W), float32."""

    @abstractmethod
    def encode(self, f_BCHW: torch.Tensor, schedule: ScaleSchedule) -> list[torch.Tensor]:
        """Latents (B, C, H, W) to tokens: one int64 tensor per scale, (B, l) or, of n draws a token, (B, l, n)."""

    @abstractmethod
    def choose(self, rest_BCHW: torch.Tensor, k: int, schedule: ScaleSchedule) -> torch.Tensor:
        """The tokens of scale k for what is still missing of the latents, (B, C, H, W) float32."""

    @abstractmethod
    def lookup(self, ids_Bl: torch.Tensor, k: int, schedule: ScaleSchedule) -> torch.Tensor:
        """Tokens of scale k to their code map (B, C, h, w), float32."""

    @abstractmethod
    def blend(self, weights_BlV: torch.Tensor, k: int, schedule: ScaleSchedule) -> torch.Tensor:
        """The code map (B, C, h, w) of tokens that are mixed with these weights."""

    @abstractmethod
    def next_input(self, f_hat_BCHW: torch.Tensor, k: int, schedule: ScaleSchedule) -> torch.Tensor:
        """What the transformer reads before predicting scale k >= 1: (B, l, channels) float32."""

    @abstractmethod
    def spread(self, code_BChw: torch.Tensor, k: int, schedule: ScaleSchedule) -> torch.Tensor:
        """What the code map of scale k adds to the reconstruction: (B, C, H, W)."""

    def accumulate(
        self, f_hat_BCHW: torch.Tensor, code_BChw: torch.Tensor, k: int, schedule: ScaleSchedule
    ) -> torch.Tensor:
        """The running reconstruction (B, C, H, W) with scale k's code map added (algorithm 2, lines 5-7)."""
        with torch.autocast(f_hat_BCHW.device.type, enabled=False):
            return f_hat_BCHW + self.spread(code_BChw, k, schedule)

    @torch.no_grad()
    def scale_code(self, ids_Bl: torch.Tensor, k: int, schedule: ScaleSchedule) -> torch.Tensor:
        """What the tokens of scale k alone add to the reconstruction, at their own size: (B, l, channels) float32.

        A masked pass reads it beside the scale's input (HMAR, section 4.2).
        """
        with torch.autocast(ids_Bl.device.type, enabled=False):
            return self.next_input(self.spread(self.lookup(ids_Bl, k, schedule), k, schedule), k, schedule)

    @torch.no_grad()
    def teacher_inputs(self, ids: list[torch.Tensor], schedule: ScaleSchedule) -> torch.Tensor:
        """Transformer inputs of scales 1.. for known tokens: (B, L - l of scale 0, C) float32."""
        f_hat = self.start(len(ids[0]), schedule, ids[0].device)
        inputs = []
        for k in range(len(schedule) - 1):
            f_hat = self.accumulate(f_hat, self.lookup(ids[k], k, schedule), k, schedule)
            inputs.append(self.next_input(f_hat, k + 1, schedule))
        return torch.cat(inputs, dim=1) if inputs else f_hat.new_zeros(len(f_hat), 0, self.channels)

    @torch.no_grad()
    def partial_sums(self, ids: list[torch.Tensor], schedule: ScaleSchedule) -> list[torch.Tensor]:
        """The running reconstruction after each scale: K tensors (B, C, H, W)."""
        f_hat, sums = self.start(len(ids[0]), schedule, ids[0].device), []
        for k in range(len(schedule)):
            f_hat = self.accumulate(f_hat, self.lookup(ids[k], k, schedule), k, schedule)
            sums.append(f_hat)
        return sums


class MultiScaleQuantizer(PyramidQuantizer):
    """One codebook, residual quantisation over the scales of a schedule.

    Args:
        vocab_size: codes in the codebook, V.
        channels: latent channels, C.
        phi_ratio: r of phi; its sign is ignored, 0 means no convolution at all.
        num_phis: convolutions shared by the scales (4 officially; 1 = one for all; 0 = one per scale).
        num_scales: scales of the model's own schedule; counts the convolutions when `num_phis` is 0.
        cosine: nearest code by cosine similarity instead of Euclidean distance.
        beta: weight of the commitment term.
        normalize_scales: divide each scale's residuals by their root mean square before the search, and multiply the
            codes back. Not in VAR: there fine scales with small residuals share a few short codes. The buffer
            `scale_rms_K` is set by training.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        channels: int,
        phi_ratio: float = 0.5,
        num_phis: int = 4,
        num_scales: int = 10,
        cosine: bool = False,
        beta: float = 0.25,
        normalize_scales: bool = False,
    ):
        super().__init__()
        if vocab_size < 2:
            raise ValueError(f"vocab_size must be 2 or more, got {vocab_size}")
        self.vocab_size, self.channels, self.cosine, self.beta = vocab_size, channels, cosine, beta
        self.normalize_scales = normalize_scales
        if normalize_scales:
            self.register_buffer("scale_rms_K", torch.ones(num_scales))
        self.codebook = nn.Embedding(vocab_size, channels)
        count = (num_phis or num_scales) if abs(phi_ratio) > 1e-6 else 0
        self.phis = nn.ModuleList(Phi(channels, phi_ratio) for _ in range(count))

    # --- the verbs ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, f_BCHW: torch.Tensor, schedule: ScaleSchedule) -> list[torch.Tensor]:
        """Latents (B, C, H, W) to one (B, l) int64 tensor of code indices per scale, in [0, V)."""
        with torch.autocast(f_BCHW.device.type, enabled=False):
            rest, ids = f_BCHW.float(), []
            for k in range(len(schedule)):
                ids.append(self.choose(rest, k, schedule))
                rest = rest - self.spread(self.lookup(ids[k], k, schedule), k, schedule)
        return ids

    @torch.no_grad()
    def choose(self, rest_BCHW: torch.Tensor, k: int, schedule: ScaleSchedule) -> torch.Tensor:
        """The tokens (B, l) of scale k for what is still missing of the latents, (B, C, H, W) float32."""
        return self._nearest(self._shrink(rest_BCHW, k, schedule) / self.gain(k))

    def lookup(self, ids_Bl: torch.Tensor, k: int, schedule: ScaleSchedule) -> torch.Tensor:
        """Tokens (B, l) of scale k to their code map (B, C, h, w), float32."""
        h, w = schedule.sides[k]
        return rearrange(self.codebook(ids_Bl).float(), "b (h w) c -> b c h w", h=h, w=w) * self.gain(k)

    def blend(self, weights_BlV: torch.Tensor, k: int, schedule: ScaleSchedule) -> torch.Tensor:
        """Code map (B, C, h, w) of a convex mix of codes: `lookup` for soft tokens (Gumbel smoothing)."""
        h, w = schedule.sides[k]
        mixed = rearrange(weights_BlV.float() @ self.codebook.weight.float(), "b (h w) c -> b c h w", h=h, w=w)
        return mixed * self.gain(k)

    def next_input(self, f_hat_BCHW: torch.Tensor, k: int, schedule: ScaleSchedule) -> torch.Tensor:
        """What the transformer reads before predicting scale k >= 1: f_hat shrunk to that scale, (B, l, C) float32."""
        return rearrange(self._shrink(f_hat_BCHW, k, schedule), "b c h w -> b (h w) c")

    # --- training and teacher forcing -----------------------------------------------------------------------------

    def start(self, batch: int, schedule: ScaleSchedule, device: torch.device | str | None = None) -> torch.Tensor:
        """The empty reconstruction: zeros (batch, C, H, W), float32."""
        return torch.zeros(batch, self.channels, *schedule.latent_hw, device=device, dtype=torch.float32)

    @torch.no_grad()
    def corrected(
        self, f_BCHW: torch.Tensor, schedule: ScaleSchedule, noise: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Tokens of every scale, and the transformer's inputs where some tokens went wrong (self-correction).

        Infinity's bitwise self-correction (section 3.4) for codes: where bits are flipped there, here the vectors are
        disturbed before the code that enters the reconstruction is searched. The residual of a scale is taken to what
        the wrong codes before it make, so later tokens undo earlier errors.

        Args:
            f_BCHW: latents (B, C, H, W).
            noise: for each scale (B, C, h, w), added to the vectors, in units of each image's root mean square there.

        Returns:
            One (B, l) int64 tensor of undisturbed tokens per scale; inputs of scales 1.., (B, L - l of scale 0, C).
        """
        with torch.autocast(f_BCHW.device.type, enabled=False):
            rest, labels, inputs = f_BCHW.float(), [], []
            f_hat = torch.zeros_like(rest)
            for k in range(len(schedule)):
                z_BChw = self._shrink(rest, k, schedule) / self.gain(k)
                labels.append(self._nearest(z_BChw))
                size_B111 = z_BChw.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()  # of each image by itself
                shown = self._nearest(z_BChw + noise[k] * size_B111)
                step = self.spread(self.lookup(shown, k, schedule), k, schedule)
                rest, f_hat = rest - step, f_hat + step
                if k + 1 < len(schedule):
                    inputs.append(self.next_input(f_hat, k + 1, schedule))
        return labels, torch.cat(inputs, dim=1) if inputs else f_hat.new_zeros(len(f_hat), 0, self.channels)

    def forward(self, f_BCHW: torch.Tensor, schedule: ScaleSchedule) -> QuantizerOutput:
        """Quantise latents (B, C, H, W) for training.

        The loss is the mean over scales of beta * MSE(sg(f_hat_k), f) + MSE(f_hat_k, sg(f)) with the cumulative
        f_hat_k, so every scale is pulled towards all of f and the codebook learns through all later scales.
        """
        with torch.autocast(f_BCHW.device.type, enabled=False):
            f = f_BCHW.float()
            target, rest = f.detach(), f.detach()
            f_hat, loss, ids, residuals = torch.zeros_like(f), f.new_zeros(()), [], []
            for k in range(len(schedule)):
                z_BChw = self._shrink(rest, k, schedule) / self.gain(k)
                ids.append(self._nearest(z_BChw))
                residuals.append(rearrange(z_BChw, "b c h w -> (b h w) c"))
                step = self.spread(self.lookup(ids[k], k, schedule), k, schedule)
                f_hat, rest = f_hat + step, rest - step.detach()
                loss = loss + self.beta * F.mse_loss(f_hat.detach(), f) + F.mse_loss(f_hat, target)
            straight_through = (f_hat.detach() - target) + f
        return QuantizerOutput(straight_through, loss / len(schedule), ids, residuals)

    def gain(self, k: int) -> torch.Tensor | float:
        """What the codes of scale k are multiplied by: 1 unless `normalize_scales`.

        Raises:
            ValueError: with `normalize_scales`, for a scale beyond those of the model's own schedule.
        """
        if not self.normalize_scales:
            return 1.0
        if k >= len(self.scale_rms_K):
            raise ValueError(f"schedule must have at most {len(self.scale_rms_K)} scales, whose sizes were measured")
        return self.scale_rms_K[k]

    # --- pieces ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _nearest(self, z_BChw: torch.Tensor) -> torch.Tensor:
        z_NC = rearrange(z_BChw, "b c h w -> (b h w) c")
        codes_VC = self.codebook.weight.float()
        with product_precision("ieee"):
            if self.cosine:  # only the search is by angle: the code that is looked up keeps its length
                ids_N = (F.normalize(z_NC, dim=-1) @ F.normalize(codes_VC, dim=-1).T).argmax(dim=1)
            else:  # |z - e|^2, in the order of operations of the official code
                distance_NV = z_NC.square().sum(dim=1, keepdim=True) + codes_VC.square().sum(dim=1)
                ids_N = torch.addmm(distance_NV, z_NC, codes_VC.T, alpha=-2, beta=1).argmin(dim=1)
        return ids_N.view(len(z_BChw), z_BChw.shape[2] * z_BChw.shape[3])

    def _shrink(self, x_BCHW: torch.Tensor, k: int, schedule: ScaleSchedule) -> torch.Tensor:
        if k == len(schedule) - 1:
            return x_BCHW
        return average(x_BCHW, schedule.sides[k])

    def spread(self, code_BChw: torch.Tensor, k: int, schedule: ScaleSchedule) -> torch.Tensor:
        """Enlarged and passed through the scale's phi: (B, C, h, w) to (B, C, H, W)."""
        if k < len(schedule) - 1:
            code_BChw = enlarge(code_BChw, schedule.latent_hw)
        if not self.phis:
            return code_BChw
        return self.phis[phi_index(len(self.phis), k, len(schedule))](code_BChw)
