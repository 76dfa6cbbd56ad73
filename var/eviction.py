"""Caches that forget: each layer keeps what its budget allows for the next scale, chosen as soon as it was read.

A layer's attention sees its whole history and the current scale; then the layer cuts its cache to the budget of the
scale that reads it next, and only that is stored. So the peak is the sum of the budgets and one layer's history.

Shapes: B rows, H heads, S tokens of history and current scale, l new tokens, d head width, n kept tokens, w window.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.nn import functional as F

from tokenizer.schedule import ScaleSchedule
from var.cache import KVCache, Pair

Budgets = Sequence[Sequence[int]]
WINDOW = 16  # tokens that vote on what stays


def history_share(fraction: float, schedule: ScaleSchedule) -> int:
    """Tokens a layer may hold at `fraction` of everything the last scale could read (ScaleKV's "10 %" of 6425 is 642).

    Raises:
        ValueError: if the fraction is not in (0, 1], or so small that not one token is left.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"cache must be a share above 0 % and up to 100 %, got {fraction:.6g} (1 is all)")
    tokens = round(fraction * schedule.begins[-1])
    if tokens < 1:
        raise ValueError(f"cache of {100 * fraction:.6g} % of {schedule.begins[-1]} tokens keeps none of them")
    return tokens


def uniform_budgets(fraction: float, schedule: ScaleSchedule, num_layers: int) -> list[list[int]]:
    """The same budget for every layer: tokens it may hold when scale k reads, [layer][k].

    Raises:
        ValueError: as `history_share` does.
    """
    share = history_share(fraction, schedule)
    return [[min(share, begin) for begin in schedule.begins] for _ in range(num_layers)]


def pyramid_budgets(
    fraction: float, schedule: ScaleSchedule, num_layers: int, *, steepness: int = 20
) -> list[list[int]]:
    """Budgets that fall in equal steps from layer to layer, of as many tokens as `uniform_budgets` (PyramidKV, 4.2).

    Every layer has room for the voting window of `SnapKVCache`. Of the rest the last layer gets 1 / `steepness` of the
    mean, at least a token, and the first what is left of twice the mean. Where that is more than there is to hold, the
    pyramid is flatter (the released code has none then).

    Raises:
        ValueError: as `history_share` does.
    """
    share, steps = history_share(fraction, schedule), max(num_layers - 1, 1)
    budgets = [[0] * len(schedule) for _ in range(num_layers)]
    for k, begin in enumerate(schedule.begins[1:], 1):
        mean = min(share, begin)
        window = window_size(mean, schedule.lengths[k - 1])
        mean, most = mean - window, begin - window
        first = mean if num_layers == 1 else min(2 * mean - max(mean // steepness, min(mean, 1)), most)
        for layer in range(num_layers):
            budgets[layer][k] = window + round(first - (first - mean) * 2 * layer / steps)
    return budgets


class EvictingCache(KVCache):
    """A cache that keeps at most `budgets[layer][k]` tokens of a layer when scale k reads. Subclasses choose which.

    Args:
        budgets: [layer][k] tokens; scale 0 has no history.
        schedule: the scales.
    """

    def __init__(self, budgets: Budgets, schedule: ScaleSchedule):
        super().__init__(len(budgets), schedule.begins[-1])
        self.budgets, self.schedule = budgets, schedule
        self.given = [0] * len(budgets)  # tokens given so far, by layer

    def keep(
        self, layer: int, k: int, q_BHld: torch.Tensor, keys_BHSd: torch.Tensor, budget: int, scale: float
    ) -> torch.Tensor:
        """Which `budget` of the S tokens stay after scale k: ascending int64 (n,), or (B, H, n) for a choice a head."""
        raise TypeError(f"{type(self).__name__} does not say what to keep")

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
        """As `KVCache.update`; of what it returns, only the budget of the next scale is stored."""
        assert self.given[layer] == begin, f"layer {layer} was given {self.given[layer]} tokens of {begin}"
        end = begin + k_BHld.shape[2]
        joined = self._join(layer, k_BHld, v_BHld)
        if end > self.capacity[layer]:
            return joined
        self.given[layer] = end
        reader = self.schedule.begins.index(end)
        budget = self.budgets[layer][reader]
        S = joined[0].shape[2]
        kept = joined
        if budget < S:
            chosen = self.keep(layer, reader - 1, q_BHld, joined[0], budget, scale)
            if chosen.shape[-1] != budget:
                raise ValueError(
                    f"{type(self).__name__}.keep must choose {budget} of {S} tokens, got {chosen.shape[-1]}"
                )
            kept = take(joined[0], chosen), take(joined[1], chosen)
        self.keys[layer], self.values[layer] = kept
        self.lengths[layer] = min(S, budget)
        self._note_peak(*(joined if budget < S else ()))
        return joined

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

    def free_layers(self, layers: Iterable[int]) -> None:
        """Give back the memory of layers that will not run again."""
        layers = list(layers)
        super().free_layers(layers)
        for layer in layers:
            self.given[layer] = 0


class SlidingWindowCache(EvictingCache):
    """Keeps the most recent tokens."""

    def keep(
        self, layer: int, k: int, q_BHld: torch.Tensor, keys_BHSd: torch.Tensor, budget: int, scale: float
    ) -> torch.Tensor:
        """The last `budget` tokens."""
        S = keys_BHSd.shape[2]
        return torch.arange(S - budget, S, device=keys_BHSd.device)


class StreamingCache(EvictingCache):
    """Keeps the first tokens, which attention leans on, and the most recent ones (StreamingLLM, section 3.2).

    Args:
        sinks: first tokens to keep; 5 are the scales 1x1 and 2x2.
    """

    def __init__(self, budgets: Budgets, schedule: ScaleSchedule, *, sinks: int = 5):
        super().__init__(budgets, schedule)
        self.sinks = sinks

    def keep(
        self, layer: int, k: int, q_BHld: torch.Tensor, keys_BHSd: torch.Tensor, budget: int, scale: float
    ) -> torch.Tensor:
        """The sinks, at most half the budget, and the last tokens."""
        S, sinks = keys_BHSd.shape[2], min(self.sinks, budget // 2)
        device = keys_BHSd.device
        return torch.cat([torch.arange(sinks, device=device), torch.arange(S - budget + sinks, S, device=device)])


class SnapKVCache(EvictingCache):
    """Keeps what the last tokens attend to, and these tokens (SnapKV, section 4).

    Args:
        window: last tokens that vote, at most half of what layers may hold on average; as many in every layer.
        kernel: width of the pooling that keeps neighbours together.
    """

    def __init__(self, budgets: Budgets, schedule: ScaleSchedule, *, window: int = WINDOW, kernel: int = 5):
        super().__init__(budgets, schedule)
        self.window, self.kernel = window, check_kernel(kernel)
        self.means = [sum(column) // len(budgets) for column in zip(*budgets)]  # over the layers

    def keep(
        self, layer: int, k: int, q_BHld: torch.Tensor, keys_BHSd: torch.Tensor, budget: int, scale: float
    ) -> torch.Tensor:
        """The window's tokens, and those it attends to most."""
        S, size = keys_BHSd.shape[2], window_size(self.means[k + 1], self.schedule.lengths[k], self.window)
        window = torch.arange(S - size, S, device=keys_BHSd.device)
        scores = window_scores(q_BHld[:, :, -size:], keys_BHSd, window, scale=scale, kernel=self.kernel)
        return best_and_window(scores, window, budget)


def window_size(budget: int, length: int, most: int = WINDOW) -> int:
    """Tokens that vote: of the last scale of `length`, and at most half of a budget."""
    return max(1, min(most, budget // 2, length))


def check_kernel(kernel: int) -> int:
    """The width of a pooling that has a middle.

    Raises:
        ValueError: if it is even, or below 1.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd, so that every token has a score; got {kernel}")
    return kernel


def window_scores(
    q_BHwd: torch.Tensor,
    keys_BHSd: torch.Tensor,
    window: torch.Tensor,
    *,
    scale: float,
    kernel: int,
    pooling: str = "avg",
    softmax: bool = True,
) -> torch.Tensor:
    """How much the window attends to each token, pooled over neighbours: (B, H, S) float32, -inf at the window itself.

    Args:
        window: int64 (w,), positions in S of the queries' own tokens; they are kept anyway and do not compete.
        scale: factor of the attention logits.
        kernel: odd width of the pooling over neighbours in the sequence; 1 is none.
        pooling: "avg" (paper) or "max" (the released code).
        softmax: add up attention weights (paper) rather than raw logits (the released code).
    """
    logits_BHwS = (q_BHwd @ keys_BHSd.mT).float() * scale
    scores = (logits_BHwS.softmax(dim=-1) if softmax else logits_BHwS).sum(dim=2)
    nothing = 0.0 if softmax else -torch.inf
    pool = {"avg": F.avg_pool1d, "max": F.max_pool1d}[pooling]
    scores = pool(scores.index_fill(2, window, nothing), kernel, stride=1, padding=kernel // 2)
    return scores.index_fill(2, window, -torch.inf)


def best_and_window(scores_BHS: torch.Tensor, window: torch.Tensor, budget: int) -> torch.Tensor:
    """The window and the best-scored others, `budget` in all: ascending int64 (B, H, budget)."""
    B, H, _ = scores_BHS.shape
    best = scores_BHS.topk(budget - len(window), dim=-1).indices
    return torch.cat([best, window.expand(B, H, -1)], dim=-1).sort(dim=-1).values


def take(x_BHSd: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The tokens `keep`, (n,) or (B, H, n), of (B, H, S, d): a fresh (B, H, n, d)."""
    if keep.ndim == 1:
        return x_BHSd.index_select(2, keep)
    return x_BHSd.gather(2, keep[..., None].expand(*keep.shape, x_BHSd.shape[-1]))
