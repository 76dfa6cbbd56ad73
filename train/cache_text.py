"""Encode the captions of a training once: `python -m train.cache_text --config configs/var/MINE.yaml`.

The configuration is the one of `train.train_var`, with `text.pretrained`, `text.train: false` and `text.cache`. Several
processes share the captions (`accelerate launch --num_processes 8 -m train.cache_text ...`). The same command again
goes on where it stopped, or adds the captions that are new.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset
from tqdm import tqdm

from sample.files import check_place
from sample.processes import check_group, works_on_cpu
from train import train_var
from train.config import exit_code, yaml_word
from train.stream import StreamDataset
from train.text import load_text_encoder, text_reader
from train.text_cache import DTYPES, TextCache, begin_cache, describe, write_states


@dataclass(kw_only=True)
class EncodeConfig:
    """How captions are encoded.

    Args:
        batch_size: captions per forward pass.
        file_size: captions per file; what a kill loses at most, in each process.
        dtype: float16, bfloat16 or float32, of the states on disk.
        precision: no (the encoder's own), bf16 or fp16, of its matrix products.
        cpu: encode on the CPU even if there is a GPU.
    """

    batch_size: int = 64
    file_size: int = 4096
    dtype: str = "float16"
    precision: str | bool = "no"
    cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "file_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"encode.{name} must be 1 or more, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"encode.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        self.precision = yaml_word(self.precision)
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"encode.precision must be no, bf16 or fp16, got {self.precision!r}")


def all_captions(data: Dataset) -> Iterator[str]:
    """Every caption that training on a data set can meet, with repetitions.

    Raises:
        ValueError: if the data are streamed.
    """
    if isinstance(data, StreamDataset):
        raise ValueError("text.cache needs captions that can be listed: data.streaming must be false")
    for index in range(len(data)):
        yield from data.captions(index)


@torch.no_grad()
def encode(accelerator: Accelerator, read, captions: Sequence[str], config: EncodeConfig) -> list[torch.Tensor]:
    """States (T, E) of each caption, in the cache's dtype, on the CPU.

    Raises:
        ValueError: if one does not fit the dtype.
    """
    made = []
    for begin in range(0, len(captions), config.batch_size):
        some = list(captions[begin : begin + config.batch_size])
        with accelerator.autocast():
            text = read(some, accelerator.device)
        states, mask = text["states"].to(DTYPES[config.dtype]).cpu(), text["mask"].cpu()
        for caption, one, real in zip(some, states, mask):
            if not one[real].isfinite().all():
                raise ValueError(f"encode.dtype {config.dtype} cannot hold the states of {caption!r}: take float32")
            made.append(one[real])
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and encode the captions of both splits.

    Raises:
        ValueError: on settings that do not fit together, or a cache that another encoder made.
    """
    made = train_var.parser()
    made.add_class_arguments(EncodeConfig, "encode")
    built = made.instantiate(made.parse_args(argv))
    text, config, length = built.text, built.encode, built.transformer.text_length
    if built.transformer.conditioning != "text":
        raise ValueError(f"transformer.conditioning must be text, got {built.transformer.conditioning!r}")
    if text.pretrained is None or text.cache is None:
        raise ValueError("text.pretrained and text.cache must say which encoder's states go where")
    check_place("text.cache", text.cache, folder=True)
    on_cpu = config.cpu or built.run.cpu or works_on_cpu()
    accelerator = Accelerator(mixed_precision=config.precision, cpu=on_cpu)
    check_group(accelerator)
    splits = train_var.datasets(built, train_var.open_tokenizer(built))
    encoder, tokenizer = load_text_encoder(text.pretrained)
    read, folder = text_reader(encoder, tokenizer, length, frozen=True), Path(text.cache)
    manifest = describe(encoder, tokenizer, text_length=length, dtype=config.dtype, pretrained=text.pretrained)
    if accelerator.is_main_process:
        begin_cache(folder, manifest, encoder, tokenizer)
    accelerator.wait_for_everyone()
    cache = TextCache(folder, encoder_hash=manifest["encoder_hash"])
    distinct = sorted({caption for data in splits for caption in all_captions(data)}, key=lambda c: (len(c), c))
    missing = [caption for caption, there in zip(distinct, cache.has(distinct)) if not there]
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    files = range(-(-len(missing) // config.file_size))
    with tqdm(total=len(missing), unit="caption", disable=not accelerator.is_main_process) as bar:
        for file in files[accelerator.process_index :: accelerator.num_processes]:
            some = missing[file * config.file_size : (file + 1) * config.file_size]
            write_states(folder, cache.next_number + file, some, encode(accelerator, read, some, config))
            bar.update(min(len(some) * accelerator.num_processes, bar.total - bar.n))
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    sys.exit(exit_code(main))
