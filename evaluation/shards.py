"""Described images on disk, in shards that exist only when they are whole: what a generation for metrics leaves behind.

WORK/settings.json says what made them; WORK/features/000012.npz holds one shard.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from evaluation.features import Described
from sample.files import atomically
from sample.images import Request

FIELDS = ("features", "log_posterior", "spatial")
DAMAGED = (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error)  # what reading a cut file raises


def shard_path(work: Path, number: int) -> Path:
    """Where a shard lies."""
    return work / "features" / f"{number:06d}.npz"


def write_shard(
    path: Path,
    requests: Sequence[Request],
    digests: Sequence[str],
    described: dict[str, Described],
    correct: Sequence[bool] | None = None,
) -> None:
    """Write one shard: labels (-1 for texts), seeds, digests; float32 `NETWORK.features`, `.log_posterior` and maybe
    `.spatial`; for texts `prompts`, digests of them; `correct`, whether each image shows its caption, where that is
    judged.
    """
    arrays = {
        "labels": np.array([request.prompt if isinstance(request.prompt, int) else -1 for request in requests]),
        "seeds": np.array([request.seed for request in requests], np.int64),
        "digests": np.array(digests),
    }
    if isinstance(requests[0].prompt, str):
        arrays["prompts"] = np.array([prompt_digest(request.prompt) for request in requests])
    if correct is not None:
        arrays["correct"] = np.array(correct)
    for network, found in described.items():
        for name in FIELDS:
            tensor = getattr(found, name)
            if tensor is not None:
                arrays[f"{network}.{name}"] = tensor.float().numpy()

    def save(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez(file, **arrays)

    atomically(path, save)


def prompt_digest(prompt: str) -> str:
    """Sixteen hexadecimal digits of a text."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def shard_paths(work: str | Path) -> list[Path]:
    """All shards of a folder, in order. Raises FileNotFoundError if there is none."""
    found = sorted((Path(work) / "features").glob("[0-9]*.npz"))
    if not found:
        raise FileNotFoundError(f"{work} holds no features of a run: make them with python -m evaluation.run")
    return found


def read_column(paths: Sequence[Path], name: str) -> np.ndarray:
    """One array over all shards, in order. Raises ValueError if a shard lacks it or is damaged."""
    parts = []
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as archive:
                parts.append(archive[name])
        except DAMAGED as error:
            raise ValueError(f"{path} has no readable {name}: {error}; remove it and run again") from None
    return np.concatenate(parts)


def has_column(paths: Sequence[Path], name: str) -> bool:
    """Whether all shards hold an array of this name. Raises ValueError if one is damaged."""
    return all(name in names_in(path) for path in paths)


def networks_in(paths: Sequence[Path]) -> list[str]:
    """The networks that described the images. Raises ValueError if the first shard is damaged."""
    return [name.removesuffix(".features") for name in names_in(paths[0]) if name.endswith(".features")]


def names_in(path: Path) -> list[str]:
    """The arrays of a shard. Raises ValueError if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive.files
    except DAMAGED as error:
        raise ValueError(f"{path} cannot be read: {error}; remove it and run again") from None


def read_described(paths: Sequence[Path], network: str) -> Described:
    """What one network says about all images, in order; float64 but for spatial features."""
    features, posterior = (torch.from_numpy(read_column(paths, f"{network}.{name}")) for name in FIELDS[:2])
    spatial = None
    if has_column(paths, f"{network}.spatial"):
        spatial = torch.from_numpy(read_column(paths, f"{network}.spatial"))
    return Described(features.double(), posterior.double(), spatial)
