"""What makes a figure mislead: found before or while it is measured, and said in one line.

What cannot be right raises ValueError; what a reader must know is a caution, kept with the result.

Shapes: N images, P classes, h w pixels.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ENOUGH = 10_000  # images below which a Frechet distance is biased by more than models differ
LOSSY = {"JPEG", "WEBP", "MPO"}
SMALL_PART = 500  # images of a part of an inception score, below which it is far too low
SORTED_DROP = 0.9  # of the shuffled inception score: a score in file order below this share says "sorted by class"


@dataclass
class Watch:
    """Passes images through and remembers what may be wrong with them.

    images: uint8 (h, w, 3).  sizes: counts of (h, w).  digests: counts of contents.
    """

    images: Iterable[np.ndarray]
    sizes: Counter = field(default_factory=Counter)
    digests: Counter = field(default_factory=Counter)

    def __iter__(self) -> Iterator[np.ndarray]:
        for image in self.images:
            self.sizes[image.shape[:2]] += 1
            self.digests[hashlib.blake2b(np.ascontiguousarray(image), digest_size=12).digest()] += 1
            yield image

    def cautions(self, what: str = "samples") -> list[str]:
        """Images of several sizes, and copies."""
        lines = []
        if len(self.sizes) > 1:
            shown = ", ".join(f"{h}x{w}" for (h, w), _ in self.sizes.most_common(3))
            lines.append(f"{what} are of {len(self.sizes)} sizes ({shown}): cropped or not yet resized?")
        copies = sum(count - 1 for count in self.digests.values())
        if copies:
            lines.append(
                f"{copies} of {sum(self.digests.values())} {what} are exact copies of others: correlated seeds?"
            )
        return lines


def check_finite(name: str, array: np.ndarray) -> None:
    """Raise ValueError, naming the first bad row, if an array of floats holds NaN or infinity."""
    if not np.issubdtype(array.dtype, np.floating) or np.isfinite(array).all():
        return
    bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(1))
    raise ValueError(f"{name} holds NaN or infinity in {len(bad)} of {len(array)} rows, first in row {bad[0]}")


def check_features(features_ND: torch.Tensor, *, first: int = 0) -> None:
    """Raise ValueError, naming the image, if features are not finite: it would poison every mean.

    first: number of the first row's image in its set.
    """
    bad = (~features_ND.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"image {first + bad[0]} (counted from 0) has features that are not finite")


def file_cautions(paths: Sequence[Path], what: str = "samples") -> list[str]:
    """Files whose contents (not names) are JPEG or WebP: their artefacts count in every metric."""
    lossy = Counter(kind for kind in map(_format_of, paths) if kind in LOSSY)
    if not lossy:
        return []
    kinds = " and ".join(sorted(lossy))
    return [f"{lossy.total()} of {len(paths)} {what} are {kinds} files: their artefacts move FID; keep samples as PNG"]


def _format_of(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            return image.format
    except (OSError, SyntaxError):
        return None  # reading it will name it


def size_cautions(samples: Counter, reference: Counter) -> list[str]:
    """References of another size than the samples: resized by one of the two sides, before the metric's own resize."""
    if not samples or not reference:
        return []
    ours, theirs = (max(sizes, key=sizes.get) for sizes in (samples, reference))
    if ours == theirs and len(reference) == 1:
        return []
    if len(reference) > 1:
        return [f"the reference is of {len(reference)} sizes: published FIDs crop and resize real images first"]
    return [f"samples are {ours[0]}x{ours[1]} and the reference {theirs[0]}x{theirs[1]}: one of them was resized"]


def count_cautions(labels_N: Sequence[int], classes: int, per_class: int | None = None) -> list[str]:
    """Counts per class that are not alike, or not `per_class`. Raises ValueError on a label outside [0, classes)."""
    outside = [label for label in labels_N if not 0 <= label < classes]
    if outside:
        raise ValueError(f"labels must be in [0, {classes}), got {outside[0]}")
    counts = Counter(labels_N)
    wanted = per_class if per_class is not None else round(len(labels_N) / classes)
    wrong = [label for label in range(classes) if counts[label] != wanted]
    if not wrong:
        return []
    example = f"class {wrong[0]} has {counts[wrong[0]]}"
    return [f"{len(wrong)} of {classes} classes do not have {wanted} images ({example}): FID compares the mix too"]


def is_class_sorted(labels_N: Sequence[int]) -> bool:
    """Whether equal labels stand together: no more runs than classes, and several classes."""
    labels = np.asarray(labels_N)
    classes = len(np.unique(labels))
    return 1 < classes < len(labels) and 1 + int((labels[1:] != labels[:-1]).sum()) == classes


def order_cautions(in_order: float, shuffled: float) -> list[str]:
    """Inception scores over parts in file order and over shuffled parts that tell a file sorted by class."""
    if in_order >= SORTED_DROP * shuffled:
        return []
    return [
        f"images are sorted by class: IS over parts in file order is {in_order:.2f} and {shuffled:.2f} when shuffled; "
        "evaluators that do not shuffle (ADM's) report the first"
    ]


def small_part_cautions(size: int, parts: int) -> list[str]:
    """An inception score over parts is at most their size, and low long before that."""
    if size >= SMALL_PART:
        return []
    return [f"is is over {parts} parts of {size} images, and never above that number: compare it at equal n only"]


def seed_cautions(seeds: Sequence[int]) -> list[str]:
    """Seeds used more than once: images of one seed share their noise, and the set is less varied than its n."""
    repeated = sum(count for count in Counter(seeds).values() if count > 1)
    if not repeated:
        return []
    return [f"{repeated} of {len(seeds)} images share their seed with another: correlated samples raise FID"]


def few_cautions(distances: Sequence[str], n: int, enough: int = ENOUGH, *, what: str = "images") -> list[str]:
    """Frechet distances of too few images, or against too few."""
    if not distances or n >= enough:
        return []
    return [
        f"{' and '.join(distances)} of {n} {what} is biased upwards: take {enough} or more, and compare "
        "only figures of the same n"
    ]


def stored_seeds(paths: Sequence[Path]) -> list[int]:
    """The seeds that PNGs made by `nextscale sample` name; files without one are left out."""
    found = []
    for path in paths:
        try:
            with Image.open(path) as image:
                seed = str(image.info.get("seed", ""))
        except (OSError, SyntaxError):
            continue
        if seed.isdecimal():
            found.append(int(seed))
    return found
