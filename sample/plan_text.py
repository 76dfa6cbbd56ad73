"""Plans in words: `--plan code:6 --depth 4 --cache 10%`, the same keys in YAML and in the pipeline's call.

    var            one model makes all scales                                   (VAR; with a depth: a subnet of it)
    supernet:N     all layers for N scales, then a subnet of `depth` layers     (VARiant)
    code:N         the model for N scales, then the refiner, or the model itself with `depth` layers    (CoDe)
    self:N         the latter, also where the model has a refiner

A subnet after a bridge reads the keys that all layers made; a refiner makes its own keys of the earlier scales. With
`--prune 50%` or `--prune 40%,50%,100%` layers compute only some tokens of the last scales, of those at 100% nothing
(FastVAR).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sample.draw import Filter
from sample.guidance import Guidance
from sample.masked import OFF, read_mask_schedule
from sample.plan import Plan, Stage, check_count
from tokenizer.schedule import ScaleSchedule
from var.cache import KVCache
from var.eviction import SlidingWindowCache, SnapKVCache, StreamingCache, pyramid_budgets, uniform_budgets
from var.pruning import Pruning
from var.scalekv import ScaleKVCache, scalekv_budgets
from var.supernet import equidistant, runs_of_depth
from var.transformer import NextScaleTransformer

BASELINES = {
    "window": (SlidingWindowCache, uniform_budgets),
    "streaming": (StreamingCache, uniform_budgets),
    "snapkv": (SnapKVCache, uniform_budgets),
    "pyramidkv": (SnapKVCache, pyramid_budgets),
}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A plan in words, for any model.

    Args:
        plan: var, supernet:N, code:N or self:N with N scales before the border.
        depth: layers of the subnet: one number for all its scales, or one a scale (4 or "4" or "6,4,4").
        cache: share of the key/value cache to keep: "100%" is all; "10%" is scalekv:10%, or window:10%, streaming:10%,
            snapkv:10% or pyramidkv:10%. "scalekv:10%,window=3" sets the side of the observed grid.
        prune: share of the tokens that layers leave out at the last scale, or shares for the last scales:
            "40%,50%,100%,100%" or [0.4, 0.5, 1, 1]; "off" for none. All layers but the first 3/32 and the last 4/32 do
            so. Scales of 100% are not drawn. It needs a whole cache.

    Raises:
        ValueError: on a text that is not one of these.
    """

    plan: str = "var"
    depth: int | Sequence[int] | str | None = None
    cache: str | float = "100%"
    prune: str | float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        share = read_cache(self.cache)[1]
        if any(read_prune(self.prune)) and share < 1:
            raise ValueError(
                f"prune {self.prune} needs a cache of 100%, got {self.cache}; prune off leaves nothing out"
            )
        if self.kind in ("supernet", "self") and not self.depths:
            raise ValueError(f"plan {self.plan} needs a depth: the layers of its subnet")

    @property
    def kind(self) -> str:
        """var, supernet, code or self."""
        return read_plan(self.plan)[0]

    @property
    def border(self) -> int:
        """Scales before the border; 0 of var."""
        return read_plan(self.plan)[1]

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers of the subnet: none given, one, or one for each of its scales."""
        return read_depth(self.depth)

    def build(
        self,
        model: NextScaleTransformer,
        *,
        refiner: NextScaleTransformer | None = None,
        guidance: float | Sequence[float] | Guidance = 1.5,
        filters: Filter | Sequence[Filter] | None = None,
        schedule: ScaleSchedule | None = None,
        sequential: int | None = None,
        mask_schedule: str | Sequence[Sequence[int]] | None = None,
    ) -> Plan:
        """The plan for a model, and a refiner where the plan has one.

        Args:
            filters: one for all scales, or one a scale.
            schedule: the scales, where they are not the model's own (another aspect ratio).
            sequential: the first so many scales are drawn token by token, see `Stage`.
            mask_schedule: how many tokens each pass over a scale settles, for models of masked prediction; the
                published one when None (`sample.masked.read_mask_schedule`).

        Raises:
            ValueError: if the plan does not fit the models.
        """
        K = len(schedule or model.schedule)
        if self.kind != "var" and not 0 < self.border < K:
            raise ValueError(f"plan {self.plan} must leave scales to both sides: {self.kind}:1 to {self.kind}:{K - 1}")
        second = refiner if self.kind == "code" and refiner is not None else model
        if self.kind == "code" and refiner is None and not self.depths:
            raise ValueError(f"plan {self.plan} needs a refiner, or a depth for the model to refine its own work with")
        if mask_schedule not in (None, OFF) and all(m.masked is None for m in (model, second)):
            raise ValueError(f"mask_schedule {mask_schedule} is for a model of masked prediction (masked_layers)")
        caches = {id(m): cache_factory(self.cache, m, schedule) for m in (model, second)}
        shared = guidance if isinstance(guidance, Guidance) else Guidance(guidance)

        def stage(model: NextScaleTransformer, scales: range, depth: int | None, recompute: bool) -> Stage:
            of_stage = filters or Filter()
            if not isinstance(of_stage, Filter):
                check_count("filters", len(of_stage), K)
                of_stage = of_stage[scales.start : scales.stop]
            layers = None if depth is None else equidistant(len(model.blocks), depth)
            common = {"guidance": shared, "filters": of_stage, "new_cache": caches[id(model)], "schedule": schedule}
            common |= {"sequential": sequential, "pruning": pruning_of(self.prune, model, schedule)}
            if model.masked is not None:
                common["mask_schedule"] = read_mask_schedule(mask_schedule, schedule or model.schedule)
            return Stage(model, scales, layers=layers, recompute=recompute, **common)

        border = self.border
        stages = [stage(model, range(border), None, False)] if border else []
        for scales, depth in self._runs(K - border):
            shifted = range(scales.start + border, scales.stop + border)
            joins = self.kind in ("code", "self") and scales.start == 0
            stages.append(stage(second, shifted, depth, joins))
        return Plan(tuple(stages))

    def _runs(self, scales: int) -> list[tuple[range, int | None]]:
        if not self.depths:
            return [(range(scales), None)]
        if len(self.depths) == 1:
            return [(range(scales), self.depths[0])]
        check_count("depth", len(self.depths), scales)
        return runs_of_depth(self.depths)


def read_plan(text: str) -> tuple[str, int]:
    """("code", 6) of "code:6"; ("var", 0) of "var"."""
    found = re.fullmatch(r"var|(supernet|code|self):(\d+)", str(text).strip())
    if not found:
        raise ValueError(f"plan must be var, supernet:N, code:N or self:N, got {text!r}")
    return (found[1], int(found[2])) if found[1] else ("var", 0)


def read_depth(depth: int | Sequence[int] | str | None) -> tuple[int, ...]:
    """(6, 4, 4) of "6,4,4" or [6, 4, 4]; (4,) of 4; () of None."""
    if depth is None:
        return ()
    parts = depth.split(",") if isinstance(depth, str) else depth if isinstance(depth, Sequence) else [depth]
    if not parts or not all(str(part).strip().isdecimal() for part in parts):
        raise ValueError(f"depth must be a number of layers, or one a scale like 6,4,4; got {depth!r}")
    return tuple(int(part) for part in parts)


def read_cache(cache: str | float) -> tuple[str, float, int | None]:
    """("snapkv", 0.1, None) of "snapkv:10%"; ("full", 1.0, None) of "100%", "full" and 1.0."""
    text = f"{100 * cache:.6g}%" if isinstance(cache, float | int) else str(cache).replace(" ", "")
    if text in ("full", "100%"):
        return "full", 1.0, None
    known = ("scalekv", *BASELINES)
    found = re.fullmatch(rf"(?:({'|'.join(known)}):)?(\d+(?:\.\d+)?)%(?:,window=(\d+))?", text)
    share = float(found[2]) / 100 if found else 0.0
    if not found or not 0 < share <= 1 or (found[3] and (found[1] or known[0]) != "scalekv"):
        raise ValueError(f"cache must be like 10% or {':10%, '.join(known)}:10% up to 100%, got {cache!r}")
    return found[1] or known[0], share, int(found[3]) if found[3] else None


def read_prune(prune: str | float | Sequence[float] | None) -> tuple[float, ...]:
    """(0.4, 1.0) of "40%,100%", "0.4,1" and [0.4, 1]; () of None and of "off"."""
    if prune is None or prune == "off":
        return ()
    parts = prune.split(",") if isinstance(prune, str) else prune if isinstance(prune, Sequence) else [prune]
    texts = [f"{part:.9f}" if isinstance(part, float) else str(part).strip() for part in parts]
    found = [re.fullmatch(r"(\d+\.?\d*|\.\d+)(%?)", text) for text in texts]
    shares = [float(match[1]) / (100 if match[2] else 1) if match else 2.0 for match in found]
    if not shares or max(shares) > 1:
        raise ValueError(f"prune must be like 50% or 40%,50%,100%, shares of the last scales' tokens; got {prune!r}")
    return tuple(shares)


def pruning_of(
    prune: str | float | Sequence[float] | None, model: NextScaleTransformer, schedule: ScaleSchedule | None = None
) -> Pruning | None:
    """What a model leaves out; None for nothing.

    Raises:
        ValueError: if there are more shares than scales, or as `Pruning`.
    """
    shares, schedule = read_prune(prune), model.check_schedule(schedule)
    if not any(shares):
        return None
    if len(shares) > len(schedule):
        raise ValueError(f"prune must have at most {len(schedule)} shares, one a scale, got {prune}")
    return Pruning.of_last(shares, schedule, len(model.blocks))


def cache_factory(
    cache: str | float, model: NextScaleTransformer, schedule: ScaleSchedule | None = None
) -> Callable[[], KVCache] | None:
    """What makes the caches of a model's stages; None for the model's own full cache.

    Raises:
        ValueError: if the share is too small, or ScaleKV lacks what `nextscale calibrate` measures.
    """
    policy, share, window = read_cache(cache)
    if share < 1 and model.config.mask == "block_diagonal":
        raise ValueError(f"cache must be 100% for a block_diagonal model, whose scales read no others; got {cache}")
    schedule = schedule or model.schedule
    if policy == "full":
        return None
    if policy == "scalekv":
        index = model.config.selectivity
        if index is None:
            raise ValueError(
                f"cache {cache} needs to know the layers: nextscale calibrate --model MODEL measures them once "
                f"({', '.join(BASELINES)} need no measurement)"
            )
        index = [row[: len(schedule)] for row in index]  # a smaller size has the first of the same scales
        if (len(index), len(index[0])) != (len(model.blocks), len(schedule)):
            raise ValueError(f"cache {cache}: the model was calibrated with other layers or scales; calibrate it again")
        budgets = scalekv_budgets(share, index, schedule)

        def make() -> KVCache:
            return ScaleKVCache(budgets, schedule, window=window)

    else:
        baseline, spread = BASELINES[policy]
        budgets = spread(share, schedule, len(model.blocks))

        def make() -> KVCache:
            return baseline(budgets, schedule)

    make()  # a window beyond the budget is refused here
    return make
