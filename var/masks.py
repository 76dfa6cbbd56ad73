"""Who may attend to whom, as one predicate on scale levels; as a dense mask, a flex_attention block mask, or by scales.

Shapes: Q query tokens, S key tokens, n tokens of the first scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import torch

from tokenizer.schedule import ScaleSchedule

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

PREDICATES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "block_causal": lambda query_level, key_level: query_level >= key_level,  # VAR, section 3.3
    "block_diagonal": lambda query_level, key_level: query_level == key_level,  # HMAR: Markov over scales
}


BACKENDS = ("sdpa", "flex", "grouped")
OWN_CALL = 64  # tokens that a scale needs for a call of its own to be worth it


@dataclass(frozen=True)
class Groups:
    """Attention as few calls: the first scales under a mask, each later one without, over all that it sees.

    Nothing that is masked is computed there, and what takes no mask can use the fastest kernels.

    Attributes:
        first_nn: the mask of the first scales' tokens; None where only the very first is among them.
        spans: of each group of tokens, where it begins and ends, and the first token that it sees.
    """

    first_nn: torch.Tensor | None
    spans: tuple[tuple[int, int, int], ...]


Mask: TypeAlias = "torch.Tensor | BlockMask | Groups"


@torch.compiler.disable  # scales are numbers here, not symbols; a mask is made once and kept
def attention_mask(
    schedule: ScaleSchedule,
    scales: range,
    device: torch.device | str,
    *,
    kind: str = "block_causal",
    backend: str = "sdpa",
    cached: bool = False,
) -> Mask | None:
    """The mask for queries of `scales`, against keys of the same scales or, with `cached`, of all scales from 0.

    Returns:
        None where nothing is masked (one scale, and no keys but those it sees); else for "sdpa" a bool (Q, S) tensor,
        True = may attend; for "flex" a BlockMask; for "grouped" Groups, or the bool tensor where the scales do not
        begin with the first.

    Raises:
        ValueError: on an unknown kind or backend.
    """
    if kind not in PREDICATES:
        raise ValueError(f"mask kind must be one of {', '.join(PREDICATES)}, got {kind!r}")
    if backend not in BACKENDS:
        raise ValueError(f"attention backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if len(scales) == 1 and (kind == "block_causal" or not cached):
        return None
    first_key = 0 if cached else schedule.begins[scales.start]
    end = schedule.ends[scales.stop - 1]
    levels = schedule.level_ids
    if backend == "grouped":
        if scales.start == 0:
            return _groups(schedule, scales.stop, str(device), kind)
        backend = "sdpa"
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
    from var.flex import block_mask

    return block_mask(query_Q, key_S, allowed)


@cache
@torch.inference_mode(False)
def _groups(schedule: ScaleSchedule, count: int, device: str, kind: str) -> Groups:
    """The groups of the first `count` scales."""
    small = next((k for k in range(1, count) if schedule.lengths[k] >= OWN_CALL), count)
    levels = schedule.level_ids[: schedule.ends[small - 1]]
    mask = None if small == 1 else _mask(levels, levels, device, kind, "sdpa")
    borders = pairwise((0, *(schedule.ends[k] for k in range(small - 1, count))))
    return Groups(mask, tuple((begin, end, begin if kind == "block_diagonal" else 0) for begin, end in borders))
