"""What a text model reads captions with: an encoder that trains along, a frozen one, or the cache of its states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import Dataset

from train.session import Batch
from train.text import TextConfig, build_text_encoder, load_text_encoder, text_reader
from train.text_cache import TextCache, check_manifest, encoder_hash
from train.token_cache import TokenCache


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """What a text model reads captions with; a class model has only a width, that nothing uses.

    Attributes:
        width: of the states.
        tokenizer: of the encoder that is here, which is either `trained` along or `frozen`.
        cache: states in the place of an encoder.
    """

    width: int
    tokenizer: object | None = None
    trained: nn.Module | None = None
    frozen: nn.Module | None = None
    cache: TextCache | None = None

    def depends(self) -> dict[str, str]:
        """What tells a frozen encoder from another; nothing of one that trains along."""
        if self.cache is not None:
            return {"text encoder": check_manifest(self.cache.folder, {})["encoder_hash"]}
        return {} if self.frozen is None else {"text encoder": encoder_hash(self.frozen, self.tokenizer)}

    def reader(self, max_length: int, data: Sequence[Dataset]) -> Callable[[list[str], torch.device], Batch] | None:
        """What makes the text entries of a batch; None for a class model.

        Raises:
            ValueError: if the encoder or the cache is not for texts of `max_length`, or the cache lacks captions.
        """
        if self.cache is None:
            frozen = self.frozen is not None
            encoder = self.frozen if frozen else self.trained
            return None if encoder is None else text_reader(encoder, self.tokenizer, max_length, frozen=frozen)
        check_manifest(self.cache.folder, {"text_length": max_length})
        for cached in (split for split in data if isinstance(split, TokenCache)):
            self.cache.require(sorted({caption for _, caption in cached.rows}))
        return self.cache


def open_text_source(config: TextConfig) -> TextSource:
    """The text encoder of a configuration, or the cache of its states.

    Raises:
        ValueError: if another encoder than `config.pretrained` made the cache.
    """
    if config.cache is None:
        encoder, tokenizer = build_text_encoder(config)
        role = "trained" if config.train else "frozen"
        return TextSource(width=encoder.config.hidden_size, tokenizer=tokenizer, **{role: encoder})
    wanted = {}
    if config.pretrained is not None:
        wanted["encoder_hash"] = encoder_hash(*load_text_encoder(config.pretrained))
    cache = TextCache(config.cache, **wanted)
    return TextSource(width=cache.width, cache=cache)
