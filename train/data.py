"""Training images: one config, one function, five sources.

`build_dataset(config, split)` gives items {"image": uint8 (3, H, W) in [0, 255], "label": int, "caption": str}.
Map-style data sets are wrapped in a KeyedDataset and read in the order of a KeyedSampler; streams come in an order of
their own (train/stream.py). No global random state is read anywhere.
"""

import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
from torch.utils.data import Dataset

from sample.pixels import MAX_PIXELS
from train.images import CorruptLog, ImageDataset, RowReader, Transform, no_label
from train.order import KeyedDataset, KeyedSampler, permute
from train.sources import (
    METADATA_FILES,
    SPLIT_NAMES,
    Columns,
    FolderSource,
    TableSource,
    choose_columns,
    class_names,
    data_files,
    get,
    load_tables,
    narrowed,
)
from train.stream import StreamDataset, StreamLoader

__all__ = [
    "CorruptLog",
    "DataConfig",
    "ImageDataset",
    "KeyedDataset",
    "KeyedSampler",
    "StreamDataset",
    "StreamLoader",
    "build_dataset",
    "build_stream",
    "permute",
]

SOURCES = ("scenes", "folder", "parquet", "datasets", "webdataset")
VAL_NAMES = ("validation", "val", "valid", "dev")
VAL_SCENES = 2**31  # data-set seed of the validation scenes
MANY_CLASSES = 30_000  # labels above are taken only where images are many, too, or `num_classes` says so


@dataclass(kw_only=True)
class DataConfig:
    """What to train on.

    Args:
        source: where images come from: scenes (drawn), folder, parquet, datasets or webdataset, see docs/data.md.
        path: folder; parquet or tar file(s), folder or glob; Hub name or folder.
        val_path: the same for validation; the source's own split, or a hash split, when None.
        subset: configuration of a Hub data set.
        train_split: name of the training split or sub-folder.
        val_split: name of the validation one; validation, val, valid or dev if there is one when None.
        val_fraction: share of the images hashed into validation where no validation data is given.
        size: pixels: square side, or (h, w).
        resize_factor: the short side is resized to resize_factor * size before the crop.
        flip: mirror half of the training images; not with captions that say left or right.
        image_column: image, jpg, jpeg, png, webp or img, the first there is, when None.
        label_column: label, cls, json.label or json.cls if there when None; without one every label is 0.
        caption_column: text, caption, txt, json.text or json.caption when None; else the class name.
        num_classes: number of labels; one more than the largest, which a stream cannot know, when None.
        streaming: read forwards without a local copy (parquet, datasets, webdataset).
        shuffle_buffer: streaming: records shuffled together, per worker.
        stream_val_images: streaming: validation images read at the start and held in memory.
        limit: only the first so many images.
        num_scenes: scenes: images in an epoch (validation: num_scenes * val_fraction).
        scene_tags: scenes: how often each tag is trained on (others: 1); alike when None.
        max_pixels: larger images count as corrupt.
        cache_dir: where `datasets` keeps its Arrow copies; its default when None.

    Raises:
        ValueError: naming the field that is wrong.
    """

    source: Literal["scenes", "folder", "parquet", "datasets", "webdataset"] = "scenes"
    path: str | list[str] | None = None
    val_path: str | list[str] | None = None
    subset: str | None = None
    train_split: str = "train"
    val_split: str | None = None
    val_fraction: float = 0.02
    size: int | tuple[int, int] = 256
    resize_factor: float = 1.125
    flip: bool = False
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    num_classes: int | None = None
    streaming: bool = False
    shuffle_buffer: int = 1000
    stream_val_images: int = 256
    limit: int | None = None
    num_scenes: int = 100_000
    scene_tags: dict[str, float] | None = None
    max_pixels: int = MAX_PIXELS
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source={self.source!r} must be one of {', '.join(SOURCES)}")
        if self.source == "scenes" and (self.path or self.val_path):
            raise ValueError(f"path={self.path or self.val_path!r}: source='scenes' is drawn and takes no path")
        if self.source != "scenes" and not self.path:
            raise ValueError(f"path is required for source={self.source!r}")
        for name in ("path", "val_path") if self.source in ("folder", "datasets") else ():
            if isinstance(getattr(self, name), list):
                raise ValueError(f"{name}={getattr(self, name)!r}: source={self.source!r} takes one path, not a list")
        if len(self.hw) != 2 or min(self.hw) < 1:
            raise ValueError(f"size={self.size!r} must be a positive number of pixels or a pair (h, w) of them")
        if self.resize_factor < 1:
            raise ValueError(f"resize_factor={self.resize_factor} must be at least 1")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must be in [0, 1)")
        for name in ("limit", "num_scenes", "max_pixels", "stream_val_images", "num_classes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer={self.shuffle_buffer} must be at least 0")
        if self.streaming and self.source in ("scenes", "folder"):
            raise ValueError(f"streaming=True: source={self.source!r} is not streamed; it needs no local copy anyway")
        if self.scene_tags is not None and self.source != "scenes":
            raise ValueError(f"scene_tags={self.scene_tags} is for source='scenes', not {self.source!r}")
        if self.source == "scenes" and (self.flip or self.hw[0] != self.hw[1]):
            raise ValueError("source='scenes' is square and says left and right: flip must be False, size one number")

    @property
    def hw(self) -> tuple[int, int]:
        """(h, w) of the crops."""
        return (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)

    def transform(self, split: str, seed: int) -> Transform:
        """How the images of a split are cropped."""
        return Transform(
            hw=self.hw,
            resize_factor=self.resize_factor,
            flip=self.flip,
            max_pixels=self.max_pixels,
            train=split == "train",
            seed=seed,
        )

    @property
    def columns(self) -> dict[str, str | None]:
        """The named columns, as `choose_columns` takes them."""
        return {"image": self.image_column, "label": self.label_column, "caption": self.caption_column}


class HeldImages(Dataset):
    """The first images of a stream, read once and held: what a streamed run validates on."""

    def __init__(self, stream: StreamDataset, count: int):
        self.items = list(islice(stream, count))
        self.classes, self.num_classes, self.corrupt = stream.classes, stream.num_classes, stream.corrupt

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return self.items[index]

    def captions(self, index: int) -> tuple[str, ...]:
        """The caption of an item."""
        return (self.items[index]["caption"],)


class SceneImages(Dataset):
    """Drawn scenes (`evaluation.scenes`); `classes` are the six tags. Rendered at size: nothing is cropped."""

    def __init__(self, n: int, *, seed: int, size: int, tags: dict[str, float] | None = None):
        from evaluation.scenes import TAGS, SceneDataset

        self.scenes = SceneDataset(n, seed=seed, size=size, tags=tags)
        self.classes, self.num_classes, self.corrupt = tuple(TAGS), len(TAGS), CorruptLog()

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict:
        return self.scenes[index]

    def captions(self, index: int) -> tuple[str, ...]:
        """The caption of an item, which is not rendered for it."""
        from evaluation.scenes import scene_at

        return (scene_at(index, self.scenes.seed, self.scenes.split, self.scenes.shares).caption,)


def hash_split(names: Iterable[str], fraction: float) -> np.ndarray:
    """Which of `names` are validation, as bool (n,): about `fraction` of them, by crc32, whatever else there is.

    At least one of two or more is, so that a small folder can be validated; none if `fraction` is 0.
    """
    keys = np.array([zlib.crc32(os.fsencode(name)) for name in names], dtype=np.int64)
    chosen = keys < fraction * 2**32
    if fraction > 0 and len(keys) > 1 and not chosen.any():
        chosen[keys.argmin()] = True
    return chosen


def _pick_split(names: list[str], config: DataConfig, split: str) -> tuple[str, bool]:
    """(split name, hash it?) among the splits or sub-folders a source has."""
    wanted = [config.val_split] if config.val_split else VAL_NAMES
    if config.val_split and config.val_split not in names and config.val_path is None:
        raise ValueError(f"val_split={config.val_split!r} is not one of {', '.join(names)}")
    if config.train_split in names:
        train = config.train_split
    elif len(names) == 1 or split == "val":  # of validation alone the other split matters where it is hashed
        train = next((name for name in names if name not in wanted), names[0])
    else:
        raise ValueError(f"train_split={config.train_split!r} is not one of {', '.join(names)}")
    if config.val_split == train and config.val_path is None:
        raise ValueError(f"val_split={train!r} is what is trained on: leave it out, or name another train_split")
    val = [name for name in wanted if name in names and name != train]
    if split == "val" and val:
        return val[0], False
    return train, not val and config.val_path is None


def _open_folder(config: DataConfig, split: str) -> tuple[FolderSource, bool]:
    root = Path(config.path)
    if not root.is_dir():
        raise FileNotFoundError(f"path={config.path!r} is not a folder")
    wanted = {config.train_split, config.val_split, *VAL_NAMES}
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name in wanted)
    asked = [config.val_split] if config.val_path is None else []
    asked += [config.train_split] if config.train_split != "train" else []
    for missing in (name for name in asked if name and name not in names):
        raise ValueError(f"path={config.path!r} has no folder {missing!r} (train_split, val_split) in it")
    if names and any((root / name).is_file() for name in METADATA_FILES):
        raise ValueError(
            f"path={config.path!r} has metadata beside a folder {names[0]!r}: metadata goes into the folders"
        )
    if names and config.train_split not in names:
        raise ValueError(
            f"path={config.path!r} has a folder {names[0]!r} and no {config.train_split!r}: give train_split"
        )
    folder, hashed = root, config.val_path is None
    if config.train_split in names:
        name, hashed = _pick_split(names, config, split)
        folder = root / name
    if split == "val" and config.val_path is not None:
        folder, hashed = Path(config.val_path), False
    classes = _open_folder(config, "train")[0].classes if split == "val" and not hashed else None
    return FolderSource(folder, classes=classes, columns=config.columns), hashed


def _open_table(config: DataConfig, split: str):
    """(`datasets` table, hash it?)"""
    options = {
        "subset": config.subset,
        "streaming": config.streaming,
        "cache_dir": config.cache_dir,
        "split_names": SPLIT_NAMES | {config.train_split, config.val_split},
    }
    if split == "val" and config.val_path is not None:
        tables = load_tables(config.source, config.val_path, **options)
        name = config.val_split or _pick_split(list(tables), config, "train")[0]
        if name not in tables:
            raise ValueError(f"val_split={name!r} is not one of {', '.join(tables)} in val_path={config.val_path!r}")
        return tables[name], False
    tables = load_tables(config.source, config.path, **options)
    name, hashed = _pick_split(list(tables), config, split)
    return tables[name], hashed


def _table_columns(rows, config: DataConfig) -> Columns:
    schema = rows.features or next(iter(rows.take(1)), None)
    if not schema:
        raise ValueError(f"path={config.path!r} holds no rows")
    return choose_columns(schema, **config.columns, where=repr(config.path))


def _build_table(config: DataConfig, split: str) -> tuple[TableSource, bool]:
    rows, hashed = _open_table(config, split)
    classes = _build_table(config, "train")[0].classes if split == "val" and not hashed else None
    return TableSource(rows, _table_columns(rows, config), title=repr(config.path), classes=classes), hashed


def build_stream(
    config: DataConfig, split: str, *, seed: int, corrupt: CorruptLog, labelled: bool = False
) -> StreamDataset:
    """One split as a stream: training shuffled without end, validation once in order."""
    rows, hashed = _open_table(config, split)
    columns = _table_columns(rows, config)
    classes = class_names(rows, columns.label)
    label_type = get(dict(rows.features or {}), columns.label) if columns.label else None
    if classes is None and getattr(label_type, "dtype", "") == "string":
        raise ValueError(
            f"label_column={columns.label!r} is text: a stream cannot number it; store integers or ClassLabel"
        )
    if config.limit is not None:
        rows = rows.take(config.limit)
    found = len(classes) if classes else (1 if columns.label is None else None)
    number = _declared(config, found)
    if labelled and number is None:
        raise ValueError(
            "data.num_classes must be given for class-conditional training: a stream cannot tell how many there are"
        )
    cut = config.val_fraction
    part = None if not hashed else (0.0, cut) if split == "val" else (cut, 1.0)
    return StreamDataset(
        narrowed(rows, columns),
        RowReader(columns, classes, config.transform(split, seed), corrupt, part, number, labelled),
        window=config.shuffle_buffer if split == "train" else 0,
        repeat=split == "train",
        seed=seed,
        shards=_shards(config),
    )


def _shards(config: DataConfig) -> list[str]:
    """Tar files or patterns of a webdataset, of both splits."""
    given = (config.path, config.val_path) if config.source == "webdataset" else ()
    return list(chain.from_iterable(files for path in given if path for files in data_files(path, ".tar").values()))


def _declared(config: DataConfig, found: int | None) -> int | None:
    """The number of classes: what the config says, which must hold all that were found, or else what was found."""
    if config.num_classes is not None and config.num_classes < (found or 0):
        raise ValueError(f"num_classes={config.num_classes} must be at least {found}, the labels of {config.path!r}")
    return config.num_classes or found


def _not_empty(data: ImageDataset | HeldImages, config: DataConfig, split: str) -> ImageDataset | HeldImages:
    if len(data) == 0:
        raise ValueError(
            f"split={split!r} of path={config.path!r} has no images: "
            f"give val_path or another val_fraction than {config.val_fraction}"
        )
    return data


def build_dataset(
    config: DataConfig,
    split: Literal["train", "val"] = "train",
    *,
    seed: int = 0,
    corrupt_log: str | os.PathLike | None = None,
    labelled: bool = False,
) -> ImageDataset | SceneImages | StreamDataset | HeldImages:
    """The images of one split; items {"image": uint8 (3, H, W) in [0, 255], "label": int, "caption": str}.

    Training crops are random, keyed by (seed, epoch, image); validation crops are central. With
    `config.streaming` the training split is a StreamDataset, for a StreamLoader; everything else is map-style, for a
    KeyedDataset. corrupt_log: a file that collects the names of unreadable images. labelled: refuse images without
    labels. Raises ValueError or FileNotFoundError in one line for a path, split, column or class that is not there, and
    for a split without images.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split={split!r} must be 'train' or 'val'")
    corrupt = CorruptLog(corrupt_log)
    if config.source == "scenes":
        n = config.num_scenes if split == "train" else max(1, round(config.num_scenes * config.val_fraction))
        seed, tags = (0, config.scene_tags) if split == "train" else (VAL_SCENES, None)
        return SceneImages(min(n, config.limit or n), seed=seed, size=config.hw[0], tags=tags)
    if config.streaming:
        stream = build_stream(config, split, seed=seed, corrupt=corrupt, labelled=labelled)
        return stream if split == "train" else _not_empty(HeldImages(stream, config.stream_val_images), config, split)
    source, hashed = (_open_folder if config.source == "folder" else _build_table)(config, split)
    if labelled and source.unlabelled:
        raise ValueError(no_label(f"an image of path={config.path!r}"))
    indices = np.arange(len(source))
    if hashed:
        validation = hash_split(map(source.name, indices), config.val_fraction)
        indices = indices[validation == (split == "val")]
    if config.num_classes is None and source.num_classes > max(MANY_CLASSES, 10 * len(source)):
        raise ValueError(
            f"labels of path={config.path!r} go up to {source.num_classes - 1:,}, of {len(source):,} images: "
            "give another label_column, or data.num_classes"
        )
    source.num_classes = _declared(config, source.num_classes)
    data = ImageDataset(source, indices[: config.limit], config.transform(split, seed), corrupt)
    return _not_empty(data, config, split)
