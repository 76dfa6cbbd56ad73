"""Which image is seen when: everything here is a pure function of (seed, global image counter).

The training loop counts images: counter g runs 0, 1, 2, ... over the whole training, all processes together. With n
images, g belongs to epoch g // n, and is the (g % n)-th image of that epoch's permutation. Nothing is stored, so a
run resumes by starting at another g, and any number of processes or workers sees the same images.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

ROUNDS = 8
MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's step


@lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(int(key) for key in np.random.SeedSequence((seed, epoch)).generate_state(ROUNDS, np.uint64))


def _mix(value: int) -> int:
    """splitmix64's finaliser: 64 bits to 64 well-mixed bits."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


def permute(position: int, n: int, *, seed: int, epoch: int) -> int:
    """Where `position` in [0, n) goes in the permutation keyed by (seed, epoch): a bijection of [0, n), in O(1) memory.

    An alternating Feistel network on Z_a x Z_b with a * b just above n (Black and Rogaway 2002), walked along
    its cycle until it lands inside [0, n). Raises IndexError outside the range.
    """
    if not 0 <= position < n:
        raise IndexError(f"position must be in [0, {n}), not {position}")
    a = isqrt(n - 1) + 1
    b = -(-n // a)
    keys = _round_keys(seed, epoch)
    while True:
        left, right = divmod(position, b)
        for k in range(0, ROUNDS, 2):
            left = (left + _mix(right ^ keys[k])) % a
            right = (right + _mix(left ^ keys[k + 1])) % b
        position = left * b + right
        if position < n:
            return position


def spread_index(i: int, n: int) -> int:
    """The i-th of n images to look at where not all are: any of them, always in the same order (files lie by class)."""
    return permute(i, n, seed=0, epoch=0)


def uniforms(count: int, *key: int) -> tuple[float, ...]:
    """`count` numbers in [0, 1) that depend on the non-negative integers of `key` alone."""
    words = np.random.SeedSequence(key).generate_state(count, np.uint64)
    return tuple(float(word >> np.uint64(11)) * 2.0**-53 for word in words)


def image_draws(counters: Sequence[int], count: int, *key: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Numbers in [0, 1) that depend on an image's counter and the non-negative integers of `key` alone.

    What `uniforms` is for one image, made for a whole batch where it is needed: (B, count) float32 on `device`, equal
    bits on every device. Two rounds of splitmix64's finaliser, over the image and over the place.
    """
    base = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    if isinstance(counters, range):  # made on the device: a copy would wait for it
        images_B = torch.arange(counters.start, counters.stop, counters.step, device=device)
    else:
        images_B = torch.tensor(list(counters), dtype=torch.int64, device=device)
    images_B = _mix_tensor(images_B * _signed(GOLDEN) + _signed(base))
    words = _mix_tensor(images_B[:, None] + torch.arange(1, count + 1, device=device) * _signed(GOLDEN))
    return _shifted(words, 40).float() * 2.0**-24


def _signed(word: int) -> int:
    """A 64-bit word as the int64 of the same bits."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(words: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift to the right of int64 words."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def _mix_tensor(words: torch.Tensor) -> torch.Tensor:
    """`_mix` of int64 words; products wrap."""
    words = (words ^ _shifted(words, 30)) * _signed(0xBF58476D1CE4E5B9)
    words = (words ^ _shifted(words, 27)) * _signed(0x94D049BB133111EB)
    return words ^ _shifted(words, 31)


class KeyedDataset(Dataset):
    """A map-style dataset indexed by the global image counter g (see the module's text), shuffled anew every epoch.

    A dataset with a method `at(index, epoch)` is read through it, so that its crops differ from epoch to epoch;
    any other is read as `dataset[index]`. One with a method `place(position, seed=, epoch=)` has an order of its own.
    Raises ValueError for an empty dataset.
    """

    def __init__(self, dataset: Dataset, *, seed: int = 0):
        if len(dataset) == 0:
            raise ValueError("dataset is empty: there is nothing to draw from")
        self.dataset, self.seed = dataset, seed

    def locate(self, g: int) -> tuple[int, int]:
        """(epoch, index) of global counter g >= 0."""
        epoch, position = divmod(g, len(self.dataset))
        if hasattr(self.dataset, "place"):
            return epoch, self.dataset.place(position, seed=self.seed, epoch=epoch)
        return epoch, permute(position, len(self.dataset), seed=self.seed, epoch=epoch)

    def __getitem__(self, g: int) -> Any:
        epoch, index = self.locate(g)
        return self.dataset.at(index, epoch) if hasattr(self.dataset, "at") else self.dataset[index]


class KeyedSampler(Sampler[int]):
    """Global counters start + rank, start + rank + world, ... below `stop` (None: without end).

    With a loader of batch size b on each of `world` processes, step t reads the counters
    [start + t*b*world, start + (t+1)*b*world) whatever the split, so global batches do not depend on it.
    """

    def __init__(self, *, rank: int = 0, world: int = 1, start: int = 0, stop: int | None = None):
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in [0, world={world}), not {rank}")
        if start < 0:
            raise ValueError(f"start must be at least 0, not {start}")
        self.rank, self.world, self.start, self.stop = rank, world, start, stop

    def __iter__(self) -> Iterator[int]:
        g = self.start + self.rank
        while self.stop is None or g < self.stop:
            yield g
            g += self.world

    def __len__(self) -> int:
        if self.stop is None:
            raise TypeError("a KeyedSampler without stop= has no length")
        return len(range(self.start + self.rank, self.stop, self.world))
