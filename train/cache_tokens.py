"""Encode a data set once: `python -m train.cache_tokens --config configs/var/scenes.yaml --cache.folder=cache/scenes`.

Shards are dealt out to processes (`accelerate launch --num_processes 8 -m train.cache_tokens ...`); the same command
again goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from sample.fast import accelerate_tokenizer, supported
from sample.files import check_place, write_text
from sample.load import load_tokenizer
from sample.processes import check_group, works_on_cpu
from tokenizer.model import MultiScaleVQ, check_latents
from tokenizer.precision import cast
from train.config import base_parser, exit_code, yaml_word
from train.data import DataConfig, build_dataset
from train.prepare import as_floats
from train.token_cache import has_shard, token_dtype, tokenizer_hash, write_shard


@dataclass(kw_only=True)
class CacheConfig:
    """What to encode and where to.

    Args:
        folder: of the cache; gets `train/` and `val/`.
        tokenizer: the tokenizer: its folder, or that of a run or a pipeline it is in, or "scenes".
        passes: times the training images are encoded, each with its own crops.
        shard_size: images per file.
        batch_size: images per forward pass.
        workers: data loading processes.
        precision: no (float32) or bf16, of the encoder; the quantiser is float32 always.
        fast: encode on the fast path (`sample.fast`), whose tokens are the plain ones but where rounding decides.
        latents: also keep what is quantised, in float16, for training with self-correction.
        seed: of the crops.
    """

    folder: str
    tokenizer: str
    passes: int = 1
    shard_size: int = 8192
    batch_size: int = 64
    workers: int = 0
    precision: str | bool = "no"
    fast: bool = True
    latents: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("passes", "shard_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"cache.{name} must be 1 or more, got {getattr(self, name)}")
        self.precision = yaml_word(self.precision)
        if self.precision not in ("no", "bf16"):
            raise ValueError(f"cache.precision must be no or bf16, got {self.precision!r}")


class Passes(Dataset):
    """A data set `count` times in a row; pass p is read with epoch p, so that its crops differ."""

    def __init__(self, dataset: Dataset, count: int):
        self.dataset, self.count = dataset, count

    def __len__(self) -> int:
        return len(self.dataset) * self.count

    def __getitem__(self, position: int) -> dict:
        epoch, index = divmod(position, len(self.dataset))
        return self.dataset.at(index, epoch) if hasattr(self.dataset, "at") else self.dataset[index]


@torch.no_grad()
def encode_split(
    accelerator: Accelerator, vqvae: MultiScaleVQ, name: str, data: DataConfig, config: CacheConfig, split: str
) -> None:
    """Write the missing shards of a split, then its manifest; `name` is the tokenizer's `tokenizer_hash`."""
    images = build_dataset(data, split, seed=config.seed, corrupt_log=Path(config.folder) / "unreadable_images.txt")
    items = Passes(images, config.passes if split == "train" else 1)
    folder = Path(config.folder) / split
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "tokenizer_hash": name,
        "schedule": vqvae.schedule.spec,
        "vocab_size": vqvae.config.vocab_size,
        "num_classes": images.num_classes,
        "classes": images.classes,
        "images": len(items),
        "shard_size": config.shard_size,
        "passes": items.count,
        "seed": config.seed,
        "latents": config.latents,
        "precision": config.precision,
        "fast": config.fast,
        **{f"data.{option}": value for option, value in vars(data).items() if option != "cache_dir"},
    }
    check_plan(folder, manifest, accelerator)
    shards = range(-(-len(items) // config.shard_size))
    mine = shards[accelerator.process_index :: accelerator.num_processes]
    with tqdm(total=len(items), unit="img", desc=split, disable=not accelerator.is_main_process) as bar:
        done = advance(bar, accelerator)
        for shard in mine:
            rows = range(shard * config.shard_size, min((shard + 1) * config.shard_size, len(items)))
            if not has_shard(folder, shard):
                ids, about, latents = encode(accelerator, vqvae, Subset(items, rows), config, done)
                write_shard(folder, shard, ids, about, latents)
            else:
                done(len(rows))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_text(folder / "manifest.json", json.dumps(manifest, indent=1), durable=True)
        if unreadable := images.corrupt.summary():
            print(unreadable, file=sys.stderr)


def check_plan(folder: Path, manifest: dict, accelerator: Accelerator, *, option: str = "cache.folder") -> None:
    """Refuse to mix shards of different plans in one folder; the plan is kept beside the shards.

    Args:
        option: what the folder is called where it is given.

    Raises:
        ValueError: naming the first difference.
    """
    path = folder / "plan.json"
    if path.exists():
        kept = {"latents": False, **json.loads(path.read_text(encoding="utf-8"))}
        for name, value in json.loads(json.dumps(manifest)).items():  # as it is read: lists for tuples
            if kept.get(name, value) != value:  # older caches do not say all
                raise ValueError(
                    f"{option} {folder} was begun with other data or settings, {name} is {value} and was "
                    f"{kept[name]}: remove it or give another one"
                )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_text(path, json.dumps(manifest, indent=1), durable=True)


def advance(bar: tqdm, accelerator: Accelerator) -> Callable[[int], None]:
    """What moves the bar on by so many images of this process, and as many of every other."""

    def move(count: int) -> None:
        bar.update(min(count * accelerator.num_processes, bar.total - bar.n))

    return move


def encode(
    accelerator: Accelerator, vqvae: MultiScaleVQ, items: Dataset, config: CacheConfig, done: Callable[[int], None]
) -> tuple[np.ndarray, list, np.ndarray | None]:
    """Tokens (n, L), {"label", "caption"} rows and, if wanted, latents (n, C, H, W) float16 of items.

    `done` hears of batches.
    """
    tokens, rows, latents = [], [], []
    for batch in DataLoader(items, batch_size=config.batch_size, num_workers=config.workers):
        image = as_floats({"image": batch["image"].to(accelerator.device)})["image"]
        f_BCHW = check_latents(vqvae.encode(image.to(vqvae.dtype)))
        ids = torch.cat(vqvae.quantizer.encode(f_BCHW, vqvae.schedule), dim=1)
        tokens.append(ids.cpu().numpy().astype(token_dtype(vqvae.config.vocab_size)))
        if config.latents:
            latents.append(f_BCHW.half().cpu().numpy())
        rows += [{"label": int(a), "caption": b} for a, b in zip(batch["label"], batch["caption"])]
        done(len(ids))
    return np.concatenate(tokens), rows, np.concatenate(latents) if latents else None


def ready(vqvae: MultiScaleVQ, device: torch.device, config: CacheConfig) -> None:
    """Put a tokenizer on its device, in its precision, on the fast path if wanted."""
    cast(vqvae, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    vqvae.to(device)
    if config.fast:
        accelerate_tokenizer(vqvae, supported(device, vqvae.dtype))


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and encode both splits."""
    made = base_parser("Encode a data set into token shards.")
    made.add_class_arguments(DataConfig, "data")
    made.add_class_arguments(CacheConfig, "cache")
    built = made.instantiate(made.parse_args(argv))
    config: CacheConfig = built.cache
    check_place("cache.folder", config.folder, folder=True)
    accelerator = Accelerator(mixed_precision=config.precision, cpu=works_on_cpu())
    check_group(accelerator)
    vqvae = load_tokenizer(config.tokenizer)
    name = tokenizer_hash(vqvae)
    ready(vqvae, accelerator.device, config)
    if tuple(built.data.hw) != vqvae.image_hw:
        raise ValueError(f"data.size {built.data.hw} must be the tokenizer's: {vqvae.image_hw}")
    for split in ("train", "val"):
        encode_split(accelerator, vqvae, name, built.data, config, split)


if __name__ == "__main__":
    sys.exit(exit_code(main))
