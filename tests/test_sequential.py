"""The head that draws a scale's tokens one after the other: in the loop, in training, from file to file."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY, liven, quiet_pipeline
from conftest import drawn_tokens as tokens
from test_supernet import last_validation, train

from sample.costs import plan_flops
from sample.edit import EditHook
from sample.generate import draw_in_turn, generate, scale_features, start
from sample.guidance import mix
from sample.ledger import counted_flops
from sample.load import load_pipeline
from sample.pipeline import NextScalePipeline
from sample.plan import Plan, Stage, plain
from sample.plan_text import PlanConfig
from train.sequential import SequentialConfig, with_head, without_head
from var.conditioning import ClassPrompt
from var.transformer import NextScaleTransformer

HEAD = {"sequential_layers": 2, "sequential_scales": 2}


def make_model(seed=2, **sizes):
    return liven(NextScaleTransformer(depth=2, width=32, heads=2, num_classes=5, **TINY, **HEAD | sizes), seed)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def pipeline(model, tiny_vqvae):
    return quiet_pipeline(model, tiny_vqvae)


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_an_untrained_head_changes_nothing(class_pipeline, tiny_class_model, tiny_vqvae, guidance):
    headed = with_head(tiny_class_model, SequentialConfig(layers=2, scales=3), tiny_vqvae.quantizer).eval()
    other = NextScalePipeline(headed, tiny_vqvae)
    assert torch.equal(tokens(other, guidance_scale=guidance), tokens(class_pipeline, guidance_scale=guidance))
    assert without_head(headed).sequential is None


def test_it_can_be_left_out_or_stop_earlier(pipeline, model, tiny_vqvae):
    alone = NextScalePipeline(without_head(model).eval(), tiny_vqvae)
    whole, off = tokens(pipeline), tokens(pipeline, sequential=0)
    assert torch.equal(off, tokens(alone)) and not torch.equal(whole, off)
    assert torch.equal(tokens(pipeline, sequential=2), whole)
    assert not torch.equal(tokens(pipeline, sequential=1), whole)
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=rf"sequential must be in 0\.\.2 scales of this model, got {wrong}"):
            tokens(pipeline, sequential=wrong)


def test_a_stage_of_later_scales_needs_no_head(model):
    """What is drawn token by token is said of the whole plan; it must hold where those scales are made."""
    drafted, headless = Stage(model, range(2), sequential=2), without_head(model)
    assert len(Plan((drafted, Stage(headless, range(2, 3), sequential=2))).stages) == 2
    with pytest.raises(ValueError, match="sequential must be 0, as this model has no head for it, got 2"):
        Plan((Stage(model, range(1), sequential=1), Stage(headless, range(1, 3), sequential=2)))


@torch.no_grad()
def test_token_by_token_is_the_masked_pass(model):
    features, ids, lengths = torch.randn(3, 21, 32), torch.randint(16, (3, 21)), (1, 4, 16)
    whole, parts = model.sequential(features, ids, lengths), []
    for begin, n in ((0, 1), (1, 4), (5, 16)):
        before, past = None, None
        for place in range(begin, begin + n):
            correction, past = model.sequential.step(features[:, place : place + 1], before, past)
            before = ids[:, place : place + 1]
            parts.append(correction)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("given_first", [False, True])
def test_a_token_is_drawn_from_what_those_before_it_say(model, tiny_vqvae, given_first, guidance):
    """Also where those before it are given, as in editing, and not drawn; the head reads the conditional half."""

    def after_one_scale():
        state = start(plan, tiny_vqvae.quantizer, ClassPrompt(torch.tensor([1, 2])), [3, 4])
        state.enter(plan.stages[0])
        scale_features(state, 0)
        state.advance(0, torch.tensor([[7], [9]]))
        return state

    plan = plain(model, guidance=guidance, top_k=5)
    state = after_one_scale()
    if given_first:
        state.extras["given"] = torch.full((2, 21), -1)
        state.extras["given"][:, 1:3] = torch.tensor([[0, 6], [7, 0]])
    logits, drawn = draw_in_turn(state, 1)
    if given_first:
        assert torch.equal(drawn[:, :2], state.extras["given"][:, 1:3])
    features = scale_features(after_one_scale(), 1)
    parallel = model.head.project(mix(features, 1.0) if guidance else features)  # half of the ramp to 2
    expected = parallel + model.sequential(features[:2], drawn, (4,))
    torch.testing.assert_close(logits, plan.stages[0].filter(1)(expected), rtol=1e-4, atol=1e-4)


def test_an_image_does_not_depend_on_its_batch(pipeline):
    both = tokens(pipeline, guidance_scale=1.5, top_k=8)
    for row, label in enumerate((1, 3)):
        one = pipeline(class_labels=label, seed=5 + row, output_type="latent", guidance_scale=1.5, top_k=8)
        assert torch.equal(torch.cat(one.tokens, dim=1)[0], both[row])


def test_given_tokens_stay(model, tiny_vqvae):
    given = torch.full((1, 21), -1)
    given[0, :3] = torch.tensor([1, 2, 3])
    state = generate(plain(model), tiny_vqvae.quantizer, ClassPrompt(torch.tensor([1])), [0], hooks=[EditHook(given)])
    assert torch.cat(state.tokens, dim=1)[0, :3].tolist() == [1, 2, 3]


def test_only_a_whole_model_has_a_head(model):
    """A subnet's features are not what the head was trained on."""
    stages = PlanConfig(plan="supernet:1", depth=1).build(model).stages
    assert [stage.in_turn(k) for stage in stages for k in stage.scales] == [True, False, False]


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_its_operations_are_counted(model, tiny_vqvae, guidance):
    plan, counted = plain(model, guidance=guidance), 0
    state = start(plan, tiny_vqvae.quantizer, ClassPrompt(torch.tensor([1])), [1])
    state.enter(plan.stages[0])
    for k in range(2):
        with counted_flops() as counter:
            _, drawn = draw_in_turn(state, k)
        counted += counter.get_total_flops()
        state.advance(k, drawn)
    last = plan_flops(plan) - counted
    assert last == plan_flops(plain(without_head(model), guidance=guidance), [0, 0, 1])


def test_it_is_saved_with_its_transformer(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(tokens(loaded), tokens(pipeline))
    assert load_pipeline(tmp_path, dtype="bfloat16").transformer.sequential.proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"sequential_scales": 4}, r"sequential_scales then in 1\.\.3: got 2 and 4"),
        ({"sequential_layers": -1}, "sequential_layers must be 0 or more"),
        ({"bitwise": True}, "sequential_layers must be 0 for bitwise tokens"),
    ],
)
def test_mistakes_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_model(**sizes)


def test_it_is_trained_on_a_finished_transformer(tiny_vqvae, tmp_path, capfd):
    """The transformer stays as it is, to the bit; the head learns, and is no part of what is trained on from there."""
    vqvae, base = tmp_path / "vqvae", tmp_path / "base"
    tiny_vqvae.save_pretrained(vqvae)
    assert train(base, vqvae) == 0
    settings = [f"--start_from={base}/latest/transformer", "--sequential.layers=1", "--sequential.scales=2"]
    settings += ["--optimizer.lr=0.01", "--run.total_images=200", "--transformer.drop_path=0.1"]
    assert train(tmp_path / "head", vqvae, *settings) == 0
    found = last_validation(tmp_path / "head")
    assert {"loss_1x1", "loss_2x2"} <= set(found) and "loss_4x4" not in found
    assert found["loss"] < found["loss_at_once"]

    before, after = (NextScaleTransformer.from_pretrained(p / "latest/transformer") for p in (base, tmp_path / "head"))
    weights = after.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.state_dict().items())
    assert after.sequential.proj.weight.abs().max() > 0

    capfd.readouterr()
    again = [f"--start_from={tmp_path}/head/latest/transformer"]
    assert train(tmp_path / "on", vqvae, *again) == 0
    assert "its sequential head is left out" in capfd.readouterr().err
    assert json.loads((tmp_path / "on/latest/transformer/config.json").read_text())["sequential_layers"] == 0
    for more, message in (
        ([], "give start_from"),
        ([*settings, "--supernet.depths=[1]"], "leave one out"),
        ([*again, "--sequential.layers=2"], "and the head of start_from has (1, 2)"),
        (["--sequential.layers=-1"], "sequential.layers must be 0 or more"),
    ):
        assert train(tmp_path / "wrong", vqvae, "--sequential.layers=1", *more) == 2
        assert message in capfd.readouterr().err


def test_the_command_takes_it(pipeline, tmp_path, capsys):
    from nextscale import main

    pipeline.save_pretrained(tmp_path / "model")
    common = ["sample", "--model", str(tmp_path / "model"), "--class", "1", "--seed", "2"]
    for name, more in (("on", []), ("off", ["--sequential", "0"])):
        assert main([*common, "--out", str(tmp_path / name), *more]) == 0
    on, off = (np.fromfile(next((tmp_path / name).rglob("*.png")), np.uint8) for name in ("on", "off"))
    assert on.tobytes() != off.tobytes()
    assert main([*common, "--out", str(tmp_path / "more"), "--sequential", "3"]) == 2
    assert "sequential must be in 0..2" in capsys.readouterr().err
