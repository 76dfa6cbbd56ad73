"""What images cost: tokens, floating-point operations, decoder and reward calls, seconds, counted while they are made.

The transformers' FLOPs are those of `sample.costs`; those of the other networks are measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from sample.costs import plan_work
from sample.plan import Plan
from sample.state import GenerationState, Hook


@dataclass
class Ledger(Hook):
    """Counts over everything it is given to, until it is thrown away; put it into `hooks`, and into a search.

    Attributes:
        images: images asked for; what the averages of `per_image` are taken over.
        tokens: drawn, of all candidates.
        model_flops: of the transformers, with the unconditional half and prefills.
        calls: rows given to each other network by name, e.g. {"decoder": 24, "reward": 24, "features": 16}.
        flops, seconds: of those networks by name; and of everything, seconds["total"], where `clock` was used.
    """

    images: int = 0
    tokens: int = 0
    model_flops: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    _row_flops: dict[tuple, float] = field(default_factory=dict, repr=False)
    _run: tuple[Plan, int] | None = field(default=None, repr=False)
    _scale_flops: list[int] = field(default_factory=list, repr=False)

    def on_start(self, state: GenerationState) -> None:
        """Count the images asked for; a search multiplies them later."""
        self.images += len(state)

    def on_tokens(
        self, state: GenerationState, k: int, logits_BlV: torch.Tensor, tokens_Bl: torch.Tensor
    ) -> torch.Tensor:
        """After scale k's draw: all rows that ran it, before any is dropped."""
        mask = state.cond.memory_mask_B11T
        run = (state.plan, 0 if mask is None else mask.shape[-1])
        if run != self._run:
            works = plan_work(state.plan, 1, text_tokens=run[1])
            self._run, self._scale_flops = run, [round(work.flops) for work in works]
        self.model_flops += len(state) * self._scale_flops[k]
        self.tokens += len(state) * state.plan.schedule.lengths[k]
        return tokens_Bl

    def call(self, name: str, function: Callable[..., torch.Tensor], rows: Sequence | torch.Tensor, *more: Any) -> Any:
        """`function(rows, *more)`, its rows, seconds and FLOPs counted under `name`.

        The FLOPs of a row are measured at the first call with rows of a shape, and taken over for the others.
        """
        begin, key = time.perf_counter(), (name, tuple(rows[0].shape) if isinstance(rows, torch.Tensor) else None)
        if key in self._row_flops:
            result = function(rows, *more)
        else:
            with counted_flops() as counter:
                result = function(rows, *more)
            self._row_flops[key] = counter.get_total_flops() / len(rows)
        if isinstance(result, torch.Tensor):
            wait_for(result.device)
        for book, value in ((self.calls, len(rows)), (self.flops, round(self._row_flops[key] * len(rows)))):
            book[name] = book.get(name, 0) + value
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
        return result

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Adds the wall time spent inside to `seconds["total"]`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds["total"] = self.seconds.get("total", 0.0) + time.perf_counter() - begin

    @property
    def total_flops(self) -> int:
        """Of everything counted."""
        return self.model_flops + sum(self.flops.values())

    def per_image(self) -> dict[str, float]:
        """Averages over `images`: tokens, gflops (all, and by part), calls and seconds."""
        n = max(self.images, 1)
        found = {"tokens": self.tokens / n, "gflops": self.total_flops / n / 1e9}
        found["transformer_gflops"] = self.model_flops / n / 1e9
        for name in self.calls:
            found[f"{name}_calls"] = self.calls[name] / n
            found[f"{name}_gflops"] = self.flops[name] / n / 1e9
        return found | {f"{name}_s": seconds / n for name, seconds in self.seconds.items()}

    def __str__(self) -> str:
        """One line for a terminal."""
        found = self.per_image()
        parts = [f"{found['tokens']:.0f} tokens", f"{found['gflops']:.2f} GFLOPs"]
        parts += [f"{found[f'{name}_calls']:.3g} {name} calls" for name in self.calls]
        if "total_s" in found:
            parts.append(f"{found['total_s']:.3f} s")
        return f"an image took {', '.join(parts)}"


# --- measuring -------------------------------------------------------------------------------------------------------


def wait_for(device: torch.device) -> None:
    """Return when an accelerator has done what it was given; PyTorch can wait for one kind of them."""
    if device.type == "cpu" or not torch.accelerator.is_available():
        return
    if torch.accelerator.current_accelerator().type == device.type:
        torch.accelerator.synchronize(device)


def counted_flops() -> FlopCounterMode:
    """A context that counts the FLOPs of torch operations, attention on CPUs and packed layers (`sample.fast`) too."""

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return 4 * prod(query) * key[-2]

    def packed(x: Any, weight: Any, more: Any = None, *args: Any, out_shape: Any, **kwargs: Any) -> int:
        added = more is not None and len(more) == len(weight)  # `weight` is a map to add to, `more` the weight
        return 2 * prod(out_shape) * prod((more if added else weight)[1:])

    def transposed(x: Any, weight: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
        return 2 * prod(x) * prod(weight[1:])  # weight (I, O, h, w): each input meets all of it once

    counts = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    laid_out = {"_linear_pointwise": packed, "_convolution_pointwise": packed}
    laid_out["_convolution_transpose_pointwise"] = transposed
    mkldnn = torch.ops.mkldnn
    counts |= {getattr(mkldnn, name): count for name, count in laid_out.items() if hasattr(mkldnn, name)}
    return FlopCounterMode(display=False, custom_mapping=counts)


def call_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """FLOPs of one call."""
    with counted_flops() as counter, torch.no_grad():
        function(*arguments)
    return counter.get_total_flops()
