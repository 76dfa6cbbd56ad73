"""Prompts to the states that condition a text model, with any encoder of transformers.

Shapes: B prompts, T text tokens, E width of the encoder.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from var.conditioning import TextPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@torch.no_grad()
def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    prompts: Sequence[str],
    *,
    max_length: int,
    whole: bool = False,
    device: torch.device | str | None = None,
) -> TextPrompt:
    """States (B, T, E) and a bool mask (B, T) of prompts, padded to the longest of them or, `whole`, to `max_length`.

    A prompt of more than `max_length` tokens is cut, and one logged line names the text that is lost.

    Args:
        tokenizer, text_encoder: T5, ByT5, UMT5, CLIP, ... ; the last hidden state is taken.
        prompts: B texts; an empty one is allowed.
        max_length: most tokens of a prompt, end mark included.
        device: where the encoder is; where its weights are when None.

    Raises:
        TypeError: if a prompt is not a str.
    """
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be str, got {type(prompt).__name__}: {prompt!r}")
    texts = list(prompts)
    _warn_of_cuts(tokenizer, texts, max_length)
    padding = "max_length" if whole else "longest"
    made = tokenizer(texts, padding=padding, truncation=True, max_length=max_length, return_tensors="pt")
    device = device if device is not None else text_encoder.device
    ids, mask = made.input_ids.to(device), made.attention_mask.to(device)
    states = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return TextPrompt(states, mask.bool())


def _warn_of_cuts(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int) -> None:
    """One line naming the text of every prompt that does not fit."""
    marks = tokenizer.num_special_tokens_to_add()
    lost = []
    for text in dict.fromkeys(texts):
        rest = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[max_length - marks :]
        if rest:
            lost.append(tokenizer.decode(rest))
    if lost:
        named = ", ".join(repr(text) for text in lost)
        logger.warning("prompts are cut at %d tokens; ignored: %s", max_length, named)
