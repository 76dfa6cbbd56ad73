"""The text encoder that trains along: a small byte-level T5 (no vocabulary to learn or ship)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

TEXT_STEP = 16  # text lengths are rounded up to a multiple of this


@dataclass(kw_only=True)
class TextConfig:
    """Which text encoder conditions a text model.

    Args:
        pretrained: folder or Hub name of an encoder with its tokenizer; a new byte-level T5 when null.
        train: whether its weights train along; a new encoder must.
        d_model, layers, heads, d_ff: size of a new encoder.
    """

    pretrained: str | None = None
    train: bool = True
    d_model: int = 256
    layers: int = 4
    heads: int = 4
    d_ff: int = 1024

    def __post_init__(self) -> None:
        if self.pretrained is None and not self.train:
            raise ValueError("text.train must be true for a new encoder: give text.pretrained to keep one frozen")
        if self.d_model % self.heads:
            raise ValueError(f"text.d_model must be a multiple of text.heads, got {self.d_model} and {self.heads}")


def build_text_encoder(config: TextConfig) -> tuple[nn.Module, object]:
    """(encoder, tokenizer): transformers' own classes. A folder may hold both in `text_encoder/` and `tokenizer/`."""
    from transformers import AutoModelForTextEncoding, AutoTokenizer, ByT5Tokenizer, T5Config, T5EncoderModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # every checkpoint would draw one over the run's own
    if config.pretrained is not None:
        root = Path(config.pretrained)
        nested = (root / "text_encoder").is_dir()
        encoder = AutoModelForTextEncoding.from_pretrained(root / "text_encoder" if nested else config.pretrained)
        tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer" if nested else config.pretrained)
        return encoder.requires_grad_(config.train), tokenizer
    tokenizer = ByT5Tokenizer()
    sizes = T5Config(
        vocab_size=len(tokenizer),
        d_model=config.d_model,
        d_kv=config.d_model // config.heads,
        d_ff=config.d_ff,
        num_layers=config.layers,
        num_heads=config.heads,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(sizes), tokenizer


def tokenize(tokenizer: object, captions: list[str], max_length: int) -> dict[str, torch.Tensor]:
    """{"input_ids": (B, T) int64, "mask": (B, T) bool}, cut at `max_length`.

    T is a multiple of `TEXT_STEP` where that divides `max_length`, else always `max_length`: few shapes to compile.
    """
    fits = max_length % TEXT_STEP == 0
    made = tokenizer(
        captions,
        padding="longest" if fits else "max_length",
        pad_to_multiple_of=TEXT_STEP if fits else None,
        truncation=True,
        max_length=max_length,
        return_tensors="pt",
    )
    return {"input_ids": made.input_ids, "mask": made.attention_mask.bool()}
