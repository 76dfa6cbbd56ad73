"""A plan says which model, which layers and which settings make each scale. Methods are plans; the loop reads them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sample.draw import Filter
from sample.guidance import Guidance
from sample.masked import MaskSchedule, check_mask_schedule
from tokenizer.schedule import ScaleSchedule
from var.cache import KVCache
from var.pruning import PrunedCache, Pruning
from var.supernet import is_trained
from var.transformer import NextScaleTransformer

LogitsFilter = Callable[[torch.Tensor], torch.Tensor]
BACKENDS = ("sdpa", "flex", "grouped")


@dataclass(frozen=True)
class Stage:
    """Consecutive scales made by one model under one setting.

    A stage goes on with the cache of the one before if model and `new_cache` are the same and no layer joins; layers
    that no longer run give theirs back. Else it begins with an empty cache and prefills it, in one masked pass.

    Attributes:
        model: the transformer.
        scales: which scales, e.g. range(0, 7).
        layers: blocks to run; all when None.
        guidance: classifier-free guidance of these scales.
        filters: what may be drawn; one for all scales of the stage, or one each. A `Filter`, or any function of logits
            (B, l, V) or, bitwise, (B, l, n, 2) to the same with -inf where nothing may be drawn.
        new_cache: makes the stage's cache; the model's own when None.
        attention_backend: "sdpa", "flex" or "grouped", for a prefill.
        schedule: the scales, where they are not the model's own (another aspect ratio).
        recompute: prefill in any case: these layers read what they themselves make of the earlier scales.
        sequential: the first so many scales are drawn token by token, by a model with a head for that; as many as it
            was trained for when None, 0 for none.
        mask_schedule: how many tokens each pass over each scale settles, by a model of masked prediction; as
            `sample.masked.read_mask_schedule`. One pass each when None.
        pruning: which tokens are not computed, and which scales not drawn (FastVAR); none when None. A prefill leaves
            nothing out.
    """

    model: NextScaleTransformer
    scales: range
    layers: Collection[int] | None = None
    guidance: Guidance = field(default_factory=Guidance)
    filters: LogitsFilter | Sequence[LogitsFilter] = field(default_factory=Filter)
    new_cache: Callable[[], KVCache] | None = None
    attention_backend: str = "grouped"
    schedule: ScaleSchedule | None = None
    recompute: bool = False
    sequential: int | None = None
    mask_schedule: MaskSchedule | None = None
    pruning: Pruning | None = None

    @property
    def pyramid(self) -> ScaleSchedule:
        """The scales it works on."""
        return self.model.check_schedule(self.schedule)

    @property
    def active(self) -> frozenset[int]:
        """The blocks that run."""
        return frozenset(range(len(self.model.blocks)) if self.layers is None else self.layers)

    def make_cache(self) -> KVCache:
        """An empty cache of the stage's kind."""
        if self.new_cache is not None:
            return self.new_cache()
        if self.pruning is not None and self.pruning.source is not None:
            return PrunedCache(len(self.model.blocks), self.pruning)
        return self.model.new_cache(self.pyramid)

    def continues(self, before: Stage) -> bool:
        """Whether this stage goes on with the cache of `before`."""
        same = self.model is before.model and self.new_cache is before.new_cache and self.pruning == before.pruning
        return same and not self.recompute and before.active >= self.active

    def draws(self, k: int) -> bool:
        """Whether scale k is drawn; one that is not adds nothing to the image."""
        return self.pruning is None or k < self.pruning.drawn

    def computed(self, layer: int, k: int) -> int:
        """Tokens of scale k that a layer computes."""
        return self.pyramid.lengths[k] if self.pruning is None else self.pruning.count(layer, k)

    def in_turn(self, k: int) -> bool:
        """Whether the tokens of scale k are drawn one after the other: only where all blocks run, as in training."""
        if self.model.sequential is None or len(self.active) < len(self.model.blocks):
            return False
        return k < (self.model.config.sequential_scales if self.sequential is None else self.sequential)

    def settled(self, k: int) -> tuple[int, ...]:
        """How many tokens each pass over scale k settles; several passes only where all blocks run, as in training."""
        if self.model.masked is None or self.mask_schedule is None or len(self.active) < len(self.model.blocks):
            return (self.pyramid.lengths[k],)
        return self.mask_schedule[k]

    def filter(self, k: int) -> LogitsFilter:
        """The filter of scale k."""
        return self.filters[k - self.scales.start] if isinstance(self.filters, Sequence) else self.filters


@dataclass(frozen=True)
class Plan:
    """Stages that together make every scale once, in order.

    Raises:
        TypeError: if a stage holds something of another kind than it says.
        ValueError: if scales are left out or made twice, if stages disagree on the token schedule or vocabulary, or
            if a stage names layers its model does not have.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.stages, Sequence) or not all(isinstance(stage, Stage) for stage in self.stages):
            raise TypeError(f"stages must be a tuple of Stage, got {type(self.stages).__name__}")
        if not self.stages:
            raise ValueError("plan has no stage")
        for stage in self.stages:
            _check_kinds(stage)
        if not all(stage.scales for stage in self.stages):
            raise ValueError("a stage makes one scale or more, got none")
        made = [k for stage in self.stages for k in stage.scales]
        if made != list(range(len(self.schedule))):
            raise ValueError(f"plan must make scales 0 to {len(self.schedule) - 1} once, in order; it makes {made}")
        for stage in self.stages:
            _check_stage(stage, self.stages[0])
        drawn = [stage.draws(k) for stage in self.stages for k in stage.scales]
        if drawn != sorted(drawn, reverse=True):
            raise ValueError(f"plan draws scales after one that it leaves out (prune): {drawn.index(False)}")

    @property
    def schedule(self) -> ScaleSchedule:
        """The token schedule of all stages."""
        return self.stages[0].pyramid

    def replace(self, **settings: Any) -> Plan:
        """The plan with these attributes in all of its stages: `plan.replace(guidance=Guidance(2.0))`."""
        return Plan(tuple(replace(stage, **settings) for stage in self.stages))

    def reserved(self, stage: Stage, scales: int | None = None) -> list[int]:
        """Tokens each layer of a stage's model must hold while it runs: those that it, or one going on, reads again.

        Args:
            scales: not those of scales from this one on: there will be fewer rows then.
        """
        place = next(i for i, own in enumerate(self.stages) if own is stage)
        after = self.stages[place + 1] if place + 1 < len(self.stages) else None
        if not stage.model.reads_earlier:
            return [0] * len(stage.model.blocks)
        staying = after.active if after is not None and after.continues(stage) else frozenset()
        last, schedule = max(filter(stage.draws, stage.scales)), self.schedule
        most = schedule.total if scales is None else schedule.ends[scales - 1]
        held = (
            schedule.ends[last] if layer in staying else schedule.begins[last] if layer in stage.active else 0
            for layer in range(len(stage.model.blocks))
        )
        return [min(tokens, most) for tokens in held]

    @property
    def passes(self) -> int:
        """The most passes over a scale: how often a token may be drawn."""
        return max(len(stage.settled(k)) for stage in self.stages for k in stage.scales)

    @property
    def drawn(self) -> int:
        """Scales that are drawn, all but some of the last."""
        return sum(stage.draws(k) for stage in self.stages for k in stage.scales)

    @property
    def guided_scales(self) -> int:
        """Scales up to the last one that is drawn and guided; the unconditional half does not run after them."""
        K = len(self.schedule)
        drawn = ((stage, k) for stage in self.stages for k in stage.scales if stage.draws(k))
        return max((k + 1 for stage, k in drawn if stage.guidance.weight(k, K)), default=0)

    @property
    def guided(self) -> bool:
        """Whether any scale is guided."""
        return self.guided_scales > 0

    def joins(self, stage: Stage) -> bool:
        """Whether a stage prefills a cache of its own with the scales before it."""
        place = next(i for i, own in enumerate(self.stages) if own is stage)
        return place > 0 and stage.model.reads_earlier and not stage.continues(self.stages[place - 1])

    def doubles(self, stage: Stage, k: int, *, prefilling: bool = False) -> bool:
        """Whether the unconditional half of scale k runs; or that of the scales before k, when a stage prefills them.

        Guidance inside the blocks is part of what the conditional half's keys are made of.
        """
        if k < self.guided_scales or not prefilling or not stage.guidance.blocks:
            return k < self.guided_scales
        return any(stage.guidance.weight(i, len(self.schedule)) for i in range(k))


def plain(
    model: NextScaleTransformer,
    *,
    guidance: float | Sequence[float] | Guidance = 1.5,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    temperature: float | Sequence[float] = 1.0,
    layers: Collection[int] | None = None,
    schedule: ScaleSchedule | None = None,
) -> Plan:
    """One model for all scales: VAR as published; what may be drawn may be given scale by scale, as Infinity's tau."""
    steps = range(len(schedule or model.schedule))
    stage = Stage(
        model,
        steps,
        layers=layers,
        guidance=guidance if isinstance(guidance, Guidance) else Guidance(guidance),
        filters=scale_filters(len(steps), top_k=top_k, top_p=top_p, temperature=temperature),
        schedule=schedule,
    )
    return Plan((stage,))


def collaborative(
    drafter: NextScaleTransformer,
    refiner: NextScaleTransformer,
    *,
    handover: int,
    guidance: float | Sequence[float] | Guidance = 1.5,
    drafter_filters: Filter | Sequence[Filter] | None = None,
    refiner_filters: Filter | Sequence[Filter] | None = None,
) -> Plan:
    """CoDe: `drafter` makes scales 0..handover-1, `refiner` the rest after prefilling its own cache.

    Raises:
        ValueError: if `handover` leaves either of them nothing to do.
    """
    K = len(drafter.schedule)
    if not 0 < handover < K:
        raise ValueError(f"handover must be in 1..{K - 1} scales, got {handover}")
    shared = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    return Plan(
        (
            Stage(drafter, range(handover), guidance=shared, filters=drafter_filters or Filter()),
            Stage(refiner, range(handover, K), guidance=shared, filters=refiner_filters or Filter()),
        )
    )


def scale_filters(
    num_scales: int,
    *,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    temperature: float | Sequence[float] = 1.0,
    temperature_last: bool = False,
) -> Filter | list[Filter]:
    """The filter of all scales, or one a scale where any setting is given by scale.

    Raises:
        ValueError: if a setting has another number of values than there are scales.
    """
    given: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
    lists = {name: value for name, value in given.items() if isinstance(value, Sequence) and not isinstance(value, str)}
    if not lists:
        return Filter(**given, temperature_last=temperature_last)
    for name, values in lists.items():
        check_count(name, len(values), num_scales)
    return [
        Filter(**{**given, **{name: values[k] for name, values in lists.items()}}, temperature_last=temperature_last)
        for k in range(num_scales)
    ]


def check_count(name: str, got: int, wanted: int) -> None:
    """Raise ValueError unless there are as many values as scales."""
    if got != wanted:
        raise ValueError(f"{name} must be one for all scales or one for each of {wanted}, got {got}")


def _check_kinds(stage: Stage) -> None:
    filters = stage.filters if isinstance(stage.filters, Sequence) else [stage.filters]
    fits = {
        "model": all(hasattr(stage.model, name) for name in ("blocks", "schedule", "condition")),  # compiled ones, too
        "scales": isinstance(stage.scales, range),
        "layers": stage.layers is None or isinstance(stage.layers, Collection),
        "guidance": isinstance(stage.guidance, Guidance),
        "filters": all(map(callable, filters)),
        "new_cache": stage.new_cache is None or callable(stage.new_cache),
        "schedule": stage.schedule is None or isinstance(stage.schedule, ScaleSchedule),
    }
    for name, fit in fits.items():
        if not fit:
            kind = type(getattr(stage, name)).__name__
            raise TypeError(f"{name} of a stage must be as sample.plan.Stage says, got {kind}")
    if stage.attention_backend not in BACKENDS:
        raise ValueError(f"attention_backend must be one of {', '.join(BACKENDS)}, got {stage.attention_backend!r}")


def _check_stage(stage: Stage, first: Stage) -> None:
    if stage.pyramid.sides != first.pyramid.sides:
        raise ValueError(
            f"all models of a plan need the same schedule, got {first.pyramid.text} and {stage.pyramid.text}"
        )
    names = ["vocab_size", "latent_channels", "bitwise", "conditioning"]
    names += ["num_classes"] if first.model.config.conditioning == "class" else ["text_width"]
    for name in names:
        mine, theirs = getattr(stage.model.config, name), getattr(first.model.config, name)
        if mine != theirs:
            raise ValueError(f"all models of a plan need the same {name}, got {theirs} and {mine}")
    depth = len(stage.model.blocks)
    if stage.layers is not None:
        unknown = sorted(set(stage.layers) - set(range(depth)))
        if unknown or not stage.layers:
            raise ValueError(f"layers must be some of 0..{depth - 1}, got {sorted(stage.layers)}")
    trained, asked = stage.model.config.sequential_scales, stage.sequential
    if asked is not None and (asked < 0 or stage.scales.start < asked > trained):
        allowed = f"0..{trained} scales of this model" if trained else "0, as this model has no head for it"
        raise ValueError(f"sequential must be {'in ' if trained else ''}{allowed}, got {asked}")
    if stage.mask_schedule is not None:
        if stage.model.masked is None:
            raise ValueError("mask_schedule is for a model of masked prediction, and this one has no part for it")
        check_mask_schedule(stage.mask_schedule, stage.pyramid)
    if stage.pruning is not None:
        _check_pruning(stage)
    if stage.new_cache is not None and not stage.model.reads_earlier:
        raise ValueError("new_cache is for models that read earlier scales, and this one keeps nothing")
    if isinstance(stage.filters, Sequence) and len(stage.filters) != len(stage.scales):
        raise ValueError(f"a stage of {len(stage.scales)} scales needs as many filters, got {len(stage.filters)}")
    scale = stage.guidance.scale
    if isinstance(scale, Sequence) and len(scale) != len(first.pyramid):
        raise ValueError(f"guidance needs one weight a scale, {len(first.pyramid)}, got {len(scale)}")
    if stage.guidance.until is not None and stage.guidance.until > len(first.pyramid):
        raise ValueError(f"guidance_until must be at most {len(first.pyramid)} scales, got {stage.guidance.until}")
    if any(not -depth <= block < depth for block in stage.guidance.blocks):
        raise ValueError(f"guidance blocks must be in {-depth}..{depth - 1}, got {list(stage.guidance.blocks)}")


def _check_pruning(stage: Stage) -> None:
    if not stage.model.reads_earlier or stage.new_cache is not None:
        raise ValueError("prune is for models that read earlier scales, with a cache of 100%")
    if stage.pruning.schedule != stage.pyramid:
        raise ValueError(
            f"prune is for the scales {stage.pruning.schedule.text}, and the plan's are {stage.pyramid.text}"
        )
    if not stage.draws(stage.scales.start):
        raise ValueError(f"prune leaves scale {stage.scales.start} out, where a stage of the plan begins")


def untrained(plan: Plan) -> str | None:
    """A line about a model that is to run fewer layers than it says it was trained for, or other scales; or None.

    Which scales a hand-over's own layers read again is not asked: of a supernet that was measured to do little harm.
    """
    for stage in plan.stages:
        config, active, begin = stage.model.config, len(stage.active), stage.scales.start
        first, end = config.trained_scales or (0, len(plan.schedule))
        if begin < first or stage.scales.stop > end:
            return (
                f"a model of this plan was trained for the scales {first} to {end - 1} only, and is to draw {begin} to "
                f"{stage.scales.stop - 1}: a drafter and a refiner belong together (--plan code:N, docs/elastic.md)"
            )
        if active != config.depth and not is_trained(config.subnets, active, begin):
            return (
                f"nothing says that a model of this plan was trained to run {active} of its {config.depth} layers from "
                f"scale {begin} on; one that was not draws noise then (docs/elastic.md)"
            )
    return None
