"""FastVAR (section 3): at the last, large scales most layers compute only some of the tokens.

A branch of a block (self-attention, cross-attention, feed-forward) computes the tokens farthest from the mean of its
input, which are those of high frequencies; to the others it adds what it added there at the last whole scale, resized.
Keys and values are those of the computed tokens.

Shapes: B rows, l tokens of a scale, n computed tokens, s tokens of the last whole scale, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange

from tokenizer.resize import average
from tokenizer.schedule import ScaleSchedule
from var.cache import KVCache

FIRST, LAST = 3 / 32, 4 / 32  # of the depth: layers that compute all tokens; the released code names 3 and 4 of 32
Branch = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Pruning:
    """Which tokens are left out, and where.

    Attributes:
        schedule: the scales.
        shares: of the tokens of each scale that are left out, in [0, 1]. 1 leaves out the scale: it is not drawn.
        layers: the blocks that leave tokens out; the others compute all of a scale that is drawn.

    Raises:
        ValueError: unless there is a share for every scale, those of 1 come last, and one scale or more before the
            others is whole.
    """

    schedule: ScaleSchedule
    shares: tuple[float, ...]
    layers: range

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.schedule) or not all(0 <= share <= 1 for share in self.shares):
            raise ValueError(
                f"prune must be shares from 0 % to 100 %, one for each of {len(self.schedule)} scales or for the last "
                f"of them, got {shares_text(self.shares)}"
            )
        if self.shares[0] > 0:
            raise ValueError(f"prune must leave the first scale whole, got {shares_text(self.shares)}")
        if any(share < 1 for share in self.shares[self.drawn :]):
            raise ValueError(
                f"prune must leave out the last scales where it leaves out any, got {shares_text(self.shares)}"
            )

    @classmethod
    def of_last(cls, shares: Sequence[float], schedule: ScaleSchedule, depth: int) -> Pruning:
        """With shares for the last scales, in the layers that the released code prunes (3 to 27 of 32)."""
        whole = (0.0,) * (len(schedule) - len(shares))
        return cls(schedule, (*whole, *shares), range(round(FIRST * depth), depth - round(LAST * depth)))

    @cached_property
    def drawn(self) -> int:
        """Scales that are drawn; the others are left out."""
        return next((k for k, share in enumerate(self.shares) if share == 1), len(self.shares))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each scale that the pruning layers compute."""
        exactly = (length * share + 1e-9 for length, share in zip(self.schedule.lengths, self.shares))  # 100 x 29 %
        return tuple(length - int(left) for length, left in zip(self.schedule.lengths, exactly))

    @cached_property
    def source(self) -> int | None:
        """The scale whose outputs are used again: the last whole one before some are not. None where none is needed."""
        pruned = [k for k, length in enumerate(self.schedule.lengths[: self.drawn]) if self.counts[k] < length]
        return pruned[0] - 1 if pruned else None

    def count(self, layer: int, k: int) -> int:
        """Tokens of scale k that a layer computes."""
        return self.counts[k] if layer in self.layers and k < self.drawn else self.schedule.lengths[k]


def shares_text(shares: Iterable[float]) -> str:
    """50%,100% of (0.5, 1)."""
    return ",".join(f"{100 * share:.6g}%" for share in shares)


class PrunedCache(KVCache):
    """A cache of tokens that were computed, and of what the branches of pruning layers added at the last whole scale.

    Its capacity is in tokens of the sequence, as any cache's: of those before that place it holds the computed ones.

    Args:
        num_layers: as `KVCache`.
        pruning: which tokens are computed.
    """

    def __init__(self, num_layers: int, pruning: Pruning):
        super().__init__(num_layers, pruning.schedule.begins[-1])
        self.pruning = pruning
        self.limits = self.capacity
        self.given = [0] * num_layers  # tokens of the sequence, computed or not
        self.added: dict[tuple[int, str], torch.Tensor] = {}  # by layer and branch, (B, s, D)

    def reserve(self, capacity: Sequence[int]) -> None:
        """As `KVCache.reserve`."""
        self.limits = list(capacity)

    def slots(self, layer: int, begin: int, shape: Sequence[int], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As `KVCache.slots`."""
        assert self.given[layer] == begin, f"layer {layer} was given {self.given[layer]} tokens of {begin}"
        begins, ends = self.pruning.schedule.begins, self.pruning.schedule.ends
        limit, stored = self.limits[layer], self.lengths[layer]
        end = shape[2] if begin == 0 else ends[begins.index(begin)]
        later = (k for k, first in enumerate(begins) if first >= end and ends[k] <= limit)
        room = stored + shape[2] + sum(self.pruning.count(layer, k) for k in later)
        self.capacity = list(self.capacity)
        self.capacity[layer] = room if end <= limit else stored
        self.given[layer] = end
        return super().slots(layer, stored, shape, like)

    def acts(self, layer: int, end: int) -> bool:
        """Whether a layer's branches go through `add` when it computes tokens up to place `end` of the sequence."""
        source = self.pruning.source
        return source is not None and layer in self.pruning.layers and end > self.pruning.schedule.begins[source]

    def add(self, name: str, layer: int, begin: int, x_BlD: torch.Tensor, branch: Branch) -> torch.Tensor:
        """x, and what a branch adds to it: (B, l, D) to the same.

        Args:
            name: of the branch.
            begin: place of the first token in the sequence. From 0 on, several scales may come at once, all whole.
            branch: what it adds to tokens (B, n, D), of which it is also told the places in the scale, int64 (B, n), or
                None for all of them.
        """
        pruning, schedule = self.pruning, self.pruning.schedule
        k = schedule.begins.index(begin)
        if pruning.counts[k] == schedule.lengths[k]:  # as of scale 0, with which a prefill begins
            added_BlD = branch(x_BlD, None)
            own = slice(schedule.begins[pruning.source] - begin, schedule.ends[pruning.source] - begin)
            if 0 <= own.start < x_BlD.shape[1]:
                self.note(name, layer, added_BlD[:, own] if k == pruning.source else added_BlD[:, own].clone())
            return x_BlD + added_BlD
        places_Bn = farthest(x_BlD, pruning.counts[k])
        few_BnD = branch(take(x_BlD, places_Bn), places_Bn)
        before_BlD = resize(self.added[layer, name], schedule.sides[pruning.source], schedule.sides[k])
        return x_BlD + before_BlD.scatter(1, _wide(places_Bn, few_BnD), few_BnD)

    def note(self, name: str, layer: int, added_BsD: torch.Tensor) -> None:
        """Keep what a branch added at the last whole scale."""
        self.added[layer, name] = added_BsD
        self._note_peak()

    def select(self, rows: torch.Tensor) -> None:
        """As `KVCache.select`."""
        super().select(rows)
        self.added = {place: tensor[rows] for place, tensor in self.added.items()}

    def free_layers(self, layers: Iterable[int]) -> None:
        """As `KVCache.free_layers`."""
        layers = list(layers)
        super().free_layers(layers)
        self.added = {place: tensor for place, tensor in self.added.items() if place[0] not in layers}
        for layer in layers:
            self.given[layer] = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated now, what branches added included."""
        return super().nbytes + sum(tensor.nbytes for tensor in self.added.values())


def farthest(x_BlD: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the `count` tokens with the largest squared distance from the mean, ascending int64 (B, count)."""
    x_BlD = x_BlD.float()
    distance_Bl = (x_BlD - x_BlD.mean(dim=1, keepdim=True)).square().sum(dim=-1)
    return distance_Bl.topk(count, dim=1).indices.sort(dim=1).values


def take(x_BlD: torch.Tensor, places_Bn: torch.Tensor) -> torch.Tensor:
    """The tokens of some places, (B, n, D)."""
    return x_BlD.gather(1, _wide(places_Bn, x_BlD))


def resize(x_BsD: torch.Tensor, from_hw: tuple[int, int], to_hw: tuple[int, int]) -> torch.Tensor:
    """A map of tokens (B, s, D) at another size, (B, l, D), by areas."""
    x_BDhw = rearrange(x_BsD, "b (h w) d -> b d h w", h=from_hw[0])
    return rearrange(average(x_BDhw, to_hw), "b d h w -> b (h w) d")


def _wide(places_Bn: torch.Tensor, like_BlD: torch.Tensor) -> torch.Tensor:
    return places_Bn[..., None].expand(-1, -1, like_BlD.shape[-1])
