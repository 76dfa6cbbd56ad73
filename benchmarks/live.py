"""Bytes of all tensors alive, followed through every operator of a block of code."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storage of tensors made inside a `with` block, for as long as any of them lives.

    Exact and repeatable, unlike the memory of a process; what operators use within themselves is not seen.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.owners: Counter[int] = Counter()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {tensor.untyped_storage()._cdata for tensor in _plain(args)}
        for tensor in _plain(out):
            key = tensor.untyped_storage()._cdata
            if key in inputs and key not in self.sizes:
                continue  # a view of something older than the block
            if key not in self.sizes:
                self.sizes[key] = tensor.untyped_storage().nbytes()
                self.now += self.sizes[key]
            self.owners[key] += 1
            weakref.finalize(tensor, self._forget, key)
        self.peak = max(self.peak, self.now)
        return out

    def _forget(self, key: int) -> None:
        self.owners[key] -= 1
        if self.owners[key] == 0:
            del self.owners[key]
            self.now -= self.sizes.pop(key)

    def restart(self) -> None:
        """Let `peak` count from now on."""
        self.peak = self.now


def _plain(tree: Any) -> list[torch.Tensor]:
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return [leaf for leaf in leaves if leaf.layout == torch.strided]
