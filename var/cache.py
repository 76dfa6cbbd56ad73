"""The key/value cache of generation: preallocated, written in place, never holding what nobody reads again.

Shapes: B rows, H heads, S stored tokens, l new tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


class KVCache:
    """Keys and values of every layer, in the dtype attention computes in.

    Args:
        num_layers: layers of the model it serves.
        capacity: tokens each layer holds, or one number a layer; tokens from there on are attended to but not stored.
            A schedule needs `schedule.begins[-1]`, because nobody reads the last scale's keys again.

    Attributes:
        peak_nbytes: most bytes alive at once so far, the joined keys and values of one layer's attention included.
    """

    def __init__(self, num_layers: int, capacity: int | Sequence[int]):
        self.capacity = [capacity] * num_layers if isinstance(capacity, int) else list(capacity)
        self.keys: list[torch.Tensor | None] = [None] * num_layers  # (B, H, capacity, d), allocated at first use
        self.values: list[torch.Tensor | None] = [None] * num_layers
        self.lengths = [0] * num_layers  # tokens stored, by layer
        self.peak_nbytes = 0

    def update(
        self,
        layer: int,
        k_BHld: torch.Tensor,
        v_BHld: torch.Tensor,
        *,
        begin: int = 0,
        q_BHld: torch.Tensor | None = None,
        scale: float = 1.0,
    ) -> Pair:
        """All keys and values layer `layer` may see: those stored, then the new ones; each (B, H, S + l, d).

        Args:
            begin: position of the first new token in the sequence; everything before it must have been given.
            q_BHld, scale: the queries of the new tokens and the factor of attention logits, for caches that choose
                what to keep by attention.
        """
        end = begin + k_BHld.shape[2]
        assert self.lengths[layer] == begin, f"layer {layer} holds {self.lengths[layer]} tokens of {begin}"
        if end > self.capacity[layer]:
            return self._join(layer, k_BHld, v_BHld)
        self._make_room(layer, k_BHld, v_BHld)
        self.keys[layer][:, :, begin:end] = k_BHld
        self.values[layer][:, :, begin:end] = v_BHld
        self.lengths[layer] = end
        self._note_peak()
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def reserve(self, capacity: Sequence[int]) -> None:
        """From now on hold so many tokens, by layer; buffers grow when they are next written to."""
        self.capacity = list(capacity)

    def select(self, rows: torch.Tensor) -> None:
        """Keep `rows` (int64, duplicates allowed) of the batch, in that order."""
        for store in (self.keys, self.values):
            for layer, tensor in enumerate(store):
                if tensor is not None:
                    store[layer] = tensor[rows]

    def free_layers(self, layers: Iterable[int]) -> None:
        """Give back the memory of layers that will not run again."""
        for layer in layers:
            self.keys[layer] = self.values[layer] = None
            self.lengths[layer] = 0

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self.free_layers(range(len(self.keys)))

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""
        return sum(_nbytes(t) for t in (*self.keys, *self.values) if t is not None)

    def _join(self, layer: int, k_BHld: torch.Tensor, v_BHld: torch.Tensor) -> Pair:
        """What is stored and the new, in fresh tensors; the new alone where nothing is stored."""
        S = self.lengths[layer]
        if S == 0:
            return k_BHld, v_BHld
        joined = (
            torch.cat([self.keys[layer][:, :, :S], k_BHld], dim=2),
            torch.cat([self.values[layer][:, :, :S], v_BHld], dim=2),
        )
        self._note_peak(*joined)
        return joined

    def _make_room(self, layer: int, k_BHld: torch.Tensor, v_BHld: torch.Tensor) -> None:
        old = self.keys[layer], self.values[layer]
        if old[0] is not None and old[0].shape[2] >= self.capacity[layer]:
            return
        B, H, _, d = k_BHld.shape
        S = self.lengths[layer]
        for store, like, before in ((self.keys, k_BHld, old[0]), (self.values, v_BHld, old[1])):
            store[layer] = like.new_empty(B, H, self.capacity[layer], d)
            if S:
                store[layer][:, :, :S] = before[:, :, :S]
        self._note_peak(*(tensor for tensor in old if tensor is not None))

    def _note_peak(self, *transient: torch.Tensor) -> None:
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes + sum(map(_nbytes, transient)))


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
