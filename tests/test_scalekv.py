"""Compressed caches: bytes by the formula, budgets that add up, the observed grid, what each policy keeps."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nextscale
from tokenizer.schedule import SCHEDULES, ScaleSchedule
from var.cache import KVCache
from var.eviction import (
    SlidingWindowCache,
    SnapKVCache,
    StreamingCache,
    pyramid_budgets,
    uniform_budgets,
    window_size,
)
from var.scalekv import (
    ScaleKVCache,
    SelectivityCache,
    drafters,
    observation_window,
    scalekv_budgets,
    smallest_budget,
)

SCHEDULE = ScaleSchedule.of("1,2,3,4,5,6,8")  # history of the last scale: 91 tokens
LAYERS, B, H, D = 4, 2, 3, 8
INDEX = [[0.1 * layer + 0.01 * k for k in range(7)] for layer in range(LAYERS)]


def feed(cache, schedule=SCHEDULE, layers=LAYERS, dtype=torch.bfloat16, prefill=1):
    """Runs random keys through a cache, the first `prefill` scales at once; yields after every scale."""
    generator = torch.Generator().manual_seed(0)
    for k in range(prefill - 1, len(schedule)):
        begin = 0 if k == prefill - 1 else schedule.begins[k]
        for layer in range(layers):
            q, key, value = (
                torch.randn(B, H, schedule.ends[k] - begin, D, generator=generator).to(dtype) for _ in range(3)
            )
            cache.update(layer, key, value, begin=begin, q_BHld=q)
        yield k


POLICIES = {
    "window": lambda share: SlidingWindowCache(uniform_budgets(share, SCHEDULE, LAYERS), SCHEDULE),
    "streaming": lambda share: StreamingCache(uniform_budgets(share, SCHEDULE, LAYERS), SCHEDULE),
    "snapkv": lambda share: SnapKVCache(uniform_budgets(share, SCHEDULE, LAYERS), SCHEDULE),
    "pyramidkv": lambda share: SnapKVCache(pyramid_budgets(share, SCHEDULE, LAYERS), SCHEDULE),
    "scalekv": lambda share: ScaleKVCache(scalekv_budgets(share, INDEX, SCHEDULE), SCHEDULE),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("prefill", [1, 5])
def test_bytes_are_those_of_the_budgets(policy, share, prefill):
    """Stored bytes = 2 (k, v) x rows x heads x width x 2 bytes x what the budgets of the next scale allow."""
    cache = POLICIES[policy](share)
    a_token = 2 * B * H * D * 2
    held = [0] * LAYERS
    for k in feed(cache, prefill=prefill):
        if k + 1 < len(SCHEDULE):
            new = SCHEDULE.ends[k] if k == prefill - 1 else SCHEDULE.lengths[k]
            held = [min(n + new, row[k + 1]) for n, row in zip(held, cache.budgets)]
        assert cache.lengths == held
        assert cache.nbytes == sum(held) * a_token
    assert cache.nbytes <= round(share * 91) * LAYERS * a_token


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_the_peak_is_the_budgets_and_one_layer(share):
    plain, squeezed = KVCache(LAYERS, SCHEDULE.begins[-1]), POLICIES["snapkv"](share)
    for _ in feed(plain):
        pass
    for _ in feed(squeezed):
        pass
    a_token, budget = 2 * B * H * D * 2, round(share * 91)
    assert plain.peak_nbytes == (LAYERS * 91 + 155) * a_token
    assert squeezed.peak_nbytes == (LAYERS * budget + budget + 64) * a_token


@settings(max_examples=60)
@given(
    st.floats(0.02, 1.0),
    st.integers(1, 33),
    st.sampled_from(["scenes64", "var256", "var512"]),
    st.integers(0, 1000),
    st.floats(0.0, 0.5),
)
def test_budgets_add_up_to_the_uniform_ones(share, layers, schedule, seed, drafter_share):
    schedule = SCHEDULES[schedule]
    index = torch.rand(layers, len(schedule), generator=torch.Generator().manual_seed(seed)).tolist()
    budgets = scalekv_budgets(share, index, schedule, drafter_share=drafter_share)
    uniform = round(share * schedule.begins[-1])
    for k, begin in enumerate(schedule.begins):
        column = [row[k] for row in budgets]
        assert all(0 <= tokens <= begin for tokens in column)
        if begin <= uniform:
            assert column == [begin] * layers
        else:  # nothing is wasted but what cannot be split evenly
            assert uniform * layers - layers < sum(column) <= uniform * layers


def test_a_layer_is_promised_no_more_than_it_still_has():
    """What a refiner forgot is gone: as a drafter of a later scale it holds what it kept and the scale after that."""
    schedule = SCHEDULES["var256"]
    index = torch.rand(8, len(schedule), generator=torch.Generator().manual_seed(0)).tolist()
    for share in (0.3, 0.6):
        for row in scalekv_budgets(share, index, schedule, drafter_share=0.1):
            assert all(row[k] <= row[k - 1] + schedule.lengths[k - 1] for k in range(1, len(schedule)))


def test_refiners_shrink_from_scale_to_scale_as_published():
    """0.92 and 0.11 of the uniform budget, as 600 and 70 of 650; here of 27 tokens. Drafters share the rest."""
    budgets = scalekv_budgets(0.3, INDEX, SCHEDULE, drafter_share=0.5)
    refiners = [round(27 * (0.92 - 0.11 * j)) for j in range(3)]
    assert [row[4:] for row in budgets[2:]] == [refiners] * 2
    assert [row[4:] for row in budgets[:2]] == [[2 * 27 - tokens for tokens in refiners]] * 2
    just_fits = scalekv_budgets(30 / 91, INDEX, SCHEDULE, drafter_share=0.5)  # at scale 4: the next is the first beyond
    assert [row[4:6] for row in just_fits[2:]] == [[30, round(30 * 0.92)]] * 2


def test_drafters_are_two_layers_of_thirty_two():
    index = torch.rand(32, len(SCHEDULE), generator=torch.Generator().manual_seed(0)).tolist()
    budgets = scalekv_budgets(0.3, index, SCHEDULE)
    assert sum(row[k] > 27 for row in budgets for k in (4, 5, 6)) == 2 * 3
    assert sum(map(len, drafters(index[:2], [4, 5, 6], 0.25).values())) == 2  # 1.5 of 6, rounded
    even = [[0.5, 0.1], [0.5, 0.9]]  # a scale at which all layers are alike has no drafter before another
    assert drafters(even, [0, 1], 0.25) == {0: [], 1: [0]}


def test_drafters_keep_more_than_refiners():
    budgets = scalekv_budgets(0.3, INDEX, SCHEDULE, drafter_share=0.25)
    roles = drafters(INDEX, [5, 6], 0.25)
    assert roles == {5: [0], 6: [0]}  # the smallest index at every scale is layer 0's
    for k in (5, 6):
        assert budgets[0][k] > max(row[k] for row in budgets[1:])


def test_the_observed_grid():
    assert observation_window(4, 4, 4) == list(range(16))
    assert observation_window(8, 8, 4) == [r * 8 + c for r in (0, 2, 4, 6) for c in (0, 2, 4, 6)]
    assert observation_window(6, 3, 3) == [r * 3 + c for r in (0, 2, 4) for c in (0, 1, 2)]
    assert observation_window(8, 2, 4) == [r * 2 + c for r in (0, 2, 4, 6) for c in (0, 1)]
    assert observation_window(1, 1, 4) == [0]
    assert observation_window(13, 13, 4)[:2] == [1 * 13 + 1, 1 * 13 + 4]


@pytest.mark.parametrize("schedule", ["1,2,3,4,5,6,8", "1x2,2x4,3x6,4x8"])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.6])
def test_the_window_stays_and_never_outgrows_the_budget(schedule, share):
    schedule = ScaleSchedule.of(schedule)
    budgets = uniform_budgets(share, schedule, LAYERS)
    cache = ScaleKVCache(budgets, schedule)
    assert cache.window == max(side for side in (1, 2, 3, 4) if side == 1 or 2 * side**2 <= budgets[0][-1])
    assert cache.window**2 <= smallest_budget(budgets, schedule)
    for _ in feed(cache, schedule):
        assert max(cache.lengths) <= max(budgets[0])
    with pytest.raises(ValueError, match="fewer than its window"):
        ScaleKVCache(uniform_budgets(0.05, schedule, LAYERS), schedule, window=5)


def keep_of(cache, k, S, budget):
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(B, H, S, D, generator=generator)
    return cache.keep(0, k, torch.randn(B, H, SCHEDULE.lengths[k], D, generator=generator), keys, budget, 1.0), keys


def test_windows_and_poolings_that_cannot_be_are_named():
    budgets = [[9] * len(SCHEDULE)]
    with pytest.raises(ValueError, match="window must be 1 or more cells a side, got 0"):
        ScaleKVCache(budgets, SCHEDULE, window=0)
    for make in (ScaleKVCache, SnapKVCache):
        with pytest.raises(ValueError, match=r"kernel must be odd, .* got 4"):
            make(budgets, SCHEDULE, kernel=4)


@given(st.floats(0.011, 1.0), st.integers(1, 40), st.integers(1, 30))
def test_a_pyramid_falls_in_equal_steps(share, layers, steepness):
    """As many tokens as with equal budgets, the window in every layer, no more than there is, and no faster growth."""
    even = uniform_budgets(share, SCHEDULE, layers)
    budgets = pyramid_budgets(share, SCHEDULE, layers, steepness=steepness)
    for k, begin in enumerate(SCHEDULE.begins):
        column, mean = [row[k] for row in budgets], even[0][k]
        assert sum(column) == mean * layers and column == sorted(column, reverse=True)
        assert column[0] <= begin and (min(column) >= 1 or k == 0)
        assert all(abs((a - b) - (column[0] - column[-1]) / (layers - 1)) <= 1 for a, b in pairwise(column))
        if k:
            assert all(row[k] - row[k - 1] <= SCHEDULE.lengths[k - 1] for row in budgets)
            window = window_size(mean, SCHEDULE.lengths[k - 1])
            rest = mean - window
            least = max(rest // steepness, min(rest, 1))
            if layers > 1 and 2 * rest - least <= begin - window:
                assert (column[0], column[-1]) == (window + 2 * rest - least, window + least)


def test_the_pyramid_of_the_released_code():
    """30 layers, a tenth of 424 tokens: 42 on average, of which 16 vote, and beside them 26 // 20 to 52 - 1."""
    column = [row[-1] for row in pyramid_budgets(0.1, SCHEDULES["var256"], 30)]
    assert (column[0], column[-1], sum(column)) == (16 + 51, 16 + 1, 42 * 30)
    cache = SnapKVCache(pyramid_budgets(0.3, SCHEDULE, LAYERS), SCHEDULE)
    kept = keep_of(cache, 5, 60, cache.budgets[-1][6])[0]
    assert kept.shape[-1] < 27 and (kept[..., -13:] == torch.arange(47, 60)).all()  # half of 27 vote, in every layer


def test_what_each_policy_keeps():
    k, S, budget = 5, 60, 20  # scale 5 is 6x6: the last 36 of the 60
    assert keep_of(POLICIES["window"](0.3), k, S, budget)[0].tolist() == list(range(40, 60))
    assert keep_of(POLICIES["streaming"](0.3), k, S, budget)[0].tolist() == [*range(5), *range(45, 60)]
    recent = keep_of(POLICIES["snapkv"](0.3), k, S, budget)[0]
    assert recent.shape == (B, H, budget) and (recent[..., -10:] == torch.arange(50, 60)).all()
    spread = keep_of(ScaleKVCache(uniform_budgets(0.3, SCHEDULE, LAYERS), SCHEDULE, window=3), k, S, budget)[0]
    window = torch.tensor(observation_window(6, 6, 3)) + 24
    assert spread.shape == (B, H, budget) and (spread.diff(dim=-1) > 0).all()
    assert torch.isin(window, spread[0, 0]).all() and torch.isin(window, spread[1, 2]).all()


def test_what_is_attended_to_is_kept():
    cache = POLICIES["scalekv"](0.3)
    k, S = 5, 60
    q, keys = torch.ones(1, 1, 36, D), torch.zeros(1, 1, S, D)
    keys[0, 0, [3, 11, 20]] = 1.0  # logit 8 against 0
    kept = cache.keep(0, k, q, keys, cache.window**2 + 9, 1.0)[0, 0].tolist()
    assert {3, 11, 20} <= set(kept)


def test_a_prefill_is_observed_at_its_last_scale():
    """Queries of the scales before it, run in the same pass, choose nothing."""
    cache = POLICIES["scalekv"](0.3)
    keys, q = torch.randn(B, H, 91, D), torch.randn(B, H, 91, D)
    alone = cache.keep(0, 5, q[:, :, -36:], keys, 27, 1.0)
    assert torch.equal(cache.keep(0, 5, q, keys, 27, 1.0), alone)


def test_selectivity_is_the_papers_formula():
    schedule = ScaleSchedule.of("1,2,3")
    cache = SelectivityCache(1, schedule, top=0.5)
    for begin, end in ((0, 1), (1, 5), (5, 14)):
        q, k = (torch.randn(B, H, end - begin, D) for _ in range(2))
        keys, _ = cache.update(0, k, k, begin=begin, q_BHld=q, scale=0.3)
    weights = (q @ keys.mT * 0.3).softmax(-1)
    narrow = weights[..., :5].topk(2).values.sum(-1).mean(-1)  # half of 5 history tokens, rounded
    wanted = (weights[..., 5:].sum(-1).mean(-1) * narrow).mean().item()
    assert cache.index_LK[0, 2].item() == pytest.approx(wanted, rel=1e-5)
    assert cache.index_LK[0, 0] == 0


def test_the_bundled_model_is_not_calibrated_in_its_place(capsys):
    assert nextscale.main(["calibrate", "a red star"]) == 2
    assert "name --out" in capsys.readouterr().err
