"""A token cache of a model's own best pictures: `python -m train.cache_samples --config FILE`.

Tokens of one scale are drawn in parallel, each from its own distribution. Where a caption leaves much open these do not
agree, however well each of them is learned. Trained on those of its own pictures that a reward finds right, a model
prefers what it can draw (rejection sampling fine-tuning: RAFT, Dong et al. 2023; ReST, Gulcehre et al. 2023).
`train.train_var --tokens.cache=FOLDER` then trains on them as on any cache.

A shard is made of captions of its own, so processes share the work (`accelerate launch --num_processes 8 -m ...`), and
the same command again goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset
from tqdm import tqdm

from sample.draw import derive_seed
from sample.files import write_text
from sample.load import load_pipeline, load_tokenizer, model_digest, model_folder
from sample.pipeline import NextScalePipeline
from sample.processes import check_group, works_on_cpu
from sample.reward_names import load_reward
from sample.search import Search
from sample.search_steps import make_steps
from train.cache_tokens import check_plan
from train.config import base_parser, exit_code
from train.data import DataConfig, build_dataset
from train.token_cache import has_shard, token_dtype, tokenizer_hash, write_shard

STREAM = 0x0A5E1F  # keeps the seeds of these pictures apart
MOST_TRIES = 100  # captions tried for every picture that is to be kept


@dataclass(kw_only=True)
class SamplesConfig:
    """What to draw, and what to keep.

    Args:
        folder: of the cache; gets `train/` and `val/`.
        model: a training run, or a pipeline folder.
        val_cache: folder of a cache of the data set: its validation split is taken over.
        images: pictures to keep.
        candidates: pictures drawn of each caption; the best one is kept, if it is good enough.
        reward: what they are scored with, as of `nextscale sample --reward`.
        enough: least score of a picture that is kept.
        shard_size: pictures per file.
        batch_size: candidates drawn at once.
        dtype: of the drawing model: auto, float32, bfloat16 or float16.
        fast: auto, on or off, as of `nextscale sample --fast`.
        device: cpu, cuda, ...; what `accelerate` chooses when null.
        seed: of captions and pictures.
    """

    folder: str
    model: str
    val_cache: str
    images: int = 20_000
    candidates: int = 4
    reward: str = "scenes"
    enough: float = 0.5
    shard_size: int = 1000
    batch_size: int = 96
    dtype: str = "bfloat16"
    fast: str = "on"
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "candidates", "shard_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"samples.{name} must be 1 or more, got {getattr(self, name)}")
        if self.images % self.shard_size:
            raise ValueError(f"samples.images must be a multiple of shard_size {self.shard_size}, got {self.images}")


@dataclass(frozen=True)
class Kept:
    """A picture that was kept: its tokens (L,), caption and score; and captions tried since the one before."""

    ids: np.ndarray
    caption: str
    score: float
    tried: int


def kept_samples(
    pipeline: NextScalePipeline, search: Search, data: Dataset, config: SamplesConfig, shard: int
) -> Iterator[Kept]:
    """The pictures of a shard, one after the other without end, as captions are tried.

    Raises:
        ValueError: if next to none is good enough.
    """
    size, tried = max(1, config.batch_size // search.candidates), 0
    for begin in range(0, MOST_TRIES * config.shard_size, size):
        seeds = [derive_seed(config.seed, STREAM, shard, begin + i) for i in range(size)]
        rows = [seed % len(data) for seed in seeds]
        captions = [data.captions(row)[0] for row in rows]
        output = pipeline(captions, seed=seeds, search=search, output_type="latent")
        ids_BL = torch.cat(output.tokens, dim=1).cpu().numpy()
        for i, score in enumerate(output.search.scores):
            tried += 1
            if score >= config.enough:
                yield Kept(ids_BL[i], captions[i], score, tried)
                tried = 0
    raise ValueError(f"samples.enough {config.enough}: fewer than one picture in {MOST_TRIES} reaches it")


def write_samples(
    pipeline: NextScalePipeline, search: Search, data: Dataset, config: SamplesConfig, shard: int, bar: tqdm
) -> None:
    """Draw one shard, and write it with the share of captions that gave a picture in `SHARD.kept.json`."""
    folder, kept = Path(config.folder) / "train", []
    samples = kept_samples(pipeline, search, data, config, shard)
    while len(kept) < config.shard_size:
        kept.append(next(samples))
        bar.update()
    share = len(kept) / sum(sample.tried for sample in kept)
    bar.set_postfix_str(f"kept {share:.2f}")
    scores = [sample.score for sample in kept]
    facts = {"kept": share, "mean_score": float(np.mean(scores))}
    write_text(folder / f"{shard:05d}.kept.json", json.dumps(facts), durable=True)
    ids_NL = np.stack([sample.ids for sample in kept]).astype(token_dtype(pipeline.vqvae.config.vocab_size))
    write_shard(folder, shard, ids_NL, [{"label": -1, "caption": sample.caption} for sample in kept])


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, draw the missing shards, and take over the validation split.

    Raises:
        ValueError: if the model reads no captions, or the cache was made with another tokenizer.
    """
    made = base_parser("Cache the tokens of a model's own best pictures.")
    made.add_class_arguments(DataConfig, "data")
    made.add_class_arguments(SamplesConfig, "samples")
    built = made.instantiate(made.parse_args(argv))
    config: SamplesConfig = built.samples
    accelerator = Accelerator(cpu=works_on_cpu(config.device))
    check_group(accelerator)
    device = config.device or accelerator.device
    pipeline = load_pipeline(config.model, dtype=config.dtype, device=device, fast=config.fast)
    pipeline.set_progress_bar_config(disable=True)
    if pipeline.text_encoder is None:
        raise ValueError(f"samples.model {config.model!r} reads no captions: rewards are of pictures and captions")
    if pipeline.make_plan().drawn < len(pipeline.vqvae.schedule):
        raise ValueError(f"samples.model {config.model!r} leaves out its last scales (prune): it has no tokens of them")
    if built.data.streaming:
        raise ValueError("data.streaming must be false: captions are drawn from all of the data")
    data = build_dataset(built.data, "train", seed=config.seed)
    validation = Path(config.val_cache) / "val"
    manifest = {
        "tokenizer_hash": tokenizer_hash(load_tokenizer(model_folder(config.model) / "vqvae")),
        "schedule": pipeline.vqvae.schedule.spec,
        "vocab_size": pipeline.vqvae.config.vocab_size,
        "num_classes": data.num_classes,
        "images": config.images,
        "shard_size": config.shard_size,
        "seed": config.seed,
        "latents": False,
        "model_digest": model_digest(config.model),
        **{name: getattr(config, name) for name in ("candidates", "reward", "enough", "dtype", "fast", "val_cache")},
        **{f"data.{option}": value for option, value in vars(built.data).items() if option != "cache_dir"},
    }
    check_validation(validation, manifest)
    folder = Path(config.folder) / "train"
    folder.mkdir(parents=True, exist_ok=True)
    check_plan(folder, manifest, accelerator, option="samples.folder")
    candidates, steps = make_steps("best", config.candidates, len(pipeline.vqvae.schedule))
    reward = load_reward(config.reward, device=device)
    search = Search(candidates=candidates, steps=steps, reward=reward, enough=config.enough)
    shards = range(config.images // config.shard_size)
    mine = shards[accelerator.process_index :: accelerator.num_processes]
    todo = [shard for shard in mine if not has_shard(folder, shard)]
    with tqdm(total=len(todo) * config.shard_size, unit="img", disable=not accelerator.is_main_process) as bar:
        for shard in todo:
            write_samples(pipeline, search, data, config, shard, bar)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        facts = [json.loads((folder / f"{shard:05d}.kept.json").read_text(encoding="utf-8")) for shard in shards]
        kept = len(facts) / sum(1 / fact["kept"] for fact in facts)
        shutil.copytree(validation, Path(config.folder) / "val", dirs_exist_ok=True)
        write_text(folder / "manifest.json", json.dumps({**manifest, "kept": kept}, indent=1), durable=True)
        print(f"{config.folder}: {config.images} pictures, {kept:.3f} of the captions tried", file=sys.stderr)


def check_validation(folder: Path, manifest: dict) -> None:
    """Whether a validation split is there, and of the same tokens.

    Raises:
        FileNotFoundError, ValueError: if not.
    """
    path = folder / "manifest.json"
    if not path.exists():
        raise FileNotFoundError(f"samples.val_cache has no {path}: run train.cache_tokens to its end")
    if json.loads(path.read_text(encoding="utf-8"))["tokenizer_hash"] != manifest["tokenizer_hash"]:
        raise ValueError(f"samples.val_cache {folder.parent} was made with another tokenizer than the model's")


if __name__ == "__main__":
    sys.exit(exit_code(main))
