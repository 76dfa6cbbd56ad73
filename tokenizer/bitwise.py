"""Binary spherical quantisation over the scales: a token is a row of bits, and there is no codebook (Infinity, 3.2).

Shapes: B images, C latent channels, H W the latent grid, h w the token grid of one scale, l = h*w its tokens,
n = C * patch**2 bits of a token, L all tokens.

The four verbs of `tokenizer.quantizer`. With `patch` p > 1 a token covers p x p latent cells, so the latent grid is p
times the schedule's in both directions (Infinity 8B: p = 2). All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from einops import rearrange
from torch.nn import functional as F

from tokenizer.quantizer import PyramidQuantizer, QuantizerOutput
from tokenizer.resize import average
from tokenizer.schedule import ScaleSchedule

INVERSE_TEMPERATURE = 100.0  # of the soft bits in the entropy penalty


class BinarySphericalQuantizer(PyramidQuantizer):
    """Residual quantisation where the code of a residual is its signs over sqrt(C): a corner on the unit sphere.

    Args:
        channels: latent channels, C: bits of a latent cell.
        patch: latent cells along a token's side.
        entropy: weight of the entropy penalty in the loss (0.1 in the official code, where the forward pass that was
            released leaves it out).
        beta: weight of the commitment term in the loss (0 in the official code).
    """

    normalize_scales = False
    has_codebook = False

    def __init__(self, *, channels: int, patch: int = 1, entropy: float = 0.0, beta: float = 0.0):
        super().__init__()
        if channels * patch**2 < 2:
            raise ValueError(f"a bitwise token needs 2 bits or more, got latent_channels {channels}")
        self.bits, self.patch, self.entropy, self.beta = channels, patch, entropy, beta
        self.vocab_size = 2  # of each bit
        self.channels = channels * patch**2
        self.draws_per_token = self.channels

    # --- the verbs ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, f_BCHW: torch.Tensor, schedule: ScaleSchedule) -> list[torch.Tensor]:
        """Latents (B, C, H, W) to one (B, l, n) int64 tensor of bits per scale."""
        return self.corrected(f_BCHW, schedule)[0]

    @torch.no_grad()
    def choose(self, rest_BCHW: torch.Tensor, k: int, schedule: ScaleSchedule) -> torch.Tensor:
        """The bits (B, l, n) of scale k for what is still missing of the latents, (B, C, H, W) float32."""
        return self._to_tokens((self._shrink(rest_BCHW, k, schedule) > 0).long())

    def lookup(self, bits_Bln: torch.Tensor, k: int, schedule: ScaleSchedule) -> torch.Tensor:
        """Bits (B, l, n) of scale k to their code map (B, C, p*h, p*w), entries +-1/sqrt(C), float32."""
        return self._to_map((bits_Bln * 2 - 1).float() / sqrt(self.bits), k, schedule)

    def blend(self, weights_Bln2: torch.Tensor, k: int, schedule: ScaleSchedule) -> torch.Tensor:
        """Code map (B, C, p*h, p*w) of soft bits, weights (B, l, n, 2) of 0 and 1."""
        off, on = weights_Bln2.float().unbind(dim=-1)
        return self._to_map((on - off) / sqrt(self.bits), k, schedule)

    def next_input(self, f_hat_BCHW: torch.Tensor, k: int, schedule: ScaleSchedule) -> torch.Tensor:
        """What the transformer reads before predicting scale k >= 1: (B, l, n) float32.

        f_hat is shrunk by linear interpolation, unlike the residuals, which are averaged over areas.
        """
        if k < len(schedule) - 1:
            f_hat_BCHW = F.interpolate(f_hat_BCHW, size=self.cells(schedule.sides[k]), mode="bilinear")
        return self._to_tokens(f_hat_BCHW)

    # --- training and teacher forcing -----------------------------------------------------------------------------

    def start(self, batch: int, schedule: ScaleSchedule, device: torch.device | str | None = None) -> torch.Tensor:
        """The empty reconstruction: zeros (batch, C, H, W), float32."""
        return torch.zeros(batch, self.bits, *self.cells(schedule.latent_hw), device=device, dtype=torch.float32)

    @torch.no_grad()
    def corrected(
        self, f_BCHW: torch.Tensor, schedule: ScaleSchedule, flips: Sequence[torch.Tensor] | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Bits of every scale, and the transformer's inputs where some bits went wrong (bitwise self-correction).

        The residual of a scale is taken to what the flipped bits before it make, so the labels of later scales undo
        the errors of earlier ones (Infinity, section 3.4).

        Args:
            f_BCHW: latents (B, C, H, W).
            flips: for each scale a bool (B, l, n), True = this bit enters the reconstruction flipped; None flips none.

        Returns:
            One (B, l, n) int64 tensor of unflipped bits per scale; inputs of scales 1.., (B, L - l of scale 0, n).
        """
        with torch.autocast(f_BCHW.device.type, enabled=False):
            f, labels, inputs = f_BCHW.float(), [], []
            f_hat = torch.zeros_like(f)
            for k in range(len(schedule)):
                bits_Bln = self.choose(f - f_hat, k, schedule)
                labels.append(bits_Bln)
                shown = bits_Bln if flips is None else bits_Bln ^ flips[k].long()
                f_hat = self.accumulate(f_hat, self.lookup(shown, k, schedule), k, schedule)
                if k + 1 < len(schedule):
                    inputs.append(self.next_input(f_hat, k + 1, schedule))
        return labels, torch.cat(inputs, dim=1) if inputs else f.new_zeros(len(f), 0, self.channels)

    def forward(self, f_BCHW: torch.Tensor, schedule: ScaleSchedule) -> QuantizerOutput:
        """Quantise latents (B, C, H, W) for training.

        Every scale's code passes its gradient straight to the residual on the unit sphere, and through the averaging
        to the latents. The loss is entropy * the penalty, a mean over scales, + beta * MSE(f, sg(f_hat)).
        """
        with torch.autocast(f_BCHW.device.type, enabled=False):
            f = f_BCHW.float()
            rest, f_hat, penalty = f, torch.zeros_like(f), f.new_zeros(())
            ids, residuals, sums = [], [], []
            for k in range(len(schedule)):
                z_BChw = F.normalize(self._shrink(rest, k, schedule), dim=1)
                bits_Bln = self._to_tokens((z_BChw.detach() > 0).long())
                code = self.lookup(bits_Bln, k, schedule)
                step = self.spread(z_BChw + (code - z_BChw).detach(), k, schedule)
                rest, f_hat = rest - step.detach(), f_hat + step
                ids.append(bits_Bln)
                sums.append(f_hat)
                residuals.append(rearrange(z_BChw.detach(), "b c h w -> (b h w) c"))
                if self.entropy:
                    penalty = penalty + entropy_penalty(z_BChw) / len(schedule)
            loss = self.entropy * penalty / INVERSE_TEMPERATURE + self.beta * F.mse_loss(f_hat.detach(), f)
        return QuantizerOutput(f_hat, loss, ids, residuals, sums)

    # --- pieces ---------------------------------------------------------------------------------------------------

    def cells(self, side: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in latent cells of a (height, width) in tokens."""
        return side[0] * self.patch, side[1] * self.patch

    def _to_tokens(self, x_BChw: torch.Tensor) -> torch.Tensor:
        return rearrange(x_BChw, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)

    def _to_map(self, x_Bln: torch.Tensor, k: int, schedule: ScaleSchedule) -> torch.Tensor:
        h, w = schedule.sides[k]
        shape = {"h": h, "w": w, "p": self.patch, "q": self.patch}
        return rearrange(x_Bln, "b (h w) (c p q) -> b c (h p) (w q)", **shape)

    def _shrink(self, x_BCHW: torch.Tensor, k: int, schedule: ScaleSchedule) -> torch.Tensor:
        if k == len(schedule) - 1:
            return x_BCHW
        return average(x_BCHW, self.cells(schedule.sides[k]))

    def spread(self, code_BChw: torch.Tensor, k: int, schedule: ScaleSchedule) -> torch.Tensor:
        """Enlarged: (B, C, p*h, p*w) to (B, C, H, W)."""
        if k == len(schedule) - 1:
            return code_BChw
        return F.interpolate(code_BChw, size=self.cells(schedule.latent_hw), mode="bilinear")


def entropy_penalty(z_BChw: torch.Tensor) -> torch.Tensor:
    """Mean entropy of each vector's soft bits minus the entropy of their mean: bits sure, but evenly used. A scalar.

    In closed form, bit by bit (BSQ, section 3.3): bit i of a unit vector is 0 with probability
    sigmoid(-4 t z_i / sqrt(C)).

    Args:
        z_BChw: residuals on the unit sphere, (B, C, h, w).
    """
    logits_NC = rearrange(z_BChw, "b c h w -> (b h w) c") * (4 * INVERSE_TEMPERATURE / sqrt(z_BChw.shape[1]))
    p_NC = logits_NC.sigmoid()
    return _bit_entropy(p_NC).sum(dim=-1).mean() - _bit_entropy(p_NC.mean(dim=0)).sum()


def _bit_entropy(p: torch.Tensor) -> torch.Tensor:
    return -(p * (p + 1e-8).log() + (1 - p) * (1 - p + 1e-8).log())
