"""A training step gives a GPU its work without waiting for it; what it measures is kept there until it is asked for."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from training_toys import in_child

from benchmarks.training import random_batch
from benchmarks.training_gpu import our_steps
from train.collaborate import CollaborationConfig, DrafterObjective, RefinerObjective, distillation_scores
from train.loop import LARGEST_SCALE, clip_gradients, update
from train.optimizers import Branch, OptimizerConfig, build_optimizers
from train.progressive import ProgressiveConfig, ProgressiveObjective
from train.session import Clock, Meter, Processes
from train.supernet import SupernetConfig, SupernetObjective
from train.var_objective import VarLossConfig, VarObjective, token_scores
from var.transformer import NextScaleTransformer


class NoWaiting(TorchDispatchMode):
    """Refuses what would make a GPU's step wait: numbers read back, and copies from or to another device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        assert name != "_local_scalar_dense", "a number was read back"
        if name in ("_to_copy", "copy_"):
            given = args[0] if name == "_to_copy" else args[1]
            there = kwargs.get("device") or args[0].device
            assert torch.device(there).type == given.device.type, f"a copy from {given.device} to {there}"
        return function(*args, **kwargs)


@pytest.mark.parametrize("kind", ["plain", "progressive", "drafter", "refiner", "supernet"])
def test_a_step_does_not_wait_for_the_device(kind, monkeypatch):
    """On meta tensors, whose numbers are nowhere: as a GPU's, they cannot be read without a copy."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which knows no such device
    shape = {"depth": 2, "width": 32, "heads": 2, "vocab_size": 16, "latent_channels": 4, "schedule": "1,2,4,8"}
    made = [NextScaleTransformer(**shape, num_classes=3, drop_path=0.1) for _ in range(2)]
    given = (made[0], VarLossConfig(drop=0.5, weights="side"), OptimizerConfig())
    objective = {
        "plain": lambda: VarObjective(*given),
        "progressive": lambda: ProgressiveObjective(*given, progressive=ProgressiveConfig(until=0.9, first=2)),
        "drafter": lambda: DrafterObjective(*given, code=CollaborationConfig(role="drafter", handover=2)),
        "refiner": lambda: RefinerObjective(
            *given, code=CollaborationConfig(role="refiner", handover=2, teacher="it"), teacher=made[1]
        ),
        "supernet": lambda: SupernetObjective(*given, supernet=SupernetConfig(depths=[1], bridge=2, joint=1.0)),
    }[kind]()
    objective.to("meta").train()
    made[1].to("meta")
    batch = {
        "ids": torch.zeros(3, 85, dtype=torch.int64), "inputs": torch.zeros(3, 84, 4), "label": torch.zeros(3).long()
    }  # fmt: skip
    batch = {name: tensor.to("meta") for name, tensor in batch.items()} | {"counter": range(3)}
    meter = Meter()
    for step in range(2):
        with NoWaiting() if step else contextlib.nullcontext():  # what is kept is made in the first step
            loss, metrics = objective(batch, Clock(step, 0.4, 0))
            loss.backward()
            norm = clip_gradients([p for p in objective.parameters() if p.grad is not None], 1.0)
            meter.add({"loss": loss, **metrics, "grad_norm": norm})
    assert len(meter.sums) == 1


@pytest.mark.parametrize("kind", ["plain", "refiner"])
def test_stochastic_depth_depends_on_the_image_alone(kind):
    """A batch as one and in two parts; other images, steps and seeds of it."""
    torch.manual_seed(0)
    shape = {"depth": 3, "width": 32, "heads": 2, "vocab_size": 16, "latent_channels": 4, "schedule": "1,2,4"}
    model = NextScaleTransformer(**shape, num_classes=3, drop_path=0.6).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # a new model says the same of all tokens
    given = (model, VarLossConfig(drop=0.0), OptimizerConfig())
    objective = VarObjective(*given)
    if kind == "refiner":
        config = CollaborationConfig(role="refiner", handover=2, teacher="it")
        objective = RefinerObjective(*given, code=config, teacher=NextScaleTransformer(**shape, num_classes=3))
    ids, inputs, label = torch.randint(16, (6, 21)), torch.randn(6, 20, 4), torch.arange(6) % 3

    def loss_of(rows, counters=None, step=0, seed=0):
        batch = {"ids": ids[rows], "inputs": inputs[rows], "label": label[rows], "counter": counters or rows}
        return objective(batch | {"counter": list(batch["counter"])}, Clock(step, 0.0, seed))[0].item()

    whole = loss_of(range(6))
    assert (loss_of(range(3)) + loss_of(range(3, 6))) / 2 == pytest.approx(whole, rel=1e-5)
    assert loss_of(range(6), step=5) == whole
    for other in ({"counters": range(6, 12)}, {"seed": 1}):
        assert loss_of(range(6), **other) != pytest.approx(whole, rel=1e-5)
    objective.eval()
    assert loss_of(range(6)) == loss_of(range(6), seed=1)


def test_draws_of_stochastic_depth_are_independent():
    """Of block and block, of the two branches of one, and of which prompts are dropped."""
    shape = {"depth": 3, "width": 8, "heads": 2, "vocab_size": 16, "latent_channels": 4, "schedule": "1,2"}
    model = NextScaleTransformer(**shape, num_classes=3, drop_path=0.5).train()
    objective = VarObjective(model, VarLossConfig(drop=0.5), OptimizerConfig())
    batch, clock = {"label": torch.zeros(4000, dtype=torch.int64), "counter": range(4000)}, Clock(0, 0.0, 0)
    kept = objective.condition(batch, clock).kept
    assert kept[0] is None and [(k > 0).float().mean().item() for k in kept[1:]] == pytest.approx([0.75, 0.5], abs=0.03)
    dropped_B = objective.training_prompt(batch, clock).classes_B == 3
    draws = torch.stack([*(branch.flatten() > 0 for two in kept[1:] for branch in two), dropped_B]).float()
    assert (torch.corrcoef(draws) - torch.eye(5)).abs().max() < 0.06


class Counting(TorchDispatchMode):
    """Counts what a GPU would have to begin: operations that are more than another view."""

    VIEWS = ("view", "t", "transpose", "unbind", "slice", "select", "expand", "unsqueeze", "squeeze", "detach", "alias")
    VIEWS += ("as_strided", "split", "split_with_sizes", "permute", "_unsafe_view", "lift_fresh")
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ not in self.VIEWS
        return function(*args, **(kwargs or {}))


def test_a_step_is_little_beside_its_blocks():
    """Whole steps of models of one and of two blocks: small models' steps wait for what is to be begun."""

    def check() -> None:
        counts = []
        for depth in (1, 2):
            shape = {"width": 32, "heads": 2, "vocab_size": 16, "latent_channels": 4, "schedule": "1,2,8"}
            model = NextScaleTransformer(depth=depth, **shape)
            (step, _), *_ = our_steps(["grouped"], model, random_batch(model.config, 2), "cpu").values()
            step()
            with Counting() as counting:
                step()
            counts.append(counting.count)
        assert 50 < 2 * counts[0] - counts[1] <= 110

    assert in_child(check) == 0  # which knows no accelerate of other tests


def test_a_meter_holds_means_and_goes_on_from_its_totals():
    processes = Processes(Accelerator(cpu=True))
    meter, again = Meter(), Meter()
    for value in (1.0, 2.0, 6.0):
        metrics = {
            "loss": torch.tensor(value),
            "hits": torch.zeros(3),
            "half": torch.tensor(value, dtype=torch.bfloat16),
        }
        meter.add(metrics)
        again.add(metrics)
        again = Meter.of({name: pair.clone() for name, pair in again.totals().items()}, torch.device("cpu"))
    assert meter.means(processes) == again.means(processes) == {"loss": 3.0, "half": 3.0}
    assert len(again.sums) == 1  # what comes next is added to the same sums, in the same order
    meter.add({"loss": torch.tensor(7.0)}, weight=3)
    assert meter.means(processes) == {"loss": 5.0, "half": 3.0}
    assert Meter().means(processes) == {}


@pytest.mark.cuda
@pytest.mark.parametrize("bits", [0, 5])
def test_compiled_scores_are_the_plain_ones(bits):
    shape = (3, 85, bits, 2) if bits else (3, 85, 64)
    ours, theirs = (torch.randn(shape, device="cuda") for _ in range(2))
    ids = torch.randint(shape[-1], shape[:-1], device="cuda")
    for score, given in ((token_scores, (ids, 0.1)), (distillation_scores, (theirs, ids, "teacher"))):
        made = []
        for function in (score, torch.compile(score, dynamic=False)):
            logits = ours.clone().requires_grad_()
            loss_L, correct_L = function(logits, *given)
            loss_L.sum().backward()
            made.append((loss_L, correct_L, logits.grad))
        assert all(torch.allclose(plain, fast, atol=1e-5) for plain, fast in zip(*made))


def test_the_scale_of_the_loss_is_capped_under_fp16():
    """As VAR's: looked at now and then, as asking for it waits for the device."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    branch = Branch(OptimizerConfig(), [("weight", weight)])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17)
    session = SimpleNamespace(accelerator=SimpleNamespace(scaler=scaler), branches={"main": branch}, progress=0.0)
    session.optimizers = {"main": build_optimizers(branch)}
    for session.step, expected in ((99, 2.0**17), (100, LARGEST_SCALE), (101, LARGEST_SCALE)):
        scaler.scale(weight.sum()).backward()
        update(session, {})
        assert scaler.get_scale() == expected
    assert LARGEST_SCALE == 32768
