"""What a generation is in the middle of, and what may be hooked into it.

Shapes: B images, C latent channels, H W the latent grid, l tokens of one scale, L all tokens, V codes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sample.draw import derive_seed, pass_uniforms
from sample.plan import Plan, Stage
from tokenizer.quantizer import PyramidQuantizer
from var.cache import KVCache
from var.conditioning import Conditioning, Prompt


@dataclass
class GenerationState:
    """A batch of images between two scales.

    Attributes:
        plan, quantizer: what is being run.
        prompt: of each image.
        negative: what guidance pushes away from; each model's own null prompt when None.
        seeds: the name of each image.
        uniforms_BLn: float32 in [0, 1), one row of draws per token; those of a second pass after those of the first.
        f_hat_BCHW: the running reconstruction, float32.
        tokens: int64 (B, l) or, bitwise, (B, l, n) of every finished scale.
        inputs: float32 (B, l, C), the transformer input of scales 1.. made so far (one more than finished scales - 1).
        stage, cond, cache: what is running; cond and cache have 2B rows [conditional; unconditional] when doubled.
        doubled: whether the transformer runs an unconditional half.
        origins: which image of the request each row is, or is a copy of.
        copies: rows made of each origin by duplication, for fresh streams.
        extras: what hooks keep about each image, tensors of B rows that `select` moves along. "given", int64 (B, L)
            or, bitwise, (B, L, n), are tokens that hold whatever is drawn, -1 where there is none.
        finite: whether what was drawn from was finite so far, on the device; None where the draw itself looks (CPU).
        narrows: scales after which rows will go (a search); until then the cache has room for no later ones.
    """

    plan: Plan
    quantizer: PyramidQuantizer
    prompt: Prompt
    negative: Prompt | None
    seeds: list[int]
    uniforms_BLn: torch.Tensor
    f_hat_BCHW: torch.Tensor
    tokens: list[torch.Tensor] = field(default_factory=list)
    inputs: list[torch.Tensor] = field(default_factory=list)
    stage: Stage | None = None
    cond: Conditioning | None = None
    cache: KVCache | None = None
    doubled: bool = False
    origins: list[int] = field(default_factory=list)
    copies: Counter = field(default_factory=Counter)
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    finite: torch.Tensor | None = None
    narrows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.origins = self.origins or list(range(len(self.seeds)))

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def scale(self) -> int:
        """The next scale to make; K when done."""
        return len(self.tokens)

    def input(self, k: int) -> torch.Tensor | None:
        """The transformer's input of scale k, (B or 2B, l, C); None for scale 0."""
        return self._double(self.inputs[k - 1]) if k else None

    def enter(self, stage: Stage) -> None:
        """Begin a stage: go on with the cache, or condition the model and prefill a new one (see `Stage`)."""
        before, self.stage = self.stage, stage
        continues = before is not None and stage.continues(before)
        if continues:
            self.cache.free_layers(before.active - stage.active)
        else:
            self.doubled = self.plan.doubles(stage, self.scale, prefilling=stage.model.reads_earlier)
            self.cond = self._condition(stage)
            self.cache = stage.make_cache()
        self._reserve()
        if self.scale and not continues and stage.model.reads_earlier:
            self._prefill(stage)

    def begin(self, k: int) -> None:
        """Begin a scale: without the unconditional half if none from here on is guided."""
        if self.doubled and not self.plan.doubles(self.stage, k):
            rows = torch.arange(len(self), device=self.f_hat_BCHW.device)
            self.cond, self.doubled = self.cond.select(rows), False
            self.cache.select(rows)
            self._reserve()

    def uniforms(self, k: int, step: int = 0) -> torch.Tensor:
        """The draws of a pass over this scale: (B, l) or, with several draws a token, (B, l, n)."""
        schedule, count = self.plan.schedule, self.quantizer.draws_per_token
        of_scale_Bln = self.uniforms_BLn[:, schedule.begins[k] : schedule.ends[k]]
        return of_scale_Bln[..., step * count : (step + 1) * count].squeeze(-1)

    def given(self, k: int) -> torch.Tensor | None:
        """This scale's given tokens, (B, l) or, bitwise, (B, l, n), -1 where there is none; None without any."""
        if "given" not in self.extras:
            return None
        given_BL, schedule, wanted = self.extras["given"], self.plan.schedule, tuple(self.uniforms(k).shape)
        given_Bl = given_BL[:, schedule.begins[k] : schedule.ends[k]]
        if tuple(given_Bl.shape) != wanted:
            whole = (wanted[0], schedule.total, *wanted[2:])
            raise ValueError(f'extras["given"] must be {whole} on this plan, got {tuple(given_BL.shape)}')
        return given_Bl

    def advance(self, k: int, tokens_Bl: torch.Tensor, code_BChw: torch.Tensor | None = None) -> None:
        """Take scale k's tokens: add their codes to f_hat and prepare the next scale's input.

        Args:
            code_BChw: code map to add instead of the tokens' own (soft tokens).
        """
        schedule = self.plan.schedule
        if code_BChw is None:
            code_BChw = self.quantizer.lookup(tokens_Bl, k, schedule)
        self.f_hat_BCHW = self.quantizer.accumulate(self.f_hat_BCHW, code_BChw, k, schedule)
        self.tokens.append(tokens_Bl)
        if k + 1 < len(schedule):
            self.inputs.append(self.quantizer.next_input(self.f_hat_BCHW, k + 1, schedule))
        self._reserve()

    def replace(self, f_hat_BCHW: torch.Tensor) -> None:
        """Go on from another reconstruction, (B, C, H, W); the next scale reads it. For hooks, after a scale."""
        self.f_hat_BCHW, schedule = f_hat_BCHW.to(self.f_hat_BCHW), self.plan.schedule
        if 0 < self.scale < len(schedule) and self.inputs:
            self.inputs[-1] = self.quantizer.next_input(self.f_hat_BCHW, self.scale, schedule)

    def skip(self, k: int) -> None:
        """Leave scale k out, as all after it: its tokens are -1, and the image stays as it is."""
        like = self.uniforms(k)
        self.tokens.append(torch.full(like.shape, -1, dtype=torch.int64, device=like.device))

    def select(self, rows: Sequence[int] | torch.Tensor) -> None:
        """Keep the images of `rows`, in that order; a row may be named several times.

        The first copy of a row goes on with its own stream of uniforms; further copies get fresh ones for the scales
        to come, derived from (seed, scale, copy).

        Args:
            rows: numbers of rows, or a bool (B,) of those to keep.

        Raises:
            ValueError: if they are neither, a row is not in [0, B), or none is left.
        """
        rows = _row_numbers(rows, len(self))
        if rows.tolist() == list(range(len(self))):
            return
        B, on_device = len(self), rows.to(self.f_hat_BCHW.device)
        both = torch.cat([on_device, on_device + B]) if self.doubled else on_device
        self.prompt = self.prompt.select(on_device)
        self.negative = self.negative.select(on_device) if self.negative is not None else None
        self.f_hat_BCHW = self.f_hat_BCHW[on_device]
        self.tokens = [tokens[on_device] for tokens in self.tokens]
        self.inputs = [x[on_device] for x in self.inputs]
        self.extras = {name: rows_B[on_device] for name, rows_B in self.extras.items()}
        self.uniforms_BLn = self.uniforms_BLn[on_device]
        self._refresh_copies(rows.tolist())
        self.seeds = [self.seeds[row] for row in rows.tolist()]
        self.origins = [self.origins[row] for row in rows.tolist()]
        if self.stage is not None:  # before the first stage there is no more to select
            self.cond = self.cond.select(both)
            self.cache.select(both)

    def _refresh_copies(self, rows: list[int]) -> None:
        begin, seen = self.plan.schedule.ends[self.scale - 1] if self.scale else 0, set()
        draws, passes = self.quantizer.draws_per_token, self.plan.passes
        for place, row in enumerate(rows):
            if row in seen:
                origin = self.origins[row]
                self.copies[origin] += 1
                key = derive_seed(self.seeds[row], self.scale, self.copies[origin])
                fresh = pass_uniforms(key, self.plan.schedule, draws, passes)
                self.uniforms_BLn[place, begin:] = fresh[begin:].to(self.uniforms_BLn)
            seen.add(row)

    def _condition(self, stage: Stage) -> Conditioning:
        if not self.doubled:
            return stage.model.condition(self.prompt)
        negative = self.negative if self.negative is not None else stage.model.null_prompt(self.prompt)
        return stage.model.condition(self.prompt.join(negative))

    def _reserve(self) -> None:
        """Room in the cache for what this stage stores; with rows to go later, for what it stores before that."""
        borders = [k + 1 for k in self.narrows if k >= self.scale]
        if self.doubled:
            borders.append(max(self.plan.guided_scales, self.scale))
        self.cache.reserve(self.plan.reserved(self.stage, min(borders, default=None)))

    def _prefill(self, stage: Stage) -> None:
        scales, schedule = range(self.scale), self.plan.schedule
        earlier = [self.input(k) for k in scales[1:]]
        inside = stage.guidance.inside(scales, schedule, len(stage.model.blocks)) if self.doubled else None
        stage.model(
            torch.cat(earlier, dim=1) if earlier else None,
            self.cond,
            scales=scales,
            cache=self.cache,
            layers=stage.layers,
            attention_backend=stage.attention_backend,
            schedule=schedule,
            after=inside,
        )

    def _double(self, x_BlC: torch.Tensor) -> torch.Tensor:
        return torch.cat([x_BlC, x_BlC]) if self.doubled else x_BlC


def _row_numbers(rows: Sequence[int] | torch.Tensor, count: int) -> torch.Tensor:
    """Rows as int64 numbers in [0, count); see `GenerationState.select`."""
    try:
        given = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"rows must be numbers in [0, {count}), or a bool for each row, got {rows!r:.80}") from None
    if not given.numel() or (given.dtype == torch.bool and not given.any()):
        raise ValueError("rows must leave one image or more, got none")
    if given.dtype == torch.bool and given.shape == (count,):
        return given.nonzero()[:, 0].cpu()
    whole, numbers = not (given.is_floating_point() or given.dtype == torch.bool), given.long().cpu()
    if not whole or numbers.ndim != 1 or not 0 <= numbers.min() <= numbers.max() < count:
        raise ValueError(f"rows must be numbers in [0, {count}), or a bool for each row, got {given.tolist()}")
    return numbers


class Hook:
    """Something plugged into the loop. Every method here changes nothing; override what you need.

    Raises:
        TypeError: on a class with an on_... method that the loop would never call.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        strange = sorted(name for name in vars(cls) if name.startswith("on_") and not hasattr(Hook, name))
        if strange:
            known = ", ".join(name for name in vars(Hook) if name.startswith("on_"))
            raise TypeError(f"{cls.__name__}.{strange[0]} is called by nothing: a hook has {known}")

    def __str__(self) -> str:
        return type(self).__name__

    def of_images(self, images: Sequence[int]) -> Hook:
        """The hook for some images of its request only, given by number (the later rounds of a search)."""
        return self

    def on_start(self, state: GenerationState) -> None:
        """Before the first scale (more rows by `state.select`, `state.extras`)."""

    def on_scale_begin(self, state: GenerationState, k: int) -> None:
        """Before scale k is drawn, or left out by the plan (tokens that are given)."""

    def on_tokens(
        self, state: GenerationState, k: int, logits_BlV: torch.Tensor, tokens_Bl: torch.Tensor
    ) -> torch.Tensor:
        """After scale k's draw: the tokens (B, l) to go on with (editing, refinement).

        Args:
            logits_BlV: what was drawn from: guided and filtered, -inf where nothing may be drawn.
            tokens_Bl: int64, not to be written into; what is returned is of their shape. Images are selected after the
                scale, not here.
        """
        return tokens_Bl

    def on_scale_end(self, state: GenerationState, k: int) -> None:
        """After scale k was added to the reconstruction, or left out (search by `state.select`, previews, progress)."""
