"""Bitwise tokens: their quantiser, the transformer's options for them, any aspect ratio, Infinity's checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import liven
from golden_infinity import load_infinity, text_prompt
from golden_outputs import Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from sample import adapters
from sample.convert import convert, convert_back
from sample.costs import cache_peak, plan_work
from sample.generate import generate, smooth_code, start
from sample.guidance import Guidance
from sample.load import load_pipeline
from sample.measure import Stopwatch
from sample.memory import predict
from sample.official import Flags, load_official
from sample.plan import plain
from sample.search import Search
from sample.search_steps import Step
from sample.selectivity import measure_selectivity
from sample.state import Hook
from tokenizer.aspects import SIZES, TEMPLATES, aspect_schedule, nearest_template, read_aspect, schedule_of
from tokenizer.bitwise import BinarySphericalQuantizer, entropy_penalty
from tokenizer.model import MultiScaleVQ
from tokenizer.schedule import ScaleSchedule
from var.conditioning import TextPrompt
from var.convert_infinity import chunked, normalized
from var.presets import PRESETS
from var.transformer import NextScaleTransformer


class Brightest:
    """A reward that looks at pixels alone."""

    name = "brightest"

    def __call__(self, images, prompts):
        return images.float().mean(dim=(1, 2, 3))


GOLDEN = Path(__file__).parent / "goldens/infinity_tiny"
SIDES = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4).map(
    lambda sides: [(sum(h for h, _ in sides[: i + 1]), sum(w for _, w in sides[: i + 1])) for i in range(len(sides))]
)


def latent(quantizer: BinarySphericalQuantizer, schedule: ScaleSchedule, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, quantizer.bits, *quantizer.cells(schedule.latent_hw), generator=generator)


# --- the quantiser --------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(sides=SIDES, patch=st.integers(1, 2), channels=st.integers(2, 5))
def test_verbs_agree(sides: list[tuple[int, int]], patch: int, channels: int) -> None:
    schedule, quantizer = ScaleSchedule.of(sides), BinarySphericalQuantizer(channels=channels, patch=patch)
    f = latent(quantizer, schedule)
    bits, inputs = quantizer.corrected(f, schedule)
    trained = quantizer(f, schedule)
    assert [tuple(b.shape) for b in bits] == [(2, n, channels * patch**2) for n in schedule.lengths]
    assert all(torch.equal(a, b) for a, b in zip(bits, trained.ids))
    assert torch.equal(inputs, quantizer.teacher_inputs(bits, schedule))
    torch.testing.assert_close(quantizer.partial_sums(bits, schedule)[-1], trained.f_hat_BCHW)
    code = quantizer.lookup(bits[0], 0, schedule)
    torch.testing.assert_close(code.square().sum(dim=1), torch.ones_like(code[:, 0]))


def test_zero_is_bit_0_and_soft_bits_at_the_corners_are_hard_ones() -> None:
    quantizer, schedule = BinarySphericalQuantizer(channels=3), ScaleSchedule.of("1,2")
    assert not quantizer.encode(torch.zeros(1, 3, 2, 2), schedule)[0].any()
    assert not quantizer(torch.zeros(1, 3, 2, 2), schedule).ids[0].any()
    with pytest.raises(ValueError, match="2 bits or more, got latent_channels 1"):
        BinarySphericalQuantizer(channels=1)
    bits = quantizer.encode(latent(quantizer, schedule), schedule)[1]
    assert torch.equal(quantizer.blend(F.one_hot(bits, 2), 1, schedule), quantizer.lookup(bits, 1, schedule))


def test_patches_are_in_the_order_of_pixel_shuffle() -> None:
    quantizer, schedule = BinarySphericalQuantizer(channels=3, patch=2), ScaleSchedule.of("2x3")
    f = latent(quantizer, schedule)
    bits = quantizer.encode(f, schedule)[0]
    expected = F.pixel_unshuffle((f > 0).long(), 2)
    assert torch.equal(bits.transpose(1, 2).reshape(expected.shape), expected)
    assert torch.equal(quantizer.next_input(f, 0, schedule), F.pixel_unshuffle(f, 2).flatten(2).transpose(1, 2))


def test_inputs_are_interpolated_and_residuals_averaged() -> None:
    """From 8 cells a side to 2: linear interpolation reads the middle 2x2 cells of each 4x4, an average all of them."""
    quantizer, schedule = BinarySphericalQuantizer(channels=3), ScaleSchedule.of("1,2,8")
    f = latent(quantizer, schedule)
    parts = f.unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 1, 3, 5)  # B, rows, columns, C, 4, 4
    middle, whole = (part.mean(dim=(-1, -2)).flatten(1, 2) for part in (parts[..., 1:3, 1:3], parts))
    torch.testing.assert_close(quantizer.next_input(f, 1, schedule), middle)
    assert torch.equal(quantizer.choose(f, 1, schedule), (whole > 0).long())


def test_later_labels_see_the_flipped_bits() -> None:
    quantizer, schedule = BinarySphericalQuantizer(channels=8), ScaleSchedule.of("1,2,4,8")
    f = latent(quantizer, schedule, batch=8)
    none = [torch.zeros(8, n, 8, dtype=torch.bool) for n in schedule.lengths]
    flipped = [torch.ones_like(none[0]), *none[1:]]
    clean, wrong = (quantizer.corrected(f, schedule, flips) for flips in (none, flipped))
    assert torch.equal(clean[1], quantizer.corrected(f, schedule)[1])
    assert torch.equal(clean[0][0], wrong[0][0])  # the label of the flipped scale itself is the true one
    assert not torch.equal(clean[0][1], wrong[0][1])
    shown = [wrong[0][0] ^ 1, *wrong[0][1:]]
    naive = [clean[0][0] ^ 1, *clean[0][1:]]
    errors = [(quantizer.partial_sums(bits, schedule)[-1] - f).square().mean() for bits in (shown, naive)]
    assert errors[0] < errors[1]  # labels that know of the error undo some of it


def test_entropy_penalty_has_its_least_value_at_sure_and_even_bits() -> None:
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]).T[None, :, :, None] / 2**0.5
    assert entropy_penalty(corners).item() == pytest.approx(-2 * log(2), abs=1e-3)
    assert entropy_penalty(corners[:, :, :1]).item() == pytest.approx(0, abs=1e-3)
    z = F.normalize(torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0)), dim=1).requires_grad_()
    entropy_penalty(z).backward()
    assert z.grad.abs().max() > 0


def test_entropy_penalty_is_that_of_soft_choices_among_all_corners() -> None:
    """By the distances to all 2^C corners, inverse temperature 100: the entropy of a choice less that of the mean."""
    z_NC = F.normalize(torch.tensor([[0.9, 0.01, -0.02, 0.4], [0.004, 0.7, -0.6, -0.01], [0.5, -0.5, 0.5, 0.0]]), dim=1)
    corners = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * 4)
    p_NK = (-100 * torch.cdist(z_NC, corners).square()).double().softmax(dim=1)
    own = -torch.special.xlogy(p_NK, p_NK).sum(dim=1).mean()
    on_C = p_NK.mean(dim=0) @ (corners > 0).double()
    evenly = -(torch.special.xlogy(on_C, on_C) + torch.special.xlogy(1 - on_C, 1 - on_C)).sum()
    found = entropy_penalty(z_NC.T[None, :, :, None])
    assert found.item() == pytest.approx((own - evenly).item(), abs=1e-4) and own > 0.3


def test_the_training_loss_by_hand() -> None:
    quantizer, schedule = BinarySphericalQuantizer(channels=5, entropy=0.1, beta=0.3), ScaleSchedule.of("1,2,4")
    f = latent(quantizer, schedule)
    found = quantizer(f, schedule)
    penalties = [entropy_penalty(z_NC.T[None, :, :, None]) for z_NC in found.residuals_NC]
    distance = (found.f_hat_BCHW - f).square().mean()
    assert found.loss.item() == pytest.approx((0.1 * sum(penalties) / 3 / 100 + 0.3 * distance).item(), rel=1e-4)


def test_gradients_go_straight_through_to_each_residual() -> None:
    """As if a scale's code were its residual on the sphere, and what came before a constant; sums carry them, too."""
    quantizer, schedule = BinarySphericalQuantizer(channels=4, beta=0.5), ScaleSchedule.of("1,1")
    f = torch.randn(2, 4, 1, 1, requires_grad=True)
    found, weight = quantizer(f, schedule), torch.randn(2, 4, 1, 1)
    first = quantizer.lookup(found.ids[0], 0, schedule)
    straight = [F.normalize(f, dim=1), F.normalize(f - first, dim=1)]
    expected = [torch.autograd.grad((z * weight).sum(), f)[0] for z in straight]
    for k in range(2):
        (got,) = torch.autograd.grad((found.sums_BCHW[k] * weight).sum(), f, retain_graph=True)
        torch.testing.assert_close(got, sum(expected[: k + 1]))
    (pull,) = torch.autograd.grad(found.loss, f)
    torch.testing.assert_close(pull, 0.5 * 2 * (f - found.f_hat_BCHW).detach() / f.numel())


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    sizes = {"channels": [8, 8], "layers_per_block": 1, "attention": False, "norm_groups": 4, "latent_channels": 4}
    model = MultiScaleVQ(**sizes, schedule="1,2", bitwise=True, token_patch=2).eval()
    assert model.image_hw == (8, 8) and model.config.vocab_size == 2
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = model.image_to_tokens(image)
    assert [tuple(bits.shape) for bits in ids] == [(2, 1, 16), (2, 4, 16)]
    model.save_pretrained(tmp_path)
    again = MultiScaleVQ.from_pretrained(tmp_path)
    assert torch.equal(again.tokens_to_image(ids), model.tokens_to_image(ids))
    with pytest.raises(ValueError, match="token_patch is for bitwise"):
        MultiScaleVQ(**sizes, schedule="1,2", token_patch=2)


# --- the transformer ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> NextScaleTransformer:
    return load_infinity(Golden(GOLDEN))


@pytest.fixture(scope="module")
def prompt() -> TextPrompt:
    io = load_file(GOLDEN / "io.safetensors")
    return text_prompt(io["text_compact"], io["text_lens"])


QUANTIZER = BinarySphericalQuantizer(channels=8)
WIDE = ScaleSchedule.of("1,2x3,3x5")


@torch.no_grad()
@pytest.mark.parametrize("level_every", [0, 2])
def test_cached_equals_uncached_on_another_schedule(prompt: TextPrompt, level_every: int) -> None:
    golden = Golden(GOLDEN)
    state, grid = normalized(golden.weights), (48, 84)
    flags = {"heads": 4, "level_every": level_every}
    model = adapters.build(adapters.INFINITY, state, schedule="1,2,4", rope_grid=grid, **flags)
    built_for_it = adapters.build(adapters.INFINITY, state, schedule=WIDE, rope_grid=grid, **flags)
    schedule, cond = replace(WIDE, grid=grid), model.condition(prompt)
    inputs = torch.randn(2, WIDE.total - 1, 8, generator=torch.Generator().manual_seed(1))
    whole = model(inputs, cond, schedule=schedule)
    assert torch.equal(whole, built_for_it(inputs, cond))
    cache, parts = model.new_cache(schedule), []
    for k, (begin, end) in enumerate(zip(WIDE.begins, WIDE.ends)):
        x = inputs[:, begin - 1 : end - 1] if k else None
        parts.append(model(x, cond, scales=range(k, k + 1), cache=cache, schedule=schedule))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=0)


def test_save_and_load_keep_the_grid(model: NextScaleTransformer, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = NextScaleTransformer.from_pretrained(tmp_path)
    assert again.schedule == model.schedule and again.schedule.grid == (64, 64)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_schedules_a_model_cannot_work_on_are_refused(model: NextScaleTransformer, tiny_text_model) -> None:
    with pytest.raises(ValueError, match="rotary positions"):
        plain(tiny_text_model, schedule=WIDE)
    with pytest.raises(ValueError, match="at most 15 scales"):
        plain(model, schedule=ScaleSchedule.of(list(range(1, 17))))
    with pytest.raises(ValueError, match="must begin with 1 tokens"):
        plain(model, schedule=ScaleSchedule.of("2,4"))
    with pytest.raises(ValueError, match=r"guidance blocks must be in -4\.\.3"):
        plain(model, guidance=Guidance(1.0, blocks=(-5,)))
    with pytest.raises(ValueError, match="temperature must be one for all scales or one for each of 3, got 2"):
        plain(model, temperature=[1.0, 0.5])


# --- sampling -------------------------------------------------------------------------------------------------------


def test_an_image_does_not_depend_on_its_batch(model: NextScaleTransformer, prompt: TextPrompt) -> None:
    """Prompts of 5 and 9 tokens, another aspect ratio, guidance inside and on the logits."""
    guidance = Guidance([0.0, 2.0, 1.0], blocks=(-2,))
    plan = plain(model, guidance=guidance, temperature=[1.0, 0.7, 0.5], top_p=0.97, schedule=WIDE)
    both = generate(plan, QUANTIZER, prompt, [7, 8])
    for row in range(2):
        alone = generate(plan, QUANTIZER, prompt.select(slice(row, row + 1)), [7 + row])
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(alone.tokens, both.tokens))
    assert both.f_hat_BCHW.shape == (2, 8, 3, 5)


def test_bits_follow_their_probabilities(model: NextScaleTransformer, prompt: TextPrompt) -> None:
    class Keep(Hook):
        def on_tokens(self, state, k, logits, tokens):
            self.p = logits.softmax(dim=-1)[..., 1]
            return tokens

    hook, one = Keep(), prompt.select(slice(0, 1))
    plan = plain(model, guidance=0.0, schedule=ScaleSchedule.of("1"))
    many = one.select(torch.zeros(2000, dtype=torch.int64))
    drawn = generate(plan, QUANTIZER, many, range(2000), hooks=[hook]).tokens[0]
    torch.testing.assert_close(drawn.float().mean(dim=0), hook.p[0], atol=0.05, rtol=0)


def test_a_token_with_one_bit_given_is_no_mix(model: NextScaleTransformer, prompt: TextPrompt) -> None:
    state = start(plain(model, guidance=0.0), QUANTIZER, prompt, [7, 8])
    state.extras["given"] = torch.full((2, model.schedule.total, 8), -1)
    state.extras["given"][0, 2, 3] = 0
    bits = torch.randint(2, (2, 4, 8))
    code = smooth_code(state, 1, torch.randn(2, 4, 8, 2), bits, bits)
    hard = (code.abs() - 8**-0.5).abs().amax(dim=1) < 1e-6
    assert hard.flatten(1).tolist() == [[False, True, False, False], [False] * 4]


def test_selected_copies_differ_and_first_ones_do_not(model: NextScaleTransformer, prompt: TextPrompt) -> None:
    class Double(Hook):
        def on_scale_end(self, state, k):
            if k == 0:
                state.select([0, 0, 1])

    plan = plain(model, guidance=1.0)
    plainly, doubled = (generate(plan, QUANTIZER, prompt, [1, 2], hooks=hooks) for hooks in ([], [Double()]))
    assert torch.equal(doubled.tokens[2][[0, 2]], plainly.tokens[2])
    assert not torch.equal(doubled.tokens[2][0], doubled.tokens[2][1])


# --- aspect ratios --------------------------------------------------------------------------------------------------


def test_templates() -> None:
    assert [aspect_schedule("1:1", size).total for size in SIZES] == [521, 2521, 6425, 10521]
    assert len(TEMPLATES) == 15
    for ratio, schedule in TEMPLATES.items():
        assert len(schedule) == 13 and schedule.latent_hw[0] / schedule.latent_hw[1] == pytest.approx(ratio, abs=0.01)
        for size in SIZES:
            assert schedule_of(*aspect_schedule(ratio, size).latent_hw).grid == schedule.latent_hw
    assert nearest_template(read_aspect("16:9")) == 0.571 and aspect_schedule("9:16").latent_hw == (84, 48)


@pytest.mark.parametrize("wrong", ["wide", "4:1", "0:3", "1:9", "-1", "2"])
def test_aspects_that_cannot_be_drawn(wrong: str) -> None:
    with pytest.raises(ValueError, match="aspect must be"):
        aspect_schedule(wrong)
    with pytest.raises(ValueError, match="size must be one of"):
        aspect_schedule("1:1", "2M")


# --- checkpoints ----------------------------------------------------------------------------------------------------


def bitwise_vae(bits: int) -> MultiScaleVQ:
    sizes = {"channels": [32, 32, 64], "layers_per_block": 1, "attention": False, "beta": 0.0}
    return liven(MultiScaleVQ(**sizes, latent_channels=bits, schedule="1,2,4", bitwise=True), 5)


@pytest.fixture(scope="module")
def vae_state() -> dict[str, torch.Tensor]:
    """A small tokenizer of 8 bits under official names, with both names of the mask."""
    model = bitwise_vae(8)
    state = adapters.to_official(adapters.BSQ, model.state_dict(), model.config)
    return state | adapters.BSQ.official_buffers(model.config, torch.float32)


@pytest.fixture
def files(vae_state: dict[str, torch.Tensor], tmp_path: Path) -> dict[str, Path]:
    weights = load_file(GOLDEN / "weights.safetensors")
    saved = {"vae": {"vae": vae_state, "ema": {k: v + 1 for k, v in vae_state.items()}}, "transformer": weights}
    for name, state in saved.items():
        torch.save(state, tmp_path / f"{name}.pth")
    return {name: tmp_path / f"{name}.pth" for name in saved}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_round_trip_is_bit_equal(files: dict[str, Path], tmp_path: Path) -> None:
    convert(tmp_path / "ours", family="infinity", **files)
    convert_back(tmp_path / "ours", tmp_path / "back", family="infinity", chunks=2)
    assert same(torch.load(tmp_path / "back/transformer.pth"), torch.load(files["transformer"]))
    assert same(torch.load(tmp_path / "back/vae.pth")["vae"], torch.load(files["vae"])["vae"])
    assert json.loads((tmp_path / "ours/transformer/config.json").read_text())["rope_grid"] == [64, 64]


def converted(files: dict[str, Path], folder: Path, prompt: TextPrompt):
    convert(folder, family="infinity", **files, flags=Flags(size="0.06M"))
    made = load_pipeline(folder, device="cpu")
    made.encode_prompt = lambda texts: prompt.select(slice(0, len(texts)))  # no text encoder here
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def pipeline(files: dict[str, Path], tmp_path: Path, prompt: TextPrompt):
    """The converted model at its smallest size, its two prompts encoded already."""
    return converted(files, tmp_path / "ours", prompt)


@pytest.fixture
def patched(files: dict[str, Path], tmp_path: Path, prompt: TextPrompt):
    """The same on a tokenizer of 2 bits a cell, so that a token of 8 bits is 2 x 2 cells (8B's way)."""
    model = bitwise_vae(2)
    state = adapters.to_official(adapters.BSQ, model.state_dict(), model.config)
    torch.save({"vae": state}, tmp_path / "cells.pth")
    made = converted({**files, "vae": tmp_path / "cells.pth"}, tmp_path / "patched", prompt)
    assert made.vqvae.config.token_patch == 2 and made.vqvae.stride == 8
    return made


def test_pipeline_draws_any_aspect(pipeline) -> None:
    output = pipeline(["a", "b"], aspect="3:1", seed=0, output_type="np")
    assert output.images.shape == (2, 9 * 4, 27 * 4, 3)
    assert len(output.tokens) == 7
    with pytest.raises(ValueError, match=r"aspect must be width:height.*got 2.0"):
        pipeline.make_plan(aspect=2.0)
    assert pipeline.make_plan().stages[0].guidance == Guidance(2.0, "constant")
    listed = pipeline.make_plan(guidance_scale=[2.0] * 7, temperature=[0.5] * 7, guidance_blocks=[-2])
    assert not listed.stages[0].guidance.on_logits
    other = pipeline(["a", "b"], negative_prompt="c", aspect="3:1", seed=0, output_type="np")
    assert not np.array_equal(other.images, output.images)


@pytest.mark.parametrize("words", [{"aspect": "16:9"}, {"aspect": "1:1", "size": "0.25M"}], ids=str)
def test_costs_are_those_of_the_shape_that_is_drawn(pipeline, words: dict) -> None:
    plan = pipeline.make_plan(**words)
    watch = Stopwatch(torch.device("cpu"))
    prompt = pipeline.encode_prompt(["a"])
    with torch.no_grad():
        generate(plan, pipeline.vqvae.quantizer, prompt, [0], hooks=[watch])
    assert cache_peak(plan, 1, torch.float32) == watch.cache_bytes
    bits = 2 * pipeline.transformer.config.latent_channels
    assert [work.drawn for work in plan_work(plan, 1)] == [bits * n for n in plan.schedule.lengths]
    own, read = (predict(plan, pipeline.vqvae, 1, torch.float32, text_tokens=n) for n in (0, 10))
    config = pipeline.transformer.config
    assert read.cache - own.cache == 2 * 2 * 10 * config.width * config.depth * 4  # keys and values, with guidance
    square = predict(pipeline.make_plan(), pipeline.vqvae, 1, torch.float32)
    h, w = plan.schedule.latent_hw
    assert own.decoder * 16 * 16 == square.decoder * h * w


def test_guidance_on_blocks_stays_where_a_subnet_skips_them(pipeline) -> None:
    """Block 2 of 4 is none of the two that run."""
    words = {"plan": "supernet:1", "depth": 2, "guidance_blocks": [-2], "seed": 0, "output_type": "np"}
    guided, without = (pipeline("a", guidance_scale=scale, **words).images for scale in (3.0, 0.0))
    assert not np.array_equal(guided, without)


def test_positions_of_another_grid_are_refused() -> None:
    sizes = {"depth": 1, "width": 16, "heads": 2, "latent_channels": 4, "positions": "rope", "num_classes": 3}
    own = aspect_schedule("1:1", "0.06M")
    alone = NextScaleTransformer(**sizes, vocab_size=8, schedule=own.text)
    with pytest.raises(ValueError, match="a model of several shapes is trained with rope_grid"):
        alone.check_schedule(own)
    several = NextScaleTransformer(**sizes, vocab_size=8, schedule=own.text, rope_grid=[64, 64])
    assert several.check_schedule(own) == own


METHODS = [
    {"cache": "window:50%"},
    {"cache": "snapkv:30%", "plan": "supernet:4", "depth": 2},
    {"plan": "self:5", "depth": 2},
    {"smooth": True},
    {"negative_prompt": "c", "guidance_blocks": [-2, 0]},
    {"search": Search(candidates=3, steps=(Step(2, 2, "cluster"), Step(6, 1, "best")), reward=Brightest())},
]


@pytest.mark.parametrize("words", METHODS, ids=lambda words: next(iter(words)))
@pytest.mark.parametrize("kind", ["pipeline", "patched"])
def test_methods_work_on_bits(kind: str, words: dict, request: pytest.FixtureRequest) -> None:
    drawn = request.getfixturevalue(kind)
    side = 16 * drawn.vqvae.stride
    output = drawn("a", seed=0, output_type="np", **words)
    assert output.images.shape == (1, side, side, 3) and output.tokens[6].shape == (1, 256, 8)


@pytest.mark.parametrize("kind", ["pipeline", "patched"])
def test_neutral_settings_are_the_plain_loop_on_bits(kind: str, request: pytest.FixtureRequest) -> None:
    drawn = request.getfixturevalue(kind)
    plainly = drawn("a", seed=3, output_type="np").images
    one = Search(candidates=1, steps=(Step(6, 1, "random"),))
    for words in ({"cache": "100%"}, {"plan": "supernet:4", "depth": 4}, {"guidance_blocks": None}, {"search": one}):
        np.testing.assert_array_equal(drawn("a", seed=3, output_type="np", **words).images, plainly)


def test_scalekv_measures_and_cuts_on_bits(pipeline) -> None:
    index = measure_selectivity(pipeline, ["a"], model=pipeline.transformer)
    assert np.shape(index) == (4, 7)
    pipeline.register_to_config(sampling={**pipeline.config.sampling, "aspect": "16:9"})
    assert np.shape(measure_selectivity(pipeline, ["a"], model=pipeline.transformer)) == (4, 7)
    pipeline.register_to_config(sampling={**pipeline.config.sampling, "aspect": "1:1"})
    pipeline.transformer.register_to_config(selectivity=index)
    whole, cut = (pipeline("a", seed=0, output_type="np", cache=share).images for share in ("100%", "20%"))
    assert whole.shape == cut.shape and not np.array_equal(whole, cut)


@pytest.mark.parametrize("kind", ["pipeline", "patched"])
def test_edits_keep_what_is_outside_the_mask(kind: str, request: pytest.FixtureRequest) -> None:
    drawn = request.getfixturevalue(kind)
    h, w = 9 * drawn.vqvae.stride, 27 * drawn.vqvae.stride
    image = np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)
    mask = np.zeros((h, w), dtype=bool)
    mask[:, w // 2 :] = True
    output = drawn("a", image=image, mask_image=mask, seed=0, aspect="3:1", output_type="np")
    assert np.array_equal(np.rint(output.images[0] * 255).astype(np.uint8)[:, : w // 2], image[:, : w // 2])
    assert not np.array_equal(output.images[0][:, w // 2 :], image[:, w // 2 :] / 255)


def test_shards_trainers_and_names_without_wrappers(files: dict[str, Path], tmp_path: Path) -> None:
    expected = load_official(family="infinity", **files)["transformer"].state_dict()
    weights, vae = torch.load(files["transformer"]), torch.load(files["vae"])["vae"]
    keys, shards = sorted(weights), tmp_path / "shards"
    shards.mkdir()
    halves = {f"{i}.safetensors": {k: weights[k] for k in keys[i::2]} for i in range(2)}
    for name, state in halves.items():
        save_file(state, shards / name)
    index = {"weight_map": {key: name for name, state in halves.items() for key in state}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    plain_names = {k.replace("conv.conv.", "conv.").replace("norm.", ""): v for k, v in vae.items()}
    plain_names = {k.replace("_in.conv.", "_in.").replace("_out.conv.", "_out."): v for k, v in plain_names.items()}
    trainer = {"trainer": {"gpt_fsdp": weights, "gpt_fsdp_opt": {}, "vae_local": plain_names}, "args": {}}
    torch.save(trainer, tmp_path / "ar-ckpt.pth")
    for transformer in (shards, tmp_path / "ar-ckpt.pth"):
        found = load_official(family="infinity", vae=files["vae"], transformer=transformer)
        assert same(found["transformer"].state_dict(), expected)
    (shards / "1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no such file: .*1\.safetensors"):
        load_official(family="infinity", vae=files["vae"], transformer=shards)


def test_a_tokenizer_of_other_bits_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    other = MultiScaleVQ(channels=[32], layers_per_block=1, attention=False, latent_channels=6, bitwise=True)
    state = adapters.to_official(adapters.BSQ, other.state_dict(), other.config)
    torch.save({"vae": state}, tmp_path / "infinity_vae_d6.pth")
    with pytest.raises(ValueError, match=r"6 bits a cell .* and 8 bits a token"):
        load_official(family="infinity", vae=tmp_path / "infinity_vae_d6.pth", transformer=files["transformer"])
    with pytest.raises(ValueError, match=r"holds no Infinity transformer|lacks"):
        load_official(family="infinity", vae=files["vae"], transformer=files["vae"])


def test_chunks_and_blocks_are_the_same_names() -> None:
    state = load_file(GOLDEN / "weights.safetensors")
    assert same(chunked(normalized(state), 2), state)
    assert "blocks.3.ada_gss" in normalized(state)
    with pytest.raises(ValueError, match="chunks must divide the 4 blocks, got 3"):
        chunked(normalized(state), 3)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("125m", 125), ("361m", 362), ("1b", 941), ("2b", 2200), ("2.2b", 2260), ("4.7b", 4720), ("8b", 8380)],
)
def test_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = NextScaleTransformer(**PRESETS[f"infinity-{name}"], schedule=aspect_schedule("1:1"))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_commands(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Convert with a text encoder, then sample in another shape."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    import nextscale

    tokenizer = ByT5Tokenizer()
    sizes = {"d_model": 128, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    ours, pictures = tmp_path / "ours", tmp_path / "pictures"
    given = ["--vae", files["vae"], "--transformer", files["transformer"], "--text-encoder", tmp_path / "t5"]
    assert command(nextscale, "convert", "--from", "infinity", *given, "--out", ours) == 0
    assert "sample --model" in capsys.readouterr().out
    how = ["--aspect", "16:9", "--size", "0.06M", "--guidance-blocks", "-2", "--text-device", "cpu", "--device", "cpu"]
    assert command(nextscale, "sample", "a fox", "a cat", "--model", ours, *how, "--out", pictures) == 0
    made = sorted(pictures.glob("*.png"))
    assert len(made) >= 2 and Image.open(made[0]).size == (21 * 4, 12 * 4)
    assert command(nextscale, "sample", "a fox", "--model", ours, "--aspect", "9:1", "--out", tmp_path / "no") == 2
    assert "aspect must be between 3:1 and 1:3" in capsys.readouterr().err


def command(nextscale, *words: object) -> int:
    return nextscale.main([str(word) for word in words])
