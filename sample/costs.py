"""What a plan costs before it is run: work by scale (FLOPs, calls, bytes) and the exact bytes of its caches.

FLOPs are 2 a multiply-add, of matrix products and attention. Not counted: what is done once a prompt (conditioning,
text encoder), norms and other pointwise work, the scores by which a cache chooses what it keeps.

Shapes: B images, R rows (B, or 2 B with guidance), l tokens of a scale, S tokens attended to, D width, V codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import torch

from sample.plan import Plan, Stage
from var.cache import KVCache
from var.pruning import PrunedCache


@dataclass(frozen=True)
class Work:
    """The work of one step of the loop, in the units that its time is fitted with.

    Attributes:
        steps: 1 a scale: what the loop itself costs.
        blocks: transformer blocks called.
        linear: floating-point operations of the matrix products.
        attention: floating-point operations of attention, to earlier tokens and to text.
        drawn: logits computed and drawn from, B l V.
        weights: bytes of weights read.
        moved: bytes of keys and values read.
    """

    steps: float = 0.0
    blocks: float = 0.0
    linear: float = 0.0
    attention: float = 0.0
    drawn: float = 0.0
    weights: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other))))

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return self.linear + self.attention

    @classmethod
    def names(cls) -> list[str]:
        """The features, in order."""
        return [field.name for field in fields(cls)]


def plan_work(plan: Plan, batch: int, *, text_tokens: int = 0, head: bool = True, prefill: bool = True) -> list[Work]:
    """The work of every scale.

    Args:
        text_tokens: length of the prompts, padding included.
        head: count the projection to logits and the draw, too.
        prefill: count what a stage reads of earlier scales before it begins, with its first scale.
    """
    made, before, joined = [], None, 0
    for stage in plan.stages:
        if before is None or not stage.continues(before):
            joined = stage.scales.start
        for k in stage.scales:
            if not stage.draws(k):
                made.append(Work())
                continue
            rows = batch * (1 + plan.doubles(stage, k))
            work = Work(steps=1) + step_work(stage, range(k, k + 1), rows, text_tokens, prefilled=joined)
            if prefill and k == joined > 0 and stage.model.reads_earlier:
                rows = batch * (1 + plan.doubles(stage, k, prefilling=True))
                work += step_work(stage, range(k), rows, text_tokens, prefilled=joined)
            made.append(work + head_work(stage, k, batch, text_tokens) if head else work)
        before = stage
    return made


def plan_flops(plan: Plan, widths: Sequence[int] | None = None, *, text_tokens: int = 0) -> int:
    """FLOPs of the transformers for one image; `widths`: candidates running each scale (one each when None)."""
    works = plan_work(plan, 1, text_tokens=text_tokens)
    return round(sum(width * work.flops for width, work in zip(widths or [1] * len(works), works, strict=True)))


def step_work(stage: Stage, scales: range, rows: int, text_tokens: int, *, prefilled: int = 0) -> Work:
    """The work of one pass over some scales, up to the head; several scales are a prefill, with dense attention.

    What a layer holds of earlier scales is read off the `budgets` of the stage's cache; without such it is what the
    layer computed of them: everything of those that were `prefilled`.
    """
    model, schedule = stage.model, stage.pyramid
    D, hidden = model.config.width, round(model.config.width * model.config.mlp_ratio)
    cross = model.config.conditioning == "text"
    begin, end = schedule.begins[scales.start], schedule.ends[scales.stop - 1]
    per_token = 2 * (4 * D * D + 2 * D * hidden + (2 * D * D if cross else 0))
    itemsize = next(model.parameters()).element_size()
    budgets = getattr(stage.new_cache() if stage.new_cache else None, "budgets", None)
    fed = end - max(begin, schedule.ends[0])  # the first scale has no input to project
    total = Work(linear=2 * rows * fed * model.config.latent_channels * D)
    for layer in sorted(stage.active):
        length = sum(_computed(stage, layer, k, prefilled) for k in scales)
        earlier = sum(_computed(stage, layer, k, prefilled) for k in range(scales.start)) * model.reads_earlier
        S = length + (earlier if budgets is None else min(earlier, budgets[layer][scales.start]))
        total += Work(
            blocks=1,
            linear=rows * length * per_token,
            attention=4 * rows * length * D * (S + (text_tokens if cross else 0)),
            weights=per_token / 2 * itemsize,
            moved=2 * rows * S * D * itemsize,
        )
    return total


def _computed(stage: Stage, layer: int, k: int, prefilled: int) -> int:
    """Tokens of scale k that a layer computes: all of those that are prefilled."""
    return stage.pyramid.lengths[k] if k < prefilled else stage.computed(layer, k)


def head_work(stage: Stage, k: int, batch: int, text_tokens: int = 0) -> Work:
    """The work of one scale's logits and draw, masked passes included; guidance mixes before the projection."""
    config, length = stage.model.config, stage.pyramid.lengths[k]
    drawn = batch * length * (2 * config.latent_channels if config.bitwise else config.vocab_size)
    work = Work(drawn=drawn, linear=2 * drawn * config.width)
    if stage.in_turn(k):
        return work + sequential_work(stage, length, batch)
    again = Work(steps=1) + step_work(stage, range(k, k + 1), batch, text_tokens) + work
    again += Work(linear=2 * batch * length * config.latent_channels * config.width)  # the tokens are embedded, too
    for _ in stage.settled(k)[1:]:  # masked passes, without guidance
        work += again
    return work


def sequential_work(stage: Stage, length: int, batch: int) -> Work:
    """The work of drawing the tokens of a scale one after the other: a small causal transformer, token by token."""
    config, layers = stage.model.config, stage.model.config.sequential_layers
    D, hidden = config.width, round(config.width * config.mlp_ratio)
    weights = layers * (4 * D * D + 2 * D * hidden) + D * D + D * config.vocab_size
    itemsize = next(stage.model.sequential.parameters()).element_size()
    return Work(
        steps=length - 1,
        blocks=layers * length,
        linear=2 * batch * length * weights,
        attention=4 * batch * layers * D * length * (length + 1) / 2,
        weights=weights * length * itemsize,
    )


def cache_peak(plan: Plan, batch: int, dtype: torch.dtype) -> int:
    """Most bytes of keys and values alive at once: the plan's own caches, run on tensors without storage."""
    rows, peak, before, cache = 0, 0, None, None
    for stage in plan.stages:
        if not stage.model.reads_earlier:
            before = stage
            continue
        continues = before is not None and stage.continues(before)
        if continues:
            cache.free_layers(before.active - stage.active)
        else:
            rows, cache = batch * (1 + plan.doubles(stage, stage.scales.start, prefilling=True)), stage.make_cache()
        ends = max(plan.guided_scales, stage.scales.start)  # of the unconditional half
        cache.reserve(plan.reserved(stage, ends if rows > batch else None))
        if stage.scales.start and not continues:
            _feed(cache, stage, range(stage.scales.start), rows, dtype)
        for k in filter(stage.draws, stage.scales):
            if rows > batch and not plan.doubles(stage, k):
                rows = batch
                cache.select(torch.arange(batch, device="meta"))
                cache.reserve(plan.reserved(stage))
            _feed(cache, stage, range(k, k + 1), rows, dtype)
        peak, before = max(peak, cache.peak_nbytes), stage
    return peak


def _feed(cache: KVCache, stage: Stage, scales: range, rows: int, dtype: torch.dtype) -> None:
    config, schedule = stage.model.config, stage.pyramid
    begin, end = schedule.begins[scales.start], schedule.ends[scales.stop - 1]
    for layer in sorted(stage.active):
        length = stage.computed(layer, scales.start) if len(scales) == 1 else end - begin
        shape = (rows, config.heads, length, config.width // config.heads)
        fresh = torch.empty(shape, dtype=dtype, device="meta")
        cache.update(layer, fresh, fresh, begin=begin, q_BHld=fresh)
        if isinstance(cache, PrunedCache) and cache.acts(layer, end) and cache.pruning.source in scales:
            shape = (rows, schedule.lengths[cache.pruning.source], config.width)
            for name in ("self", "text", "ffn") if config.conditioning == "text" else ("self", "ffn"):
                cache.note(name, layer, torch.empty(shape, dtype=dtype, device="meta"))


def parameter_bytes(*models: torch.nn.Module | None) -> int:
    """Bytes of the parameters of some models; the same model is counted once."""
    parameters = {id(p): p for model in models if model is not None for p in model.parameters()}
    return sum(p.numel() * p.element_size() for p in parameters.values())
