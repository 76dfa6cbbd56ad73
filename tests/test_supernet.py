"""Subnets and collaborations in training: which layers run when, what learns from what, through the command line."""

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_toys import in_processes

from sample.commands.info import describe
from sample.load import load_pipeline
from sample.plan import untrained
from tokenizer.schedule import ScaleSchedule
from train.collaborate import CollaborationConfig, DrafterObjective, RefinerObjective
from train.config import exit_code
from train.optimizers import OptimizerConfig
from train.progressive import ProgressiveConfig, ProgressiveObjective
from train.session import Clock
from train.supernet import SupernetConfig, SupernetObjective
from train.train_var import main
from train.var_objective import VarLossConfig, VarObjective
from var.conditioning import ClassPrompt
from var.supernet import equidistant, is_trained, runs_of_depth
from var.transformer import NextScaleTransformer

SCHEDULE = ScaleSchedule.of("1,2,3")
START = Clock(0, 0.0, 0)


def make_model(seed=0, depth=4, width=32, **options):
    torch.manual_seed(seed)
    config = {"vocab_size": 16, "latent_channels": 4, "schedule": "1,2,3", "num_classes": 5, "heads": 2}
    model = NextScaleTransformer(depth=depth, width=width, **{**config, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def token_batch(count=6):
    generator = torch.Generator().manual_seed(0)
    return {
        "ids": torch.randint(16, (count, 14), generator=generator),
        "inputs": torch.randn(count, 13, 4, generator=generator),
        "label": torch.arange(count) % 5,
        "counter": range(count),
    }


def test_equidistant_layers_are_the_papers():
    assert equidistant(30, 16) == (0, *range(1, 30, 2))
    assert equidistant(30, 8) == (0, 4, 8, 12, 16, 20, 24, 29)
    assert equidistant(30, 4) == (0, 9, 19, 29) and equidistant(30, 2) == (0, 29) and equidistant(30, 1) == (0,)


@given(st.integers(1, 60), st.data())
def test_a_subnet_of_every_depth(depth, data):
    active = data.draw(st.integers(1, depth))
    layers = equidistant(depth, active)
    assert len(set(layers)) == active and sorted(layers) == list(layers) and layers[0] == 0 and layers[-1] < depth
    assert active == 1 or layers[-1] == depth - 1
    assert equidistant(depth, depth) == tuple(range(depth))


def test_which_subnets_are_trained():
    subnets = {"depths": [4, 2], "bridge": 3}
    assert [is_trained(subnets, *asked) for asked in ((4, 3), (2, 5), (4, 2), (3, 3))] == [True, True, False, False]
    assert not is_trained(None, 4, 3)


def test_runs_of_depth():
    assert runs_of_depth([8, 8, 4]) == [(range(2), 8), (range(2, 3), 4)]
    assert runs_of_depth([2, 1, 2]) == [(range(1), 2), (range(1, 2), 1), (range(2, 3), 2)]


def test_the_share_of_subnet_steps_goes_through_three_phases():
    config = SupernetConfig(depths=[2], joint=0.2, phases=(0.2, 0.8))
    assert [config.share(p) for p in (0, 0.1, 0.2, 0.5, 0.8, 1.0)] == pytest.approx([0.2, 0.2, 0.2, 0.6, 1.0, 1.0])


def supernet(model, drop=0.0, **settings):
    config = SupernetConfig(**{"depths": [1, 2], "bridge": 1, **settings})
    return SupernetObjective(model, VarLossConfig(drop=drop), OptimizerConfig(), supernet=config)


def test_depths_are_drawn_from_seed_and_step():
    """So every process, and every resumed run, draws the same."""
    one, other = supernet(make_model()), supernet(make_model(seed=1))
    clocks = [Clock(step, 0.5, 7) for step in range(400)]
    drawn = [one.depth(clock) for clock in clocks]
    assert drawn == [other.depth(clock) for clock in clocks]
    shares = {depth: drawn.count(depth) / 400 for depth in (None, 1, 2)}
    assert shares == pytest.approx({None: 0.4, 1: 0.3, 2: 0.3}, abs=0.08)
    assert drawn != [one.depth(Clock(step, 0.5, 8)) for step in range(400)]


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"positions": "rope"}], ids=str)
def test_a_bridge_runs_all_layers_and_the_rest_a_subnet(options):
    model = make_model(**options).eval()
    cond, x = model.condition(ClassPrompt(torch.tensor([0, 1]))), torch.randn(2, 13, 4)
    full, subnet = model(x, cond), model(x, cond, layers=[0, 3])
    bridged = model(x, cond, layers=[0, 3], bridge=2)
    torch.testing.assert_close(bridged[:, :5], full[:, :5], atol=1e-5, rtol=0)
    for other in (full, subnet):
        assert (bridged[:, 5:] - other[:, 5:]).abs().max() > 1e-3
    torch.testing.assert_close(model(x, cond, layers=range(4), bridge=2), full, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"bridge must be in \[0, 3\), and 0 unless scales begin at 0; got 3"):
        model(x, cond, layers=[0, 3], bridge=3)


def test_skipped_layers_learn_from_the_bridge():
    model = make_model()
    objective = supernet(model, drop=0.1, joint=1.0, depths=[2], bridge=1).train()
    objective(token_batch(), START)[0].backward()
    skipped = model.blocks[1].ffn.fc1.weight.grad
    assert skipped is not None and skipped.abs().max() > 0 and not objective.find_unused
    model.zero_grad()
    bare = supernet(model, drop=0.1, joint=1.0, depths=[2], bridge=0).train()
    bare(token_batch(), START)[0].backward()
    assert model.blocks[1].ffn.fc1.weight.grad is None and bare.find_unused


def test_a_step_trains_what_it_drew():
    model = make_model()
    objective = supernet(model, joint=1.0, depths=[2]).train()
    loss, _ = objective(token_batch(), START)
    cond = model.condition(ClassPrompt(token_batch()["label"]))
    logits = model.logits(model(token_batch()["inputs"], cond, layers=(0, 3), bridge=1), cond)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_batch()["ids"].flatten())
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


@torch.no_grad()
def test_validation_tells_of_every_subnet():
    model = make_model()
    loss, metrics = supernet(model).eval()(token_batch(), START)
    whole, _ = VarObjective(model, VarLossConfig(), OptimizerConfig()).eval()(token_batch(), START)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    assert {"loss_depth1", "accuracy_depth1", "loss_depth2", "accuracy_depth2"} <= set(metrics)


@torch.no_grad()
@pytest.mark.parametrize("handover", [1, 2])
def test_a_drafter_learns_its_scales_as_a_whole_model_would(handover):
    model, config = make_model(), CollaborationConfig(role="drafter", handover=handover)
    drafter = DrafterObjective(model, VarLossConfig(drop=0.0), OptimizerConfig(), code=config).train()
    loss, metrics = drafter(token_batch(), START)
    _, whole = VarObjective(model, VarLossConfig(drop=0.0), OptimizerConfig()).train()(token_batch(), START)
    sides = ["1x1", "2x2"][:handover]
    assert {name for name in metrics if name.startswith("loss_")} == {f"loss_{side}" for side in sides}
    for side in sides:
        assert metrics[f"loss_{side}"].item() == pytest.approx(whole[f"loss_{side}"].item(), rel=1e-5)
    weights = torch.tensor([1.0, 4.0][:handover])
    wanted = (torch.stack([metrics[f"loss_{side}"] for side in sides]) * weights / weights.sum()).sum()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def bits_batch(count=6):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, (count, 14, 4), generator=generator)
    inputs = torch.randn(count, 13, 4, generator=generator)
    return {"label": torch.arange(count) % 5, "counter": range(count), "ids": ids, "inputs": inputs}


BITS = {"bitwise": True, "vocab_size": 2}


@torch.no_grad()
@pytest.mark.parametrize("handover", [1, 2])
def test_a_drafter_learns_from_bits(handover):
    model, config = make_model(**BITS), CollaborationConfig(role="drafter", handover=handover)
    drafter = DrafterObjective(model, VarLossConfig(drop=0.0), OptimizerConfig(), code=config)
    whole = VarObjective(model, VarLossConfig(drop=0.0), OptimizerConfig())
    found, wanted = (o.train()(bits_batch(), START)[1] for o in (drafter, whole))
    for side in ["1x1", "2x2"][:handover]:
        assert found[f"loss_{side}"].item() == pytest.approx(wanted[f"loss_{side}"].item(), rel=1e-5)


def test_a_refiner_follows_its_teacher_on_bits():
    teacher = make_model(seed=1, **BITS)
    same = refiner(make_model(seed=1, **BITS), teacher).train()
    assert same(bits_batch(), START)[0].item() == pytest.approx(0, abs=1e-6)
    other = refiner(make_model(seed=2, depth=2, width=16, **BITS), teacher).train()
    loss, metrics = other(bits_batch(), START)
    assert loss.item() > 0.001 and {"kl_1x1", "accuracy_3x3"} <= set(metrics)
    loss.backward()


def refiner(student, teacher, **settings):
    config = CollaborationConfig(role="refiner", handover=2, teacher="-", **settings)
    return RefinerObjective(student, VarLossConfig(drop=0.3), OptimizerConfig(), code=config, teacher=teacher)


def smoothed_refiner():
    config = CollaborationConfig(role="refiner", handover=2, teacher="-")
    loss = VarLossConfig(label_smoothing=0.1)
    return RefinerObjective(make_model(), loss, OptimizerConfig(), code=config, teacher=make_model(seed=1))


def test_parts_that_one_scale_leaves_unused_are_found():
    """The first scale alone reads no inputs; DDP must know."""
    config = CollaborationConfig(role="drafter", handover=1)
    common = (make_model(), VarLossConfig(drop=0.1), OptimizerConfig())
    assert DrafterObjective(*common, code=config).find_unused
    assert ProgressiveObjective(*common, progressive=ProgressiveConfig(coarse=1)).find_unused
    assert not ProgressiveObjective(*common, progressive=ProgressiveConfig(coarse=2)).find_unused
    assert VarObjective(*common, text_encoder=torch.nn.Linear(2, 2)).find_unused


@pytest.mark.parametrize("divergence", ["teacher", "student"])
def test_a_refiner_follows_its_teacher(divergence):
    teacher = make_model(seed=1)
    same = refiner(make_model(seed=1), teacher, divergence=divergence).train()
    assert same(token_batch(), START)[0].item() == pytest.approx(0, abs=1e-6)
    other = refiner(make_model(seed=2, depth=2, width=16), teacher, divergence=divergence).train()
    loss, metrics = other(token_batch(), START)
    assert loss.item() > 0.01 and {"kl_1x1", "kl_3x3", "accuracy_3x3"} <= set(metrics)
    loss.backward()
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not any("frozen" in name or "teacher" in name for name in other.state_dict())


TEXT = {"conditioning": "text", "text_width": 6, "text_length": 5}


def test_a_refiners_teacher_reads_its_own_null_text(monkeypatch):
    """What is dropped is each model's own learned prompt: a teacher of other weights is followed there as well."""
    teacher, student = make_model(seed=1, **TEXT), make_model(seed=2, **TEXT)
    objective = refiner(student, teacher).train()
    objective.config.drop = 1.0
    seen = {}
    for name, model in (("teacher", teacher), ("student", student)):
        condition = model.condition
        monkeypatch.setattr(model, "condition", lambda p, n=name, c=condition: c(seen.setdefault(n, p)))
    objective(token_batch() | {"states": torch.randn(6, 5, 6), "mask": torch.ones(6, 5, dtype=torch.bool)}, START)
    for name, model in (("teacher", teacher), ("student", student)):
        assert torch.equal(seen[name].states_BTE, model.null_prompt(seen[name]).states_BTE)
    assert not torch.equal(seen["teacher"].states_BTE, seen["student"].states_BTE)


@torch.no_grad()
def test_early_scales_fade_out():
    objective = refiner(make_model(seed=2), make_model(seed=1)).train()
    plain = VarObjective(make_model(), VarLossConfig(), OptimizerConfig()).weights(START)
    for progress in (0.0, 0.25, 1.0):
        weights = objective.weights(Clock(0, progress, 0))
        torch.testing.assert_close(weights[5:], plain[5:])
        torch.testing.assert_close(weights[:5], plain[:5] * (1 - progress))
    assert objective.eval().weights(START)[:5].sum() == 0


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda: supernet(make_model(), depths=[4]), "supernet.depths must be in 1..3"),
        (lambda: supernet(make_model(), bridge=3), "supernet.bridge must be in 0..2"),
        (lambda: SupernetConfig(phases=(0.8, 0.2)), "supernet.phases"),
        (lambda: SupernetConfig(joint=1.2), "supernet.joint"),
        (lambda: CollaborationConfig(role="teacher"), "code.role"),
        (lambda: CollaborationConfig(role="refiner", handover=1), "code.teacher"),
        (lambda: refiner(make_model(), make_model(vocab_size=17)), "vocab_size"),
        (lambda: refiner(make_model(num_classes=3), make_model(num_classes=4)), "num_classes"),
        (lambda: smoothed_refiner(), "loss.label_smoothing must be 0"),
        (lambda: refiner(make_model(vocab_size=2), make_model(**BITS)), "bitwise"),
        (lambda: refiner(make_model(schedule="1,2"), make_model(schedule="1,2")), "code.handover"),
    ],
)
def test_mistakes_are_named(build, named):
    with pytest.raises(ValueError, match=named):
        build()


# --- through the command line ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vqvae_folder(tiny_vqvae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqvae")
    tiny_vqvae.save_pretrained(folder)
    return folder


def train(folder, vqvae_folder, *arguments):
    run = {"run_dir": folder, "total_images": 16, "batch_size": 4, "log_every": 2, "checkpoint_every": 2}
    run |= {"validate_every": 4, "workers": 0, "cpu": "true", "validation_images": 4, "previews": 2, "bar_every": 60}
    argv = [f"--run.{name}={value}" for name, value in run.items()]
    argv += ["--data.source=scenes", "--data.size=8", "--data.num_scenes=40", f"--tokens.tokenizer={vqvae_folder}"]
    argv += ["--transformer.depth=3", "--transformer.width=16", "--transformer.heads=2"]
    return exit_code(main, [*argv, *arguments])


def last_validation(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "validation"][-1]


def test_every_training_of_elastic_decoding_starts_from_a_checkpoint(vqvae_folder, tmp_path, capfd):
    base, plain = tmp_path / "base", f"--start_from={tmp_path}/base/latest/transformer"
    assert train(base, vqvae_folder) == 0
    assert train(tmp_path / "net", vqvae_folder, plain, "--supernet.depths=[1,2]", "--supernet.bridge=1") == 0
    assert {"loss_depth1", "accuracy_depth2"} <= set(last_validation(tmp_path / "net"))
    net = f"--start_from={tmp_path}/net/latest/transformer"
    head = [net, "--sequential.layers=1", "--sequential.scales=2"]
    assert train(tmp_path / "head", vqvae_folder, *head) == 0 == train(tmp_path / "on", vqvae_folder, net)
    subnets = [
        NextScaleTransformer.load_config(tmp_path / f"{run}/latest/transformer").get("subnets")
        for run in ("base", "net", "head", "on")
    ]
    assert subnets == [
        None,
        {"depths": [1, 2], "bridge": 1},
        {"depths": [1, 2], "bridge": 1},
        None,
    ]  # a head alters none
    assert train(tmp_path / "draft", vqvae_folder, plain, "--code.role=drafter", "--code.handover=2") == 0
    assert {"loss_1x1", "loss_2x2"} <= set(last_validation(tmp_path / "draft"))
    teacher = ["--code.role=refiner", "--code.handover=2", f"--code.teacher={base}/latest/transformer"]
    assert train(tmp_path / "refine", vqvae_folder, "--transformer.depth=1", *teacher) == 0
    assert {"kl_1x1", "kl_4x4"} <= set(last_validation(tmp_path / "refine"))
    scales_are_told(tmp_path)
    teacher[-1] = f"--code.teacher={tmp_path}/net/latest/transformer"
    capfd.readouterr()
    assert train(tmp_path / "refine", vqvae_folder, "--transformer.depth=1", *teacher) == 2
    assert "was trained with another code.teacher: resume with that one" in capfd.readouterr().err
    teacher[-1] = f"--code.teacher={base}/latest/transformer"
    capfd.readouterr()
    assert train(tmp_path / "both", vqvae_folder, *teacher, "--supernet.depths=[1]") == 2
    assert "leave one out" in capfd.readouterr().err


def scales_are_told(runs):
    """Of a drafter and a refiner, each alone and in turn; a model that goes on from them is for all scales again."""
    ranges = [NextScaleTransformer.load_config(runs / f"{run}/latest/transformer")["trained_scales"]
              for run in ("base", "draft", "refine")]  # fmt: skip
    assert ranges == [None, [0, 2], [2, 3]]
    base, draft = load_pipeline(runs / "base", device="cpu"), load_pipeline(runs / "draft", device="cpu")
    refine = load_pipeline(runs / "refine", device="cpu")
    assert untrained(base.make_plan()) is None
    assert "for the scales 0 to 1 only, and is to draw 0 to 2" in untrained(draft.make_plan())
    assert "for the scales 2 to 2 only, and is to draw 0 to 2" in untrained(refine.make_plan())
    both = load_pipeline(runs / "draft", device="cpu", refiner=runs / "refine")
    assert untrained(both.make_plan("code:2")) is None
    assert "for the scales 2 to 2 only, and is to draw 1 to 2" in untrained(both.make_plan("code:1"))
    assert dict(describe(refine))["trained"].startswith("for the scales 2 to 2 only: a refiner")


def trained(folder, vqvae_folder, *arguments):
    torch.manual_seed(0)
    if code := train(folder, vqvae_folder, *arguments):
        os._exit(code)


@pytest.mark.parametrize("bridge", [0, 1])
def test_two_processes_train_the_same_subnets(vqvae_folder, tmp_path, bridge):
    """The same draw in all processes; without a bridge, skipped layers get no gradient in any of them. What stochastic
    depth drops is an image's own.
    """
    settings = ["--supernet.depths=[1,2]", f"--supernet.bridge={bridge}", "--supernet.joint=1", "--run.micro_batch=2"]
    settings += ["--transformer.drop_path=0.5", "--gate_gain=1"]
    assert in_processes(1, trained, tmp_path / "one", vqvae_folder, *settings) == [0]
    assert in_processes(2, trained, tmp_path / "two", vqvae_folder, *settings) == [0, 0]
    one, two = (last_validation(tmp_path / name) for name in ("one", "two"))
    for name in ("loss", "loss_depth1", "loss_depth2"):
        assert two[name] == pytest.approx(one[name], rel=1e-4)
