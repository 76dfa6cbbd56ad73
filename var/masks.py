"""Who may attend to whom, as one predicate on scale levels; as a dense SDPA mask or a flex_attention block mask.

Shapes: Q query tokens, S key tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from tokenizer.schedule import ScaleSchedule

PREDICATES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "block_causal": lambda query_level, key_level: query_level >= key_level,  # VAR, section 3.3
    "block_diagonal": lambda query_level, key_level: query_level == key_level,  # HMAR: Markov over scales
}


def attention_mask(
    schedule: ScaleSchedule,
    scales: range,
    device: torch.device | str,
    *,
    kind: str = "block_causal",
    backend: str = "sdpa",
    cached: bool = False,
) -> torch.Tensor | BlockMask | None:
    """The mask for queries of `scales`, against keys of the same scales or, with `cached`, of all scales from 0.

    Returns:
        None where nothing is masked (one scale that sees everything before it); else for "sdpa" a bool (Q, S)
        tensor, True = may attend; for "flex" a BlockMask.

    Raises:
        ValueError: on an unknown kind or backend.
    """
    if kind not in PREDICATES:
        raise ValueError(f"mask kind must be one of {', '.join(PREDICATES)}, got {kind!r}")
    if backend not in ("sdpa", "flex"):
        raise ValueError(f"attention backend must be sdpa or flex, got {backend!r}")
    if len(scales) == 1 and kind == "block_causal":
        return None
    first_key = 0 if cached else schedule.begins[scales.start]
    end = schedule.ends[scales.stop - 1]
    levels = schedule.level_ids
    return _mask(levels[schedule.begins[scales.start] : end], levels[first_key:end], str(device), kind, backend)


@cache  # not bounded: a recorded CUDA graph reads its masks again
@torch.inference_mode(False)
def _mask(
    query_levels: Sequence[int], key_levels: Sequence[int], device: str, kind: str, backend: str
) -> torch.Tensor | BlockMask:
    query_Q, key_S = (torch.tensor(levels, device=device) for levels in (query_levels, key_levels))
    allowed = PREDICATES[kind]
    if backend == "sdpa":
        return allowed(query_Q[:, None], key_S[None, :])

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return allowed(query_Q[q], key_S[s])

    return create_block_mask(mask_mod, None, None, len(query_Q), len(key_S), device=device)
