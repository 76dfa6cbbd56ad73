"""The loop over any split of a batch, the objectives' rules, the token cache, every stage through its command line."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import liven
from torch import nn
from training_toys import Rows, ToyObjective, curve, equal, final_state, in_child, in_processes, toy_config, toy_run
from transformers import BertConfig, BertModel

from tokenizer.model import MultiScaleVQ
from tokenizer.schedule import ScaleSchedule
from train.config import RunConfig, exit_code
from train.loop import (
    begin_averaging,
    gather_apart,
    micro_batches,
    train_step,
    validate,
)
from train.machine import can_compile, shards_on_cpus, tell_of_emulation
from train.optimizers import Branch, OptimizerConfig, build_optimizers
from train.order import spread_index
from train.report import log_training
from train.session import Clock, Processes, Session, Task
from train.start_from import same_tokenizer
from train.state import resume, save
from train.text import TextConfig, build_text_encoder, tokenize
from train.token_cache import tokenizer_hash
from train.tokenizer_objective import TokenizerLossConfig, TokenizerObjective
from train.var_objective import VarLossConfig, VarObjective, drop_prompts
from var.conditioning import ClassPrompt, TextPrompt
from var.transformer import NextScaleTransformer

START = Clock(step=0, progress=0.0, seed=0)
needs_sharding = pytest.mark.skipif(not shards_on_cpus(), reason="this release of torch splits them on GPUs only")


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in curve(folder)]


# --- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gradient_checkpointing", "compile"])
def test_an_objective_is_asked_for_what_it_lacks(tmp_path, name):
    with pytest.raises(ValueError, match=f"run.{name} is not available for ToyObjective"):
        toy_run(tmp_path, **{name: True})


def test_micro_batches_do_not_change_the_run(tmp_path):
    assert in_child(toy_run, tmp_path / "one", dropout=0.0) == 0
    assert in_child(toy_run, tmp_path / "four", dropout=0.0, micro_batch=2) == 0
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_processes_do_not_change_the_run(tmp_path):
    assert in_child(toy_run, tmp_path / "one", dropout=0.0) == 0
    assert in_processes(2, toy_run, tmp_path / "two", dropout=0.0, micro_batch=2) == [0, 0]
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [row["first"] for row in two] == pytest.approx([row["first"] for row in one])  # the same images,
    counters = [[row["counter"] for row in curve(tmp_path / name, "train")] for name in ("one", "two")]
    assert counters[1] == counters[0]  # and by the same names
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert final_state(tmp_path / "two")["model"]["seen"].item() == pytest.approx(
        2 * final_state(tmp_path / "one")["model"]["seen"].item(), rel=1e-5
    )


def test_waiting_for_data_is_told(tmp_path):
    """A share of the time: the toy's loader is most of its work, a step that sleeps makes it little."""
    assert in_child(toy_run, tmp_path / "fast") == 0
    assert in_child(toy_run, tmp_path / "slow", die=lambda step: time.sleep(0.3)) == 0
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("fast", "slow")]
    fast, slow = ([json.loads(line) for line in own] for own in lines)
    shares = [[row["data_wait"] for row in rows if row["kind"] == "train"] for rows in (fast, slow)]
    assert all(0 < share < 1 for share in (*shares[0], *shares[1])) and len(shares[0]) == 4
    assert sum(shares[1]) < sum(shares[0]) / 2


def sharded_run(folder: Path, steps: int) -> None:
    """The toy with its parameters split over two processes (FSDP2), step by step as `run` does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    accelerator, objective = Accelerator(cpu=True), ToyObjective(dropout=0.0)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(objective.net, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    branches = objective.branches()
    optimizers = {name: build_optimizers(branch) for name, branch in branches.items()}

    def write(path, module, weights):
        path.mkdir()
        torch.save(weights, path / "weights.pt")

    task = Task(objective=objective, train_data=Rows(), val_data=Rows(16), prepare=dict, export=write)
    session = Session(toy_config(folder), accelerator, task, objective, branches, optimizers)
    begin_averaging(session)
    resume(session)
    batches = micro_batches(session)
    while session.step < steps:
        train_step(session, batches)
        if session.step % 3 == 0:
            log_training(session, images_per_s=0.0, data_wait=0.0)
        if session.step % 6 == 0:
            validate(session)
        if session.step % 4 == 0:
            save(session)


@needs_sharding
def test_sharded_parameters_train_and_resume_like_whole_ones(tmp_path):
    assert in_processes(2, toy_run, tmp_path / "whole", dropout=0.0) == [0, 0]
    assert in_processes(2, sharded_run, tmp_path / "split", 6) == [0, 0]
    assert in_processes(2, sharded_run, tmp_path / "split", 12) == [0, 0]
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    whole, split = (
        torch.load(tmp_path / name / "latest" / "weights.pt", weights_only=True) for name in ("whole", "split")
    )
    for name, value in split.items():
        assert torch.allclose(value, whole[name], rtol=1e-4, atol=1e-6), name


def test_exported_weights_are_the_averages(tmp_path):
    assert in_child(toy_run, tmp_path) == 0
    state = final_state(tmp_path)
    exported = torch.load(tmp_path / "latest" / "weights.pt", weights_only=True)
    names = [name for name in state["model"] if name.startswith("net")]
    shadows = {tuple(value.shape): value for value in state["ema"]["shadow_params"]}
    for name in names:
        assert torch.equal(exported[name], shadows[tuple(exported[name].shape)])
        assert not torch.equal(exported[name], state["model"][name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "run.batch_size must be 1 or more"),
        ({"precision": "fp8"}, "run.precision must be no, bf16 or fp16"),
        ({"ema": 1.0}, "run.ema"),
        ({"micro_batch": 0}, "run.micro_batch"),
    ],
)
def test_run_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**changes)


@pytest.mark.parametrize("words", [["--config={file}"], ["--run.precision=no"]])
def test_a_bare_no_is_read_as_it_is_meant(tmp_path, words):
    """YAML says false for it."""
    (tmp_path / "run.yaml").write_text("run: {precision: no}\n")
    from train import train_var

    made = train_var.parser()
    given = [word.format(file=tmp_path / "run.yaml") for word in words]
    config = made.parse_args([*given, "--tokens.tokenizer=x", "--data.source=scenes"])
    assert made.instantiate(config).run.precision == "no"


def test_batch_must_split_evenly():
    with pytest.raises(ValueError, match="multiple of micro_batch x processes = 3 x 2"):
        RunConfig(batch_size=32, micro_batch=3).check_split(2)
    RunConfig(batch_size=30, micro_batch=3).check_split(2)


# --- the tokenizer's objective ---------------------------------------------------------------------------------------


def tokenizer_objective(vqvae, **loss) -> TokenizerObjective:
    config = TokenizerLossConfig(**{"adversary_width": 8, "adversary_layers": 1, **loss})
    return TokenizerObjective(vqvae, config, OptimizerConfig(), OptimizerConfig())


@pytest.fixture()
def vqvae(tiny_vqvae):
    """A copy that may be trained."""
    copy = type(tiny_vqvae).from_config(tiny_vqvae.config)
    copy.load_state_dict(tiny_vqvae.state_dict())
    return copy.train()


def images(count: int = 4) -> dict:
    return {"image": torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1}


def test_adversary_and_tokenizer_do_not_leak_into_each_other(vqvae):
    objective = tokenizer_objective(vqvae, adversary=0.5, adversary_start=0.0)
    reconstruction = vqvae(images()["image"]).reconstruction
    likelihood = (reconstruction - images()["image"]).square().mean()
    total, metrics = objective.adversarial_losses(reconstruction, images()["image"], likelihood)
    d_weight = objective.discriminator.net[0].weight
    both = torch.autograd.grad(total, d_weight, retain_graph=True)[0]
    alone = torch.autograd.grad(metrics["discriminator"], d_weight, retain_graph=True)[0]
    assert torch.equal(both, alone)
    g_weight = vqvae.decoder.conv_out.weight
    both = torch.autograd.grad(total, g_weight, retain_graph=True)[0]
    alone = torch.autograd.grad(metrics["adversarial"], g_weight, retain_graph=True)[0] * metrics["adaptive_weight"]
    assert torch.allclose(both, 0.5 * alone, rtol=1e-4, atol=1e-6)
    nll = torch.autograd.grad(likelihood, g_weight)[0]
    assert both.norm() == pytest.approx(0.5 * nll.norm().item(), rel=0.05)  # half as strong as the reconstruction


def test_the_loss_is_its_parts_by_their_weights(vqvae):
    weights = {"l1": 0.3, "l2": 0.7, "gradient": 0.5, "perceptual": 0.4, "vq": 2.0}
    objective = tokenizer_objective(vqvae, perceptual_kind="scenes", **weights).train()
    loss, metrics = objective(images(), START)
    difference = vqvae(images()["image"]).reconstruction - images()["image"]
    pixel = 0.3 * difference.abs().mean() + 0.7 * difference.square().mean()
    assert metrics["pixel"].item() == pytest.approx(pixel.item(), rel=1e-4)
    edges = sum(difference.diff(dim=d).abs().mean() for d in (2, 3))
    assert metrics["gradient"].item() == pytest.approx(edges.item(), rel=1e-4)
    expected = pixel + 0.5 * edges + 0.4 * metrics["perceptual"] + 2.0 * metrics["vq"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_an_image_of_the_first_scales_counts_as_much_as_asked():
    """Drawn anew at every step; never of all scales, which the reconstruction itself is; not in validation."""
    torch.manual_seed(0)
    sizes = {"channels": [8, 8], "layers_per_block": 1, "attention": False, "norm_groups": 4, "latent_channels": 4}
    vqvae = MultiScaleVQ(**sizes, schedule="1,2,4", bitwise=True)
    objective = tokenizer_objective(vqvae, early=0.5, adversary=0.0).train()
    sums = vqvae(images()["image"]).quantized.sums_BCHW
    wanted = [objective.likelihood(vqvae.decode(f_hat), images()["image"])[0].item() for f_hat in sums]
    drawn = set()
    for step in range(12):
        loss, metrics = objective(images(), Clock(step, 0.0, 0))
        drawn.add(min(range(3), key=lambda k: abs(wanted[k] - metrics["early"].item())))
        assert loss.item() == pytest.approx(
            (metrics["pixel"] + metrics["vq"] + 0.5 * metrics["early"]).item(), rel=1e-4
        )
    assert drawn == {0, 1}
    assert "early" not in objective.eval()(images(), START)[1]


def test_adversary_joins_when_it_is_time(vqvae):
    objective = tokenizer_objective(vqvae, adversary=1.0, adversary_start=0.5).train()
    _, before = objective(images(), Clock(3, 0.49, 0))
    _, after = objective(images(), Clock(3, 0.5, 0))
    assert "adversarial" not in before and "adversarial" in after
    assert objective.branches()["adversary"].progress(0.5) == 0 < objective.branches()["main"].progress(0.5)


def test_dead_codes_restart_at_data_the_same_way_every_time(vqvae):
    objective = tokenizer_objective(vqvae, restart_every=10)
    codebook = vqvae.quantizer.codebook.weight
    with torch.no_grad():
        codebook[5:] += 1000.0  # out of reach: dead
    objective.usage_KV[:, 5:] = 0.0
    _, metrics = objective(images(), START)
    before, processes = codebook.detach().clone(), Processes(Accelerator(cpu=True))
    objective.after_step(images(), metrics, Clock(20, 0.1, 7), processes)
    first = codebook.detach().clone()
    assert torch.equal(first[:5], before[:5])
    assert first[5:].abs().max() < 100
    with torch.no_grad():
        codebook.copy_(before)
    objective.usage_KV[:, 5:] = 0.0
    objective.after_step(images(), metrics, Clock(20, 0.1, 7), processes)
    assert torch.equal(codebook, first)
    with torch.no_grad():
        codebook.copy_(before)
    objective.usage_KV[:, 5:] = 0.0
    objective.after_step(images(), metrics, Clock(30, 0.1, 7), processes)
    assert not torch.equal(codebook, first)  # drawn anew
    with torch.no_grad():
        codebook.copy_(before)
    objective.usage_KV[:, 5:] = 0.0
    objective.after_step(images(), metrics, Clock(20, 0.95, 7), processes)
    assert torch.equal(codebook, before)  # too late in training


def test_a_code_is_dead_by_its_share_of_all_tokens(vqvae):
    """Scales count by their tokens, 1, 4 and 16 of 21: the finest alone can keep a code, the coarsest cannot."""
    objective = tokenizer_objective(vqvae, restart_every=10, dead_below=0.03)
    codebook, processes = vqvae.quantizer.codebook.weight, Processes(Accelerator(cpu=True))
    used = torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.041]])  # 1, 0.024 and 0.031 in all
    metrics = {"hits_KV": torch.tensor([1.0, 4.0, 16.0])[:, None].expand(3, 16)}
    objective.usage_KV.fill_(1.0)
    objective.usage_KV[:, :3] = used
    before, share_K1 = codebook.detach().clone(), metrics["hits_KV"].sum(dim=1, keepdim=True) / 16
    objective.restart_codes(images()["image"], share_K1, Clock(20, 0.1, 0), processes)
    moved = (codebook != before).any(dim=1).tolist()
    assert moved == [False, True, *[False] * 14] and objective.training
    assert torch.equal(objective.usage_KV[:, 1], torch.ones(3))  # time to prove itself
    assert torch.equal(objective.usage_KV[:, 2], used[:, 2])


def restarted(vqvae, folder):
    accelerator = Accelerator(cpu=True)
    objective = tokenizer_objective(vqvae, restart_every=10, dead_below=0.03)
    objective.usage_KV[:, 5:] = 0.0
    own = images()["image"] * (1 - 0.5 * accelerator.process_index)  # each process has images of its own
    objective.restart_codes(own, torch.ones(3, 1), Clock(20, 0.1, 0), Processes(accelerator))
    torch.save(vqvae.quantizer.codebook.weight, folder / f"{accelerator.process_index}.pt")


def test_codes_restart_alike_in_all_processes(vqvae, tmp_path):
    assert in_processes(2, restarted, vqvae, tmp_path) == [0, 0]
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(one, two) and (one != vqvae.quantizer.codebook.weight).any(dim=1).sum() == 11


@pytest.mark.parametrize("step, weight", [(0, 0.1), (99, 0.1), (100, 0.01)])
def test_usage_is_an_average_of_the_last_steps(vqvae, step, weight):
    """Hits over those of an equal split; a new training forgets sooner."""
    objective, processes = (
        tokenizer_objective(vqvae, restart_every=0, draw_codes=False),
        Processes(Accelerator(cpu=True)),
    )
    before = torch.rand(3, 16)
    objective.usage_KV.copy_(before)
    hits = torch.randint(1, 9, (3, 16)).float()
    objective.after_step(images(), {"hits_KV": hits}, Clock(step, 0.1, 0), processes)
    expected = (1 - weight) * before + weight * hits / hits.mean(dim=1, keepdim=True)
    torch.testing.assert_close(objective.usage_KV, expected)


@pytest.mark.parametrize("draw, step, share", [(True, 0, 1.0), (False, 0, 0.1), (True, 3, 0.1), (True, 100, 0.01)])
def test_sizes_of_scales_follow_the_residuals(tiny_vqvae, draw, step, share):
    """At once where all codes are drawn anew, else a share of the way in each step."""
    vqvae = type(tiny_vqvae).from_config(tiny_vqvae.config, normalize_scales=True)
    objective = tokenizer_objective(vqvae, draw_codes=draw, restart_every=0)
    before, codes = vqvae.quantizer.scale_rms_K.clone(), vqvae.quantizer.codebook.weight.detach().clone()
    metrics = objective(images(), START)[1]
    with torch.no_grad():
        residuals = vqvae(images()["image"]).quantized.residuals_NC
    objective.after_step(images(), metrics, Clock(step, 0.0, 0), Processes(Accelerator(cpu=True)))
    sizes_K = torch.stack([r_NC.square().mean().sqrt() for r_NC in residuals])
    expected = before * (1 + share * (sizes_K - 1))
    torch.testing.assert_close(vqvae.quantizer.scale_rms_K, expected)
    assert torch.equal(vqvae.quantizer.codebook.weight, codes) == (not (draw and step == 0))


@pytest.mark.parametrize("until, moved", [(0.0, False), (0.8, True)])
def test_sizes_of_scales_are_left_alone_from_the_start(tiny_vqvae, until, moved):
    vqvae = type(tiny_vqvae).from_config(tiny_vqvae.config, normalize_scales=True)
    objective = tokenizer_objective(vqvae, restart_until=until, draw_codes=False)
    before = vqvae.quantizer.scale_rms_K.clone()
    objective.after_step(images(), objective(images(), START)[1], START, Processes(Accelerator(cpu=True)))
    assert torch.equal(vqvae.quantizer.scale_rms_K, before) == (not moved)


def test_perceptual_network_never_changes(vqvae):
    objective = tokenizer_objective(vqvae, perceptual_kind="scenes").train()
    before = {name: value.clone() for name, value in objective.perceptual.state_dict().items()}
    loss, metrics = objective(images(), START)
    loss.backward()
    assert metrics["perceptual"] > 0
    assert equal(dict(objective.perceptual.state_dict()), before)
    assert not any(p.requires_grad for p in objective.perceptual.parameters())


def test_usage_counts_codes_by_scale(vqvae):
    objective = tokenizer_objective(vqvae)
    objective.usage_KV.zero_()
    objective.usage_KV[0, :4] = 1.0
    objective.usage_KV[1, 3:5] = 0.081
    statistics = objective.statistics()
    assert (statistics["usage_1x1"], statistics["usage_2x2"], statistics["usage_4x4"]) == (4 / 16, 2 / 16, 0)
    assert statistics["usage"] == 5 / 16


def test_validation_reports_psnr_and_ssim(vqvae):
    objective = tokenizer_objective(vqvae).eval()
    batch = {"image": torch.rand(2, 3, 16, 16) * 2 - 1}
    vqvae.quantizer.codebook.weight.data.mul_(1.0)
    with torch.no_grad():
        metrics = objective({"image": batch["image"][..., :8, :8]}, START)[1]
    assert metrics["psnr"] > 0 and -1 <= metrics["ssim"] <= 1


# --- the transformer's objective -------------------------------------------------------------------------------------


@pytest.fixture()
def transformer():
    torch.manual_seed(0)
    return NextScaleTransformer(
        depth=2, width=32, heads=2, vocab_size=16, latent_channels=4, schedule="1,2,4", num_classes=5
    )


def token_batch(count: int = 6) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "ids": torch.randint(16, (count, 21), generator=generator),
        "inputs": torch.randn(count, 20, 4, generator=generator),
        "label": torch.arange(count) % 5,
        "counter": range(count),
    }


def test_loss_by_scale_adds_up(transformer):
    objective = VarObjective(transformer, VarLossConfig(drop=0.0), OptimizerConfig()).eval()
    loss, metrics = objective(token_batch(), START)
    expected = (metrics["loss_1x1"] * 1 + metrics["loss_2x2"] * 4 + metrics["loss_4x4"] * 16) / 21
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() == pytest.approx(np.log(16), rel=0.05)  # a fresh model knows nothing


def test_labels_are_smoothed_in_training_only(transformer):
    """Smoothed by e, a label is itself with 1 - e, and with e any code."""
    objective = VarObjective(transformer, VarLossConfig(drop=0.0, label_smoothing=0.2), OptimizerConfig())
    batch = token_batch()
    cond = transformer.condition(ClassPrompt(batch["label"]))
    logs_BLV = transformer.logits(transformer(batch["inputs"], cond), cond).log_softmax(-1)
    hard, any_code = -logs_BLV.gather(-1, batch["ids"][..., None]).mean(), -logs_BLV.mean()
    assert objective.eval()(batch, START)[0].item() == pytest.approx(hard.item(), rel=1e-5)
    assert objective.train()(batch, START)[0].item() == pytest.approx((0.8 * hard + 0.2 * any_code).item(), rel=1e-5)


def test_images_of_another_shape_have_the_same_kind_of_weights():
    torch.manual_seed(0)
    sizes = {"depth": 1, "width": 32, "heads": 2, "vocab_size": 16, "latent_channels": 4, "num_classes": 5}
    model = NextScaleTransformer(**sizes, schedule="1,2,4", positions="rope", rope_grid=[4, 4])
    objective = VarObjective(model, VarLossConfig(drop=0.0, weights="side"), OptimizerConfig()).eval()
    wide = ScaleSchedule.of([(1, 1), (1, 2), (2, 4)])
    batch = {"ids": torch.randint(16, (3, 11)), "inputs": torch.randn(3, 10, 4), "label": torch.arange(3)}
    batch |= {"counter": range(3), "schedule": replace(wide, grid=(4, 4))}
    cond = model.condition(ClassPrompt(batch["label"]))
    logits_BLV = model.logits(model(batch["inputs"], cond, schedule=batch["schedule"]), cond)
    each_L = torch.nn.functional.cross_entropy(logits_BLV.transpose(1, 2), batch["ids"], reduction="none").mean(0)
    weight_L = torch.tensor([1.0, *[0.5**0.5] * 2, *[8**-0.5] * 8])
    expected = (each_L * weight_L).sum() / weight_L.sum()
    assert objective(batch, START)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_recomputed_activations_give_the_same_gradients(transformer):
    objective = VarObjective(transformer, VarLossConfig(), OptimizerConfig()).train()
    objective(token_batch(), START)[0].backward()
    kept = {name: p.grad.clone() for name, p in objective.named_parameters()}
    objective.zero_grad()
    objective.checkpoint_activations()
    objective(token_batch(), START)[0].backward()
    assert all(torch.allclose(p.grad, kept[name], atol=1e-6) for name, p in objective.named_parameters())


def test_prompts_drop_by_image_not_by_batch(transformer):
    """Image i's prompt is dropped or not whatever the batch; a share of `drop` is dropped."""
    seen = []

    class Watch(VarObjective):
        def hidden(self, inputs, cond, **passes):
            seen.append(cond.start_BD)
            return super().hidden(inputs, cond, **passes)

    objective = Watch(transformer, VarLossConfig(drop=0.3), OptimizerConfig()).train()
    count = 200
    batch = {
        k: v[:1].expand(count, *v.shape[1:]) if isinstance(v, torch.Tensor) else v for k, v in token_batch().items()
    }
    objective({**batch, "counter": range(count)}, START)
    halves = {k: v[:100] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    objective({**halves, "counter": range(100, 200)}, START)
    null = transformer.conditioner.embedding.weight[5]
    dropped = (seen[0] == null).all(dim=1)
    assert 0.2 < dropped.float().mean() < 0.4
    assert torch.equal((seen[1] == null).all(dim=1), dropped[100:])
    objective({**batch, "counter": range(count)}, Clock(step=0, progress=0.0, seed=1))
    assert not torch.equal((seen[2] == null).all(dim=1), dropped)  # another run drops others
    objective.eval()({**batch, "counter": range(count)}, START)
    assert not (seen[3] == null).all(dim=1).any()  # validation drops none


def test_drop_prompts_keeps_the_others():
    prompt = drop_prompts(
        ClassPrompt(torch.tensor([1, 2])), ClassPrompt(torch.tensor([9, 9])), torch.tensor([True, False])
    )
    assert prompt.classes_B.tolist() == [9, 2]


def text_model(seed: int) -> NextScaleTransformer:
    torch.manual_seed(seed)
    return NextScaleTransformer(
        depth=1, width=32, heads=2, vocab_size=16, latent_channels=4, schedule="1,2,4", conditioning="text",
        text_width=16, text_length=12,
    )  # fmt: skip


def test_a_dropped_text_is_the_null_text_of_who_reads_it():
    """A teacher's own, as a student's is another."""
    student, teacher = text_model(0), text_model(1)
    objective = VarObjective(student, VarLossConfig(drop=0.5), OptimizerConfig()).train()
    batch = {"states": torch.randn(20, 5, 16), "mask": torch.ones(20, 5, dtype=torch.bool), "counter": range(20)}
    for reader in (student, teacher):
        prompt = objective.training_prompt(batch, START, reader)
        null = reader.null_prompt(prompt).states_BTE
        dropped = (prompt.states_BTE == null).flatten(1).all(dim=1)
        assert 3 < dropped.sum() < 17
        assert torch.equal(prompt.states_BTE[~dropped], batch["states"][~dropped])


def test_what_learns_nothing_now_and_then_is_known():
    """Several processes must know: the null prompt where none is dropped, an encoder's parts that make no states."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertModel(BertConfig(**sizes))
    text = {"input_ids": torch.arange(60).view(6, 10) % 32, "states": torch.randn(6, 10, 16)}
    for drop, given in ((0.0, None), (0.5, encoder)):
        objective = VarObjective(text_model(0), VarLossConfig(drop=drop), OptimizerConfig(), given).train()
        objective({**token_batch(), **text, "mask": torch.ones(6, 10, dtype=torch.bool)}, START)[0].backward()
        assert any(p.grad is None for p in objective.parameters()) and objective.find_unused


def test_padding_says_nothing_to_a_text_encoder_that_trains():
    encoder = build_text_encoder(TextConfig(d_model=16, layers=1, heads=2, d_ff=16))[0].eval()
    objective = VarObjective(text_model(0), VarLossConfig(), OptimizerConfig(), encoder)
    ids = torch.arange(3, 9)[None]
    alone = objective.prompt({"input_ids": ids, "mask": torch.ones(1, 6, dtype=torch.bool)}).states_BTE
    padded = torch.nn.functional.pad(ids, (0, 4), value=5)
    beside = objective.prompt({"input_ids": padded, "mask": torch.arange(10)[None] < 6}).states_BTE
    torch.testing.assert_close(beside[:, :6], alone)


def test_captions_are_padded_as_their_tokenizer_does():
    tokenizer = build_text_encoder(TextConfig(d_model=16, layers=1, heads=2, d_ff=16))[1]
    captions = ["a ring", "a star that goes on for longer than the limit of the model", "a ring"]
    with pytest.warns(UserWarning, match="more than transformer.text_length 32 tokens are cut") as told:
        made = tokenize(tokenizer, captions, 32)
        tokenize(tokenizer, ["a" * 31], 32)  # with its end mark, just short enough
    assert len(told) == 1
    like = tokenizer(captions, padding="longest", truncation=True, max_length=32, return_tensors="pt")
    assert torch.equal(made["input_ids"], like.input_ids) and torch.equal(made["mask"], like.attention_mask.bool())


def test_text_encoder_trains_along():
    torch.manual_seed(0)
    encoder, tokenizer = build_text_encoder(TextConfig(d_model=16, layers=1, heads=2, d_ff=16))
    objective = VarObjective(text_model(0), VarLossConfig(drop=0.5), OptimizerConfig(), encoder).train()
    text = tokenize(tokenizer, ["a ring", "two very long captions"] * 3, 12)
    assert text["input_ids"].shape == (6, 12) and text["mask"].dtype == torch.bool
    assert tokenize(tokenizer, ["a ring"], 32)["input_ids"].shape == (1, 16)
    loss, _ = objective({**token_batch(), **text}, START)
    loss.backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


# --- the stages, through their command lines -------------------------------------------------------------------------

TINY = ["--run.log_every=2", "--run.checkpoint_every=2", "--run.validate_every=4", "--run.workers=0", "--run.cpu=true"]
TINY += ["--run.batch_size=4", "--run.total_images=16", "--run.validation_images=4", "--run.previews=2"]
TINY += ["--run.bar_every=60", "--data.source=scenes", "--data.size=16", "--data.num_scenes=40"]
TOKENIZER = [*TINY, "--tokenizer.channels=[8,8]", "--tokenizer.layers_per_block=1", "--tokenizer.attention=false"]
TOKENIZER += ["--tokenizer.latent_channels=4", "--tokenizer.vocab_size=16", "--tokenizer.schedule=1,2,8"]
TOKENIZER += ["--tokenizer.norm_groups=4", "--loss.adversary_layers=1", "--loss.adversary_width=8"]


def stage(module: str, *arguments: str) -> int:
    """Exit code of a stage's command line in a child process."""
    import importlib

    main = importlib.import_module(f"train.{module}").main
    return in_child(lambda: os._exit(exit_code(main, list(arguments))))


@pytest.fixture(scope="module")
def tokenizer_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    assert stage("train_tokenizer", *TOKENIZER, f"--run.run_dir={folder}", "--loss.adversary=0.5") == 0
    return folder


def test_tokenizer_stage(tokenizer_run):
    assert {"config.yaml", "metrics.jsonl", "images", "checkpoints", "latest"} <= set(os.listdir(tokenizer_run))
    last = curve(tokenizer_run)[-1]
    assert last["kind"] == "validation" and last["images"] == 16 and {"psnr", "ssim"} <= set(last)
    train = curve(tokenizer_run, "train")[-1]
    assert {"usage_1x1", "usage_8x8", "adversarial", "grad_norm_adversary", "lr_main", "lr_adversary"} <= set(train)
    assert list((tokenizer_run / "images").glob("*.png"))


def test_a_decoder_trains_on_the_tokens_that_there_are(tokenizer_run, tmp_path, capfd):
    """Settings that weights do not show count, too: in the check, and in the name by which tokens are cached."""
    only = ["--loss.decoder_only=true", f"--run.run_dir={tmp_path}/decoder"]
    start = f"--start_from={tokenizer_run}/latest/vqvae"
    assert stage("train_tokenizer", *TOKENIZER, *only) == 2
    assert "loss.decoder_only=true trains the decoder of a finished tokenizer" in capfd.readouterr().err
    assert stage("train_tokenizer", *TOKENIZER, *only, start, "--tokenizer.phi_ratio=0.1") == 2
    assert "makes other tokens: it has" in capfd.readouterr().err
    assert stage("train_tokenizer", *TOKENIZER, *only, start, "--tokenizer.vocab_size=48") == 2
    assert "does not fit: quantizer.codebook.weight is missing or of another shape" in capfd.readouterr().err
    assert stage("train_tokenizer", *TOKENIZER, *only, start) == 0
    folders = (f"{tokenizer_run}/latest/vqvae", f"{tmp_path}/decoder/latest/vqvae")
    before, after = map(MultiScaleVQ.from_pretrained, folders)
    assert tokenizer_hash(before) == tokenizer_hash(after)
    other = MultiScaleVQ.from_config({**before.config, "cosine": True})
    other.load_state_dict(before.state_dict())
    assert tokenizer_hash(before) != tokenizer_hash(other) and not same_tokenizer(before, other)


def test_a_part_that_joins_late_has_its_own_warm_up():
    branch = Branch(OptimizerConfig(), [], begin=0.2)
    assert [branch.progress(p) for p in (0.0, 0.2, 0.6, 1.0)] == pytest.approx([0.0, 0.0, 0.5, 1.0])
    assert Branch(OptimizerConfig(), []).progress(0.3) == 0.3
    assert Branch(OptimizerConfig(), [], begin=1.0).progress(1.0) == 0


def test_validation_looks_at_images_of_all_classes():
    seen = [spread_index(i, 200) for i in range(200)]
    assert sorted(seen) == list(range(200))
    assert len({index // 10 for index in seen[:40]}) > 12  # of 20 folders of ten


def test_widths_of_the_adversary_are_checked():
    for width in (20, 24, 0):
        with pytest.raises(ValueError, match=f"loss.adversary_width must be a multiple of 16, got {width}"):
            TokenizerLossConfig(adversary_width=width)


def test_a_finished_run_says_so(tokenizer_run, capfd):
    assert stage("train_tokenizer", *TOKENIZER, f"--run.run_dir={tokenizer_run}", "--loss.adversary=0.5") == 0
    assert f"{tokenizer_run} has all its 16 images: nothing to train" in capfd.readouterr().err


def test_saved_configuration_runs_again(tokenizer_run, tmp_path):
    arguments = [f"--config={tokenizer_run}/config.yaml", f"--run.run_dir={tmp_path}"]
    assert stage("train_tokenizer", *arguments) == 0
    assert curve(tmp_path) == curve(tokenizer_run)


@pytest.fixture(scope="module")
def cache(tokenizer_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    arguments = ["--data.source=scenes", "--data.size=16", "--data.num_scenes=40", "--data.val_fraction=0.2"]
    arguments += [f"--cache.tokenizer={tokenizer_run}/latest/vqvae", f"--cache.folder={folder}"]
    arguments += ["--cache.shard_size=16", "--cache.batch_size=8"]
    assert stage("cache_tokens", *arguments) == 0
    (folder / "train" / "00001.npy").unlink()  # as if stopped half-way
    (folder / "train" / "manifest.json").unlink()
    assert stage("cache_tokens", *arguments) == 0
    assert stage("cache_tokens", *arguments, "--cache.seed=1") == 2
    assert stage("cache_tokens", *arguments, "--cache.latents=true") == 2  # its shards have none
    assert stage("cache_tokens", *arguments, '--data.scene_tags={"colors": 2.0}') == 2
    assert stage("cache_tokens", *arguments, "--cache.precision=bf16") == 2
    return folder


def test_cached_tokens_are_the_tokenizers(cache, tokenizer_run):
    from tokenizer.model import MultiScaleVQ
    from train.data import DataConfig, build_dataset
    from train.prepare import as_floats
    from train.token_cache import TokenCache

    vqvae = MultiScaleVQ.from_pretrained(tokenizer_run / "latest" / "vqvae").eval()
    cached = TokenCache(cache, "train", vqvae)
    data = build_dataset(DataConfig(source="scenes", size=16, num_scenes=40, val_fraction=0.2), "train")
    assert len(cached) == len(data) == 40 and cached.num_classes == 6
    for index in (0, 17, 39):
        item, image = cached[index], data[index]
        ids = torch.cat(vqvae.image_to_tokens(as_floats({"image": image["image"][None]})["image"]), dim=1)
        assert torch.equal(item["ids"], ids[0])
        assert (item["label"], item["caption"]) == (image["label"], image["caption"])
    assert np.load(cache / "train" / "00000.npy").dtype == np.uint16


def test_a_cache_of_another_tokenizer_is_refused(cache, tiny_vqvae):
    from train.token_cache import TokenCache

    with pytest.raises(ValueError, match="another tokenizer"):
        TokenCache(cache, "train", tiny_vqvae)
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        TokenCache(cache / "nowhere", "train", tiny_vqvae)


@pytest.mark.parametrize("kind", ["class", "text"])
def test_transformer_stage(cache, tokenizer_run, tmp_path, kind, capfd):
    arguments = [*TINY, f"--run.run_dir={tmp_path}", f"--tokens.tokenizer={tokenizer_run}/latest/vqvae"]
    arguments += ["--transformer.depth=1", "--transformer.width=16", "--transformer.heads=2"]
    if kind == "text":
        arguments += ["--transformer.conditioning=text", "--text.d_model=16", "--text.layers=1", "--text.heads=2"]
        arguments += ["--text.d_ff=16", f"--tokens.cache={cache}"]
        arguments += ["--optimizer.name=muon"] if hasattr(torch.optim, "Muon") else []
    assert stage("train_var", *arguments) == 0
    from sample.pipeline import NextScalePipeline

    pipeline = NextScalePipeline.from_pretrained(tmp_path / "latest")
    assert (pipeline.text_encoder is not None) == (kind == "text")
    assert list((tmp_path / "images").glob("samples_*.png"))
    assert {"accuracy", "loss_1x1", "accuracy_8x8"} <= set(curve(tmp_path)[-1])
    capfd.readouterr()
    assert stage("train_var", *arguments, "--transformer.mask=block_diagonal") == 2
    assert "was trained with another transformer.mask: resume with that one" in capfd.readouterr().err
    if kind == "class" and hasattr(torch.optim, "Muon"):
        assert stage("train_var", *arguments, "--optimizer.name=muon") == 2
        assert "was trained with another optimizer.name" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--optimizer.nme=x", "--optimizer.nme"),
        ("--run.total_images=many", "run.total_images"),
        ("--data.size=24", "data.size (24, 24) must be (16, 16)"),
        ("--tokenizer.schedule=3,2", "schedule must not shrink"),
        ("--optimizer.name=muon", "muon"),
    ],
)
def test_user_mistakes_are_one_line_and_exit_2(tmp_path, capfd, argument, words):
    assert stage("train_tokenizer", *TOKENIZER, f"--run.run_dir={tmp_path}/run", argument) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0]


def test_another_model_in_the_same_folder_is_refused(tokenizer_run, capfd):
    before = json.loads((tokenizer_run / "metrics.jsonl").read_text().splitlines()[-1])
    arguments = [*TOKENIZER, f"--run.run_dir={tokenizer_run}", "--loss.adversary=0.5", "--tokenizer.vocab_size=32"]
    state = final_state(tokenizer_run)
    assert stage("train_tokenizer", *arguments) == 2
    assert "holds a run of another model" in capfd.readouterr().err
    assert stage("train_tokenizer", *arguments[:-1], "--tokenizer.schedule=1,4,8") == 2  # of the same shapes
    assert "was trained with another tokenizer.schedule" in capfd.readouterr().err
    assert json.loads((tokenizer_run / "metrics.jsonl").read_text().splitlines()[-1]) == before
    assert equal(final_state(tokenizer_run), state)


def compare_sharded(options: dict) -> None:
    """A real transformer's loss and gradients, whole and sharded as fsdp2.yaml says; exits with 1 where they differ."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    settings = yaml.safe_load(Path("configs/accelerate/fsdp2.yaml").read_text())["fsdp_config"]
    names = settings["fsdp_transformer_layer_cls_to_wrap"].split(",")
    sizes = {"depth": 2, "width": 32, "heads": 2, "vocab_size": 20, "latent_channels": 5, "schedule": "1,2,3"}
    torch.manual_seed(0)
    Accelerator(cpu=True)  # joins the processes
    model = liven(NextScaleTransformer(**sizes, num_classes=4, **options), 1).train()
    text = TextPrompt(torch.randn(2, 7, 12), torch.ones(2, 7, dtype=torch.bool))
    prompt = text if "text_width" in options else ClassPrompt(torch.tensor([0, 1]))
    inputs = torch.randn(2, model.schedule.total - 1, 5)

    class Objective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = model

        def forward(self) -> torch.Tensor:
            cond = self.transformer.condition(prompt)
            return self.transformer.logits(self.transformer(inputs, cond), cond).square().mean()

    objective = Objective()
    objective().backward()
    expected = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    mesh, wrapped = init_device_mesh("cpu", (2,)), 0
    for module in reversed(list(objective.modules())[1:]):
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh)
            wrapped += 1
    fully_shard(objective, mesh=mesh)
    gather_apart(objective)
    objective().backward()
    found = {name: p.grad.full_tensor() for name, p in objective.named_parameters() if p.grad is not None}
    same = found.keys() == expected.keys() and all(torch.allclose(found[n], g, atol=1e-5) for n, g in expected.items())
    sys.exit(not (same and wrapped > 2))


@needs_sharding
@pytest.mark.parametrize("options", [{}, {"shared_ada": True}, {"text_width": 12, "text_length": 9, "cross_gate": 0.5}])
def test_a_sharded_transformer_is_the_whole_one(options):
    options = {**options, "conditioning": "text"} if "text_width" in options else options
    assert in_processes(2, compare_sharded, options) == [0, 0]


@pytest.mark.parametrize(
    "native, precision, device, told",
    [
        (False, "bf16", "cpu", "no"),
        (True, "bf16", "cpu", None),
        (False, "no", "cpu", None),
        (False, "bf16", "cuda", "fp16"),
        (None, "bf16", "cuda", "no"),
        (True, "bf16", "cuda", None),
        (False, "bf16", "mps", None),
    ],
)
def test_emulated_half_precision_is_told(native, precision, device, told, monkeypatch, capsys):
    capability = {False: (7, 5), True: (9, 0), None: (6, 1)}[native]  # Turing, Hopper, Pascal
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: native, raising=False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False, raising=False)
    tell_of_emulation(SimpleNamespace(mixed_precision=precision, device=torch.device(device), print=print))
    said = capsys.readouterr().err
    assert said.endswith(f"take --run.precision={told}\n") if told else not said


@pytest.mark.parametrize(
    "device, compiler, told",
    [
        ("cpu", True, None),
        ("cpu", False, "there is no C++ compiler"),
        ("cuda", True, None),
        ("cuda", False, "there is no C compiler, which Triton needs"),
        ("mps", True, "it was never tried on mps"),
    ],
)
def test_compiling_is_left_out_where_it_cannot_work(device, compiler, told, monkeypatch, capsys):
    from torch._inductor import cpp_builder, exc

    def find():
        if not compiler:
            raise exc.InvalidCxxCompiler
        return "g++"

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", find)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if compiler else None)
    assert can_compile(SimpleNamespace(device=torch.device(device), print=print)) == (told is None)
    said = capsys.readouterr().err
    assert said == (f"run.compile is left out: {told}\n" if told else "")


@pytest.mark.parametrize(
    "image", [torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(2, 1, 8, 8).byte()]
)
def test_images_of_another_kind_are_not_trained_on(image):
    from train.prepare import as_floats

    with pytest.raises(ValueError, match=r"images to train on must be uint8 \(3, h, w\) each, got a batch of "):
        as_floats({"image": image})
