"""Rates as functions of progress, which weights decay, and which optimiser takes what."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tokenizer.schedule import ScaleSchedule
from train.optimizers import Branch, OptimizerConfig, build_optimizers, is_decayed, is_hidden_matrix, set_rates
from train.schedules import SCHEDULES, lr_factor, weight_decay_at
from train.var_objective import token_weights
from var.transformer import NextScaleTransformer

SHARE = st.floats(0, 1)
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch is older than 2.9")


@given(progress=SHARE, schedule=st.sampled_from([*SCHEDULES, "lin0.3"]), warmup=st.floats(0, 0.9), end=SHARE)
def test_factor_stays_between_its_ends(progress, schedule, warmup, end):
    factor = lr_factor(progress, schedule=schedule, warmup=warmup, end=end)
    assert min(0.005, end) - 1e-9 <= factor <= 1 + 1e-9


def test_lin0_is_the_official_schedule():
    """VAR's `lin0`: warm-up from 0.005, flat for 5 % of the rest, then linear to `wpe` (its lr_control.py)."""

    def factor(progress):
        return lr_factor(progress, schedule="lin0", warmup=0.02, end=0.1)

    assert factor(0) == 0.005
    assert factor(0.01) == pytest.approx(0.005 + 0.995 / 2)
    assert factor(0.02) == 1 == factor(0.02 + 0.049 * 0.98)
    assert factor(1) == pytest.approx(0.1)
    middle = 0.02 + 0.98 * (0.05 + 0.95 / 2)
    assert factor(middle) == pytest.approx(0.55)


@pytest.mark.parametrize("share, end", [(0.5, 0.1), (0.8, 0.01), (0.25, 0.0)])
def test_lin_with_a_share_bends_there_as_in_the_official_code(share, end):
    def factor(rest):
        return lr_factor(0.02 + 0.98 * rest, schedule=f"lin{share}", warmup=0.02, end=end)

    middle = (1 + end + (1 - end) * (1 - share)) / 2
    assert factor(0) == pytest.approx(1) and factor(share) == pytest.approx(middle) and factor(1) == pytest.approx(end)
    assert factor(share / 2) == pytest.approx((1 + middle) / 2)
    assert factor((1 + share) / 2) == pytest.approx((middle + end) / 2)


@pytest.mark.parametrize("schedule", ["lin1", "lin", "linear", "lin-0.5", "step"])
def test_unknown_schedules_are_refused(schedule):
    with pytest.raises(ValueError, match="schedule must be one of lin0, cosine, constant, or lin"):
        OptimizerConfig(schedule=schedule)


def test_cosine_and_constant():
    assert lr_factor(0.5, schedule="cosine", warmup=0, end=0.2) == pytest.approx(0.6)
    assert lr_factor(0.7, schedule="constant", warmup=0.1, end=0.2) == 1
    with pytest.raises(ValueError, match="lin0, cosine, constant"):
        lr_factor(0.5, schedule="step", warmup=0, end=0)


def test_weight_decay_goes_along_half_a_cosine():
    assert [weight_decay_at(p, start=0.05, end=0.08) for p in (0, 0.5, 1)] == pytest.approx([0.05, 0.065, 0.08])


@pytest.fixture(scope="module")
def transformer():
    return NextScaleTransformer(
        depth=2, width=32, heads=2, vocab_size=16, latent_channels=4, schedule="1,2", shared_ada=True, num_classes=3
    )


def test_what_does_not_decay(transformer):
    kept = {name for name, p in transformer.named_parameters() if not is_decayed(name, p)}
    tables = {"start_position_1lD", "position_1LD", "level_embedding.weight"}
    assert tables <= kept
    assert {name for name in dict(transformer.named_parameters()) if name.endswith("bias")} <= kept
    assert any("log_scale" in name for name in kept) and any("ada_offset" in name for name in kept)
    decayed = set(dict(transformer.named_parameters())) - kept
    assert {"conditioner.embedding.weight", "input_proj.weight", "head.proj.weight"} <= decayed
    assert all(name.endswith("weight") for name in decayed)


def test_set_rates_decays_only_what_decays(transformer):
    config = OptimizerConfig(lr=0.5, weight_decay=0.2, weight_decay_end=0.4, warmup=0, schedule="constant")
    (optimizer,) = build_optimizers(Branch(config, transformer.named_parameters()))
    set_rates(optimizer, config, 1.0)
    assert {(group["decayed"], group["lr"], round(group["weight_decay"], 6)) for group in optimizer.param_groups} == {
        (True, 0.5, 0.4),
        (False, 0.5, 0.0),
    }


@needs_muon
def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest(transformer):
    branch = Branch(OptimizerConfig(name="muon"), transformer.named_parameters())
    muon, adamw = build_optimizers(branch)
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert not taken & rest and len(taken | rest) == len(list(transformer.parameters()))
    for name, p in transformer.named_parameters():
        assert (id(p) in taken) == (name.startswith("blocks.") and p.ndim == 2 and not name.endswith("_6D")), name
    assert not is_hidden_matrix("input_proj.weight", transformer.input_proj.weight)


def test_muon_without_matrices_is_a_clear_error():
    with pytest.raises(ValueError, match="muon"):
        build_optimizers(Branch(OptimizerConfig(name="muon"), nn.Conv2d(3, 3, 3).named_parameters()))


@pytest.mark.parametrize("bad", [{"name": "sgd"}, {"lr": 0}, {"schedule": "exp"}, {"warmup": 1}])
def test_optimizer_settings_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        OptimizerConfig(**bad)


@pytest.mark.parametrize("kind", ["token", "scale", "lognorm"])
def test_token_weights_sum_to_one(kind):
    weights = token_weights(ScaleSchedule.of("1x2,2x2,3x4"), kind)
    assert weights.shape == (18,) and weights.sum() == pytest.approx(1)
    assert token_weights(ScaleSchedule.of("4,4"), kind).tolist() == pytest.approx([1 / 32] * 32)


def test_lognorm_weights_are_the_published_ones():
    """HMAR's weights of the ten 256-pixel scales (section 4.1)."""
    schedule = ScaleSchedule.of("var256")
    weights = token_weights(schedule, "lognorm")
    by_scale = [part.sum().item() for part in weights.split(schedule.lengths)]
    published = [0.0247, 0.0642, 0.1150, 0.1379, 0.1402, 0.1329, 0.1208, 0.1054, 0.0882, 0.0709]
    assert by_scale == pytest.approx(published, abs=1e-4)


@needs_muon
def test_stacked_muon_is_torchs():
    from train.muon import StackedMuon

    torch.manual_seed(0)
    shapes = [(8, 8), (8, 8), (32, 8), (8, 32), (32, 8)]
    plain = [nn.Parameter(torch.randn(*shape)) for shape in shapes]
    stacked = [nn.Parameter(p.detach().clone()) for p in plain]
    settings = {"lr": 0.01, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    torchs, ours = torch.optim.Muon(plain, **settings), StackedMuon(stacked, **settings)
    for _ in range(5):
        for p, q in zip(plain, stacked):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        torchs.step()
        ours.step_stacked(ours.param_groups[0])
    for p, q in zip(plain, stacked):
        assert (p - q).abs().max() < 0.003  # bfloat16 rounding; five steps move a weight by 0.1
        assert torch.equal(torchs.state[p]["momentum_buffer"], ours.state[q]["momentum_buffer"])


@needs_muon
def test_muon_takes_float32_where_bfloat16_is_emulated(monkeypatch):
    from train import muon

    dtypes, plain = [], muon.orthogonalise
    monkeypatch.setattr(muon, "orthogonalise", lambda x, *how: dtypes.append(x.dtype) or plain(x, *how))
    for native in (False, True):
        monkeypatch.setattr(muon, "native_bfloat16", lambda device: native)  # noqa: B023
        weight = nn.Parameter(torch.eye(4))
        weight.grad = torch.randn(4, 4)
        muon.StackedMuon([weight], lr=0.1).step()
        assert not torch.equal(weight, torch.eye(4))
    assert dtypes == [torch.float32]  # where it is native, torch's own
