"""What turns the transformer's hidden states into logits over tokens.

Shapes: B images, l tokens, D width, V codes, n bits of a token.
"""

from __future__ import annotations

import torch
from torch import nn

from var.layers import EPS, AdaLinear, modulate


class CategoricalHead(nn.Module):
    """Modulated layer norm, then a linear layer to V logits, in float32.

    The two halves are apart because guidance is an affine mix: mixing `features` and projecting once gives the same
    logits as projecting twice and mixing.
    """

    def __init__(self, width: int, vocab_size: int, *, norm_eps: float = EPS):
        super().__init__()
        self.norm_eps = norm_eps
        self.ada = AdaLinear(width, 2)
        self.proj = nn.Linear(width, vocab_size)

    def modulation(self, cond_BD: torch.Tensor) -> torch.Tensor:
        """scale, shift as (B, 2, D)."""
        return self.ada(cond_BD.to(self.proj.weight.dtype))

    def features(self, hidden_BlD: torch.Tensor, head_B2D: torch.Tensor) -> torch.Tensor:
        """(B, l, D) to (B, l, D) float32."""
        scale, shift = head_B2D.float()[:, :, None].unbind(dim=1)
        return modulate(hidden_BlD.float(), scale, shift, self.norm_eps)

    def project(self, features_BlD: torch.Tensor) -> torch.Tensor:
        """(B, l, D) to logits (B, l, V) float32."""
        with torch.autocast(features_BlD.device.type, enabled=False):
            return self.proj(features_BlD.to(self.proj.weight.dtype)).float()


class BitwiseHead(CategoricalHead):
    """Two logits for each bit of a token: 2n outputs instead of 2**n (Infinity, section 3.3)."""

    def __init__(self, width: int, bits: int, *, norm_eps: float = EPS):
        super().__init__(width, 2 * bits, norm_eps=norm_eps)

    def project(self, features_BlD: torch.Tensor) -> torch.Tensor:
        """(B, l, D) to logits (B, l, n, 2) float32; index 1 is bit 1."""
        return super().project(features_BlD).unflatten(-1, (-1, 2))
