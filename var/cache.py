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
        k_slot, v_slot, keys, values = self.slots(layer, begin, k_BHld.shape, k_BHld)
        k_slot.copy_(k_BHld)
        v_slot.copy_(v_BHld)
        return keys, values

    def slots(self, layer: int, begin: int, shape: Sequence[int], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Where new keys and values of `shape` (B, H, l, d) are to be written, and what then is all of them.

        For callers that make keys and values in place; the others call `update`.

        Returns:
            Views of the new keys and of the new values, (B, H, l, d) each, not filled in yet; and all keys and values
            as `update` returns them, of which these are the ends.
        """
        assert self.lengths[layer] == begin, f"layer {layer} holds {self.lengths[layer]} tokens of {begin}"
        end = begin + shape[2]
        if end > self.capacity[layer]:
            keys, values = (self._buffer(shape, end, like) for _ in range(2))
            if begin:
                _copy(keys[:, :, :begin], self.keys[layer][:, :, :begin])
                _copy(values[:, :, :begin], self.values[layer][:, :, :begin])
                self._note_peak(keys, values)
        else:
            self._make_room(layer, shape, like)
            self.lengths[layer] = end
            keys, values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        return keys[:, :, begin:], values[:, :, begin:], keys, values

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

    def _make_room(self, layer: int, shape: Sequence[int], like: torch.Tensor) -> None:
        old = self.keys[layer], self.values[layer]
        if old[0] is not None and old[0].shape[2] >= self.capacity[layer]:
            return
        S = self.lengths[layer]
        for store, before in zip((self.keys, self.values), old):
            store[layer] = self._buffer(shape, self.capacity[layer], like)
            if S:
                _copy(store[layer][:, :, :S], before[:, :, :S])
        self._note_peak(*(tensor for tensor in old if tensor is not None))

    @staticmethod
    def _buffer(shape: Sequence[int], count: int, like: torch.Tensor) -> torch.Tensor:
        """Room for `count` tokens, (B, H, count, d); a token's heads lie side by side, as they are made."""
        B, H, _, d = shape
        return like.new_empty(B, count, H, d).transpose(1, 2)

    def _note_peak(self, *transient: torch.Tensor) -> None:
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes + sum(map(_nbytes, transient)))


def _copy(into_BHSd: torch.Tensor, x_BHSd: torch.Tensor) -> None:
    """Copy tokens; on a GPU sixteen bytes at once, where it would go number by number."""
    rows = [x.transpose(1, 2) for x in (into_BHSd, x_BHSd)]
    if into_BHSd.is_cuda and all(row[0].is_contiguous() and row[0, 0].nbytes % 16 == 0 for row in rows):
        rows = [row.flatten(1).view(torch.complex128) for row in rows]
    rows[0].copy_(rows[1])


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
