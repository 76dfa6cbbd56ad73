"""ScaleKV (section 3): layers that look around (drafters) keep much of their cache, the others (refiners) little.

Which layer is which is measured once on a few prompts (`sample.selectivity`), by the attention selectivity index; one
number, the share of the whole history, then gives every layer's budget at every scale.

Shapes: B rows, H heads, l new tokens, S tokens of history and current scale, d head width, L layers, K scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from tokenizer.schedule import ScaleSchedule
from var.cache import KVCache, Pair
from var.eviction import Budgets, EvictingCache, best_and_window, check_kernel, history_share, window_scores

Index = Sequence[Sequence[float]]


def drafters(index: Index, scales: Sequence[int], share: float) -> dict[int, list[int]]:
    """The drafters of each of `scales`: the smallest z-scores of all (layer, scale) pairs, `share` of them.

    The z-score is over the layers of a scale: (index - mean) / (standard deviation + 1e-6).

    Args:
        index: the attention selectivity index, [layer][scale]; large where attention is narrow.
        share: drafters among the pairs, in [0, 1]; at least one pair is.
    """
    table_LK = torch.tensor(index, dtype=torch.float64)
    z_LK = (table_LK - table_LK.mean(0)) / (table_LK.std(0, correction=0) + 1e-6)
    pairs = sorted((z_LK[layer, k].item(), k, layer) for k in scales for layer in range(len(index)))
    chosen = pairs[: max(1, round(share * len(pairs)))]
    return {k: sorted(layer for _, at, layer in chosen if at == k) for k in scales}


class SelectivityCache(KVCache):
    """A plain cache that measures the selectivity index while images are made.

    ASI(layer, k) = E_i[sum of i's weights on the current scale] * E_i[sum of its `top` largest on the history], over
    queries i of scale k; the product of means is averaged over rows and heads. The paper does not say how many `top`
    is: here it is a share of the history.

    Args:
        top: share of the history whose weight counts as narrow, in (0, 1].

    Attributes:
        index_LK: float64, the index of the batch; 0 at scale 0, which has no history.
    """

    def __init__(self, num_layers: int, schedule: ScaleSchedule, *, top: float = 0.1):
        super().__init__(num_layers, schedule.begins[-1])
        self.schedule, self.top = schedule, top
        self.index_LK = torch.zeros(num_layers, len(schedule), dtype=torch.float64)

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
        """As `KVCache.update`."""
        joined = super().update(layer, k_BHld, v_BHld, begin=begin, q_BHld=q_BHld, scale=scale)
        if begin:
            k = self.schedule.begins.index(begin)
            heads = zip(q_BHld.unbind(dim=1), joined[0].unbind(dim=1))  # one by one: all weights are many gigabytes
            self.index_LK[layer, k] = sum(self._of_head(q, keys, begin, scale) for q, keys in heads) / q_BHld.shape[1]
        return joined

    def _of_head(self, q_Bld: torch.Tensor, keys_BSd: torch.Tensor, begin: int, scale: float) -> float:
        weights_BlS = ((q_Bld @ keys_BSd.mT).float() * scale).softmax(dim=-1)
        narrow_B = weights_BlS[..., :begin].topk(max(1, round(self.top * begin)), dim=-1).values.sum(-1).mean(-1)
        current_B = weights_BlS[..., begin:].sum(-1).mean(-1)
        return (current_B * narrow_B).mean().item()


def scalekv_budgets(
    fraction: float,
    index: Index,
    schedule: ScaleSchedule,
    *,
    drafter_share: float = 0.0625,
    refiner_start: float = 0.92,
    refiner_slope: float = 0.11,
) -> list[list[int]]:
    """Tokens each layer may hold when scale k reads, [layer][k]; their mean over layers is never above the uniform one.

    Scales whose history fits the uniform budget B keep it. At the j-th scale beyond, refiners get
    B (refiner_start - refiner_slope j), as in B_r(k) = B_r(0) - delta k, and drafters share the rest, as far as they
    have so many tokens; what they cannot use goes back to the refiners.

    Args:
        fraction: of the history of the last scale, in (0, 1].
        index: the selectivity index, [layer][scale], see `drafters`.
        drafter_share: drafters among the (layer, scale) pairs; the released budgets have 2 layers of 32.
        refiner_start, refiner_slope: of B; the paper's best at 10 % are 600 and 70 tokens of 650.

    Raises:
        ValueError: as `history_share` does.
    """
    uniform, num_layers = history_share(fraction, schedule), len(index)
    budgets = [[min(uniform, begin) for begin in schedule.begins] for _ in range(num_layers)]
    squeezed = [k for k, begin in enumerate(schedule.begins) if begin > uniform]
    roles = drafters(index, squeezed, drafter_share) if squeezed else {}
    for j, k in enumerate(squeezed):
        available = [row[k - 1] + schedule.lengths[k - 1] for row in budgets]
        wanted = max(1, round(uniform * (refiner_start - refiner_slope * j)))
        left = uniform * num_layers
        for row, most in zip(budgets, available):
            row[k] = min(wanted, most)
            left -= row[k]
        others = [layer for layer in range(num_layers) if layer not in roles[k]]
        for group in (roles[k], others):
            left = _pour(left, group, budgets, available, k)
    return budgets


def _pour(left: int, layers: Sequence[int], budgets: list[list[int]], available: Sequence[int], k: int) -> int:
    """Raise the budgets of `layers` at scale k evenly by `left` tokens in all, up to `available`; what is then left."""
    open_layers = [layer for layer in layers if budgets[layer][k] < available[layer]]
    while left >= len(open_layers) > 0:
        each = left // len(open_layers)
        for layer in open_layers:
            more = min(each, available[layer] - budgets[layer][k])
            budgets[layer][k] += more
            left -= more
        open_layers = [layer for layer in open_layers if budgets[layer][k] < available[layer]]
    return left


class ScaleKVCache(EvictingCache):
    """Keeps the observation window, a grid of the current scale's cell centres, and what it attends to most.

    The released code adds up raw logits of queries without norm, bias and positions, and max-pools; we score with the
    very attention weights and average, as the paper writes.

    Args:
        budgets: [layer][k], see `scalekv_budgets`.
        window: side of the grid of observed cells; the largest up to 4 whose square is at most half the smallest
            budget that evicts when None.
        kernel: width of the pooling over neighbours.

    Raises:
        ValueError: if the window is empty, or has more cells than a layer may keep.
    """

    def __init__(self, budgets: Budgets, schedule: ScaleSchedule, *, window: int | None = None, kernel: int = 5):
        super().__init__(budgets, schedule)
        smallest = smallest_budget(budgets, schedule)
        fitting = [side for side in (4, 3, 2) if 2 * side**2 <= smallest]
        if window is not None and window < 1:
            raise ValueError(f"window must be 1 or more cells a side, got {window}")
        self.window, self.kernel = window or next(iter(fitting), 1), check_kernel(kernel)
        if self.window**2 > smallest:
            raise ValueError(
                f"cache keeps {smallest} tokens in some layer, fewer than its window of {self.window}x{self.window}"
            )

    def keep(
        self, layer: int, k: int, q_BHld: torch.Tensor, keys_BHSd: torch.Tensor, budget: int, scale: float
    ) -> torch.Tensor:
        """The window's tokens, and those it attends to most; another choice for every head."""
        length = self.schedule.lengths[k]
        cells = _cells(*self.schedule.sides[k], self.window, keys_BHSd.device)
        window = cells + keys_BHSd.shape[2] - length
        observed = q_BHld[:, :, q_BHld.shape[2] - length + cells]
        scores = window_scores(observed, keys_BHSd, window, scale=scale, kernel=self.kernel)
        return best_and_window(scores, window, budget)


@cache  # made once: a copy to a GPU would wait, in every layer, for all that it has been given to do
@torch.inference_mode(False)
def _cells(h: int, w: int, side: int, device: torch.device) -> torch.Tensor:
    """`observation_window`, int64."""
    return torch.tensor(observation_window(h, w, side), device=device)


def observation_window(h: int, w: int, side: int) -> list[int]:
    """Raster positions of the cell centres of a `side` x `side` grid over (h, w) tokens, or as fine as these allow."""
    rows, columns = min(side, h), min(side, w)
    return [
        (i * (h // rows) + (h // rows - 1) // 2) * w + j * (w // columns) + (w // columns - 1) // 2
        for i in range(rows)
        for j in range(columns)
    ]


def smallest_budget(budgets: Budgets, schedule: ScaleSchedule) -> int:
    """The fewest tokens a layer may keep where something must go; all tokens where nothing ever does."""
    smallest = schedule.total
    for row in budgets:
        held = 0
        for k in range(1, len(schedule)):
            held += schedule.lengths[k - 1]
            if held > row[k]:
                smallest = min(smallest, row[k])
                held = row[k]
    return smallest
