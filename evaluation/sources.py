"""Where images to be scored come from: a folder, an npz, or a tree in GenEval's layout.

Shapes: N images, h w pixels, D features. Images are uint8 RGB, (h, w, 3).
"""

import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from evaluation.frechet import Moments

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
NOT_SAMPLES = ("_grid.png", "_scales.png")  # ends of the overviews `nextscale sample` puts beside its images


@dataclass(frozen=True)
class FileImages:
    """Image files, in order. Iterating reads them; a file that cannot be read raises ValueError naming it."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(read_image, self.paths)


Images = FileImages | np.ndarray


def read_image(path: Path) -> np.ndarray:
    """One image file as uint8 (h, w, 3), transparency on white. Raises ValueError if it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"image {path} cannot be read: {str(error).splitlines()[0]}") from None


def open_images(path: str | Path) -> Images:
    """The images of a folder (all below it, by name) or of an npz (`arr_0`, uint8 (N, h, w, 3): the ADM format).

    Overviews and rows of scales that `nextscale sample` puts beside its images are left out.
    Raises FileNotFoundError if the path does not exist or holds no image, ValueError on an npz without images.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and _is_sample(p.relative_to(path)))
        if not found:
            raise FileNotFoundError(f"images {path} holds no image file ({', '.join(sorted(EXTENSIONS))})")
        return FileImages(found)
    images = _open_npz(path).get("arr_0")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        shape = "no arr_0" if images is None else f"arr_0 {images.dtype} {images.shape}"
        raise ValueError(f"npz {path} must hold arr_0, uint8 (N, h, w, 3), and has {shape}")
    return images


def _is_sample(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and "scales" not in path.parts[:-1] and not path.name.endswith(NOT_SAMPLES)


def _open_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a folder of images or an .npz")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if name in ("arr_0", "mu", "sigma")}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise ValueError(f"{path} is no folder and cannot be read as npz: {str(error).splitlines()[0]}") from None


def stored_moments(path: str | Path) -> Moments | None:
    """The statistics `mu` (D,) and `sigma` (D, D) of a reference npz (ADM's references have them); None without."""
    path = Path(path)
    if path.is_dir():
        return None
    stored = _open_npz(path)
    if "mu" not in stored or "sigma" not in stored:
        return None
    return Moments(torch.from_numpy(stored["mu"]).double(), torch.from_numpy(stored["sigma"]).double())


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
            raise ValueError(f"{file} must hold GenEval's fields tag, include and prompt")
        samples = sorted(p for p in (file.parent / "samples").glob("*") if p.suffix.lower() in EXTENSIONS)
        if not samples:
            raise FileNotFoundError(f"{file.parent} has no image in samples/: the generation is not finished")
        paths += samples
        metadatas += [metadata] * len(samples)
    if not paths:
        raise FileNotFoundError(f"images {folder} is no GenEval tree: it has no NNNNN/metadata.jsonl")
    return FileImages(paths), metadatas


def progress(images: Iterable[np.ndarray], what: str, total: int) -> Iterable[np.ndarray]:
    """The images under a progress bar, shown on terminals only."""
    return tqdm(images, desc=what, total=total, unit="image", disable=None, leave=False)
