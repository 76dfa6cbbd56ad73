"""Images of any aspect ratio in batches of one shape each, from Infinity's lists of captions.

    FOLDER/1.000_000002500.jsonl    height over width, number of lines
           1.500_000002500.jsonl    {"image_path", "long_caption", "text"} a line; paths absolute, or from FOLDER or
                                    one of its parents

Which images share a batch is a pure function of (seed, image counter), as everything in `train.order`.
"""

from __future__ import annotations

import json
import mmap
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch.utils.data import Dataset

from sample.pixels import MAX_PIXELS, CorruptImage, crop, decode
from tokenizer.aspects import STRIDE, TEMPLATES, aspect_schedule, nearest_template
from train.images import BAD_IN_A_ROW, CorruptLog
from train.order import permute, uniforms


@dataclass(kw_only=True)
class AspectConfig:
    """Images of any aspect ratio.

    Args:
        folder: of `.jsonl` lists; null for the images of `data`.
        size: 0.06M, 0.25M, 0.60M or 1M.
        short_captions: share of images that come with their short caption ("text") instead of the long one.
        val_fraction: share of the images of the most frequent shape kept for validation, from its list's end.
    """

    folder: str | None = None
    size: str = "0.25M"
    short_captions: float = 0.5
    val_fraction: float = 0.02

    def __post_init__(self) -> None:
        aspect_schedule("1:1", self.size)
        if not 0 <= self.short_captions <= 1:
            raise ValueError(f"aspects.short_captions must be in [0, 1], got {self.short_captions}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"aspects.val_fraction must be in [0, 1), got {self.val_fraction}")


def places_of_lines(file: BinaryIO) -> np.ndarray:
    """Where each line of a file begins and ends, but blank ones: (lines, 2) int64."""
    places, end = array("q"), 0
    for line in file:
        begin, end = end, end + len(line)
        if line.strip():
            places.extend((begin, end))
    return np.array(places, dtype=np.int64).reshape(-1, 2)


class Lines:
    """The lines of some text files by number, one file after the other, without blank ones; only places are held."""

    def __init__(self, *paths: Path):
        self.paths, self.places = paths, []
        for path in paths:
            with path.open("rb") as file:
                self.places.append(places_of_lines(file))
        self.ends = list(accumulate(map(len, self.places)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> str:
        which = bisect_right(self.ends, index)
        places, index = self.places[which], index - (self.ends[which - 1] if which else 0)
        with self.paths[which].open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            begin, end = places[index]
            return whole[begin:end].decode("utf-8")


class AspectImages(Dataset):
    """Items {"image": uint8 (3, h, w), "label": -1, "caption": str}; the shape is that of the image's template.

    Args:
        split: "train", or "val" for the held-out images of the most frequent shape.
        batch_size: images of one step over all processes: each such batch has one shape.

    Raises:
        FileNotFoundError: if the folder has no lists, or images are not where their lists say.
        ValueError: if no shape has enough images for one batch.
    """

    num_classes = 1

    def __init__(
        self, config: AspectConfig, split: str, *, batch_size: int, seed: int = 0, corrupt: CorruptLog | None = None
    ):
        self.config, self.batch_size, self.seed = config, batch_size, seed
        self.corrupt = corrupt or CorruptLog()
        self.lists = self._read_lists(Path(config.folder))
        largest = max(self.lists, key=lambda ratio: len(self.lists[ratio]))
        held = max(1, int(len(self.lists[largest]) * config.val_fraction)) if config.val_fraction else 0
        self.counts = {ratio: len(lines) - held * (ratio == largest) for ratio, lines in self.lists.items()}
        self.first = 0
        if split == "val":
            self.first, self.counts = self.counts[largest], {largest: held}
        blocks = [count // batch_size if split == "train" else count for count in self.counts.values()]
        self.block = batch_size if split == "train" else 1
        self.block_ends = list(accumulate(blocks))
        if not self.block_ends or self.block_ends[-1] == 0:
            raise ValueError(f"aspects.folder {config.folder!r}: no shape has the {batch_size} images of a batch")
        self.starts = dict(zip(self.counts, [0, *accumulate(self.counts.values())]))

    def __len__(self) -> int:
        """Images of an epoch: of each shape as many as make whole batches, other ones every epoch."""
        return self.block_ends[-1] * self.block

    def place(self, position: int, *, seed: int, epoch: int) -> int:
        """Index of the image at `position` of an epoch: batches are shuffled, and images among those of their shape."""
        block, inside = divmod(position, self.block)
        block = permute(block, self.block_ends[-1], seed=seed, epoch=epoch)
        shape = bisect_right(self.block_ends, block)
        ratio = list(self.counts)[shape]
        earlier = self.block_ends[shape - 1] if shape else 0
        local = (block - earlier) * self.block + inside
        return self.starts[ratio] + permute(local, self.counts[ratio], seed=seed + shape + 1, epoch=epoch)

    def __getitem__(self, index: int) -> dict:
        return self.at(index, 0)

    def at(self, index: int, epoch: int) -> dict:
        """Item `index`, in epoch `epoch`; an image that cannot be read is replaced by the next one of its shape."""
        ratio, local = self._place(index)
        count = self.counts[ratio]
        tries = min(count, BAD_IN_A_ROW)
        for offset in range(tries):
            number = self.first + (local + offset) % count
            name = f"image {number} of the lists of shape {ratio:g}"
            try:
                row = self._row(ratio, number)
                name = row["image_path"]
                return self._item(row, ratio, epoch, index + offset)
            except (CorruptImage, OSError) as error:
                self.corrupt.add(name, str(error))
        raise ValueError(f"{tries} images in a row cannot be read; {self.corrupt.summary(3)}")

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions that item `index` may come with."""
        ratio, local = self._place(index)
        short, long = _texts(self._row(ratio, self.first + local))
        return (short or long, long or short)

    def _row(self, ratio: float, number: int) -> dict:
        return _read_row(self.lists[ratio][number])

    def _place(self, index: int) -> tuple[float, int]:
        """The shape of an image, and its number among those of that shape."""
        ratio = max((r for r, start in self.starts.items() if start <= index), key=lambda r: self.starts[r])
        return ratio, index - self.starts[ratio]

    def _item(self, row: dict, ratio: float, *key: int) -> dict:
        h, w = (side * STRIDE for side in aspect_schedule(ratio, self.config.size).latent_hw)
        image = decode(self.root / row["image_path"], at_least=max(h, w), max_pixels=MAX_PIXELS)
        return {"image": crop(image, (h, w), resize_factor=1.0), "label": -1, "caption": self._caption(row, *key)}

    def _caption(self, row: dict, *key: int) -> str:
        texts = _texts(row)
        is_long = uniforms(1, self.seed, *key, 6)[0] >= self.config.short_captions
        return texts[is_long] or texts[not is_long]

    def _read_lists(self, folder: Path) -> dict[float, Lines]:
        paths: dict[float, list[Path]] = {}
        for path in sorted(folder.glob("*.jsonl")):
            paths.setdefault(nearest_template(_ratio(path)), []).append(path)
        found = {ratio: Lines(*of_shape) for ratio, of_shape in paths.items()}
        lists = {ratio: lines for ratio, lines in found.items() if len(lines)}
        if not lists:
            raise FileNotFoundError(f"aspects.folder {str(folder)!r} has no list like 1.500_000002500.jsonl in it")
        example = _first_path(lists.values())
        if example is None:
            raise ValueError(
                f"aspects.folder {str(folder)!r}: no line of its lists is a JSON object with an image_path"
            )
        roots = [root for root in (folder, *folder.resolve().parents) if (root / example).is_file()]
        if not roots:
            raise FileNotFoundError(
                f"aspects.folder {str(folder)!r}: {example} is neither in it nor in any folder above"
            )
        self.root = roots[0]
        return lists


def _read_row(line: str) -> dict:
    """What a line says. Raises CorruptImage if it names no image."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CorruptImage(f"a line is no JSON ({error}): {line.strip()[:60]}") from None
    if not isinstance(row, dict) or not isinstance(row.get("image_path"), str):
        raise CorruptImage(f"a line has no image_path: {line.strip()[:60]}")
    return row


def _first_path(lists: Iterable[Lines]) -> str | None:
    """The path of the first image that a line names."""
    for lines in lists:
        for number in range(len(lines)):
            with suppress(CorruptImage):
                return _read_row(lines[number])["image_path"]
    return None


def _texts(row: dict) -> tuple[str, str]:
    """The short caption and the long one, empty where there is none."""
    return row.get("text") or "", row.get("long_caption") or ""


def _ratio(path: Path) -> float:
    try:
        return float(path.name.split("_")[0].removesuffix(".jsonl"))
    except ValueError:
        known = ", ".join(f"{ratio:.3f}" for ratio in TEMPLATES)
        raise ValueError(f"list {path.name} must begin with height over width, one of {known}") from None
