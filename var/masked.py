"""Masked prediction: some tokens of a scale are drawn again, given the others of the same scale (HMAR, section 4.2).

A next-scale transformer draws all tokens of a scale at once, each without knowing the others. HMAR lets a second set
of last blocks and a second head correct that: they see the scale's tokens, but for those that are masked, and predict
these. The blocks before them, and how tokens, places and conditions are embedded, are shared with the first pass.

Shapes: B images, l tokens of the scales at hand, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import nn

from var.heads import CategoricalHead
from var.layers import Block


class MaskedPrediction(nn.Module):
    """The part of a masked pass that is its own: what stands for a masked token, the last blocks, the head.

    Args:
        blocks: as the transformer's last ones, in the place of as many of them.
        head: as the transformer's.
    """

    called_apart = ("beside",)  # beside `forward`: sharding must know

    def __init__(self, blocks: Sequence[Block], head: CategoricalHead, width: int):
        super().__init__()
        self.mask_1D = nn.Parameter(torch.empty(1, width))
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def beside(self, embedded_BlD: torch.Tensor, masked_Bl: torch.Tensor) -> torch.Tensor:
        """What is added to a scale's inputs (B, l, D): its embedded tokens, or the mask where `masked_Bl` (bool) is."""
        return torch.where(masked_Bl[..., None], self.mask_1D.to(embedded_BlD.dtype), embedded_BlD)

    @torch.no_grad()
    def init_weights(self, blocks: Sequence[Block], head: CategoricalHead) -> None:
        """Begin as the transformer's own last blocks and head, as HMAR's second training does."""
        nn.init.trunc_normal_(self.mask_1D, std=sqrt(1 / (3 * self.mask_1D.shape[1])))
        for own, source in zip((*self.blocks, self.head), (*blocks, head), strict=True):
            own.load_state_dict(source.state_dict())
