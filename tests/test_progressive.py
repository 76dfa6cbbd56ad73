"""Progressive training: when scales join, and that those that have not are neither run nor weighed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenizer.schedule import ScaleSchedule
from train.optimizers import OptimizerConfig
from train.progressive import ProgressiveConfig, ProgressiveObjective
from train.session import Clock
from train.var_objective import VarLossConfig, VarObjective
from var.transformer import NextScaleTransformer

WARMUP = 0.02


def official(step, steps, scales, pg, pg0):
    """(scales trained, weight of the newest) of each step up to `step`, by the official code's running counters."""
    warm, ramp = WARMUP * steps, steps / 300
    last, since, first = None, 0, True
    for it in range(step + 1):
        if it <= warm:
            stage = pg0
        elif it >= steps * pg:
            stage = scales - 1
        else:
            stage = pg0 + round((it - warm) / (steps * pg - warm) * (scales - 1 - pg0))
        if stage != last:
            first, last, since = last is None, stage, 0
        since += 1
    weight = 1.0 if first or stage == scales - 1 else max(min(since / ramp, 1), 0.01)
    return stage + 1, weight


@pytest.mark.parametrize("pg", [0.3, 0.8])
@pytest.mark.parametrize("step", [0, 59, 61, 150, 400, 700, 701, 900, 1500, 2399, 2401, 2999])
def test_scales_join_as_in_the_official_code(step, pg):
    steps = 3000
    config = ProgressiveConfig(until=pg)
    scales, weight = config.stage(step / steps, WARMUP, 10)
    expected, ramp = official(step, steps, 10, pg, 4)
    assert scales == expected and weight == pytest.approx(ramp, abs=0.15)  # a step in ten of a ramp


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 12), st.integers(1, 12))
def test_scales_only_join(progress, until, first, scales):
    config = ProgressiveConfig(until=until, first=first)
    now, weight = config.stage(progress, WARMUP, scales)
    later, _ = config.stage(min(progress + 0.1, 1.0), WARMUP, scales)
    assert min(first, scales) <= now <= later <= scales and 0.01 <= weight <= 1
    assert config.stage(until, WARMUP, scales) == (scales, 1.0)
    assert ProgressiveConfig().stage(progress, WARMUP, scales) == (scales, 1.0)  # off by default


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "latent_channels": 4, "schedule": "1,2,3,4", "num_classes": 5}
    return NextScaleTransformer(depth=2, width=32, heads=2, **sizes)


def batch():
    generator = torch.Generator().manual_seed(0)
    return {
        "ids": torch.randint(16, (6, 30), generator=generator),
        "inputs": torch.randn(6, 29, 4, generator=generator),
        "label": torch.arange(6) % 5,
        "counter": range(6),
    }


def objective(transformer, **progressive):
    config = ProgressiveConfig(**progressive)
    return ProgressiveObjective(transformer, VarLossConfig(drop=0.0), OptimizerConfig(), progressive=config)


@pytest.mark.parametrize("first", [1, 2, 3])
def test_scales_that_have_not_joined_change_nothing(transformer, first):
    coarse = objective(transformer, until=0.5, first=first).train()
    loss, metrics = coarse(batch(), Clock(0, 0.0, 0))
    total, end = 30, ScaleSchedule.of("1,2,3,4").ends[first - 1]
    assert sum(name.startswith("loss_") for name in metrics) == first
    by_token = [metrics[f"loss_{s}x{s}"] * s * s for s in range(1, first + 1)]
    assert loss.item() == pytest.approx(sum(by_token).item() / total, rel=1e-5)
    other = batch()
    other["ids"][:, end:] = 0
    other["inputs"][:, end - 1 :] = torch.nan
    assert torch.equal(coarse(other, Clock(0, 0.0, 0))[0], loss)
    loss.backward()
    unread = transformer.position_1LD.grad[:, end:]
    assert not unread.any() and transformer.position_1LD.grad[:, :end].any()


def test_neutral_settings_are_plain_training(transformer):
    plain = VarObjective(transformer, VarLossConfig(drop=0.0), OptimizerConfig()).train()
    for progressive, progress in (({}, 0.0), ({"until": 0.5, "first": 4}, 0.0), ({"until": 0.5, "first": 1}, 0.5)):
        made = objective(transformer, **progressive).train()
        clock = Clock(0, progress, 0)
        assert torch.equal(made(batch(), clock)[0], plain(batch(), clock)[0])
    validated = objective(transformer, until=0.9, first=1).eval()(batch(), Clock(0, 0.0, 0))
    assert torch.equal(validated[0], plain.eval()(batch(), Clock(0, 0.0, 0))[0])
    assert "loss_4x4" in validated[1]


def test_the_newest_scale_comes_in_by_a_ramp(transformer):
    made = objective(transformer, until=0.5, first=1, ramp=0.05).train()
    joins = WARMUP + 0.5 / 3 * (0.5 - WARMUP)
    by_age = [made.weights(Clock(0, joins + age, 0)) for age in (1e-6, 0.025, 0.05)]
    assert [len(weights) for weights in by_age] == [5, 5, 5]
    ratios = [(weights[1:] * 30).mean().item() for weights in by_age]
    assert ratios == pytest.approx([0.01, 0.5, 1.0], abs=1e-3)
    assert all(weights[0].item() == pytest.approx(1 / 30) for weights in by_age)


def test_coarse_steps_train_the_first_scales_in_their_share_of_steps(transformer):
    made = objective(transformer, coarse=2, coarse_share=0.75).train()
    drawn = [made.stage(Clock(step, 0.5, 1)) for step in range(2000)]
    assert set(drawn) == {(2, 1.0), (4, 1.0)} and drawn.count((2, 1.0)) / 2000 == pytest.approx(0.75, abs=0.04)
    assert drawn == [made.stage(Clock(step, 0.5, 1)) for step in range(2000)]  # by seed and step alone
    step = drawn.index((2, 1.0))
    metrics = made(batch(), Clock(step, 0.5, 1))[1]
    plain = VarObjective(transformer, VarLossConfig(drop=0.0), OptimizerConfig()).train()
    whole = plain(batch(), Clock(step, 0.5, 1))[1]
    assert sorted(n for n in metrics if n.startswith("loss_")) == ["loss_1x1", "loss_2x2"]
    assert all(metrics[n].item() == pytest.approx(whole[n].item(), rel=1e-5) for n in ("loss_1x1", "loss_2x2"))
    assert made.eval().stage(Clock(step, 0.5, 1)) == (4, 1.0)  # validation takes all scales
    joining = objective(transformer, until=0.5, first=1, coarse=2, coarse_share=1.0).train()
    assert joining.stage(Clock(0, 0.0, 0)) == (1, 1.0)  # never more scales than have joined


def test_coarse_steps_are_off_by_default_and_with_a_share_of_none():
    assert not ProgressiveConfig().is_on and not ProgressiveConfig(coarse=3, coarse_share=0).is_on
    assert ProgressiveConfig(coarse=3).is_on and ProgressiveConfig(until=0.1).is_on


@pytest.mark.parametrize("bad", [{"until": 1.5}, {"until": -0.1}, {"ramp": 2}, {"first": 0}, {"coarse": -1}])
def test_settings_are_checked(bad):
    with pytest.raises(ValueError, match=f"progressive.{next(iter(bad))}"):
        ProgressiveConfig(**bad)
