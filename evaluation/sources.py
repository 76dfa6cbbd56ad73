"""Where images to be scored come from: a folder, an npz, parquet, or a tree in GenEval's layout.

Shapes: N images, h w pixels, D features. Images are uint8 RGB, (h, w, 3).
"""

import io
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from evaluation.frechet import Moments
from evaluation.guards import check_finite
from evaluation.report import is_result
from evaluation.scenes import check_metadata
from sample.files import read_png_text
from sample.pixels import IMAGE_SUFFIXES, CorruptImage, to_rgb

NOT_SAMPLES = ("_grid.png", "_scales.png")  # ends of the overviews `nextscale sample` puts beside its images


@dataclass(frozen=True)
class FileImages:
    """Image files, in order. Iterating reads them; a file that cannot be read raises ValueError naming it."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(read_image, self.paths)


@dataclass(frozen=True)
class NpzImages:
    """`arr_0` of an npz, uint8 (N, h, w, 3), read image by image; `labels` is its `arr_1` if those are N integers.

    Iterating raises ValueError, naming the image, if the file ends early or is damaged.
    """

    path: Path
    shape: tuple[int, ...]
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        size, done = int(np.prod(self.shape[1:])), 0
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                _read_header(file)
                while done < len(self):
                    content = file.read(size)
                    if len(content) < size:
                        raise EOFError("the file ends early")
                    done += 1
                    yield np.frombuffer(content, np.uint8).reshape(self.shape[1:])
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"npz {self.path} is damaged in or after image {done} of {len(self)}: {error}") from None


@dataclass(frozen=True)
class ParquetImages:
    """Images of parquet files as `datasets` writes them: the first column that holds encoded images."""

    paths: Sequence[Path]
    column: str
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[np.ndarray]:
        import pyarrow.parquet as parquet

        for path in self.paths:
            row = 0
            for batch in parquet.ParquetFile(path).iter_batches(64, columns=[self.column]):
                for cell in batch.column(0).to_pylist():
                    if cell is None or not cell["bytes"]:
                        raise ValueError(f"parquet {path} row {row} holds no image in its column {self.column!r}")
                    yield _decode(io.BytesIO(cell["bytes"]), f"{path} row {row}")
                    row += 1


Images = FileImages | NpzImages | ParquetImages


def read_image(path: Path) -> np.ndarray:
    """One image file as uint8 (h, w, 3), 16 bits scaled, transparency on white; ValueError if it cannot be read."""
    return _decode(path, str(path))


def _decode(source: Path | io.BytesIO, name: str) -> np.ndarray:
    try:
        with Image.open(source) as image:
            return np.asarray(to_rgb(image, upright=False))
    except (OSError, SyntaxError, CorruptImage) as error:
        raise ValueError(f"image {name} cannot be read: {str(error).splitlines()[0]}") from None


def open_images(path: str | Path) -> Images:
    """The images of a folder (all below it, by name), an npz (`arr_0`, uint8 (N, h, w, 3): ADM's format) or parquet.

    Overviews, rows of scales and family trees that `nextscale sample` puts beside its images are left out.
    Raises FileNotFoundError if the path does not exist or holds no image, ValueError on an npz without images.
    """
    path = Path(path)
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        return _open_parquet(path)
    if path.is_dir():
        files = list(path.rglob("*"))
        ours = {file.parent for file in files if file.name == "settings.json"}
        found = sorted(p for p in files if p.suffix.lower() in IMAGE_SUFFIXES and _is_sample(p, path, ours))
        if not found:
            raise FileNotFoundError(f"images {path} holds no image file ({', '.join(IMAGE_SUFFIXES)})")
        return FileImages(found)
    return _open_npz_images(path)


def holds_images(path: str | Path) -> bool:
    """Whether there are images at a path: a folder, parquet, or an npz with `arr_0` (not statistics only)."""
    path = Path(path)
    return path.suffix != ".npz" or "arr_0.npy" in zipfile.ZipFile(path).namelist()


def image_sizes(images: Images) -> Counter:
    """How many images are of each (h, w), from headers; empty for parquet."""
    if isinstance(images, NpzImages):
        return Counter({images.shape[1:3]: len(images)})
    sizes: Counter = Counter()
    for path in images.paths if isinstance(images, FileImages) else ():
        with Image.open(path) as image:
            sizes[image.size[::-1]] += 1
    return sizes


def _open_npz_images(path: Path) -> NpzImages:
    labels = _open_npz(path, ("arr_1",)).get("arr_1")
    with zipfile.ZipFile(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            raise ValueError(f"npz {path} must hold arr_0, uint8 (N, h, w, 3), and has no arr_0")
        with archive.open("arr_0.npy") as file:
            try:
                shape, fortran, dtype = _read_header(file)
            except (ValueError, EOFError) as error:
                raise ValueError(f"npz {path} has an arr_0 that cannot be read: {error}") from None
    if np.issubdtype(dtype, np.floating):
        check_finite(f"npz {path}: arr_0", _open_npz(path, ("arr_0",))["arr_0"])
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran:
        raise ValueError(f"npz {path} must hold arr_0, uint8 (N, h, w, 3), and has arr_0 {dtype} {shape}")
    if 0 in shape[1:]:
        raise ValueError(f"npz {path} must hold images of one pixel or more, and has arr_0 {shape}")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.ndim != 1 or (labels < 0).all()):
        labels = None  # of texts, or something else than labels
    if labels is not None and len(labels) != shape[0]:
        raise ValueError(f"npz {path} has {len(labels)} labels (arr_1) for {shape[0]} images")
    return NpzImages(path, shape, labels)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _open_parquet(path: Path) -> ParquetImages:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path} cannot be read without pyarrow: pip install 'nextscale[data]'") from None
    paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a folder of images, an .npz or a .parquet file")
    schema = parquet.read_schema(paths[0])
    columns = [f.name for f in schema if "struct" in str(f.type) and f.type.get_field_index("bytes") >= 0]
    if not columns:
        raise ValueError(f"parquet {paths[0]} has no column of images (a struct with bytes), only {schema.names}")
    for other in paths[1:]:
        if columns[0] not in (names := parquet.read_schema(other).names):
            raise ValueError(f"parquet {other} has no column {columns[0]!r}, as {paths[0].name} has, only {names}")
    return ParquetImages(paths, columns[0], sum(parquet.read_metadata(p).num_rows for p in paths))


def _is_sample(path: Path, root: Path, ours: set[Path]) -> bool:
    """Whether a file below `root` is an image to be scored; `ours` are the folders that `nextscale sample` made."""
    parts = path.relative_to(root).parts
    if any(part.startswith(".") for part in parts) or _is_of_result(path):
        return False
    beside = path.name.endswith(NOT_SAMPLES) or not {"scales", "search"}.isdisjoint(parts[:-1])
    return not (beside and any(parent in ours for parent in path.parents))


def _is_of_result(path: Path) -> bool:
    """Whether a PNG is the picture of a results file beside it."""
    return path.suffix == ".png" and is_result(path.with_suffix(".json"))


def _open_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a folder of images or an .npz")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no folder and cannot be read as npz: it is not one, or cut off")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if name in names}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        raise ValueError(f"{path} is no folder and cannot be read as npz: {str(error).splitlines()[0]}") from None


def stored_moments(path: str | Path, *, spatial: bool = False) -> Moments | None:
    """The statistics `mu` (D,) and `sigma` (D, D) of a reference npz (ADM's references have them); None without.

    spatial: `mu_s` and `sigma_s` instead, those of sFID.
    Raises ValueError if they are not finite, not of one size, or sigma is no covariance.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".parquet":
        return None
    mean_name, covariance_name = ("mu_s", "sigma_s") if spatial else ("mu", "sigma")
    stored = _open_npz(path, (mean_name, covariance_name))
    if len(stored) < 2:
        return None
    for name, array in stored.items():
        if array.dtype.kind not in "fiu":
            raise ValueError(f"npz {path}: {name} must be numbers, got {array.dtype}")
    mean, covariance = (stored[name].astype(np.float64) for name in (mean_name, covariance_name))
    for name, array in ((mean_name, mean), (covariance_name, covariance)):
        check_finite(f"npz {path}: {name}", array)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"{mean.shape} and {covariance.shape}"
        raise ValueError(f"npz {path} must hold {mean_name} (D,) and {covariance_name} (D, D), and has {shapes}")
    if (np.diag(covariance) < 0).any() or not np.allclose(
        covariance, covariance.T, atol=1e-3 * np.abs(covariance).max()
    ):
        raise ValueError(f"npz {path}: {covariance_name} is not symmetric with a diagonal of 0 or more: no covariance")
    return Moments(torch.from_numpy(mean), torch.from_numpy(covariance))


def geneval_tree(folder: str | Path) -> tuple[FileImages, list[dict]]:
    """Images and their captions' metadata of a GenEval tree: DIR/00000/metadata.jsonl, DIR/00000/samples/0000.png.

    Raises FileNotFoundError if there is no such tree or a prompt has no sample, ValueError on unreadable metadata.
    """
    folder = Path(folder)
    paths: list[Path] = []
    metadatas: list[dict] = []
    for file in sorted(folder.glob("*/metadata.jsonl")):
        try:
            metadata = json.loads(file.read_text("utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not one JSON object: {error}") from None
        if not isinstance(metadata, dict) or not {"tag", "include", "prompt"} <= metadata.keys():
            raise ValueError(
                f"{file} must hold GenEval's fields tag, include and prompt (trees of plain --prompts do not)"
            )
        check_metadata(metadata, str(file))
        there = (file.parent / "samples").glob("[!.]*")  # hidden: what a killed process was writing
        samples = sorted(p for p in there if p.suffix.lower() in IMAGE_SUFFIXES)
        if not samples:
            raise FileNotFoundError(f"{file.parent} has no image in samples/: the generation is not finished")
        paths += samples
        metadatas += [metadata] * len(samples)
    if not paths:
        raise FileNotFoundError(f"images {folder} is no GenEval tree: it has no NNNNN/metadata.jsonl")
    return FileImages(paths), metadatas


def tree_prompts(images: Images) -> list[str]:
    """The prompt of every image: of a tree DIR/00000/metadata.jsonl, DIR/00000/samples/0000.png, judged or not, or the
    one that a PNG of ours says itself.

    Raises ValueError, naming the first, if nothing says an image's.
    """
    prompts: dict[Path, str] = {}
    paths = images.paths if isinstance(images, FileImages) else ()
    for path in paths:
        file = path.parent.parent / "metadata.jsonl"
        if file not in prompts and file.is_file():
            try:
                prompts[file] = json.loads(file.read_text("utf-8"))["prompt"]
            except (OSError, ValueError, KeyError, TypeError):
                raise ValueError(f"{file} must hold the prompt of the images beside it: a tree of --prompts") from None
        if file not in prompts:
            own = (read_png_text(path) or {}).get("prompt")
            if own is None:
                raise ValueError(f"{path} lies in no tree of sample --prompts, and does not say its prompt itself")
            prompts[path] = own
    if not prompts:
        raise ValueError(
            "prompts of the images are needed for that: a tree of NNNNN/metadata.jsonl and samples/, or PNGs of ours"
        )
    return [prompts.get(path.parent.parent / "metadata.jsonl") or prompts[path] for path in paths]


def progress(images: Iterable[np.ndarray], what: str, total: int) -> Iterable[np.ndarray]:
    """The images under a progress bar, shown on terminals only."""
    return tqdm(images, desc=what, total=total, unit="image", disable=None, leave=False)
