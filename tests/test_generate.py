"""The one loop: neutral settings equal plain decoding, a seed names an image, draws have the right frequencies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sample.draw import (
    Filter,
    _keep_top_p_by_place,
    derive_seed,
    draw,
    image_uniforms,
    keep_top_k,
    keep_top_p,
    pass_uniforms,
    smooth_weights,
)
from sample.generate import generate, smooth_code, start
from sample.guidance import Guidance, mix
from sample.plan import Plan, Stage, collaborative, plain
from sample.state import Hook
from tokenizer.quantizer import MultiScaleQuantizer
from tokenizer.schedule import ScaleSchedule
from var.conditioning import ClassPrompt
from var.transformer import NextScaleTransformer

SCHEDULE = ScaleSchedule.of("1,2,3,4")


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    config = {"depth": 3, "width": 32, "heads": 2, "vocab_size": 20, "latent_channels": 5, "num_classes": 4}
    model = NextScaleTransformer(**{**config, "schedule": SCHEDULE.spec, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def quantizer():
    torch.manual_seed(3)
    return MultiScaleQuantizer(vocab_size=20, channels=5, num_scales=4)


def tokens_of(state):
    return torch.cat(state.tokens, dim=1)


def run(plan, quantizer, seeds=(5, 6, 7, 8), **options):
    return generate(plan, quantizer, ClassPrompt(torch.tensor([s % 4 for s in seeds])), seeds, **options)


def test_a_seed_names_an_image(model, quantizer):
    together = tokens_of(run(plain(model), quantizer))
    alone = torch.cat([tokens_of(run(plain(model), quantizer, [seed])) for seed in (5, 6, 7, 8)])
    shuffled = tokens_of(run(plain(model), quantizer, [8, 5, 7, 6]))
    assert torch.equal(together, alone)
    assert torch.equal(together[[3, 0, 2, 1]], shuffled)


def test_neutral_settings_equal_plain_decoding(model, quantizer):
    wanted = tokens_of(run(plain(model), quantizer))
    same = {
        "refiner = drafter": collaborative(model, model, handover=2),
        "all layers": plain(model, layers=range(3)),
        "two stages": Plan((Stage(model, range(0, 1)), Stage(model, range(1, 4), layers=[0, 1, 2]))),
        "top-k of everything": plain(model, top_k=20),
        "per-scale filters": Plan((Stage(model, range(4), filters=[Filter()] * 4),)),
    }
    for name, plan in same.items():
        assert torch.equal(tokens_of(run(plan, quantizer)), wanted), name


def test_a_late_model_prefills_as_if_it_had_always_run(model, quantizer):
    twin = make_model()  # the same weights in another module: no cache is shared
    wanted = tokens_of(run(plain(model), quantizer))
    for handover in (1, 2, 3):
        plan = collaborative(model, twin, handover=handover)
        assert torch.equal(tokens_of(run(plan, quantizer)), wanted), handover


def test_a_stage_with_fewer_layers_frees_the_others(model, quantizer):
    seen = []

    class Watch(Hook):
        def on_scale_end(self, state, k):
            seen.append([length > 0 for length in state.cache.lengths])

    plan = Plan((Stage(model, range(0, 2)), Stage(model, range(2, 4), layers=[0, 2])))
    run(plan, quantizer, hooks=[Watch()])
    assert seen[1] == [True, True, True] and seen[2] == [True, False, True]


def test_a_stage_goes_on_where_nothing_changes():
    model = make_model()
    first = Stage(model, range(0, 2), layers=[0, 1])
    assert Stage(model, range(2, 4), layers=[1, 0]).continues(first)
    assert not Stage(model, range(2, 4), layers=[0, 1], new_cache=model.new_cache).continues(first)
    assert not Stage(make_model(), range(2, 4), layers=[0, 1]).continues(first)
    assert not Stage(model, range(2, 4), layers=[0, 1], recompute=True).continues(first)


def test_drafter_and_refiner_have_filters_of_their_own(model):
    drafts, refines = Filter(top_k=3), [Filter(top_k=4), Filter(top_k=5)]
    stages = collaborative(model, model, handover=2, drafter_filters=drafts, refiner_filters=refines).stages
    assert [stage.filter(k).top_k for stage in stages for k in stage.scales] == [3, 3, 4, 5]


def test_a_stage_with_more_layers_recomputes_their_keys(model, quantizer):
    plan = Plan((Stage(model, range(0, 2), layers=[0]), Stage(model, range(2, 4))))
    state = run(plan, quantizer)
    assert tokens_of(state).shape == (4, SCHEDULE.total)


class SelectAt(Hook):
    def __init__(self, at, rows):
        self.at, self.rows = at, rows

    def on_scale_end(self, state, k):
        if k == self.at:
            state.select(self.rows)


def test_rows_to_keep_may_be_a_mask_and_must_be_there(model, quantizer):
    for rows, seeds in ((torch.tensor([True, False, True]), [10, 12]), ([2, 0], [12, 10])):
        state = start(plain(model), quantizer, ClassPrompt(torch.tensor([0, 1, 2])), [10, 11, 12])
        state.select(rows)
        assert state.seeds == seeds
    for wrong in ([-1], [2], [0.7], torch.tensor([True])):
        with pytest.raises(ValueError, match=r"rows must be numbers in \[0, 2\), or a bool for each row"):
            state.select(wrong)


def test_select_keeps_moves_and_duplicates(model, quantizer):
    wanted = tokens_of(run(plain(model), quantizer))
    for at in range(4):
        kept = run(plain(model), quantizer, hooks=[SelectAt(at, range(4))])
        assert torch.equal(tokens_of(kept), wanted)
        moved = run(plain(model), quantizer, hooks=[SelectAt(at, [2, 0])])
        assert torch.equal(tokens_of(moved), wanted[[2, 0]]) and moved.seeds == [7, 5]
    copied = run(plain(model), quantizer, hooks=[SelectAt(1, [1, 1, 1])])
    first, second, third = tokens_of(copied)
    assert torch.equal(first, wanted[1])
    assert torch.equal(second[:5], first[:5]) and not torch.equal(second, first) and not torch.equal(third, second)
    again = run(plain(model), quantizer, hooks=[SelectAt(1, [1, 1, 1])])
    assert torch.equal(tokens_of(again), tokens_of(copied))


def test_a_late_model_finds_the_rows_that_were_selected(model, quantizer):
    """Its own condition, and that of negative prompts, and what it prefills: all moved with the rows."""
    plan = collaborative(model, make_model(seed=1), handover=3)
    options = {"negative": ClassPrompt(torch.tensor([3, 2, 1, 0]))}
    wanted = tokens_of(run(plan, quantizer, **options))
    for at in (0, 1, 2):
        moved = run(plan, quantizer, hooks=[SelectAt(at, [2, 0])], **options)
        assert torch.equal(tokens_of(moved), wanted[[2, 0]]), at


def test_copies_of_copies_have_streams_of_their_own(model, quantizer):
    """Rows of one image have one seed: copies are counted by image."""
    state = start(plain(model), quantizer, ClassPrompt(torch.tensor([0, 1])), [10, 11])
    state.select([0, 0, 1])
    state.select([0, 0, 1, 1, 2, 2])
    streams = state.uniforms_BLn.flatten(1)
    assert len(torch.unique(streams, dim=0)) == 6 and state.origins == [0, 0, 0, 0, 1, 1]
    assert torch.equal(streams[0], image_uniforms(10, SCHEDULE)[:, 0])


def test_a_finished_state_holds_no_cache(model, quantizer):
    state = run(plain(model), quantizer)
    assert state.cache.nbytes == 0 and state.cache.peak_nbytes > 0


def test_hooks_get_the_tokens_of_those_before_them(model, quantizer):
    class Next(Hook):
        def on_tokens(self, state, k, logits, tokens):
            return (tokens + 1) % 20

    wanted = run(plain(model), quantizer).tokens[0]
    assert torch.equal(run(plain(model), quantizer, hooks=[Next(), Next()]).tokens[0], (wanted + 2) % 20)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda tokens: None, r"Wrong.on_tokens must return the tokens to go on with, integers, got NoneType"),
        (lambda tokens: tokens.float(), r"integers, got torch.float32"),
        (lambda tokens: tokens[:1], r"must return tokens \(4, 1\), got \(1, 1\)"),
        (lambda tokens: tokens > 0, r"integers, got torch.bool"),
        (lambda tokens: tokens * 0 - 1, r"must return tokens in \[0, 20\), got -1 to -1"),
        (lambda tokens: tokens * 0 + 20, r"must return tokens in \[0, 20\), got 20 to 20"),
    ],
)
def test_hooks_that_give_no_tokens_are_named(model, quantizer, made, said):
    class Wrong(Hook):
        def on_tokens(self, state, k, logits, tokens):
            return made(tokens)

    with pytest.raises((TypeError, ValueError), match=said):
        run(plain(model), quantizer, hooks=[Wrong()])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_tokens_of_hooks_are_int64_whatever_they_were(model, quantizer, dtype):
    class Narrow(Hook):
        def on_tokens(self, state, k, logits, tokens):
            return tokens.to(dtype)

    made, plainly = run(plain(model), quantizer, hooks=[Narrow()]), run(plain(model), quantizer)
    assert all(tokens.dtype == torch.int64 for tokens in made.tokens)
    assert torch.equal(tokens_of(made), tokens_of(plainly))


@pytest.mark.parametrize("rows", [[1, 0], [1, 0, 2, 3], [0, 0, 0, 0]])
def test_a_hook_may_select_images_after_a_scale_only(model, quantizer, rows):
    class Early(Hook):
        def on_tokens(self, state, k, logits, tokens):
            state.select(rows)
            return tokens

    with pytest.raises(ValueError, match=r"Early\.on_tokens selected images"):
        run(plain(model), quantizer, hooks=[Early()])


@pytest.mark.parametrize("rows", [[], torch.zeros(4, dtype=torch.bool), None, "ab", [[0]], [0.5], [4], [-1]])
def test_rows_that_cannot_be_selected(model, quantizer, rows):
    class Pick(Hook):
        def on_scale_end(self, state, k):
            state.select(rows)

    with pytest.raises(ValueError, match="rows must"):
        run(plain(model), quantizer, hooks=[Pick()])


def test_methods_that_nothing_calls_are_no_hook():
    with pytest.raises(TypeError, match=r"Typo.on_token is called by nothing: a hook has on_start, on_scale_begin, "):

        class Typo(Hook):
            def on_token(self, state, k, logits, tokens):
                return tokens


def test_tokens_that_are_given_hold_by_themselves(model, quantizer):
    class Give(Hook):
        def __init__(self, given_BL):
            self.given_BL = given_BL

        def on_start(self, state):
            state.extras["given"] = self.given_BL

    given_BL = torch.full((4, 30), -1)
    given_BL[1, 1:9], given_BL[3, 25] = 7, 0
    made = tokens_of(run(plain(model), quantizer, hooks=[Give(given_BL)]))
    assert torch.equal(made[given_BL >= 0], given_BL[given_BL >= 0])
    assert torch.equal(made[0], tokens_of(run(plain(model), quantizer))[0])
    with pytest.raises(ValueError, match=r'extras\["given"\] must be \(4, 30\) on this plan, got \(4, 7\)'):
        run(plain(model), quantizer, hooks=[Give(given_BL[:, :7])])


def test_another_reconstruction_is_what_the_next_scale_reads(model, quantizer):
    class Fade(Hook):
        def on_scale_end(self, state, k):
            if k == 1:
                state.replace(state.f_hat_BCHW * 0)
                inputs.append(state.inputs[-1])

    inputs = []
    made = run(plain(model), quantizer, hooks=[Fade()])
    assert torch.equal(inputs[0], quantizer.next_input(torch.zeros_like(made.f_hat_BCHW), 2, model.schedule))
    assert not torch.equal(made.tokens[2], run(plain(model), quantizer).tokens[2])


def test_no_guidance_runs_no_unconditional_half(model, quantizer):
    rows = []

    class Rows(Hook):
        def on_scale_end(self, state, k):
            rows.append(len(state.cond))

    off = run(plain(model, guidance=0.0), quantizer, hooks=[Rows()])
    assert rows == [4] * 4
    zeros = run(plain(model, guidance=[0.0, 0.0, 0.0, 1e-12]), quantizer)
    assert torch.equal(tokens_of(off), tokens_of(zeros))
    late = run(plain(model, guidance=[0.0, 0.0, 0.0, 4.0]), quantizer)
    assert torch.equal(tokens_of(late)[:, :14], tokens_of(off)[:, :14])
    assert not torch.equal(late.tokens[3], off.tokens[3])
    stages = Stage(model, range(2), guidance=Guidance(0.0)), Stage(model, range(2, 4), guidance=Guidance(4.0))
    assert not torch.equal(run(Plan(stages), quantizer).tokens[3], off.tokens[3])
    guided = run(plain(model, guidance=4.0), quantizer)
    assert torch.equal(guided.tokens[0], off.tokens[0])  # the linear ramp leaves scale 0 alone
    assert not torch.equal(tokens_of(guided), tokens_of(off))


def test_guided_logits_follow_the_published_mix():
    conditional, unconditional = torch.randn(2, 3, 5, 7)
    weight = Guidance(1.5).weight(4, 10)
    assert weight == pytest.approx(1.5 * 4 / 9)
    assert Guidance(1.5).weight(0, 1) == 1.5  # the only scale is the last one
    wanted = (1 + weight) * conditional - weight * unconditional
    torch.testing.assert_close(mix(torch.cat([conditional, unconditional]), weight), wanted)


def test_a_negative_prompt_replaces_the_null_prompt(model, quantizer):
    prompt = ClassPrompt(torch.tensor([1, 2]))
    null = generate(plain(model), quantizer, prompt, [1, 2])
    same = generate(plain(model), quantizer, prompt, [1, 2], negative=ClassPrompt(torch.tensor([4, 4])))
    other = generate(plain(model), quantizer, prompt, [1, 2], negative=ClassPrompt(torch.tensor([3, 3])))
    assert torch.equal(tokens_of(null), tokens_of(same)) and not torch.equal(tokens_of(null), tokens_of(other))


def test_smoothing_keeps_seeds_and_changes_pictures(model, quantizer):
    hard, soft = (run(plain(model), quantizer, smooth=smooth) for smooth in (False, True))
    alone = run(plain(model), quantizer, [7], smooth=True)
    assert not torch.equal(hard.f_hat_BCHW, soft.f_hat_BCHW)
    torch.testing.assert_close(alone.f_hat_BCHW[0], soft.f_hat_BCHW[2], atol=1e-4, rtol=0)


@torch.no_grad()
def test_smooth_codes_are_mixes_by_each_scales_own_noise(model, quantizer):
    """Sharper from scale to scale, up to the last; what is given, or a hook's, is a code."""
    state = start(plain(model), quantizer, ClassPrompt(torch.tensor([1, 2])), [3, 4])
    state.extras["given"] = torch.full((2, 30), -1)
    state.extras["given"][0, 2] = 0  # the second token of scale 1
    for k in (1, 3):
        length = SCHEDULE.lengths[k]
        logits, drawn = torch.randn(2, length, 20), torch.zeros(2, length, dtype=torch.int64)
        tokens = drawn.clone()
        tokens[1, 3] = 7
        weights = []
        for row, seed in enumerate((3, 4)):
            noise = torch.Generator().manual_seed(derive_seed(seed, k))
            weights.append(smooth_weights(logits[row : row + 1], k / 3, noise))
        weights = torch.cat(weights)
        weights[1, 3] = torch.nn.functional.one_hot(torch.tensor(7), 20)
        if k == 1:
            weights[0, 1] = torch.nn.functional.one_hot(torch.tensor(0), 20)
        expected = quantizer.blend(weights, k, SCHEDULE)
        torch.testing.assert_close(smooth_code(state, k, logits, tokens, drawn), expected)


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda m: Plan(()), "no stage"),
        (lambda m: Plan((Stage(m, range(0, 2)), Stage(m, range(1, 4)))), "once"),
        (lambda m: Plan((Stage(m, range(0, 3)),)), "scales 0 to 3"),
        (lambda m: collaborative(m, m, handover=4), "handover"),
        (lambda m: collaborative(m, make_model(vocab_size=21), handover=2), "vocab_size"),
        (lambda m: collaborative(m, make_model(schedule="1,2,3,5"), handover=2), "schedule"),
        (lambda m: plain(m, layers=[0, 3]), "layers"),
        (lambda m: plain(m, top_p=0), "top_p"),
        (lambda m: plain(m, top_k=-1), "top_k"),
        (lambda m: plain(m, temperature=0), "temperature"),
        (lambda m: plain(m, temperature=1e-7), "temperature"),
        (lambda m: plain(m, temperature=1e7), "temperature"),
        (lambda m: plain(m, guidance=[1.0, 2.0]), "guidance"),
        (lambda m: plain(m, guidance=[1.0] * 5), "guidance"),
        (lambda m: plain(m, guidance=-1.0), "guidance"),
        (lambda m: plain(m, guidance=1001.0), "guidance"),
        (lambda m: plain(m, guidance=Guidance(1.0, blocks=(3,))), "guidance blocks"),
        (lambda m: Plan((Stage(m, range(4), filters=[Filter()] * 5),)), "as many filters"),
        (lambda m: collaborative(m, make_model(latent_channels=6), handover=2), "latent_channels"),
        (lambda m: collaborative(m, make_model(num_classes=5), handover=2), "num_classes"),
        (lambda m: collaborative(m, make_model(conditioning="text"), handover=2), "conditioning"),
    ],
)
def test_invalid_plans_are_refused_by_name(model, build, named):
    with pytest.raises(ValueError, match=named):
        build(model)


def test_mismatched_requests_are_refused(model, quantizer):
    prompt = ClassPrompt(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="seeds"):
        generate(plain(model), quantizer, prompt, [1])
    for seed in (-2, 2**63):
        with pytest.raises(ValueError, match="seed must be"):
            generate(plain(model), quantizer, prompt, [1, seed])
    for sizes in ({"vocab_size": 19, "channels": 5}, {"vocab_size": 20, "channels": 6}):
        with pytest.raises(ValueError, match="belong together"):
            generate(plain(model), MultiScaleQuantizer(**sizes), prompt, [1, 2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value):
    logits = torch.zeros(2, 3, 5)
    logits[1, 2, 4] = value
    with pytest.raises(ValueError, match="logits are not finite"):
        draw(logits, torch.rand(2, 3))


def test_draws_have_the_right_frequencies():
    logits = torch.tensor([1.0, 0.0, -1.0, -torch.inf, 2.0])
    uniforms = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draw(logits.expand(200_000, 5), uniforms), minlength=5) / 200_000
    torch.testing.assert_close(counts, logits.softmax(-1), atol=5e-3, rtol=0)
    assert counts[3] == 0


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 40), st.floats(0.05, 1.0))
def test_filters_never_leave_nothing_and_draws_stay_inside(seed, V, k, p):
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(seed)) * 5
    assert torch.equal(Filter(top_k=float(k))(logits), Filter(top_k=k)(logits))  # as a file may have it
    kept = keep_top_p(keep_top_k(logits, k), p)
    allowed = kept > -torch.inf
    assert allowed.any(-1).all() and (allowed.sum(-1) <= max(k, 1)).all()
    assert allowed.gather(-1, logits.argmax(-1, keepdim=True)).all()
    for u in (0.0, 0.5, 1 - 2**-24):
        tokens = draw(kept, torch.full((6,), u))
        assert allowed.gather(-1, tokens[:, None]).all()


@pytest.mark.parametrize("last", [False, True])
def test_temperature_comes_before_the_filters_or_after_them(last):
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]])
    made = Filter(top_p=0.8, temperature=3.0, temperature_last=last)(logits)
    wanted = keep_top_p(logits, 0.8) / 3 if last else keep_top_p(logits / 3, 0.8)
    assert torch.equal(made, wanted) and (made > -torch.inf).sum() == (2 if last else 3)


def test_the_smallest_set_above_top_p_is_kept():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert keep_top_p(logits, 0.74).isfinite().tolist() == [[True, True, False, False]]
    assert keep_top_p(logits, 0.76).isfinite().sum() >= 3


def test_the_largest_uniform_draws_a_token_that_there_is():
    """However the sum of probabilities is rounded."""
    logits = torch.randn(3000, 300, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, -100:] = -torch.inf
    tokens = draw(logits, torch.full((3000,), 1 - 2**-24))
    assert tokens.max() < 200


def test_streams_are_reproducible_and_distinct():
    first, *others = pass_uniforms(7, SCHEDULE, 2, 3).split(2, dim=-1)
    assert torch.equal(first, image_uniforms(7, SCHEDULE, 2))
    assert not torch.equal(others[0], first) and not torch.equal(others[0], others[1])
    assert torch.equal(image_uniforms(7, SCHEDULE), image_uniforms(7, SCHEDULE))
    assert not torch.equal(image_uniforms(7, SCHEDULE), image_uniforms(8, SCHEDULE))
    seeds = (7, 7 + 2**32, 7 + 5 * 2**33, 2**63 - 1, 2**62 - 1)  # not only their lower halves count
    streams = [image_uniforms(seed, SCHEDULE, 50) for seed in seeds]
    assert len({tuple(stream[:, 0].tolist()) for stream in streams}) == len(seeds)
    for stream in streams:
        assert stream.dtype == torch.float32 and stream.min() >= 0 and stream.max() < 1
        assert abs(stream.mean() - 0.5) < 4 / (12 * stream.numel()) ** 0.5
    keys = {derive_seed(a, b, c) for a in range(20) for b in range(5) for c in range(5)}
    assert len(keys) == 500 and all(0 <= key < 2**63 for key in keys)


@given(st.integers(1, 40), st.floats(0.01, 0.99), st.integers(0, 2**31), st.booleans())
def test_top_p_by_values_is_top_p_by_places(vocab, p, seed, coarse):
    """With ties on the border as well (`coarse` logits), and with tokens that are forbidden already."""
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    logits = logits.round() if coarse else logits
    logits[0, : vocab // 2] = -torch.inf
    assert torch.equal(keep_top_p(logits, p), _keep_top_p_by_place(logits, p))
