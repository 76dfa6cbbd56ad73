"""Drawing the least certain tokens of a scale again, given its other tokens (HMAR, section 4.2).

A mask schedule says for every scale how many tokens each pass settles: (1, 3) settles one token of four by next-scale
prediction and draws the other three, those of the least probability, again by a masked pass. Each further pass masks
fewer of the same tokens, those that were drawn with the least probability then. Masked passes are not guided, as in the
official code (which guides with a millionth of the weight).

Shapes: B images, l tokens of one scale, V codes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING

import torch

from sample.draw import draw, watch
from tokenizer.schedule import ScaleSchedule

if TYPE_CHECKING:
    from sample.state import GenerationState

MaskSchedule = tuple[tuple[int, ...], ...]
PUBLISHED = {4: (1, 3), 9: (1, 1, 2, 5)}  # by tokens of a scale: HMAR's for 256 pixels; other scales in one pass
OFF = "off"


def read_mask_schedule(given: str | Sequence[Sequence[int]] | None, schedule: ScaleSchedule) -> MaskSchedule:
    """How many tokens each pass over each scale settles.

    Args:
        given: the passes of the first scales, as lists of numbers or as "1/1,3/1,1,2,5"; scales that are left out take
            one pass. "off" for one pass each; None for the published passes of scales of 4 and of 9 tokens.

    Raises:
        TypeError: if it is none of these.
        ValueError: if the numbers of a scale do not sum to its tokens.
    """
    if given is None:
        return tuple(PUBLISHED.get(tokens, (tokens,)) if k else (tokens,) for k, tokens in enumerate(schedule.lengths))
    if isinstance(given, str):
        if given != OFF and not re.fullmatch(r"\d+([,/]\d+)*", given):
            raise ValueError(f"mask_schedule must be off, or tokens a pass like 1/1,3/1,1,2,5, got {given!r}")
        given = [] if given == OFF else [[int(n) for n in scale.split(",")] for scale in given.split("/")]
    passes = [tuple(_listed(scale)) for scale in _listed(given)]
    return check_mask_schedule((*passes, *((tokens,) for tokens in schedule.lengths[len(passes) :])), schedule)


def check_mask_schedule(passes: MaskSchedule, schedule: ScaleSchedule) -> MaskSchedule:
    """The schedule, if every scale's passes settle its tokens.

    Raises:
        ValueError: naming the first scale of which they do not.
    """
    if len(passes) != len(schedule):
        raise ValueError(f"mask_schedule must have at most {len(schedule)} scales, got {len(passes)}")
    for k, (settled, tokens) in enumerate(zip(passes, schedule.lengths)):
        whole = all(isinstance(n, Integral) and n > 0 for n in settled)
        if not whole or sum(settled) != tokens or (k == 0 and len(settled) > 1):
            rule = "takes one pass" if k == 0 else f"has {tokens} tokens, of which each pass settles one or more"
            raise ValueError(f"mask_schedule: scale {k} {rule}, got {list(settled)}")
    return passes


def _listed(given: object) -> list:
    """A sequence, an array or a tensor as the list that it holds."""
    given = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"mask_schedule must hold a list of numbers for each scale, got {given!r}")
    return list(given)


def redraw(
    state: GenerationState, k: int, logits_BlV: torch.Tensor, tokens_Bl: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and tokens of scale k after the masked passes of its stage; both of the pass that drew a token last.

    Tokens that are given count as settled, stay what they are, and are seen by the others.

    Args:
        logits_BlV: filtered logits that `tokens_Bl` were drawn from.
    """
    settled, given_Bl = state.stage.settled(k), state.given(k)
    masked_Bl = torch.ones_like(tokens_Bl, dtype=torch.bool)
    if given_Bl is not None:
        masked_Bl, tokens_Bl = given_Bl < 0, torch.where(given_Bl >= 0, given_Bl, tokens_Bl)
    for step in range(1, len(settled)):
        masked_Bl = least_certain(logits_BlV, tokens_Bl, sum(settled[step:]), masked_Bl)
        again_BlV = masked_logits(state, k, tokens_Bl, masked_Bl)
        tokens_Bl = torch.where(masked_Bl, draw(again_BlV, state.uniforms(k, step)), tokens_Bl)
        logits_BlV = torch.where(masked_Bl[..., None], again_BlV, logits_BlV)
    return logits_BlV, tokens_Bl


def least_certain(
    logits_BlV: torch.Tensor, tokens_Bl: torch.Tensor, count: int, among_Bl: torch.Tensor
) -> torch.Tensor:
    """The `count` tokens of each image with the least probability, as bool (B, l); none but those of `among_Bl`."""
    chosen_Bl = logits_BlV.softmax(dim=-1).gather(-1, tokens_Bl[..., None])[..., 0]
    places = chosen_Bl.masked_fill(~among_Bl, torch.inf).topk(count, dim=-1, largest=False).indices
    return torch.zeros_like(among_Bl).scatter(-1, places, True) & among_Bl


def masked_logits(state: GenerationState, k: int, tokens_Bl: torch.Tensor, masked_Bl: torch.Tensor) -> torch.Tensor:
    """Filtered logits (B, l, V) of a masked pass over scale k; without the unconditional half."""
    stage, schedule = state.stage, state.plan.schedule
    cond = state.cond.select(slice(len(state))) if state.doubled else state.cond
    code_BlC = state.quantizer.scale_code(tokens_Bl, k, schedule)
    where = {"scales": range(k, k + 1), "schedule": schedule}
    logits_BlV = stage.model.masked_logits(state.inputs[k - 1], code_BlC, masked_Bl, cond, **where)
    state.finite = watch(logits_BlV, state.finite)
    return stage.filter(k)(logits_BlV)
