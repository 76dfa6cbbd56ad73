"""What a text model reads captions with: a new byte-level T5 that trains along, or any text encoder of transformers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from train.session import Batch, brought

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT_STEP = 16  # text lengths are rounded up to a multiple of this


@dataclass(kw_only=True)
class TextConfig:
    """Which text encoder conditions a text model.

    Args:
        pretrained: folder or Hub name of an encoder with its tokenizer; a new byte-level T5 when null.
        train: whether its weights train along; a new encoder must.
        cache: folder that `train.cache_text` wrote, of a frozen encoder's states; the encoder is not run then, and with
            `pretrained` null not even loaded.
        d_model: width of a new encoder.
        layers: of a new encoder.
        heads: of a new encoder.
        d_ff: hidden width of a new encoder's feed-forward.
    """

    pretrained: str | None = None
    train: bool = True
    cache: str | None = None
    d_model: int = 256
    layers: int = 4
    heads: int = 4
    d_ff: int = 1024

    def __post_init__(self) -> None:
        if self.cache is not None and self.train:
            raise ValueError("text.cache holds the states of a frozen encoder: it needs text.train=false")
        if self.pretrained is None and self.cache is None and not self.train:
            raise ValueError("text.train must be true for a new encoder: give text.pretrained to keep one frozen")
        if self.layers < 1 or self.d_ff < 1:
            raise ValueError(f"text.layers and text.d_ff must be 1 or more, got {self.layers} and {self.d_ff}")
        if self.heads < 1 or self.d_model % self.heads:
            raise ValueError(f"text.d_model must be a multiple of text.heads, got {self.d_model} and {self.heads}")


def build_text_encoder(config: TextConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(encoder, tokenizer): transformers' own classes."""
    if config.pretrained is not None:
        encoder, tokenizer = load_text_encoder(config.pretrained, torch.float32 if config.train else "auto")
        return encoder.requires_grad_(config.train), tokenizer
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    disable_progress_bars()
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


def disable_progress_bars() -> None:
    """No bars of transformers: every checkpoint would draw one over the run's own."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def load_text_encoder(
    pretrained: str | Path, dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The text encoder of a folder or Hub name, be it alone (T5, CLIP, ...) or a part of a model (CLIP), in eval mode.

    A folder may hold the two in `text_encoder/` and `tokenizer/`, as our exports do.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the model is no text encoder, or lacks weights.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING as ENCODERS

    nested = (Path(pretrained) / "text_encoder").is_dir()
    source, words = (Path(pretrained) / part if nested else pretrained for part in ("text_encoder", "tokenizer"))
    with _only_errors():
        try:
            config = AutoConfig.from_pretrained(source)
            tokenizer = AutoTokenizer.from_pretrained(words)
        except (OSError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise FileNotFoundError(f"text.pretrained {str(pretrained)!r} could not be read: {reason}") from None
        kinds = [type(c) for c in (config, getattr(config, "text_config", None)) if type(c) in ENCODERS]
        if not kinds:
            raise ValueError(f"text.pretrained {str(pretrained)!r} is no text encoder but a {config.model_type} model")
        load = ENCODERS[kinds[0]].from_pretrained
        encoder, info = load(source, dtype=dtype, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"text.pretrained {str(pretrained)!r} lacks weights: {', '.join(missing[:3])}, ...")
    return encoder.eval(), tokenizer


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Silence for transformers' bars and its list of weights that a text encoder has no use for."""
    from transformers.utils import logging

    disable_progress_bars()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def text_reader(
    encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int, *, frozen: bool
) -> Callable[[list[str], torch.device], Batch]:
    """What turns captions into a batch's "input_ids", "mask" and, of a frozen encoder, "states".

    Raises:
        ValueError: if the encoder has no positions for texts of `max_length` tokens.
    """
    longest = getattr(encoder.config, "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise ValueError(f"transformer.text_length must be at most {longest} for this text encoder, got {max_length}")

    def read(captions: list[str], device: torch.device) -> Batch:
        text = {name: moved(value, device) for name, value in tokenize(tokenizer, captions, max_length).items()}
        if frozen:
            encoded = brought(encoder, device)(input_ids=text["input_ids"], attention_mask=text["mask"])
            text["states"] = encoded.last_hidden_state
        return text

    return read


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device, without waiting for what a GPU is still doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def padded_length(longest: int, max_length: int) -> int:
    """The next multiple of `TEXT_STEP` where that divides `max_length`, else `max_length`: few shapes to compile."""
    return max_length if max_length % TEXT_STEP else -(-longest // TEXT_STEP) * TEXT_STEP


def tokenize(tokenizer: PreTrainedTokenizerBase, captions: list[str], max_length: int) -> dict[str, torch.Tensor]:
    """{"input_ids": (B, T) int64, "mask": (B, T) bool}, cut at `max_length`; T is a `padded_length`."""
    ids = [_caption_ids(tokenizer, caption, max_length) for caption in captions]
    lengths_B = torch.tensor([len(row) for row in ids])
    width = padded_length(int(lengths_B.max()), max_length)
    padded_BT = torch.full((len(ids), width), tokenizer.pad_token_id)
    for row, known in zip(padded_BT, ids):
        row[: len(known)] = known
    return {"input_ids": padded_BT, "mask": torch.arange(width) < lengths_B[:, None]}


@lru_cache(maxsize=2**17)
def _caption_ids(tokenizer: PreTrainedTokenizerBase, caption: str, max_length: int) -> torch.Tensor:
    """(t,) int64. Captions come again, and a tokenizer of bytes takes longer over one than a GPU over its image."""
    ids = tokenizer(caption, truncation=True, max_length=max_length).input_ids
    if len(ids) == max_length < len(tokenizer(caption, verbose=False).input_ids):
        warnings.warn(  # always in the same words, so that it is said once
            f"captions of more than transformer.text_length {max_length} tokens are cut: their ends are not learned",
            stacklevel=2,
        )
    return torch.tensor(ids)
