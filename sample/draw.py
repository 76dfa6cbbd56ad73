"""Randomness that belongs to an image, and the draw of tokens from logits.

Shapes: B images, l tokens of one scale, L all tokens, V codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from operator import index

import numpy as np
import torch
from torch.nn import functional as F

from sample import kernels
from tokenizer.schedule import ScaleSchedule

NOT_FINITE = "logits are not finite: the weights are damaged, or float32 is needed as dtype"


def derive_seed(*key: int) -> int:
    """A 63-bit seed from non-negative integers; different keys of one length, below 2**32, give independent streams."""
    low, high = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return (int(high) << 31) ^ int(low)


def image_uniforms(seed: int, schedule: ScaleSchedule, draws_per_token: int = 1) -> torch.Tensor:
    """All uniforms of the image that `seed` names: (L, draws_per_token) float32 in [0, 1), from its own CPU generator.

    They are drawn once, before the loop, so an image does not depend on its batch, process or device.
    """
    shape = (schedule.total, draws_per_token)
    if seed < 2**32:
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")
    words = np.random.MT19937(np.random.SeedSequence(seed)).random_raw(shape)  # torch would take the lower half only
    return torch.from_numpy((words & 0xFFFFFF).astype(np.float32) / np.float32(2**24))


def pass_uniforms(seed: int, schedule: ScaleSchedule, draws_per_token: int, passes: int) -> torch.Tensor:
    """`image_uniforms` for several passes over each scale, (L, passes * draws_per_token): the first pass comes first.

    What the first pass draws does not depend on the others.
    """
    streams = [seed, *(derive_seed(seed, step, 0, 0) for step in range(1, passes))]
    return torch.cat([image_uniforms(stream, schedule, draws_per_token) for stream in streams], dim=-1)


@dataclass(frozen=True)
class Filter:
    """Which tokens may be drawn: temperature, then top-k, then top-p (the official order of filters).

    Attributes:
        top_k: keep the k most likely tokens and their ties; 0 keeps all.
        top_p: then keep the smallest set with probability above p, in (0, 1]; 1 keeps all.
        temperature: logits are divided by it, in [1e-6, 1e6].
        temperature_last: divide after the filters instead of before (CoDe's order).
    """

    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    temperature_last: bool = False

    def __post_init__(self) -> None:
        for name in ("top_k", "top_p", "temperature"):
            value = getattr(self, name)
            if not isinstance(value, Real):
                raise TypeError(f"{name} must be a number, or one for each scale, got {value!r}")
        if self.top_k < 0 or not float(self.top_k).is_integer():
            raise ValueError(f"top_k must be 0 (all) or a whole number above, got {self.top_k}")
        object.__setattr__(self, "top_k", int(self.top_k))  # 900.0 of a file
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 1e-6 <= self.temperature <= 1e6:  # beyond, logits are infinite, or all alike
            raise ValueError(f"temperature must be in [1e-6, 1e6], got {self.temperature}")

    def __call__(self, logits_BlV: torch.Tensor) -> torch.Tensor:
        """Logits with forbidden tokens at -inf; a new tensor."""
        if not self.temperature_last and self.temperature != 1:
            logits_BlV = logits_BlV / self.temperature
        logits_BlV = keep_likeliest(logits_BlV, self.top_k, self.top_p)
        return logits_BlV / self.temperature if self.temperature_last else logits_BlV


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Logits (..., V) with all below the k-th largest at -inf; ties with the k-th stay. k = 0 keeps all."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Logits (..., V) with the least likely tokens, jointly at most 1 - p, at -inf; the likeliest stays.

    On a CPU values are sorted without their places, which is several times as fast, but where equal ones are on both
    sides of the border.
    """
    if p >= 1:
        return logits
    if _may_ask(logits) and logits.dtype == torch.float32:
        ordered = torch.from_numpy(np.sort(logits.detach().numpy(), axis=-1))
        drop = least_likely(ordered, p)
        border = drop.sum(dim=-1, keepdim=True)
        least = ordered.gather(-1, border)
        kept = logits.masked_fill(logits < least, -torch.inf)
        split = ((border > 0) & (ordered.gather(-1, (border - 1).clamp(min=0)) == least))[..., 0]
        if split.any():
            kept[split] = _keep_top_p_by_place(logits[split], p)
        return kept
    return _keep_top_p_by_place(logits, p)


def _may_ask(logits: torch.Tensor) -> bool:
    """Whether a number may be read inside the loop: elsewhere than on a CPU, that would wait for the device."""
    return logits.device.type == "cpu"


def watch(values: torch.Tensor, finite: torch.Tensor | None) -> torch.Tensor | None:
    """`finite` (bool, no dimensions) and whether these values are, for `check_finite` after the loop.

    None on a CPU, where `draw` looks at once.
    """
    if _may_ask(values):
        return finite
    found = values.isfinite().all()
    return found if finite is None else finite & found


def check_finite(finite: torch.Tensor | None) -> None:
    """Raise ValueError if what was drawn from was not finite, as `watch` noted it; waits for the device."""
    if finite is not None and not finite:
        raise ValueError(NOT_FINITE)


def least_likely(ordered: torch.Tensor, p: float) -> torch.Tensor:
    """Which of ascending logits (..., V) are jointly at most 1 - p, as bool; never the last one."""
    drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    drop[..., -1] = False
    return drop


def _keep_top_p_by_place(logits: torch.Tensor, p: float) -> torch.Tensor:
    ordered, order = logits.sort(dim=-1)
    drop = least_likely(ordered, p)
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


def keep_likeliest(logits: torch.Tensor, k: int, p: float) -> torch.Tensor:
    """`keep_top_p` after `keep_top_k`.

    On a CPU only the k largest are sorted, but where ties decide what is kept; on a GPU nothing is (`sample.kernels`).
    """
    if (p < 1 or 0 < k < logits.shape[-1]) and _has_kernel(logits):
        return kernels.keep_likeliest(logits, k, p)
    if not 0 < k < logits.shape[-1] or p >= 1 or logits.device.type != "cpu":
        return keep_top_p(keep_top_k(logits, k), p)
    best, order = (found.flip(-1) for found in logits.topk(k, dim=-1))  # the least likely first, as `keep_top_p` has it
    drop = least_likely(best, p)
    kept = torch.full_like(logits, -torch.inf).scatter(-1, order, best.masked_fill(drop, -torch.inf))
    tied = (logits == best[..., :1]).sum(-1) > (best == best[..., :1]).sum(-1)
    split = (drop[..., :-1] & ~drop[..., 1:] & (best[..., :-1] == best[..., 1:])).any(-1)
    undecided = tied | split
    if undecided.any():
        kept[undecided] = keep_top_p(keep_top_k(logits[undecided], k), p)
    return kept


def _has_kernel(logits: torch.Tensor) -> bool:
    """Whether rows of logits are read by `sample.kernels`: on a GPU, where they are neither bits nor too long."""
    fits = logits.dtype == torch.float32 and 2 < logits.shape[-1] <= kernels.ROW
    return logits.is_cuda and fits and kernels.usable(logits.device)


def draw(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF draw: logits (..., V) and uniforms (...) in [0, 1) to int64 tokens (...).

    A token of probability 0 is never drawn, whatever rounding does to the cumulative sum.

    Raises:
        ValueError: on a CPU, if a row of logits has no likeliest token: some are nan, or too large for the dtype. On
            other devices `check_finite` tells, after the loop.
    """
    if _has_kernel(logits):
        return kernels.draw(logits, uniforms)
    cdf = logits.float().softmax(dim=-1).cumsum(dim=-1)
    total = cdf[..., -1:]
    if _may_ask(logits) and not total.isfinite().all():
        raise ValueError(NOT_FINITE)
    target = torch.minimum(uniforms[..., None].to(cdf) * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cdf, target, right=True)[..., 0]
    return tokens if _may_ask(logits) else tokens.clamp(max=logits.shape[-1] - 1)  # of what is not finite, too


def smooth_weights(logits_BlV: torch.Tensor, ratio: float, generator: torch.Generator) -> torch.Tensor:
    """Soft token weights (B, l, V) by Gumbel-softmax, for smoother pictures (VAR's `more_smooth`; never for FID).

    Args:
        logits_BlV: already filtered logits.
        ratio: progress through the scales, in [0, 1]: later scales are sharper.
        generator: CPU generator of the Gumbel noise.
    """
    exponential = torch.empty(logits_BlV.shape).exponential_(generator=generator).to(logits_BlV)
    tau = max(0.27 * (1 - 0.95 * ratio), 0.005)
    return F.softmax((logits_BlV * (1 + ratio) - exponential.log()) / tau, dim=-1)


def seeds_from(seed: int, count: int) -> range:
    """`count` seeds, the first of them given: what names the images of one request.

    Raises:
        ValueError: if one is not in [0, 2**63).
    """
    if not 0 <= seed <= 2**63 - max(count, 1):
        most = f"[0, 2**63 - {count}] for {count} images" if count > 1 else "[0, 2**63)"
        raise ValueError(f"seed must be in {most}, got {seed}")
    return range(seed, seed + count)


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """The seeds as a list of integers in [0, 2**63).

    Raises:
        ValueError: if there are none, or one is out of range.
    """
    try:
        checked = [index(seed) for seed in seeds]
    except TypeError:
        raise ValueError(f"seed must be whole numbers, got {seeds!r}") from None
    if not checked:
        raise ValueError("seeds is empty: give one per image")
    for seed in checked:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {seed}")
    return checked
