"""flex_attention: imported when a mask for it is made, because importing it takes a second.

Shapes: B images, H heads, Q query tokens, S key tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

_compiled = torch.compile(flex_attention, dynamic=False)


def block_mask(
    query_levels_Q: torch.Tensor,
    key_levels_S: torch.Tensor,
    allowed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> BlockMask:
    """The mask of queries and keys whose levels are `allowed`."""

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return allowed(query_levels_Q[q], key_levels_S[s])

    return create_block_mask(mask_mod, None, None, len(query_levels_Q), len(key_levels_S), device=query_levels_Q.device)


def flex(
    q_BHQd: torch.Tensor, k_BHSd: torch.Tensor, v_BHSd: torch.Tensor, mask: BlockMask, scale: float | None
) -> torch.Tensor:
    """Softmax attention to (B, H, Q, d); compiled on a GPU."""
    attend = _compiled if q_BHQd.is_cuda else flex_attention
    return attend(q_BHQd, k_BHSd, v_BHSd, block_mask=mask, scale=scale)
