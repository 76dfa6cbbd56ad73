"""Masked prediction (HMAR): in the model, in the loop, in training, and from file to file."""

import copy
import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, liven, quiet_pipeline
from conftest import drawn_tokens as tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from test_supernet import last_validation, train

from sample import adapters
from sample.convert import convert, convert_back
from sample.costs import cache_peak, plan_flops
from sample.draw import draw
from sample.edit import EditHook
from sample.fast import FastSettings, accelerate_transformer
from sample.generate import generate, scale_logits, start
from sample.graphs import GraphedSampler, Recorder
from sample.ledger import counted_flops
from sample.load import load_pipeline
from sample.masked import least_certain, masked_logits, read_mask_schedule, redraw
from sample.pipeline import NextScalePipeline
from sample.plan import Plan, plain
from sample.plan_text import PlanConfig
from tokenizer.schedule import ScaleSchedule
from train.masked import MaskedObjective, draw_masked, with_masked, without_masked
from train.optimizers import OptimizerConfig
from train.session import Clock
from train.var_objective import VarLossConfig
from var import convert_hmar
from var.conditioning import ClassPrompt
from var.transformer import NextScaleTransformer

GOLDENS = Path(__file__).parent / "goldens"
PASSES = ((1,), (1, 3), (4, 4, 8))


def make_model(seed=2, **sizes):
    config = {"depth": 3, "width": 32, "heads": 2, "num_classes": 5, "mask": "block_diagonal", "masked_layers": 2}
    return liven(NextScaleTransformer(**TINY | config | sizes), seed)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def pipeline(model, tiny_vqvae):
    return quiet_pipeline(model, tiny_vqvae)


def plan_of(model, passes=PASSES, **options):
    return Plan((replace(plain(model, **options).stages[0], mask_schedule=passes),))


# --- the model ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_masked_token_is_not_seen_and_the_others_of_its_scale_are(model, tiny_vqvae):
    schedule, quantizer = model.schedule, tiny_vqvae.quantizer
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(16, (2, n), generator=generator) for n in schedule.lengths]
    x, cond = quantizer.teacher_inputs(ids, schedule), model.condition(ClassPrompt(torch.tensor([1, 2])))
    codes = torch.cat([quantizer.scale_code(ids[k], k, schedule) for k in (1, 2)], dim=1)
    masked = torch.zeros(2, 20, dtype=torch.bool)
    masked[:, 1] = True  # a token of the 2x2 scale
    before = model.masked_logits(x, codes, masked, cond)

    def moved(place):
        changed = codes.clone()
        changed[:, place] += 1
        difference = model.masked_logits(x, changed, masked, cond) - before
        return (difference.abs().amax(dim=(0, 2)) > 1e-5).tolist()

    assert not any(moved(1))
    assert moved(0) == [False, True, True, True, True, *[False] * 16]  # its own scale, and no other
    one = model.masked_logits(x[:, :4], codes[:, :4], masked[:, :4], cond, scales=range(1, 2))
    torch.testing.assert_close(one, before[:, 1:5], atol=1e-5, rtol=0)
    grouped = model.masked_logits(x, codes, masked, cond, attention_backend="grouped")
    torch.testing.assert_close(grouped, before, atol=1e-5, rtol=0)


@torch.no_grad()
@torch.no_grad()
def test_a_masked_pass_block_by_block(model, tiny_vqvae):
    """The first block is shared; the others, their modulations and the head are its own."""
    schedule, labels = model.schedule, torch.tensor([1, 2])
    ids = [torch.randint(16, (2, n)) for n in schedule.lengths]
    codes = torch.cat([tiny_vqvae.quantizer.scale_code(ids[k], k, schedule) for k in (1, 2)], dim=1)
    inputs, cond = tiny_vqvae.quantizer.teacher_inputs(ids, schedule), model.condition(ClassPrompt(labels))
    masked = torch.rand(2, 20) < 0.5
    found = model.masked_logits(inputs, codes, masked, cond)
    vector_BD = cond.start_BD
    beside = torch.where(masked[..., None], model.masked.mask_1D, codes @ model.input_proj.weight.mT)
    h = torch.cat([vector_BD[:, None] + model.start_position_1lD, model.input_proj(inputs) + beside], dim=1)
    levels = torch.repeat_interleave(torch.arange(3), torch.tensor(schedule.lengths))
    h = h + model.level_embedding(levels) + model.position_1LD
    reads = levels[:, None] == levels[None]
    for block in (model.blocks[0], *model.masked.blocks):
        h = block(h, block.modulation(vector_BD, None), mask=reads)
    head = model.masked.head
    wanted = head.project(head.features(h, head.ada(vector_BD)))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sides", ["1x1,2x2,4x2", "1x1,1x2,2x4,3x4"])
def test_other_shapes_have_their_own_places(sides):
    """A rotary model on another schedule than its own: each scale by itself as all at once."""
    model = make_model(positions="rope", rope_grid=[4, 4], level_table=5)
    schedule = replace(ScaleSchedule.of(sides), grid=(4, 4))
    generator = torch.Generator().manual_seed(0)
    x, codes = torch.randn(2, 2, schedule.total - 1, 4, generator=generator)
    masked = torch.rand(2, schedule.total - 1, generator=generator) < 0.5
    cond = model.condition(ClassPrompt(torch.tensor([1, 2])))
    whole = model.masked_logits(x, codes, masked, cond, schedule=schedule)
    for k in range(1, len(schedule)):
        here = slice(schedule.begins[k] - 1, schedule.ends[k] - 1)
        given = (x[:, here], codes[:, here], masked[:, here], cond)
        one = model.masked_logits(*given, scales=range(k, k + 1), schedule=schedule)
        torch.testing.assert_close(one, whole[:, 1:][:, here], atol=1e-5, rtol=0)


def test_another_aspect_is_drawn(tiny_vqvae):
    schedule = ScaleSchedule.of("1x1,1x2,2x2")
    model = make_model(positions="rope", rope_grid=[4, 4], level_table=5)
    stage = replace(plain(model, schedule=schedule).stages[0], mask_schedule=((1,), (2,), (1, 3)))
    state = generate(Plan((stage,)), tiny_vqvae.quantizer, ClassPrompt(torch.tensor([1])), [0])
    assert [tokens.shape[1] for tokens in state.tokens] == [1, 2, 4]


@torch.no_grad()
@pytest.mark.parametrize("level_every", [0, 2])
def test_it_begins_as_the_last_layers(level_every):
    """Without codes beside the inputs, and before any training, a masked pass is the plain pass."""
    model = with_masked(make_model(masked_layers=0, level_every=level_every), 2)
    cond = model.condition(ClassPrompt(torch.tensor([1, 2])))
    x = torch.randn(2, 20, 4)
    torch.testing.assert_close(
        model.masked_logits(x, None, None, cond), model.logits(model(x, cond), cond), atol=1e-5, rtol=0
    )
    assert without_masked(model).masked is None and with_masked(model, 2) is model
    deep = make_model(drop_path=0.3)
    assert [block.drop_path for block in deep.masked.blocks] == [block.drop_path for block in deep.blocks[1:]]
    with pytest.raises(ValueError, match="masked_layers must be 0 unless mask is block_diagonal"):
        with_masked(make_model(masked_layers=0, mask="block_causal"), 2)
    with pytest.raises(ValueError, match=r"masked\.layers is 1, and start_from has 2"):
        with_masked(model, 1)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"masked_layers": 3}, r"masked_layers must be in 0\.\.2"),
        ({"masked_layers": -1}, r"masked_layers must be in 0\.\.2"),
        ({"mask": "block_causal"}, "masked_layers must be 0 unless mask is block_diagonal"),
        ({"bitwise": True}, "masked_layers must be 0 unless"),
        ({"schedule": "4"}, "masked_layers must be 0 unless"),
        ({"sequential_layers": 1, "sequential_scales": 1}, "masked_layers must be 0 unless"),
    ],
)
def test_mistakes_of_sizes_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_model(**sizes)


def test_nothing_of_earlier_scales_is_kept(model, tiny_vqvae):
    plan = plan_of(model, guidance=1.5)
    assert plan.reserved(plan.stages[0]) == [0, 0, 0] and cache_peak(plan, 4, torch.float32) == 0
    state = start(plan, tiny_vqvae.quantizer, ClassPrompt(torch.tensor([1])), [0])
    state.enter(plan.stages[0])
    scale_logits(state, 0)
    assert state.cache.nbytes == 0 == state.cache.peak_nbytes


# --- the mask schedule ------------------------------------------------------------------------------------------------


def test_schedules_are_read():
    schedule = ScaleSchedule.of("1,2,3,4")
    published = ((1,), (1, 3), (1, 1, 2, 5), (16,))
    assert read_mask_schedule(None, schedule) == published
    assert read_mask_schedule("1/1,3/1,1,2,5", schedule) == published
    assert read_mask_schedule([[1], [1, 3], [1, 1, 2, 5]], schedule) == published
    for given_as in ([np.array([1]), torch.tensor([1, 3])], ((np.int64(1),), (1, 3))):
        assert read_mask_schedule(given_as, schedule) == ((1,), (1, 3), (9,), (16,))
    assert read_mask_schedule("off", schedule) == ((1,), (4,), (9,), (16,)) == read_mask_schedule([], schedule)
    assert max(map(len, read_mask_schedule(None, ScaleSchedule.of("var256")))) == 4  # 14 forward passes in all
    assert sum(map(len, read_mask_schedule(None, ScaleSchedule.of("var256")))) == 14
    assert read_mask_schedule(None, ScaleSchedule.of("2,3,4")) == ((4,), (1, 1, 2, 5), (16,))  # scale 0 in one pass


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("1/2,3", r"scale 1 has 4 tokens, of which each pass settles one or more, got \[2, 3\]"),
        ("1/0,4", r"scale 1 has 4 tokens"),
        ([[1], [5, -1]], r"scale 1 has 4 tokens"),
        ("0,1", r"scale 0 takes one pass"),
        ("1/4/9/16/25", r"must have at most 4 scales, got 5"),
        ("on", r"must be off, or tokens a pass like 1/1,3/1,1,2,5, got 'on'"),
    ],
)
def test_mistakes_of_schedules_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        read_mask_schedule(wrong, ScaleSchedule.of("1,2,3,4"))


def test_the_first_scale_takes_one_pass_however_many_tokens_it_has():
    with pytest.raises(ValueError, match=r"scale 0 takes one pass, got \[1, 3\]"):
        read_mask_schedule("1,3", ScaleSchedule.of("2,3"))


@pytest.mark.parametrize("wrong", [3, [1, 1], ["1", "1,3"], [None]])
def test_schedules_of_other_kinds_are_named(wrong):
    with pytest.raises(TypeError, match="mask_schedule must hold a list of numbers for each scale, got"):
        read_mask_schedule(wrong, ScaleSchedule.of("1,2,3,4"))


@pytest.mark.parametrize("passes", [((1,), (5, -1), (16,)), ((1,), (0, 4), (16,)), ((1,), (4,))])
def test_a_stage_checks_what_it_is_given(model, passes):
    with pytest.raises(ValueError, match="mask_schedule"):
        plan_of(model, passes)


@given(st.data())
@settings(max_examples=30)
def test_as_many_as_asked_are_masked_and_the_least_certain_ones(data):
    n, count = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 2))
    logits = torch.randn(3, n, 5, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    drawn = logits.argmax(dim=-1)
    masked = least_certain(logits, drawn, count, torch.ones_like(drawn, dtype=torch.bool))
    sure = logits.softmax(dim=-1).amax(dim=-1)
    assert masked.sum(dim=1).tolist() == [count] * 3
    assert (sure.masked_fill(~masked, -1).amax(1) <= sure.masked_fill(masked, 2).amin(1)).all()
    last = (torch.arange(n) == n - 1).expand(3, n)
    assert torch.equal(least_certain(logits, drawn, count, last), last)  # no more than there are
    again = least_certain(torch.randn_like(logits), drawn, 1, masked)
    assert again.sum(dim=1).tolist() == [1] * 3 and not (again & ~masked).any()  # what was settled stays


# --- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_one_pass_each_is_plain(pipeline, model, tiny_vqvae, guidance):
    alone = NextScalePipeline(without_masked(model).eval(), tiny_vqvae)
    alone.set_progress_bar_config(disable=True)
    off = tokens(pipeline, guidance_scale=guidance, mask_schedule="off")
    assert torch.equal(off, tokens(alone, guidance_scale=guidance))
    published = tokens(pipeline, guidance_scale=guidance)
    assert torch.equal(published, tokens(pipeline, guidance_scale=guidance, mask_schedule="1/1,3"))
    assert torch.equal(published[:, 0], off[:, 0])  # the first pass draws what it would draw alone
    assert not torch.equal(published, off)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_the_passes_step_by_step(model, tiny_vqvae, guidance):
    """A masked pass sees the image's own class only, and draws the least certain tokens again."""
    plan = plan_of(model, ((1,), (1, 1, 2), (16,)), guidance=guidance)
    state = start(plan, tiny_vqvae.quantizer, ClassPrompt(torch.tensor([1, 2])), [3, 4])
    state.enter(plan.stages[0])
    logits = scale_logits(state, 0)
    state.advance(0, logits.argmax(dim=-1))
    logits = scale_logits(state, 1)
    drawn = logits.argmax(dim=-1)
    after, ids = redraw(state, 1, logits, drawn)
    first = least_certain(logits, drawn, 3, torch.ones_like(drawn, dtype=torch.bool))
    assert torch.equal(ids[~first], drawn[~first]) and torch.equal(after[~first], logits[~first])
    code = tiny_vqvae.quantizer.scale_code(drawn, 1, model.schedule)
    cond = model.condition(state.prompt)
    again = model.masked_logits(state.inputs[0], code, first, cond, scales=range(1, 2))
    torch.testing.assert_close(masked_logits(state, 1, drawn, first), again, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("given", [False, True])
def test_every_pass_masks_fewer_of_the_tokens_it_drew_last(model, tiny_vqvae, given):
    """Of the scale's four: three, two, one; each with draws of its own and filtered. What is given is not drawn."""
    plan = plan_of(model, ((1,), (1, 1, 1, 1), (16,)), guidance=0.0, top_k=3)
    state = start(plan, tiny_vqvae.quantizer, ClassPrompt(torch.tensor([1, 2])), [3, 4])
    state.enter(plan.stages[0])
    state.advance(0, scale_logits(state, 0).argmax(dim=-1))
    logits = scale_logits(state, 1)
    drawn = logits.argmax(dim=-1)
    among = torch.ones_like(drawn, dtype=torch.bool)
    wanted, sure = drawn.clone(), logits.clone()
    if given:
        state.extras["given"] = torch.full((2, 21), -1)
        state.extras["given"][:, 2] = wanted[:, 1] = 0
        among[:, 1] = False
    for step, count in ((1, 3), (2, 2), (3, 1)):
        among = least_certain(sure, wanted, count, among)
        again = masked_logits(state, 1, wanted, among)
        assert (again.isfinite().sum(dim=-1) == 3).all()
        wanted = torch.where(among, draw(again, state.uniforms(1, step)), wanted)
        sure = torch.where(among[..., None], again, sure)
    after, ids = redraw(state, 1, logits, drawn)
    assert torch.equal(ids, wanted) and torch.equal(after, sure)
    assert not given or (ids[:, 1] == 0).all()


def test_a_late_stage_may_go_over_its_scales_again(model, tiny_vqvae):
    """There are as many draws as the stage with the most passes needs."""
    first, whole = plan_of(model, ((1,), (4,), (16,))), plan_of(model, ((1,), (4,), (4, 4, 8)))
    stages = replace(first.stages[0], scales=range(2)), replace(whole.stages[0], scales=range(2, 3))
    prompt = ClassPrompt(torch.tensor([1, 2]))
    made, wanted = (generate(plan, tiny_vqvae.quantizer, prompt, [3, 4]) for plan in (Plan(stages), whole))
    assert Plan(stages).passes == 3
    assert all(torch.equal(a, b) for a, b in zip(made.tokens, wanted.tokens))


def test_an_image_does_not_depend_on_its_batch(pipeline):
    options = {"guidance_scale": 1.5, "top_k": 8, "mask_schedule": PASSES}
    both = tokens(pipeline, **options)
    for row, label in enumerate((1, 3)):
        one = pipeline(class_labels=label, seed=5 + row, output_type="latent", **options)
        assert torch.equal(torch.cat(one.tokens, dim=1)[0], both[row])


def test_copies_draw_their_own(model, tiny_vqvae):
    """A row that is taken twice has fresh draws for all passes of the scales to come."""
    plan = plan_of(model)
    state = start(plan, tiny_vqvae.quantizer, ClassPrompt(torch.tensor([1])), [3])
    before = state.uniforms_BLn.clone()
    assert before.shape == (1, 21, 3)
    state.select([0, 0])
    assert torch.equal(state.uniforms_BLn[0], before[0])
    assert (state.uniforms_BLn[1] != before[0]).float().mean() > 0.99


def test_given_tokens_stay(model, tiny_vqvae):
    wanted = torch.full((1, 21), -1)
    wanted[0, :3] = torch.tensor([1, 2, 3])
    wanted[0, 9:] = torch.arange(12)
    state = generate(
        plan_of(model), tiny_vqvae.quantizer, ClassPrompt(torch.tensor([1])), [0], hooks=[EditHook(wanted)]
    )
    made = torch.cat(state.tokens, dim=1)
    assert torch.equal(made[wanted >= 0], wanted[wanted >= 0])


def test_only_a_whole_model_goes_over_a_scale_again(model):
    stages = PlanConfig(plan="supernet:2", depth=1).build(model, mask_schedule=PASSES).stages
    assert [len(stage.settled(k)) for stage in stages for k in stage.scales] == [1, 2, 1]


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_its_operations_are_counted(model, tiny_vqvae, guidance):
    plan, counted = plan_of(model, guidance=guidance), 0
    state = start(plan, tiny_vqvae.quantizer, ClassPrompt(torch.tensor([1])), [1])
    state.enter(plan.stages[0])
    for k in range(3):
        with counted_flops() as counter:
            logits = scale_logits(state, k)
            logits, drawn = redraw(state, k, logits, logits.argmax(dim=-1))
        counted += counter.get_total_flops()
        state.advance(k, drawn)
    codes = sum(2 * n * 4 * 4 * 9 * 16 for n in (1, 1, 1))  # the quantiser's convolution is not the transformer's
    assert plan_flops(plan) == counted - codes


def test_calls_are_recorded_and_replayed(pipeline, model, tiny_vqvae):
    """As on a GPU, where nothing may wait inside the loop; the recorder here only calls again."""
    sampler = GraphedSampler(tiny_vqvae, Recorder(record=lambda function, _: lambda given: list(function(*given))))
    prompt, plan = ClassPrompt(torch.tensor([1, 3])), plan_of(model)
    plainly = generate(plan, tiny_vqvae.quantizer, prompt, [5, 6])
    for _ in range(3):
        made = sampler.generate(plan_of(model), prompt, [5, 6])
        assert torch.equal(torch.cat(made.tokens, dim=1), torch.cat(plainly.tokens, dim=1))
    assert len(sampler.recorder.calls) == 1


def test_the_fast_path_draws_the_same(model, tiny_vqvae):
    prompt, drawn, fast = ClassPrompt(torch.tensor([1, 3])), [], deepcopy(model)
    accelerate_transformer(fast, FastSettings(linears=True))
    assert not any(type(module) is torch.nn.Linear for module in fast.masked.modules())
    for one in (model, fast):
        state = generate(plan_of(one, guidance=1.0), tiny_vqvae.quantizer, prompt, [5, 6])
        drawn.append(torch.cat(state.tokens, dim=1))
    assert torch.equal(*drawn)


# --- files and commands ----------------------------------------------------------------------------------------------


def test_it_is_saved_with_its_transformer(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(tokens(loaded), tokens(pipeline))
    half = load_pipeline(tmp_path, dtype="bfloat16").transformer.masked
    assert half.head.proj.weight.dtype == torch.float32 and half.blocks[0].ffn.fc1.weight.dtype == torch.bfloat16


def test_the_command_takes_it(pipeline, tmp_path, capsys):
    from nextscale import main

    pipeline.save_pretrained(tmp_path / "model")
    common = ["sample", "--model", str(tmp_path / "model"), "--class", "1", "--seed", "2"]
    for name, more in (("on", []), ("off", ["--mask-schedule", "off"])):
        assert main([*common, "--out", str(tmp_path / name), *more]) == 0
    on, off = (np.fromfile(next((tmp_path / name).rglob("*.png")), np.uint8) for name in ("on", "off"))
    assert on.tobytes() != off.tobytes()
    assert main([*common, "--out", str(tmp_path / "more"), "--mask-schedule", "1/2"]) == 2
    assert "mask_schedule: scale 1 has 4 tokens" in capsys.readouterr().err
    assert main(["sample", "a red star", "--out", str(tmp_path / "more"), "--mask-schedule", "1/1,3"]) == 2
    assert "mask_schedule 1/1,3 is for a model of masked prediction" in capsys.readouterr().err
    for text in ("1/1,3", "[[1], [1, 3]]", '["1", "1,3"]'):
        (tmp_path / "plan.yaml").write_text(f"mask_schedule: {text}\n")
        shutil.rmtree(tmp_path / "more", ignore_errors=True)
        assert main([*common, "--out", str(tmp_path / "more"), "--plan", str(tmp_path / "plan.yaml")]) == 0
        drawn = [np.asarray(Image.open(next((tmp_path / name).rglob("*.png")))) for name in ("more", "on")]
        assert np.array_equal(*drawn)
    assert main(["info", str(tmp_path / "model")]) == 0
    said = capsys.readouterr().out
    assert "2 layers and a head of their own; scales of several passes: 2x2 in 2" in said
    assert "--cache       none: attention stays within each scale" in said
    assert main(["calibrate", "--model", str(tmp_path / "model"), "--class", "1"]) == 2
    assert "there is no cache to calibrate" in capsys.readouterr().err


@pytest.fixture
def official(tmp_path):
    """Two trainings' files as HMAR's code writes them, of random weights, and the tokenizer's."""
    vae = load_file(GOLDENS / "vqvae_tiny/weights.safetensors")
    first = load_file(GOLDENS / "var_tiny/weights.safetensors")
    levels = first["lvl_1L"][0]
    allowed = levels[:, None] == levels[None]
    first["attn_bias_for_masking"] = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)[None, None]
    second = {key: tensor.clone() for key, tensor in first.items()}
    second["word_embed_bias"] = second.pop("word_embed.bias")
    generator = torch.Generator().manual_seed(0)
    for key, tensor in second.items():
        if key.startswith(("blocks.2.", "blocks.3.", "head")) and "zero_k" not in key:
            tensor += torch.randn(tensor.shape, generator=generator) * 0.1
    second["mask_embed.weight"] = torch.randn(1, 64, generator=generator)
    files = {"vae": vae, "first": first, "second": second, "whole": convert_hmar.normalized(first, second)}
    for name, state in files.items():
        torch.save(state, tmp_path / f"{name}.pth")
    return {name: tmp_path / f"{name}.pth" for name in files}


def test_official_files_come_in_and_go_back(official, tmp_path):
    files = {"vae": official["vae"], "transformer": official["first"], "masked": official["second"]}
    two = convert(tmp_path / "two", family="hmar", **files)["transformer"]
    assert (two.config["masked_layers"], two.config["depth"], two.config["mask"]) == (2, 4, "block_diagonal")
    convert(tmp_path / "one", family="hmar", vae=official["vae"], transformer=official["whole"])
    one, again = (load_pipeline(tmp_path / name, device="cpu") for name in ("one", "two"))
    whole = NextScalePipeline.from_official(**files)
    for other in (again, whole):
        for key, tensor in one.transformer.state_dict().items():
            assert torch.equal(tensor, other.transformer.state_dict()[key]), key
    assert one.config.sampling["top_p"] == 0.99
    convert_back(tmp_path / "two", tmp_path / "back", family="hmar")
    back, sent = torch.load(tmp_path / "back/transformer.pth"), torch.load(official["whole"])
    assert back.keys() == sent.keys() and all(torch.equal(back[key], sent[key]) for key in sent)
    with pytest.raises(ValueError, match="only a model with mask block_causal can be a VAR transformer"):
        convert_back(tmp_path / "two", tmp_path / "wrong")


def test_a_first_training_alone_has_no_masked_prediction(official, tmp_path):
    convert(tmp_path / "ours", family="hmar", vae=official["vae"], transformer=official["first"])
    pipeline = load_pipeline(tmp_path / "ours", device="cpu")
    assert pipeline.transformer.masked is None and not pipeline.transformer.reads_earlier
    convert_back(tmp_path / "ours", tmp_path / "back", family="hmar")
    back, sent = torch.load(tmp_path / "back/transformer.pth"), torch.load(official["first"])
    assert back.keys() == sent.keys() and all(torch.equal(back[key], sent[key]) for key in sent)


def test_files_that_do_not_belong_together(official, tmp_path):
    first, second = (torch.load(official[name]) for name in ("first", "second"))
    wrong = [
        (first, second | {"pos_start": second["pos_start"] + 1}, "do not belong together: pos_start differs"),
        (first, first, r"must have changed the last blocks of 4, got \[\]"),
        (convert_hmar.normalized(first, second), second, "has masked prediction already"),
        (
            first,
            {key: t.half() for key, t in second.items()},
            r"must be of one precision: torch.float16, torch.float32",
        ),
    ]
    for one, two, message in wrong:
        with pytest.raises(ValueError, match=message):
            convert_hmar.normalized(one, two)
    whole = convert_hmar.normalized(first, second)
    for missing in ("ns_head.weight", "mask_blocks.1.ffn.fc2.bias", "mask_embed.weight"):
        partly = {key: tensor for key, tensor in whole.items() if key != missing}
        with pytest.raises(ValueError, match=f"HMAR transformer checkpoint lacks {missing}"):
            adapters.build(adapters.HMAR, partly, schedule="1,2,3,4")
    with pytest.raises(ValueError, match="the var family has no file of masked prediction"):
        convert(
            tmp_path / "no",
            family="var",
            vae=official["vae"],
            transformer=official["first"],
            masked=official["second"],
        )


# --- training --------------------------------------------------------------------------------------------------------


def test_places_are_keyed_by_image():
    schedule = ScaleSchedule.of("1,2,3,4")
    masked = draw_masked(range(4, 4000), schedule, seed=1)
    assert torch.equal(draw_masked(range(8, 12), schedule, seed=1), masked[4:8])
    shares = torch.stack([part.float().mean(dim=1) for part in masked.split([4, 9, 16], dim=1)])
    assert (shares > 0).all() and shares.mean(dim=1).tolist() == pytest.approx([0.625, 0.556, 0.531], abs=0.02)
    spread = shares.max(dim=0).values - shares.min(dim=0).values
    assert (spread <= 0.25 + 1e-6).all()  # one share for all scales of an image, rounded up
    assert masked.float().mean(dim=0).std() < 0.05  # no place is preferred within a scale


@pytest.mark.parametrize("kind", ["token", "scale"])
@torch.no_grad()
def test_the_loss_token_by_token(model, tiny_vqvae, kind):
    """Each image weighs the same, and in it each masked token, or the masked tokens of each scale by its size."""
    schedule, quantizer, first = model.schedule, tiny_vqvae.quantizer, model.schedule.lengths[0]
    ids, labels = torch.randint(model.config.vocab_size, (3, schedule.total)), torch.tensor([0, 1, 2])
    parts = ids.split(schedule.lengths, dim=1)
    codes = torch.cat([quantizer.scale_code(parts[k], k, schedule) for k in range(1, len(schedule))], dim=1)
    inputs = quantizer.teacher_inputs(list(parts), schedule)
    batch = {"ids": ids, "inputs": inputs, "codes": codes, "label": labels, "counter": range(7, 10)}
    objective = MaskedObjective(copy.deepcopy(model), VarLossConfig(drop=0.0, weights=kind), OptimizerConfig()).eval()
    found = objective(batch, Clock(0, 0.0, 3))[0].item()
    masked = draw_masked(batch["counter"], schedule, seed=3)
    logits = model.masked_logits(inputs, codes, masked, model.condition(ClassPrompt(labels)))[:, first:]
    scale_of = [k for k, length in enumerate(schedule.lengths) for _ in range(length)][first:]
    losses = []
    for image in range(3):
        total = weight = 0.0
        for i, k in enumerate(scale_of):
            if masked[image, i]:
                own = 1.0 if kind == "token" else 1.0 / schedule.lengths[k]
                total -= own * logits[image, i].log_softmax(-1)[ids[image, first + i]].item()
                weight += own
        losses.append(total / weight)
    assert found == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_stochastic_depth_is_that_of_its_own_blocks():
    model = make_model(drop_path=0.5)
    objective = MaskedObjective(model, VarLossConfig(drop=0.0), OptimizerConfig()).train()
    batch = {"label": torch.zeros(64, dtype=torch.int64), "counter": range(64)}
    kept = objective.condition(batch, Clock(0, 0.0, 3)).kept
    assert [one is not None for one in kept] == [False] * 3 + [True] * 2  # the blocks it stands on drop nothing


def test_it_is_trained_on_a_finished_transformer(tiny_vqvae, tmp_path, capfd):
    """The transformer stays as it is, to the bit; masked prediction learns, and what goes on from there drops it."""
    vqvae, base = tmp_path / "vqvae", tmp_path / "base"
    tiny_vqvae.save_pretrained(vqvae)
    assert train(base, vqvae, "--transformer.mask=block_diagonal") == 0
    on = ["--start_from=" + str(base / "latest/transformer"), "--transformer.mask=block_diagonal"]
    settings = [*on, "--masked.layers=2", "--optimizer.lr=0.01", "--run.total_images=200"]
    assert train(tmp_path / "masked", vqvae, *settings) == 0
    lines = [json.loads(line) for line in (tmp_path / "masked/metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if line["kind"] == "validation"]
    assert {"loss_2x2", "loss_4x4", "accuracy_2x2"} <= set(validations[-1]) and "loss_1x1" not in validations[-1]
    assert validations[-1]["loss"] < validations[0]["loss"]
    before, after = (
        NextScaleTransformer.from_pretrained(p / "latest/transformer") for p in (base, tmp_path / "masked")
    )
    assert all(torch.equal(after.state_dict()[name], tensor) for name, tensor in before.state_dict().items())
    assert not torch.equal(after.masked.head.proj.weight, after.head.proj.weight)

    capfd.readouterr()
    again = ["--start_from=" + str(tmp_path / "masked"), "--transformer.mask=block_diagonal"]
    assert train(tmp_path / "on", vqvae, *again) == 0
    assert "its masked prediction is left out" in capfd.readouterr().err
    assert last_validation(tmp_path / "on")
    head = ["--start_from=" + str(tmp_path / "masked"), "--sequential.layers=1", "--sequential.scales=2"]
    assert train(tmp_path / "head", vqvae, *head) == 0  # masked prediction makes room for it
    assert "its masked prediction is left out" in capfd.readouterr().err
    assert train(tmp_path / "causal", vqvae) == 0
    causal = "--start_from=" + str(tmp_path / "causal")
    assert train(tmp_path / "changed", vqvae, causal, "--transformer.mask=block_diagonal") == 0
    assert "mask block_causal becomes block_diagonal" in capfd.readouterr().err
    for more, message in (
        (["--transformer.mask=block_diagonal"], "give start_from"),
        ([*on, "--supernet.depths=[1]"], "leave one out"),
        ([*head], "leave one out"),
        ([causal, "--transformer.mask=block_diagonal"], "has mask block_causal: train it under block_diagonal first"),
        ([*on, "--attention=flex"], "attention flex cannot train on a CPU"),
        (["--masked.layers=-1"], "masked.layers must be 0 or more"),
    ):
        assert train(tmp_path / "wrong", vqvae, "--masked.layers=1", *more) == 2
        assert message in capfd.readouterr().err
