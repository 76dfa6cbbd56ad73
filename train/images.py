"""Records -> items, past images that cannot be read."""

import os
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from sample.pixels import CorruptImage, crop, decode
from train.order import uniforms
from train.sources import Columns, FolderSource, Record, TableSource, read_row

BAD_IN_A_ROW = 1000  # unreadable neighbours after which the data, not an image, is at fault


class CorruptLog:
    """Which images could not be read. With a `path` every process appends to that file, so workers' findings count.

    Each image is counted once however often it is met.
    """

    def __init__(self, path: str | os.PathLike | None = None):
        self.path = Path(path) if path is not None else None
        self._reasons: dict[str, str] = self._read()

    def _read(self) -> dict[str, str]:
        if self.path is None or not self.path.is_file():
            return {}
        lines = self.path.read_text("utf-8", errors="surrogateescape").splitlines()
        return dict(line.split("\t", 1) for line in lines if "\t" in line)

    def add(self, name: str, reason: str) -> None:
        """Note that image `name` is unreadable."""
        if name in self._reasons:
            return
        self._reasons[name] = reason
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", errors="surrogateescape") as file:  # names of any bytes
                file.write(f"{name}\t{reason}\n")
        elif len(self._reasons) == 1:
            warnings.warn(f"skipping images that cannot be read, first {name}: {reason}", stacklevel=2)

    @property
    def names(self) -> list[str]:
        """Unreadable images met so far, by any process where there is a file."""
        return list({**self._read(), **self._reasons})

    @property
    def count(self) -> int:
        return len(self.names)

    def summary(self, first: int = 5) -> str:
        """One line: how many images were skipped and the names of the first; empty if none were."""
        names = self.names
        if not names:
            return ""
        more = ", ..." if len(names) > first else ""
        where = f"; all in {self.path}" if self.path is not None else ""
        return f"{len(names)} unreadable images were skipped: {', '.join(names[:first])}{more}{where}"


def no_label(where: str) -> str:
    """What to say of images without labels where labels are needed."""
    return f"{where} has no label: class-conditional training needs one for every image (transformer.conditioning)"


@dataclass(frozen=True)
class Transform:
    """Record -> item. Draws: crop down, crop across, flip, caption."""

    hw: tuple[int, int]
    resize_factor: float
    flip: bool
    max_pixels: int
    train: bool
    seed: int

    def __call__(self, record: Record, *key: int) -> dict:
        draws = uniforms(4, self.seed, *key) if self.train else (0.0, 0.0, 1.0, 0.0)
        room = round(max(self.hw) * self.resize_factor) * 2
        image = decode(record.image, at_least=room, max_pixels=self.max_pixels)
        pixels = crop(
            image,
            self.hw,
            resize_factor=self.resize_factor,
            uniforms=draws[:2] if self.train else None,
            mirror=self.flip and draws[2] < 0.5,
        )
        caption = record.caption
        if isinstance(caption, tuple):
            caption = caption[int(draws[3] * len(caption))]
        return {"image": pixels, "label": record.label, "caption": caption}


class ImageDataset(Dataset):
    """Map-style images of a source. `at(index, epoch)` is the item with that epoch's crop; `[index]` is `at(index, 0)`.

    An image that cannot be read is noted in `corrupt` and replaced by the next one that can.
    """

    def __init__(
        self, source: FolderSource | TableSource, indices: np.ndarray, transform: Transform, corrupt: CorruptLog
    ):
        self.source, self.indices, self.transform, self.corrupt = source, indices, transform, corrupt

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in the order of the labels, where the source has names."""
        return self.source.classes

    @property
    def num_classes(self) -> int:
        """One more than the largest label that can come."""
        return self.source.num_classes

    def __len__(self) -> int:
        return len(self.indices)

    def at(self, index: int, epoch: int) -> dict:
        """Item `index` of [0, len) as epoch `epoch` crops it. Raises ValueError if 1000 neighbours are unreadable."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), not {index}")
        tries = min(len(self), BAD_IN_A_ROW)
        for offset in range(tries):
            where = int(self.indices[(index + offset) % len(self)])
            try:
                return self.transform(self.source.record(where), epoch, where)
            except (CorruptImage, OSError) as error:
                self.corrupt.add(self.source.name(where), str(error))
        raise ValueError(f"{tries} images in a row cannot be read; {self.corrupt.summary(3)}")

    def __getitem__(self, index: int) -> dict:
        return self.at(index, 0)

    def captions(self, index: int) -> tuple[str, ...]:
        """Every caption that item `index` may come with."""
        caption = self.source.caption(int(self.indices[index]))
        return caption if isinstance(caption, tuple) else (caption,)


@dataclass(frozen=True)
class RowReader:
    """Row of a stream -> item, or None for a row of the other part or one that cannot be read.

    A streamed image is named by the crc32 of its bytes, wherever it stands: its crop depends on that and the epoch,
    and `part` = (low, high) keeps the images whose crc32 / 2**32 lies in [low, high).
    """

    columns: Columns
    classes: tuple[str, ...] | None
    transform: Transform
    corrupt: CorruptLog
    part: tuple[float, float] | None = None
    num_classes: int | None = None
    labelled: bool = False

    def __call__(self, row: dict, epoch: int) -> dict | None:
        name = str(row.get("__key__") or "")
        try:
            record = read_row(row, self.columns, self.classes, name or "a row")
            if self.num_classes is not None and record.label >= self.num_classes:
                raise ValueError(
                    f"label {record.label} of {name or 'a row'} is not below num_classes={self.num_classes}"
                )
            if self.labelled and record.label < 0:
                raise ValueError(no_label(name or "a row"))
            if isinstance(record.image, str):
                name = name or record.image
                record = replace(record, image=Path(record.image).read_bytes())
            key = zlib.crc32(record.image or b"")
            name = name or f"image with crc32 {key:08x}"
            if self.part is not None and not self.part[0] <= key / 2**32 < self.part[1]:
                return None
            return self.transform(record, epoch, key)
        except (CorruptImage, OSError) as error:
            self.corrupt.add(name, str(error))
            return None
