"""Text states on disk: every distinct caption of a data set encoded once by a frozen encoder, read through memory maps.

    FOLDER/manifest.json         what made the states
           text_encoder/         the encoder itself, and
           tokenizer/            its tokenizer: exports of a training take them from here
           000000.safetensors    states (N, E) of some captions, one after the other; keys (n,) and ends (n,) int64

A file appears only when it is complete, and any number of files makes a cache: more captions only add files.

Shapes: B captions, n captions of a file, N text tokens in a row, T text tokens of one caption, E width of the encoder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sample.checkpoints import readable
from sample.files import flush, link_or_copy, write_text
from train.checkpoint import PARTIAL
from train.session import Batch
from train.text import moved, padded_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sample.pipeline import NextScalePipeline

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MANIFEST = "manifest.json"


def encoder_hash(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides a text's states: the encoder's weights and the tokenizer's vocabulary."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def caption_keys(captions: Sequence[str]) -> np.ndarray:
    """(n,) int64: 64 bits of a hash of each caption (a million captions share one with probability 3e-8)."""
    digests = (hashlib.blake2b(caption.encode(), digest_size=8).digest() for caption in captions)
    return np.frombuffer(b"".join(digests), dtype=np.int64)


def describe(
    encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, text_length: int, dtype: str, pretrained: str
) -> dict:
    """A cache's manifest."""
    return {
        "encoder_hash": encoder_hash(encoder, tokenizer),
        "pretrained": pretrained,
        "text_length": text_length,
        "dtype": dtype,
        "width": encoder.config.hidden_size,
    }


def begin_cache(folder: Path, manifest: dict, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put encoder, tokenizer and manifest into a new cache; the manifest comes last.

    Raises:
        ValueError: if the cache was begun otherwise.
    """
    path = folder / MANIFEST
    if path.exists():
        check_manifest(folder, {name: value for name, value in manifest.items() if name != "pretrained"})
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, component in (("text_encoder", encoder), ("tokenizer", tokenizer)):
        for leftover in (folder / name, folder / f"{PARTIAL}{name}"):
            shutil.rmtree(leftover, ignore_errors=True)
        component.save_pretrained(folder / f"{PARTIAL}{name}")
        os.replace(folder / f"{PARTIAL}{name}", folder / name)
    write_text(path, json.dumps(manifest, indent=1), durable=True)


def check_manifest(folder: Path, wanted: dict) -> dict:
    """The manifest of a cache.

    Raises:
        FileNotFoundError: if there is no cache.
        ValueError: naming the first of its entries that is not as `wanted`.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"text.cache {str(folder)!r} has no {MANIFEST}: run train.cache_text")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name, value in wanted.items():
        if manifest[name] != value:
            what = "encoder" if name == "encoder_hash" else f"{name} ({manifest[name]}, not {value})"
            raise ValueError(f"text.cache {str(folder)!r} was made with another {what}: make it again or name another")
    return manifest


def write_states(folder: Path, number: int, captions: Sequence[str], states: Sequence[torch.Tensor]) -> None:
    """Write one file of states (T, E), a tensor a caption."""
    ends = torch.tensor([len(one) for one in states]).cumsum(0)
    tensors = {"states": torch.cat(list(states)), "keys": torch.from_numpy(caption_keys(captions).copy()), "ends": ends}
    partial = folder / f"{PARTIAL}{number:06d}"
    save_file(tensors, partial)
    readable(partial)
    flush(partial)
    os.replace(partial, folder / f"{number:06d}.safetensors")


class TextCache:
    """The states of captions.

    Args:
        folder: that `train.cache_text` wrote.
        wanted: entries that the manifest must have, such as text_length.

    Raises:
        FileNotFoundError, ValueError: as `check_manifest`.
    """

    def __init__(self, folder: str | Path, **wanted: object):
        self.folder = Path(folder)
        self.manifest = check_manifest(self.folder, wanted)
        self.width, self.text_length = self.manifest["width"], self.manifest["text_length"]
        files = sorted(self.folder.glob("[0-9]*.safetensors"))
        self.next_number = 1 + int(files[-1].stem) if files else 0
        opened = [safe_open(path, "pt") for path in files]
        self.slices = [file.get_slice("states") for file in opened]
        self.keys = np.concatenate([np.empty(0, np.int64), *(file.get_tensor("keys").numpy() for file in opened)])
        places = [_places(index, file.get_tensor("ends").numpy()) for index, file in enumerate(opened)]
        order = np.argsort(self.keys, kind="stable")
        self.keys, self.places = self.keys[order], np.concatenate([np.empty((0, 3), np.int64), *places])[order]

    def __len__(self) -> int:
        return len(self.keys)

    def has(self, captions: Sequence[str]) -> np.ndarray:
        """Which of the captions have states, (n,) bool."""
        return self._find(caption_keys(captions))[1]

    def require(self, captions: Sequence[str]) -> np.ndarray:
        """Where the captions stand in `places`, (n,) int64.

        Raises:
            ValueError: naming the first caption without states.
        """
        index, there = self._find(caption_keys(captions))
        if not there.all():
            missing = captions[int(there.argmin())]
            raise ValueError(
                f"text.cache {str(self.folder)!r} lacks the caption {missing!r}: run train.cache_text again"
            )
        return index

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) index into `places`, and (n,) bool whether that is the key's."""
        if not len(self):
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
        index = np.searchsorted(self.keys, keys).clip(max=len(self) - 1)
        return index, self.keys[index] == keys

    def __call__(self, captions: Sequence[str], device: torch.device | str = "cpu") -> Batch:
        """{"states": (B, T, E) float32, zero beyond each caption; "mask": (B, T) bool}; T is a `padded_length`.

        Raises:
            ValueError: naming the first caption without states.
        """
        places = self.places[self.require(captions)]
        parts = [self.slices[file][begin:end] for file, begin, end in places.tolist()]
        lengths = torch.tensor([len(one) for one in parts])
        T = padded_length(int(lengths.max()), self.text_length)
        states = parts[0].new_zeros(len(parts), T, self.width)
        for row, one in zip(states, parts):
            row[: len(one)] = one
        mask = torch.arange(T) < lengths[:, None]
        place = torch.device(device)
        return {"states": moved(states, place).float(), "mask": moved(mask, place)}

    def complete(self, pipeline: NextScalePipeline, folder: Path) -> None:
        """Give the saved pipeline in `folder` the encoder and the tokenizer: files are linked where they can be."""
        from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer

        for name in ("text_encoder", "tokenizer"):
            shutil.copytree(self.folder / name, folder / name, copy_function=link_or_copy)
        with torch.device("meta"):
            outline = AutoModelForTextEncoding.from_config(AutoConfig.from_pretrained(self.folder / "text_encoder"))
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        pipeline.register_modules(text_encoder=outline, tokenizer=tokenizer)
        pipeline.save_config(folder)


def _places(file: int, ends: np.ndarray) -> np.ndarray:
    """(file, begin, end) of each caption of a file, (n, 3) int64."""
    begins = np.concatenate([[0], ends[:-1]])
    return np.stack([np.full(len(ends), file), begins, ends], axis=1).astype(np.int64)
