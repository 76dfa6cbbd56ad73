"""The one generation loop. Every method of the field is a plan, a cache or a hook given to it.

Shapes: B images, R rows (B, or 2B with guidance), l tokens of one scale, D width, V codes, n bits of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import repeat

from sample.draw import check_finite, check_seeds, derive_seed, draw, pass_uniforms, smooth_weights, watch
from sample.guidance import mix
from sample.masked import redraw
from sample.plan import Plan
from sample.state import GenerationState, Hook
from tokenizer.quantizer import PyramidQuantizer
from var.conditioning import Prompt

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def start(
    plan: Plan,
    quantizer: PyramidQuantizer,
    prompt: Prompt,
    seeds: Sequence[int],
    *,
    negative: Prompt | None = None,
) -> GenerationState:
    """The state before the first scale: every image's uniforms drawn, an empty reconstruction.

    Raises:
        ValueError: if the numbers of seeds and prompts differ, or the quantiser is not the plan's.
    """
    seeds = check_seeds(seeds)
    if len(seeds) != len(prompt):
        raise ValueError(f"seeds must name one image per prompt: got {len(seeds)} seeds for {len(prompt)} prompts")
    wanted = plan.stages[0].model.config
    for name, mine, theirs in (
        ("vocab_size", quantizer.vocab_size, wanted.vocab_size),
        ("latent_channels", quantizer.channels, wanted.latent_channels),
    ):
        if mine != theirs:
            raise ValueError(f"tokenizer and transformer do not belong together: {name} is {mine} and {theirs}")
    device = next(plan.stages[0].model.parameters()).device
    draws = quantizer.draws_per_token
    uniforms = torch.stack([pass_uniforms(seed, plan.schedule, draws, plan.passes) for seed in seeds]).to(device)
    f_hat = quantizer.start(len(seeds), plan.schedule, device)
    return GenerationState(plan, quantizer, prompt, negative, seeds, uniforms, f_hat)


@torch.no_grad()
def generate(
    plan: Plan,
    quantizer: PyramidQuantizer,
    prompt: Prompt,
    seeds: Sequence[int],
    *,
    negative: Prompt | None = None,
    hooks: Sequence[Hook] = (),
    smooth: bool = False,
) -> GenerationState:
    """Generate one image per seed (VAR, section 3.3).

    Args:
        plan: which model, layers, guidance and filters make each scale.
        prompt: B class labels or texts.
        seeds: B integers in [0, 2**63); a seed names an image, whatever else is in the batch.
        negative: what guidance pushes away from, instead of the learned null prompt.
        hooks: called in order, at every scale.
        smooth: add Gumbel-softmax mixes of codes instead of the drawn codes (VAR's `more_smooth`).

    Returns:
        The final state: `f_hat_BCHW` is ready for the decoder, `tokens` holds every scale.

    Raises:
        ValueError: as `start`, or if logits are not finite.
    """
    state = start(plan, quantizer, prompt, seeds, negative=negative)
    for hook in hooks:
        hook.on_start(state)
    play(state, hooks, smooth=smooth)
    check_finite(state.finite)
    return state


def play(state: GenerationState, hooks: Sequence[Hook] = (), *, smooth: bool = False) -> GenerationState:
    """Make every scale of a state's plan, one after the other; without gradients only (`generate`)."""
    for stage in state.plan.stages:
        state.enter(stage)
        for k in stage.scales:
            state.begin(k)
            for hook in hooks:
                hook.on_scale_begin(state, k)
            if stage.draws(k):
                make_scale(state, k, hooks, smooth=smooth)
            else:
                state.skip(k)
            for hook in hooks:
                hook.on_scale_end(state, k)
    state.cache.reset()
    return state


def make_scale(state: GenerationState, k: int, hooks: Sequence[Hook], *, smooth: bool) -> None:
    """Draw scale k and add it to the image."""
    logits, drawn = draw_in_turn(state, k) if state.stage.in_turn(k) else draw_at_once(state, k)
    if len(state.stage.settled(k)) > 1:
        logits, drawn = redraw(state, k, logits, drawn)
    tokens, rows = drawn, state.origins
    for hook in hooks:
        made = hook.on_tokens(state, k, logits, tokens)
        if state.origins is not rows:
            raise ValueError(f"{hook}.on_tokens selected images: their tokens are drawn already")
        tokens = check_tokens(hook, made, tokens, state.quantizer.vocab_size)
    given = state.given(k)
    if given is not None:
        tokens = torch.where(given >= 0, given, tokens)
    state.advance(k, tokens, smooth_code(state, k, logits, tokens, drawn) if smooth else None)


def check_tokens(hook: Hook, tokens: object, before: torch.Tensor, vocab: int) -> torch.Tensor:
    """What a hook's `on_tokens` made of the tokens `before`, int64.

    Raises:
        TypeError, ValueError: naming the hook, unless it is like them and (on a CPU) in range.
    """
    where = f"{hook}.on_tokens"
    if tokens is before:
        return before
    if not isinstance(tokens, torch.Tensor) or tokens.dtype not in INTEGERS:
        kind = tokens.dtype if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise TypeError(f"{where} must return the tokens to go on with, integers, got {kind}")
    if tokens.shape != before.shape:
        raise ValueError(f"{where} must return tokens {tuple(before.shape)}, got {tuple(tokens.shape)}")
    if tokens.device.type == "cpu" and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab:  # else a wait
        raise ValueError(f"{where} must return tokens in [0, {vocab}), got {int(tokens.min())} to {int(tokens.max())}")
    return tokens.to(before)


def draw_at_once(state: GenerationState, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and tokens of scale k, all tokens drawn independently of one another."""
    logits = scale_logits(state, k)
    return logits, draw(logits, state.uniforms(k))


def draw_in_turn(state: GenerationState, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and tokens of scale k, each token drawn after those before it were (`var.sequential`).

    Guidance acts on the transformer's logits; what the head adds to them is the conditional half's. A token that is
    given stands for what would be drawn there, so that those after it agree with it.
    """
    stage, uniforms_Bl, given_Bl = state.stage, state.uniforms(k), state.given(k)
    features_RlD = scale_features(state, k)
    parallel_BlV = stage.model.head.project(guided(state, k, features_RlD))
    features_BlD, before_B1, past, logits, tokens = features_RlD[: len(state)], None, None, [], []
    for here in (slice(i, i + 1) for i in range(features_BlD.shape[1])):
        correction_B1V, past = stage.model.sequential.step(features_BlD[:, here], before_B1, past)
        logits_B1V = stage.filter(k)(parallel_BlV[:, here] + correction_B1V.float())
        before_B1 = draw(logits_B1V, uniforms_Bl[:, here])
        if given_Bl is not None:
            before_B1 = torch.where(given_Bl[:, here] >= 0, given_Bl[:, here], before_B1)
        logits.append(logits_B1V)
        tokens.append(before_B1)
    return torch.cat(logits, dim=1), torch.cat(tokens, dim=1)


def scale_logits(state: GenerationState, k: int) -> torch.Tensor:
    """Guided, filtered logits of scale k, (B, l, V) or, bitwise, (B, l, n, 2); the cache takes its keys."""
    features_BlD = guided(state, k, scale_features(state, k))
    return state.stage.filter(k)(state.stage.model.head.project(features_BlD))


def scale_features(state: GenerationState, k: int) -> torch.Tensor:
    """What the head of scale k projects, (R, l, D) float32, of B rows, or 2B when guided; the cache takes its keys."""
    stage, model, schedule = state.stage, state.stage.model, state.plan.schedule
    inside = stage.guidance.inside(range(k, k + 1), schedule, len(model.blocks)) if state.doubled else None
    hidden = model(
        state.input(k),
        state.cond,
        scales=range(k, k + 1),
        cache=state.cache,
        layers=stage.layers,
        schedule=schedule,
        after=inside,
    )
    features_RlD = model.head.features(hidden, state.cond.head_B2D)
    state.finite = watch(features_RlD, state.finite)
    return features_RlD


def guided(state: GenerationState, k: int, doubled: torch.Tensor) -> torch.Tensor:
    """Rows [conditional; unconditional] mixed by the guidance of scale k; the rows themselves where there is none."""
    guidance = state.stage.guidance
    if not state.doubled:
        return doubled
    return mix(doubled, guidance.weight(k, len(state.plan.schedule)) if guidance.on_logits else 0.0)


def smooth_code(
    state: GenerationState, k: int, logits_BlV: torch.Tensor, tokens_Bl: torch.Tensor, drawn_Bl: torch.Tensor
) -> torch.Tensor:
    """Scale k's code map as a Gumbel-softmax mix of codes, its noise from each image's own seed.

    Tokens that are given, and those that a hook changed, stay what they are.
    """
    schedule = state.plan.schedule
    ratio = k / max(len(schedule) - 1, 1)
    generators = [torch.Generator().manual_seed(derive_seed(seed, k)) for seed in state.seeds]
    weights = [smooth_weights(row[None], ratio, g) for row, g in zip(logits_BlV, generators)]
    code_BChw = state.quantizer.blend(torch.cat(weights), k, schedule)
    fixed, given = tokens_Bl != drawn_Bl, state.given(k)
    if given is not None:
        fixed = fixed | (given >= 0)
    (h, w), (height, width) = schedule.sides[k], code_BChw.shape[2:]
    is_fixed = fixed.reshape(len(fixed), h * w, -1).any(dim=-1).reshape(-1, h, w)
    is_fixed = repeat(is_fixed, "b h w -> b 1 (h p) (w q)", p=height // h, q=width // w)
    return torch.where(is_fixed, state.quantizer.lookup(tokens_Bl, k, schedule), code_BChw)
