"""A head that draws the tokens of a scale one after the other, so that they agree with one another.

A next-scale transformer draws all tokens of a scale at once: each is likely, together they need not be (an object in
two places, or in none). This small causal transformer stands on top of it and corrects each token's logits by the
tokens that were drawn before it in its scale, row by row. Its last layer begins at zero: untrained it changes nothing.

Shapes: B images, l tokens of the scales at hand, D width, H heads, d = D / H, V codes.
"""

from __future__ import annotations

from functools import cache
from math import sqrt

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from var.layers import FeedForward

Past = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each block, (B, H, l, d), of the scale so far


class CausalBlock(nn.Module):
    """Causal self-attention, then feed-forward, each after a layer norm."""

    def __init__(self, width: int, heads: int, hidden: int, *, norm_eps: float):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=norm_eps), nn.LayerNorm(width, eps=norm_eps)
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = FeedForward(width, hidden)

    def forward(
        self,
        x_BlD: torch.Tensor,
        mask_ll: torch.Tensor | None = None,
        past: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """(B, l, D) to the same, and the keys and values of `past` and these tokens."""
        q, k, v = rearrange(self.to_qkv(self.norm1(x_BlD)), "b l (p h d) -> p b h l d", p=3, h=self.heads)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_ll)
        x_BlD = x_BlD + self.to_out(rearrange(read, "b h l d -> b l (h d)"))
        return x_BlD + self.ffn(self.norm2(x_BlD)), (k, v)


class SequentialHead(nn.Module):
    """What the tokens drawn so far in a scale add to the logits of the next one.

    Args:
        width, heads, hidden, vocab_size: D, H, the hidden width of the feed-forward, V.
        layers: of the causal transformer.
        norm_eps: of its layer norms.
    """

    called_apart = ("step",)  # beside `forward`: sharding must know

    def __init__(self, width: int, heads: int, hidden: int, vocab_size: int, *, layers: int, norm_eps: float):
        super().__init__()
        self.first = vocab_size  # the row of `before` that stands in front of a scale
        self.before = nn.Embedding(vocab_size + 1, width)
        self.feature_proj = nn.Linear(width, width)
        self.blocks = nn.ModuleList(CausalBlock(width, heads, hidden, norm_eps=norm_eps) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.proj = nn.Linear(width, vocab_size)

    def forward(self, features_BlD: torch.Tensor, ids_Bl: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        """Corrections (B, l, V) of all tokens of consecutive scales of `lengths`, their true tokens known (training).

        Args:
            features_BlD: of the transformer's own head, `var.heads.CategoricalHead.features`.
            ids_Bl: the scales' tokens; each sees those before it in its scale.
        """
        parts = ids_Bl.split(lengths, dim=1)
        starts_B1 = ids_Bl.new_full((len(ids_Bl), 1), self.first)
        before_Bl = torch.cat([row for part in parts for row in (starts_B1, part[:, :-1])], dim=1)
        mask_ll = _causal_mask(tuple(lengths), ids_Bl.device)
        x_BlD = self._embed(features_BlD, before_Bl)
        for block in self.blocks:
            x_BlD, _ = block(x_BlD, mask_ll)
        return self.proj(self.norm(x_BlD))

    def step(
        self, features_B1D: torch.Tensor, before_B1: torch.Tensor | None, past: Past | None
    ) -> tuple[torch.Tensor, Past]:
        """Correction (B, 1, V) of one token after the one drawn `before_B1`, and the past with it; None at first."""
        if before_B1 is None:
            before_B1 = features_B1D.new_full(features_B1D.shape[:2], self.first, dtype=torch.int64)
        x_B1D, kept = self._embed(features_B1D, before_B1), []
        for i, block in enumerate(self.blocks):
            x_B1D, own = block(x_B1D, past=None if past is None else past[i])
            kept.append(own)
        return self.proj(self.norm(x_B1D)), kept

    def _embed(self, features_BlD: torch.Tensor, before_Bl: torch.Tensor) -> torch.Tensor:
        return self.feature_proj(features_BlD.to(self.feature_proj.weight.dtype)) + self.before(before_Bl)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Branches that begin small, and a last layer of zeros."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=sqrt(1 / (3 * module.in_features)))
                module.bias.zero_()
        nn.init.normal_(self.before.weight, std=0.3)
        for block in self.blocks:
            for last in (block.to_out, block.ffn.fc2):
                last.weight.div_(sqrt(2 * len(self.blocks)))
        self.proj.weight.zero_()


@cache  # made once: a copy to a GPU would wait, in every step, for all that it has been given to do
@torch.inference_mode(False)
def _causal_mask(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Which tokens each token sees, (l, l) bool: itself and those before it in its scale."""
    return torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool().to(device)
