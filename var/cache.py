"""The key/value cache of generation: preallocated, written in place, never holding the last scale.

Shapes: B rows, H heads, S stored tokens, l new tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


class KVCache:
    """Keys and values of every layer, in the dtype attention computes in.

    Args:
        num_layers: layers of the model it serves.
        capacity: tokens each layer can hold; a schedule needs `schedule.begins[-1]`, because nobody reads the last
            scale's keys again.
    """

    def __init__(self, num_layers: int, capacity: int):
        self.capacity = capacity
        self.keys: list[torch.Tensor | None] = [None] * num_layers  # (B, H, capacity, d), allocated at first use
        self.values: list[torch.Tensor | None] = [None] * num_layers
        self.lengths = [0] * num_layers  # tokens stored, by layer

    def update(
        self, layer: int, k_BHld: torch.Tensor, v_BHld: torch.Tensor, *, store: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values layer `layer` may see: those stored, then the new ones; each (B, H, S + l, d).

        Args:
            store: keep the new ones for later scales (everything but the last scale).
        """
        start, end = self.lengths[layer], self.lengths[layer] + k_BHld.shape[2]
        if not store:
            if start == 0:
                return k_BHld, v_BHld
            stored = self.keys[layer][:, :, :start], self.values[layer][:, :, :start]
            return torch.cat([stored[0], k_BHld], dim=2), torch.cat([stored[1], v_BHld], dim=2)
        assert end <= self.capacity, f"layer {layer}: {end} tokens do not fit in a cache of {self.capacity}"
        if self.keys[layer] is None:
            B, H, _, d = k_BHld.shape
            self.keys[layer] = k_BHld.new_empty(B, H, self.capacity, d)
            self.values[layer] = v_BHld.new_empty(B, H, self.capacity, d)
        self.keys[layer][:, :, start:end] = k_BHld
        self.values[layer][:, :, start:end] = v_BHld
        self.lengths[layer] = end
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def select(self, rows: torch.Tensor) -> None:
        """Keep `rows` (int64, duplicates allowed) of the batch, in that order."""
        for store in (self.keys, self.values):
            for layer, tensor in enumerate(store):
                if tensor is not None:
                    store[layer] = tensor[rows]

    def evict(self, layer: int, keep_BHn: torch.Tensor) -> None:
        """Keep only the stored tokens at positions `keep_BHn` (int64, ascending) of a layer, per row and head."""
        B, H, n = keep_BHn.shape
        for store in (self.keys, self.values):
            kept = store[layer].gather(2, keep_BHn[..., None].expand(B, H, n, store[layer].shape[-1]))
            store[layer][:, :, :n] = kept
        self.lengths[layer] = n

    def free_layers(self, layers: Iterable[int]) -> None:
        """Give back the memory of layers that will not run again."""
        for layer in layers:
            self.keys[layer] = self.values[layer] = None
            self.lengths[layer] = 0

    def end_of_scale(self, k: int) -> None:
        """Called by the loop after scale `k`; the place where a compressing cache evicts. Nothing to do here."""

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self.free_layers(range(len(self.keys)))

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values) if t is not None)
