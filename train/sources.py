"""Where labelled, captioned images come from: folders, and tables read with Hugging Face `datasets`.

A source answers `len(source)`, `source.record(i)`, `source.caption(i)` and `source.name(i)` (stable, for the hash
split), and carries `classes` (names in the order of the labels, or None), `num_classes` and `unlabelled` (whether any
label is -1). Nothing is decoded here.
"""

import csv
import glob
import io
import json
import os
import re
import tarfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from sample.files import read_text
from sample.pixels import IMAGE_SUFFIXES, CorruptImage

IMAGE_KEYS = ("image", "jpg", "jpeg", "png", "webp", "img")
LABEL_KEYS = ("label", "cls", "json.label", "json.cls")
CAPTION_KEYS = ("text", "caption", "txt", "json.text", "json.caption")
SPLIT_NAMES = frozenset(("train", "validation", "val", "valid", "dev", "test"))  # that folders of shards may use
METADATA_FILES = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Record:
    """One undecoded image: `image` is encoded bytes, a path or a Pillow image; `caption` one text or several."""

    name: str
    image: Any
    label: int
    caption: str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Column names; a dotted name (`json.caption`) reaches into a column of objects. label, caption: None if absent."""

    image: str
    label: str | None = None
    caption: str | None = None

    @property
    def named(self) -> list[str]:
        """The columns that are read."""
        return [name for name in (self.image, self.label, self.caption) if name is not None]


def get(row: dict, column: str) -> Any:
    """row["a"]["b"] for column "a.b" (or row["a.b"] where that is a column); None where a part is absent."""
    if column in row:
        return row[column]
    head, _, tail = column.partition(".")
    inner = row.get(head)
    return get(inner, tail) if tail and isinstance(inner, dict) else None


def choose_columns(row: dict, *, image: str | None, label: str | None, caption: str | None, where: str) -> Columns:
    """The columns to read from rows like `row`: those named, else the first usual name that is there.

    Raises ValueError, listing the columns there are, for a named column that is absent or for no image column.
    """

    def choose(field: str, named: str | None, usual: tuple[str, ...]) -> str | None:
        names = (named,) if named else usual
        found = next((name for name in names if name in row or get(row, name) is not None), None)
        if found is None and (named or field == "image_column"):
            raise ValueError(f"{field}={named!r}: {where} has no column {' or '.join(names)}; it has {', '.join(row)}")
        return found

    return Columns(
        image=choose("image_column", image, IMAGE_KEYS),
        label=choose("label_column", label, LABEL_KEYS),
        caption=choose("caption_column", caption, CAPTION_KEYS),
    )


def class_caption(classes: tuple[str, ...] | None, label: int) -> str:
    """The caption of an image that has none: the name of its class with underscores as spaces, or nothing."""
    return classes[label].replace("_", " ") if classes and 0 <= label < len(classes) else ""


def _as_caption(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, (list, tuple)):
        return tuple(str(text) for text in value) or ""
    return "" if value is None else str(value).strip()


class FolderSource:
    """Images in class sub-folders, or flat in one folder; see docs/data.md for the layouts.

    classes: fixes the label order (the training folder's, for a validation folder). Raises FileNotFoundError for a
    missing folder, ValueError for one without images or with a class that `classes` lacks.
    """

    def __init__(self, root: str | os.PathLike, *, classes: tuple[str, ...] | None = None, columns: dict | None = None):
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"path={str(root)!r} is not a folder")
        metadata = next((self.root / name for name in METADATA_FILES if (self.root / name).is_file()), None)
        if metadata is not None:
            files, labels, self._captions, found = _read_metadata(metadata, columns or {}, classes)
        else:
            files, labels, found = _scan(self.root, classes)
            self._captions = None
        if not files:
            raise ValueError(f"path={str(root)!r} holds no images ({' '.join(IMAGE_SUFFIXES)})")
        self.classes = found
        self.num_classes = len(found) if found else max(labels) + 1
        self._files = np.array([os.fsencode(name) for name in files])  # one buffer: workers share it copy-free
        self._labels = np.array(labels, dtype=np.int64)
        self.unlabelled = min(labels) < 0

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """Path of image `index` below the root."""
        return os.fsdecode(bytes(self._files[index]))

    def record(self, index: int) -> Record:
        name, label = self.name(index), int(self._labels[index])
        path = self.root / name
        if self._captions is not None:
            caption = self._captions[index]
        else:
            sidecar = path.with_suffix(".txt")
            caption = _sidecar(sidecar) if sidecar.is_file() else None
        return Record(name, path, label, class_caption(self.classes, label) if caption is None else caption)

    def caption(self, index: int) -> str | tuple[str, ...]:
        """The record's caption or captions."""
        return self.record(index).caption


def _sidecar(path: Path) -> str:
    try:
        return read_text("caption", path).strip()
    except ValueError as error:
        raise CorruptImage(str(error)) from None


def _images(folder: Path):
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _returns(parent, name))
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield os.path.join(parent, name)


def _returns(parent: str, name: str) -> bool:
    """Whether a folder is a link to one that it is in."""
    path = os.path.join(parent, name)
    return os.path.islink(path) and Path(parent).resolve().is_relative_to(Path(path).resolve())


def _scan(root: Path, classes: tuple[str, ...] | None) -> tuple[list[str], list[int], tuple[str, ...] | None]:
    files = [os.path.relpath(name, root) for name in _images(root)]
    tops = [name.split(os.sep, 1)[0] if os.sep in name else None for name in files]
    own = tuple(sorted({top for top in tops if top is not None}))
    if not own:  # classes are those of the training data: which of them, no folder says
        return files, [-1 if classes else 0] * len(files), classes
    if None in tops:
        loose = files[tops.index(None)]
        raise ValueError(f"path={str(root)!r} mixes loose images ({loose}) with class folders ({own[0]}); use one kind")
    classes = classes or own
    if unknown := sorted(set(own) - set(classes)):
        raise ValueError(f"path={str(root)!r} has class folder {unknown[0]!r}, which the training data lacks")
    index = {name: label for label, name in enumerate(classes)}
    return files, [index[top] for top in tops], classes


def _read_metadata(path: Path, columns: dict, classes: tuple[str, ...] | None):
    """The Hugging Face imagefolder convention: one row per image with `file_name` and any label and caption."""
    file = io.StringIO(read_text("metadata", path))
    if path.suffix == ".csv":
        rows = list(csv.DictReader(file))
    else:
        rows = []
        for number, line in enumerate(file, 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    if not rows:
        return [], [], [], classes
    if others := [row for row in rows if not isinstance(row, dict)]:
        raise ValueError(f"{path}: every line must be an object with file_name, got {str(others[0])[:60]}")
    every = {name: value for row in reversed(rows) for name, value in row.items()}  # also what the first row lacks
    chosen = choose_columns(every, **{**columns, "image": "file_name"}, where=str(path))
    captions = [_as_caption(get(row, chosen.caption)) for row in rows] if chosen.caption else None
    labels = [get(row, chosen.label) for row in rows] if chosen.label else [0] * len(rows)
    labels = [None if label == "" else label for label in labels]
    if path.suffix == ".csv" and all(label is None or _is_whole(label) for label in labels):
        labels = [None if label is None else int(float(label)) for label in labels]
    given = [str(label) for label in labels if label is not None]
    if any(isinstance(label, str) for label in labels):
        labels = [None if label is None else str(label) for label in labels]
        classes = classes or tuple(sorted(set(given)))
    labels = [label_index(label, classes, str(path)) for label in labels]
    captions = captions or [class_caption(classes, label) for label in labels]
    files = [row.get("file_name") for row in rows]
    for number, name in enumerate(files, 1):
        if not isinstance(name, str) or not name:
            raise ValueError(f"{path}, image {number}: file_name must be a file's path, got {name!r}")
    return files, labels, captions, classes


def _is_whole(text: str) -> bool:
    """Whether a CSV field is a whole number, also as 3.0 (as pandas writes a column that lacks some)."""
    try:
        return float(text).is_integer()
    except ValueError:
        return False


def label_index(value: Any, classes: tuple[str, ...] | None, where: str) -> int:
    """A label as an integer: integers stay, None and "" are -1 (unlabelled), a name is looked up in `classes`."""
    if value is None or value == "":
        return -1
    if isinstance(value, str):
        if classes is None or value not in classes:
            raise ValueError(
                f"label {value!r} of {where} is not one of {', '.join(classes or ())[:200] or 'the classes'}"
            )
        return classes.index(value)
    try:
        number = int(value)
        if number != value:
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"label {value!r} of {where} must be an integer or a class name") from None


def read_row(row: dict, columns: Columns, classes: tuple[str, ...] | None, name: str) -> Record:
    """A table's row as a Record. The image may be {"bytes", "path"}, bytes or a path."""
    image = get(row, columns.image)
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and "://" in image:
        import fsspec

        with fsspec.open(image, "rb") as file:
            image = file.read()
    label = label_index(get(row, columns.label), classes, name) if columns.label else 0
    caption = _as_caption(get(row, columns.caption)) if columns.caption else class_caption(classes, label)
    return Record(name, image, label, caption)


def heads_of(table: Any, names: Iterable[str | None]) -> list[str]:
    """The columns of a `datasets` table that hold the named ones: json of "json.text", unless a column is called so."""
    given = {name for name in names if name is not None}
    return sorted({name if name in (table.features or {}) else name.partition(".")[0] for name in given})


def narrowed(table: Any, columns: Columns) -> Any:
    """A `datasets` table of the wanted columns alone, the image as {"bytes", "path"} instead of decoded."""
    import datasets

    heads = heads_of(table, columns.named)
    if table.features:
        table = table.select_columns(sorted({*heads, *({"__key__"} & set(table.features))}))
    if isinstance((table.features or {}).get(columns.image), datasets.Image):
        return table.cast_column(columns.image, datasets.Image(decode=False))
    return table


def class_names(table: Any, column: str | None) -> tuple[str, ...] | None:
    """Names of a ClassLabel column, or None."""
    feature = (table.features or {}).get(column) if column else None
    return tuple(feature.names) if hasattr(feature, "names") else None


class TableSource:
    """A map-style `datasets.Dataset`: parquet files, tar shards or a Hub data set, memory-mapped as Arrow."""

    def __init__(self, table: Any, columns: Columns, *, title: str, classes: tuple[str, ...] | None = None):
        self.table, self.columns, self.title = narrowed(table, columns), columns, title
        own = class_names(table, columns.label)
        if own and classes and own != classes:
            raise ValueError(f"the classes of {title} are {_listed(own)}, and those of training {_listed(classes)}")
        self.classes = own or classes
        values = [0] if columns.label is None else _distinct(table, columns.label)
        if self.classes is None and any(isinstance(value, str) for value in values):
            self.classes = tuple(sorted({str(value) for value in values if value not in (None, "")}))
        labels = [label_index(value, self.classes, title) for value in values]
        self.num_classes = len(self.classes) if self.classes else max(labels, default=-1) + 1
        self.unlabelled = min(labels, default=0) < 0

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        """`row N`: the hash split goes by it, so appending rows moves none."""
        return f"row {index}"

    def record(self, index: int) -> Record:
        return read_row(self.table[index], self.columns, self.classes, self.name(index))

    def caption(self, index: int) -> str | tuple[str, ...]:
        """The record's caption or captions, read without the image."""
        heads = heads_of(self.table, (self.columns.label, self.columns.caption))
        row = self.table.select_columns(heads)[index] if heads else {}
        return read_row(row, self.columns, self.classes, self.name(index)).caption


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names)[:100]} ({len(names)})"


def _distinct(table: Any, column: str) -> list:
    example = get(table.select_columns([column.partition(".")[0]])[0], column) if len(table) else None
    if isinstance(example, (list, tuple, dict)):
        raise ValueError(f"label_column={column!r} must hold an integer or a class name a row, got {str(example)[:60]}")
    if column in table.column_names:
        return table.unique(column)
    return list({get(row, column) for row in table.select_columns([column.partition(".")[0]])})


def data_files(path: str | list[str], suffix: str, split_names: frozenset[str] = SPLIT_NAMES) -> dict[str, list[str]]:
    """Split -> files or globs; local ones are known to exist."""
    paths = [path] if isinstance(path, str) else list(path)
    if not paths:
        raise ValueError("path is an empty list: name at least one file")
    if len(paths) == 1 and os.path.isdir(paths[0]):
        return _by_split(Path(paths[0]), suffix, split_names)
    for one in paths:
        if "://" not in one and not glob.glob(one, recursive=True):
            raise FileNotFoundError(f"path={one!r} does not exist")
    return {"train": paths}


def _by_split(folder: Path, suffix: str, split_names: frozenset[str]) -> dict[str, list[str]]:
    """Files of a folder by split: a sub-folder named as a split, or a file name that begins with one; else train."""
    files = sorted(folder.rglob(f"*{suffix}"))
    if not files:
        raise ValueError(f"path={str(folder)!r} holds no *{suffix} files")
    splits: dict[str, list[str]] = {}
    for file in files:
        *folders, name = file.relative_to(folder).parts
        words = [*folders, re.split(r"[^A-Za-z0-9]", name)[0]]
        splits.setdefault(next((word for word in words if word in split_names), "train"), []).append(str(file))
    return splits


def local_files(patterns: Iterable[str]) -> list[str]:
    """The files on this machine among names and patterns, each pattern's in order."""
    here = [pattern for pattern in patterns if "://" not in pattern]
    found = ([name] if os.path.isfile(name) else sorted(glob.glob(name, recursive=True)) for name in here)
    return list(chain.from_iterable(found))


def damaged_shard(files: Iterable[str]) -> str:
    """The first local tar file, of names and patterns, that ends too early; "a shard" if there is none."""
    for file in local_files(files):
        try:
            with tarfile.open(file) as tar:
                tar.getmembers()
        except (tarfile.TarError, OSError):
            return file
    return "a shard"


def warn_of_ends(files: Iterable[str]) -> None:
    """Warn of local tar files without the zeros that end one: what came after a cut between images is lost unseen."""
    for file in (name for name in local_files(files) if name.endswith(".tar")):  # not compressed
        with open(file, "rb") as shard:
            size = shard.seek(0, os.SEEK_END)
            shard.seek(max(0, size - tarfile.BLOCKSIZE))
            if any(shard.read()):
                warnings.warn(f"{file} has no end mark: it may have been cut, and images be missing", stacklevel=2)


def load_tables(
    source: str,
    path: str | list[str],
    *,
    subset: str | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
    split_names: frozenset[str] = SPLIT_NAMES,
) -> dict[str, Any]:
    """Split name -> `datasets.Dataset` (or IterableDataset when streaming) of one source.

    split_names: what counts as the name of a split in a folder of parquet or tar files.
    source: "parquet", "webdataset" or "datasets" (a Hub name, a folder `load_dataset` knows or one of `save_to_disk`).
    Raises FileNotFoundError or ValueError in one line for what cannot be found or read, ValueError without `datasets`.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(f"source={source!r} needs the datasets package: pip install 'nextscale[data]'") from None
    options = {"streaming": streaming, "cache_dir": cache_dir}
    if source == "datasets":
        saved = any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))
        if path.startswith((".", "/", "~")) and not Path(path).exists():
            raise FileNotFoundError(f"path={path!r} does not exist")
        if saved and streaming:
            raise ValueError(
                f"path={path!r} was written by save_to_disk, which cannot be streamed: set streaming=False"
            )
        load = (
            partial(datasets.load_from_disk, path) if saved else partial(datasets.load_dataset, path, subset, **options)
        )
    else:
        files = data_files(path, {"parquet": ".parquet", "webdataset": ".tar"}[source], split_names)
        load = partial(datasets.load_dataset, source, data_files=files, **options)
        if source == "webdataset":
            warn_of_ends(chain.from_iterable(files.values()))
    try:
        tables = load()
    except (datasets.exceptions.DatasetsError, ConnectionError, tarfile.TarError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        if isinstance(error.__cause__ or error, tarfile.TarError):
            reason = f"{damaged_shard(chain.from_iterable(files.values()))} is damaged: {reason}"
        raise ValueError(f"path={path!r} cannot be read as {source}: {reason}") from error
    return dict(tables) if isinstance(tables, dict) else {"train": tables}
