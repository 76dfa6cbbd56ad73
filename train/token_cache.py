"""Tokens on disk: a data set encoded once, read through memory maps.

    FOLDER/train/manifest.json     what the tokens are, and which tokenizer made them
                 00000.npy         (n, L) uint16 or int32, all scales in order; (n, L, bits) uint8 of bitwise tokens
                 00000.jsonl       {"label", "caption"} of each row
                 00000.latents     (n, C, H, W) float16 in npy format: what was quantised, for self-correction

A shard exists only when it is complete; the manifest exists only when all shards do.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from sample.files import flush, write_text
from tokenizer.model import MultiScaleVQ
from train.images import no_label

DECODING = ("decoder.", "post_quant_conv.")  # parts of a tokenizer that do not matter to tokens


def tokenizer_hash(vqvae: MultiScaleVQ) -> str:
    """SHA-256 of what decides tokens and the transformer's inputs: encoder, quantiser, schedule, settings."""
    digest = hashlib.sha256(vqvae.schedule.text.encode())
    digest.update(unusual(vqvae).encode())
    for name, tensor in sorted(vqvae.state_dict().items()):
        if not name.startswith(DECODING):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def unusual(vqvae: MultiScaleVQ) -> str:
    """What decides tokens besides weights, where it is not as usual; empty of VAR's own settings."""
    usual = {"phi_ratio": 0.5, "cosine": False, "norm_groups": 32, "token_patch": 1}
    own = {name: vqvae.config.get(name, value) for name, value in usual.items()}
    own["phi_ratio"] = abs(own["phi_ratio"])
    return "".join(f" {name}={value}" for name, value in own.items() if value != usual[name])


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint8 (bits), uint16 and int32 that holds every value."""
    if vocab_size == 2:
        return np.dtype(np.uint8)
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


def write_shard(
    folder: Path, shard: int, ids_NL: np.ndarray, rows: list[dict], latents_NCHW: np.ndarray | None = None
) -> None:
    """Write one shard; the token file comes last and makes it count as done."""
    write_text(folder / f"{shard:05d}.jsonl", "".join(json.dumps(row) + "\n" for row in rows), durable=True)
    if latents_NCHW is not None:
        _save(folder / f"{shard:05d}.latents", latents_NCHW)
    _save(folder / f"{shard:05d}.npy", ids_NL)


def _save(path: Path, array: np.ndarray) -> None:
    partial = path.with_name(f".tmp-{path.name}")
    with partial.open("wb") as file:
        np.save(file, array)
    flush(partial)
    partial.replace(path)


def _opened(path: Path, count: int) -> np.ndarray:
    """The array of a shard, read through a memory map. Raises ValueError if it does not hold `count` rows."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        raise ValueError(f"cache {path} is damaged: remove it and run train.cache_tokens again") from None
    if len(array) != count:
        raise ValueError(
            f"cache {path} holds {len(array)} images of {count}: remove it and run train.cache_tokens again"
        )
    return array


def has_shard(folder: Path, shard: int) -> bool:
    """Whether a shard is complete."""
    return (folder / f"{shard:05d}.npy").exists()


class TokenCache(Dataset):
    """Items {"ids": (L,) int64, "label": int, "caption": str} of one split; with `latents`, those too: (C, H, W) float.

    Raises:
        FileNotFoundError: if there is no finished cache.
        ValueError: if another tokenizer made it, `labelled` and an image has no label, or `latents` and it has none.
    """

    def __init__(
        self, folder: str | Path, split: str, vqvae: MultiScaleVQ, *, labelled: bool = False, latents: bool = False
    ):
        self.folder = Path(folder) / split
        path = self.folder / "manifest.json"
        if not path.exists():
            raise FileNotFoundError(f"cache {self.folder} has no manifest.json: run train.cache_tokens to its end")
        try:
            self.manifest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"cache {path} is damaged: remove it and run train.cache_tokens again") from None
        if self.manifest["tokenizer_hash"] != tokenizer_hash(vqvae):
            raise ValueError(f"cache {self.folder} was made with another tokenizer than the given one: make it again")
        self.num_classes, self.classes = self.manifest["num_classes"], self.manifest.get("classes")
        self.shard_size = self.manifest["shard_size"]
        images = self.manifest["images"]
        shards = range(-(-images // self.shard_size))
        counts = [min(self.shard_size, images - shard * self.shard_size) for shard in shards]
        self.tokens = [_opened(self.folder / f"{shard:05d}.npy", n) for shard, n in zip(shards, counts)]
        if latents and not self.manifest.get("latents", False):
            raise ValueError(f"cache {self.folder} holds no latents: make it again with --cache.latents=true")
        kept = zip(shards, counts) if latents else ()
        self.latents = [_opened(self.folder / f"{shard:05d}.latents", n) for shard, n in kept]
        self.rows = []
        for shard in shards:
            with (self.folder / f"{shard:05d}.jsonl").open(encoding="utf-8") as file:
                self.rows += [tuple(json.loads(line).values()) for line in file]
        if len(self.rows) != images:
            raise ValueError(
                f"cache {self.folder} has captions of {len(self.rows)} of its {images} images: make it again"
            )
        if labelled and any(label < 0 for label, _ in self.rows):
            raise ValueError(no_label(f"an image of cache {self.folder}"))

    def __len__(self) -> int:
        return self.manifest["images"]

    def __getitem__(self, index: int) -> dict:
        shard, row = divmod(index, self.shard_size)
        label, caption = self.rows[index]
        item = {"ids": torch.from_numpy(self.tokens[shard][row].astype(np.int64)), "label": label, "caption": caption}
        if self.latents:
            item["latents"] = torch.from_numpy(self.latents[shard][row].astype(np.float32))
        return item

    def captions(self, index: int) -> tuple[str, ...]:
        """The caption of an item."""
        return (self.rows[index][1],)
