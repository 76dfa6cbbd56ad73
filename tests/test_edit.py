"""Editing: what is kept stays bit by bit, what is repainted is drawn; with every plan, with search, at any size."""

import importlib
import re
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import nextscale
from sample.edit import RULES, Canvas, EditHook, edit_hook, extend, kept_tokens
from sample.images import image_stream, make_requests
from sample.plan import Plan, Stage, collaborative, plain
from sample.rewards import Callback
from sample.search import Search
from sample.search_steps import Step
from sample.state import Hook
from tokenizer.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule.of("1,2,4")
VAR = ScaleSchedule.of("var256")


def picture(seed=0, h=8, w=8):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


def box_mask(left, top, right, bottom, h=8, w=8, level=255):
    mask = np.zeros((h, w), np.uint8)
    mask[top:bottom, left:right] = level
    return Image.fromarray(mask)


NOTHING, EVERYTHING = box_mask(0, 0, 0, 0), box_mask(0, 0, 8, 8)


def given_of(pipeline, image, mask, rule="official"):
    """The tokens (L,) of a picture of 8x8 that an edit keeps, -1 elsewhere."""
    canvas = Canvas.of(image, mask, (8, 8))
    seen, keep = canvas.seen((8, 8))[None], canvas.keep((4, 4))[None]
    return edit_hook(pipeline.vqvae, seen, keep, SCHEDULE, rule).given_BL[0]


def tokens_of(output):
    return torch.cat(output.tokens, dim=1)


# --- which tokens stay -----------------------------------------------------------------------------------------------


def test_kept_tokens_follow_the_official_rule():
    keep = torch.ones(1, 16, 16, dtype=torch.bool)
    keep[:, 2:13, 3:12] = False
    kept = kept_tokens(keep, VAR)[0].split(VAR.lengths)
    assert kept[0].all()  # the scale of one token is the image's
    assert torch.equal(kept[-1].view(16, 16), keep[0])  # the finest scale is the mask itself
    for (h, w), tokens in list(zip(VAR.sides, kept))[1:]:
        resized = torch.nn.functional.interpolate(keep[None].float(), size=(h, w), mode="bilinear")[0, 0]
        assert torch.equal(tokens.view(h, w), resized > 0.5)


def test_whole_cells_show_nothing_of_what_was_there():
    keep = torch.ones(1, 16, 16, dtype=torch.bool)
    keep[:, 5, 6] = False
    kept = kept_tokens(keep, VAR, "whole")[0].split(VAR.lengths)
    free = [int((~tokens).sum()) for tokens in kept]
    assert free[0] == 0 and all(1 <= n <= 4 for n in free[1:]) and free[-1] == 1  # cells of 16 in 3, 5, 6 ... overlap
    assert kept_tokens(keep, VAR, "official")[0, :5].all()  # the official rule overlooks so small a hole


def test_nothing_kept_keeps_no_token_and_everything_kept_all():
    for rule in RULES:
        assert not kept_tokens(torch.zeros(1, 16, 16, dtype=torch.bool), VAR, rule).any()
        assert kept_tokens(torch.ones(1, 16, 16, dtype=torch.bool), VAR, rule).all()
    wide = ScaleSchedule.of("1x3,2x4")
    keep = torch.tensor([[[True, False, False, False]] * 2])
    assert kept_tokens(keep, wide).tolist() == [[True] * 3 + [True, False, False, False] * 2]
    with pytest.raises(ValueError, match="mask_rule must be one of corrected, official, whole, got 'half'"):
        kept_tokens(keep, wide, "half")
    with pytest.raises(ValueError, match=r"mask of the finest scale must be \(2, 4\), got \(4, 2\)"):
        kept_tokens(keep.mT, wide)


# --- neutral settings ------------------------------------------------------------------------------------------------


def test_an_empty_mask_returns_the_picture_and_a_full_one_draws_plainly(class_pipeline):
    image = picture()
    x = torch.from_numpy(np.asarray(image) / 127.5 - 1).permute(2, 0, 1)[None].float()
    for rule in RULES:
        kept = class_pipeline(class_labels=2, image=image, mask_image=NOTHING, mask_rule=rule, seed=7)
        assert np.array_equal(np.asarray(kept.images[0]), np.asarray(image))
        assert torch.equal(tokens_of(kept), torch.cat(class_pipeline.vqvae.image_to_tokens(x), dim=1))
    wanted = class_pipeline(class_labels=2, seed=7)
    for rule in RULES:
        drawn = class_pipeline(class_labels=2, image=image, mask_image=EVERYTHING, mask_rule=rule, seed=7)
        assert torch.equal(tokens_of(drawn), tokens_of(wanted))
        assert np.array_equal(np.asarray(drawn.images[0]), np.asarray(wanted.images[0]))


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_kept_pixels_are_the_same_bits(text_pipeline, kind):
    image, mask = picture(3), box_mask(2, 2, 7, 6)
    made = text_pipeline("a red star", image=image, mask_image=mask, seed=1, output_type=kind).images
    before, kept = np.asarray(image), np.asarray(mask) == 0
    if kind == "pil":
        after = np.asarray(made[0])
    else:
        after, before = (
            np.asarray(made[0] if kind == "np" else made[0].permute(1, 2, 0)),
            before.astype(np.float32) / 255,
        )
    assert after.dtype == before.dtype
    assert np.array_equal(after[kept], before[kept]) and not np.array_equal(after[~kept], before[~kept])


# --- plans, search, smoothing ----------------------------------------------------------------------------------------


def plans(model):
    return {
        "plain": plain(model),
        "supernet": Plan((Stage(model, range(0, 2)), Stage(model, range(2, 3), layers=[0]))),
        "collaborative": collaborative(model, model, handover=2),
        "unguided": plain(model, guidance=0),
    }


@pytest.mark.parametrize("name", ["plain", "supernet", "collaborative", "unguided"])
@pytest.mark.parametrize("smooth", [False, True])
def test_every_plan_keeps_the_given_tokens(text_pipeline, name, smooth):
    plan, image, mask = plans(text_pipeline.transformer)[name], picture(5), box_mask(0, 0, 4, 8)
    what = {"image": image, "mask_image": mask, "plan": plan, "smooth": smooth, "seed": 3}
    made = text_pipeline("a star", mask_rule="official", **what)
    given = given_of(text_pipeline, image, mask)
    kept = given >= 0
    assert kept.sum() == 1 + 2 + 8
    assert torch.equal(tokens_of(made)[0, kept], given[kept])
    corrected = text_pipeline("a star", **what)
    assert torch.equal(tokens_of(corrected)[0, :5][kept[:5]], given[:5][kept[:5]])  # until then nothing else was drawn
    for images in (made.images, corrected.images):
        assert np.array_equal(np.asarray(images[0])[:, 4:], np.asarray(image)[:, 4:])


def test_smoothing_leaves_given_codes_hard(class_pipeline):
    image = picture(2)
    made = class_pipeline(class_labels=1, image=image, mask_image=NOTHING, smooth=True, seed=3, output_type="latent")
    x = torch.from_numpy(np.asarray(image) / 127.5 - 1).permute(2, 0, 1)[None].float()
    vqvae = class_pipeline.vqvae
    wanted = vqvae.quantizer.partial_sums(vqvae.image_to_tokens(x), vqvae.schedule)[-1]
    assert torch.equal(made.images, wanted)


class Reorder(Hook):
    """Selects rows before the first scale or after scale `at`."""

    def __init__(self, rows, at=None):
        self.rows, self.at = rows, at

    def on_start(self, state):
        if self.at is None:
            state.select(self.rows)

    def on_scale_end(self, state, k):
        if k == self.at:
            state.select(self.rows)


@pytest.mark.parametrize("at", [None, 0, 1, 2])
def test_edits_follow_their_image_when_a_search_moves_it(class_pipeline, at):
    images, masks = [picture(1), picture(2)], [box_mask(0, 0, 4, 8), box_mask(4, 0, 8, 8)]
    what = {"class_labels": [0, 1], "image": images, "mask_image": masks, "seed": [5, 6]}
    wanted = class_pipeline(**what)
    moved = class_pipeline(**what, hooks=[Reorder([1, 0, 1], at)])
    assert moved.seeds == [6, 5, 6]
    for row, origin in ((0, 1), (1, 0)):
        assert torch.equal(tokens_of(moved)[row], tokens_of(wanted)[origin])
        assert np.array_equal(np.asarray(moved.images[row]), np.asarray(wanted.images[origin]))
    copy, kept = np.asarray(moved.images[2]), np.asarray(masks[1]) == 0
    assert np.array_equal(copy[kept], np.asarray(images[1])[kept])


@pytest.mark.parametrize("every_scale", [False, True])
@pytest.mark.parametrize("rows", [[1, 0, 2], [2], [2, 2, 0, 2]])
def test_a_stream_names_images_that_hooks_move(class_pipeline, rows, every_scale):
    requests = make_requests([0, 1, 2], seed=5)
    stream = {"every_scale": every_scale, "batch_size": 3}
    wanted = dict(image_stream(class_pipeline, [requests[0], requests[1], requests[2]], **stream))
    made = list(image_stream(class_pipeline, requests, hooks=[Reorder(rows, 1)], **stream))
    assert [request.prompt for request, _ in made] == rows
    for place, (request, image) in enumerate(made):
        alike = np.array_equal(image, wanted[request])
        assert alike == (rows.index(rows[place]) == place)  # copies go their own way
        if every_scale:
            assert np.array_equal(image[:2], wanted[request][:2])


def test_a_search_goes_by_image_whatever_hooks_do_with_its_rows(class_pipeline):
    search = Search(candidates=3, steps=(Step(2, 1, "best"),), reward=Red())
    what = {"class_labels": [0, 1], "seed": [5, 6], "search": search}
    wanted = class_pipeline(**what)
    made = class_pipeline(**what, hooks=[Reorder([3, 4, 5, 0, 1, 2], 1)])
    assert made.search.scores == wanted.search.scores and made.seeds == wanted.seeds
    assert torch.equal(tokens_of(made), tokens_of(wanted))
    for left, right in zip(made.images, wanted.images):
        assert np.array_equal(np.asarray(left), np.asarray(right))


def test_earlier_scores_follow_their_candidates_when_hooks_move_them(class_pipeline):
    steps = (Step(1, 3, "resample"), Step(2, 1, "best"))
    how = {"candidates": 5, "steps": steps, "reward": Red(), "potential": "max", "also_score": (0,), "sharpness": 1e4}
    what = {"class_labels": [0, 1], "seed": [5, 6], "search": Search(**how)}
    wanted = class_pipeline(**what)

    made = class_pipeline(**what, hooks=[Reorder([*range(9, -1, -1)], 1)])
    best = [max(choices[0].scores) for choices in wanted.search.choices]
    assert [max(choices[0].scores) for choices in made.search.choices] == best
    for left, right in zip(made.search.choices, wanted.search.choices):
        scores = [[choices[0].scores[row] for row in choices[0].kept] for choices in (left, right)]
        assert scores[0] == scores[1]  # at this sharpness always the one that was best so far


def test_a_search_without_candidates_of_an_image_says_so(class_pipeline):
    search = Search(candidates=2, steps=(Step(2, 1, "best"),), reward=Red(), rounds=2, enough=1e5)
    for rows in ([2, 3], [0]):
        with pytest.raises(ValueError, match="one candidate of each of 2 images, and hooks left those of"):
            class_pipeline(class_labels=[0, 1], seed=5, search=search, hooks=[Reorder(rows, 1)])
    kept = class_pipeline(class_labels=[0, 1], seed=5, search=search, hooks=[Reorder([0, 2, 3], 1)])
    assert len(kept.images) == 2 and None not in kept.search.scores


class Red:
    """A reward of tensors: how much redder than blue an image is."""

    name = "red"

    def __call__(self, images_BCHW, prompts):
        return (images_BCHW[:, 0].float() - images_BCHW[:, 2].float()).mean(dim=(1, 2))


def test_a_search_judges_the_pasted_picture(class_pipeline):
    """Of candidates that differ where the picture stays, the reward sees nothing."""
    image, mask, seen = picture(1), box_mask(0, 0, 4, 8), []

    def judge(images, prompts):
        seen.append(images)
        return images[:, :, :4].mean(axis=(1, 2, 3))

    search = Search(candidates=4, steps=(Step(2, 1, "best"),), reward=Callback(judge), rounds=2, enough=1e5)
    made = class_pipeline(class_labels=[0, 1], image=image, mask_image=mask, seed=5, search=search)
    assert [len(images) for images in seen] == [8, 8]
    kept = np.asarray(mask) == 0
    for images in seen:
        assert (images[:, kept] == np.asarray(image)[kept]).all() and len(np.unique(images, axis=0)) > 2
    for picked, score in zip(made.images, made.search.scores):
        assert np.asarray(picked)[:, :4].mean() == pytest.approx(score, abs=0.6)  # bytes are cut there, rounded here


def test_every_round_of_a_search_edits_the_right_picture(class_pipeline):
    class Red:
        name = "red"

        def __call__(self, images_BCHW, prompts):
            red = images_BCHW[:, 0].flatten(1).float().mean(dim=1)
            return torch.where(torch.tensor([prompt == 0 for prompt in prompts]), red + 1e6, red)  # enough at once

    images, masks = [picture(1), picture(2)], [box_mask(0, 0, 4, 8), box_mask(4, 0, 8, 8)]
    search = Search(candidates=3, steps=(Step(2, 1, "best"),), reward=Red(), rounds=3, enough=1e5)
    made = class_pipeline(
        class_labels=[0, 1], image=images, mask_image=masks, mask_rule="official", seed=[5, 6], search=search
    )
    assert made.search.rounds == [1, 3]
    for i in range(2):
        kept = np.asarray(masks[i]) == 0
        assert np.array_equal(np.asarray(made.images[i])[kept], np.asarray(images[i])[kept])
        given = given_of(class_pipeline, images[i], masks[i])
        assert torch.equal(tokens_of(made)[i][given >= 0], given[given >= 0])


def test_a_batch_is_its_edits_one_by_one(text_pipeline):
    texts, masks = ["a red star", "two rings"], [box_mask(0, 0, 5, 5), box_mask(3, 3, 8, 8)]
    images = [picture(1), picture(2)]
    both = text_pipeline(texts, image=images, mask_image=masks, num_images_per_prompt=2, seed=4)
    for i in range(4):
        one = text_pipeline(texts[i // 2], image=images[i // 2], mask_image=masks[i // 2], seed=4 + i)
        assert torch.equal(tokens_of(one)[0], tokens_of(both)[i])
        assert np.abs(np.asarray(one.images[0], int) - np.asarray(both.images[i], int)).max() <= 1
    shared = text_pipeline(texts, image=images[0], mask_image=masks[0], seed=4)
    assert torch.equal(tokens_of(shared)[0], tokens_of(both)[0])


def test_class_models_edit_with_a_class_or_with_none(class_pipeline):
    what = {"image": picture(), "mask_image": box_mask(2, 2, 6, 6), "seed": 1, "output_type": "latent"}
    assert torch.equal(class_pipeline(**what).images, class_pipeline(class_labels=5, **what).images)
    assert not torch.equal(class_pipeline(**what).images, class_pipeline(class_labels=3, **what).images)


# --- pictures of any size --------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data())
def test_the_window_has_the_models_shape_and_holds_the_mask(data):
    model_hw = data.draw(st.sampled_from([(8, 8), (8, 16), (12, 8)]))
    h, w = (data.draw(st.integers(4, 40)) for _ in range(2))
    top, left = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, w - 1))
    bottom, right = data.draw(st.integers(top + 1, h)), data.draw(st.integers(left + 1, w))
    image, mask = picture(0, h, w), box_mask(left, top, right, bottom, h, w)
    try:
        x0, y0, x1, y1 = Canvas.of(image, mask, model_hw).window
    except ValueError as error:
        assert "repaint less (one border after the other), or crop" in str(error)
        assert (right - left) * model_hw[0] + model_hw[1] > h * model_hw[1] or (
            (bottom - top) * model_hw[1] + model_hw[0] > w * model_hw[0]
        )
        return
    assert 0 <= x0 <= left and right <= x1 <= w and 0 <= y0 <= top and bottom <= y1 <= h
    assert (y1 - y0 == h) or (x1 - x0 == w)
    assert abs((y1 - y0) * model_hw[1] - (x1 - x0) * model_hw[0]) <= max(model_hw)


@settings(max_examples=25)
@given(st.integers(0, 9), st.sampled_from([(8, 8), (5, 7), (24, 16)]), st.booleans())
def test_pasting_changes_only_what_the_mask_names(seed, hw, soft):
    rng = np.random.default_rng(seed)
    image = picture(seed, *hw)
    levels = rng.integers(0, 256, hw) if soft else rng.integers(0, 2, hw) * 255
    levels[rng.random(hw) < 0.5] = 0
    levels[: hw[0] // 3] = 0
    levels[:, : hw[1] // 3] = 0
    levels[-hw[0] // 3 :] = 0
    canvas = Canvas.of(image, levels.astype(np.uint8), (8, 8))
    made = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seed))
    after = (canvas.paste(made) * 255).round().astype(np.uint8)
    kept = levels == 0
    assert np.array_equal(after[kept], np.asarray(image)[kept])
    if hw == (8, 8):
        full = levels == 255
        assert np.array_equal(after[full], (made.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)[full])


def test_pictures_keep_their_size(class_pipeline):
    image, mask = picture(1, 30, 20), box_mask(5, 12, 15, 20, 30, 20)
    made = class_pipeline(class_labels=1, image=image, mask_image=mask, seed=2).images[0]
    assert made.size == (20, 30)
    before, after = np.asarray(image), np.asarray(made)
    kept = np.asarray(mask) == 0
    assert np.array_equal(before[kept], after[kept]) and not np.array_equal(before[~kept], after[~kept])
    small = mask.resize((10, 15))
    again = class_pipeline(class_labels=1, image=image, mask_image=small, seed=2).images[0]
    far = np.ones((30, 20), bool)
    far[9:23, 2:18] = False
    assert np.array_equal(np.asarray(again)[far], before[far])


def test_arrays_and_modes_are_read_alike(class_pipeline):
    image, mask = picture(1), box_mask(2, 2, 6, 6)
    wanted = np.asarray(class_pipeline(class_labels=1, image=image, mask_image=mask, seed=2).images[0])
    pixels, levels = np.asarray(image), np.asarray(mask)
    for same_image, same_mask in ((pixels, levels), (pixels[None], levels > 0), ([image], mask.convert("1"))):
        made = class_pipeline(class_labels=1, image=same_image, mask_image=same_mask, seed=2).images[0]
        assert np.array_equal(np.asarray(made), wanted)


def test_extending_a_picture(class_pipeline):
    image = picture(1)
    wide, mask = extend(image, left=3, bottom=2)
    assert wide.size == mask.size == (11, 10)
    levels = np.asarray(mask)
    assert (levels[:8, 3:] == 0).all() and (levels[:, :3] == 255).all() and (levels[8:] == 255).all()
    assert np.array_equal(np.asarray(wide)[:8, 3:], np.asarray(image))
    square, mask = extend(image, left=2, top=2, right=2, bottom=2)
    made = class_pipeline(class_labels=1, image=square, mask_image=mask, seed=2).images[0]
    assert np.array_equal(np.asarray(made)[2:10, 2:10], np.asarray(image))
    for borders in ({}, {"left": -1}):
        with pytest.raises(ValueError, match="borders must be 0 or more pixels"):
            extend(image, **borders)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask_image": NOTHING}, ValueError, "image and mask_image belong together"),
        ({"image": picture()}, ValueError, "image and mask_image belong together"),
        ({"image": picture(), "mask_image": NOTHING, "mask_rule": "x"}, ValueError, "mask_rule must be one of"),
        (
            {"image": [picture()] * 3, "mask_image": NOTHING},
            ValueError,
            "image must be one or one a prompt, got 3 for 2",
        ),
        (
            {"image": picture(), "mask_image": [NOTHING] * 3},
            ValueError,
            "mask_image must be one or one a prompt, got 3",
        ),
        (
            {"image": "a.png", "mask_image": NOTHING},
            TypeError,
            "image must be a PIL image or a uint8 array .*, got str",
        ),
        ({"image": np.zeros((8, 8, 3)), "mask_image": NOTHING}, TypeError, r"got ndarray float64 \(8, 8, 3\)"),
        ({"image": picture(), "mask_image": torch.zeros(8, 8)}, TypeError, r"mask_image .* got Tensor torch.float32"),
        (
            {"image": picture(0, 8, 16), "mask_image": box_mask(0, 0, 12, 8, 8, 16)},
            ValueError,
            "mask_image spans 12 pixels, and the model, which draws 8x8, sees 8x8 of this 16x8 image",
        ),
        (
            {"image": [picture(), picture(0, 9, 9)], "mask_image": NOTHING, "output_type": "np"},
            ValueError,
            "output_type 'np' needs images of one size",
        ),
    ],
)
def test_mistakes_are_one_line(class_pipeline, options, error, message):
    with pytest.raises(error, match=message) as raised:
        class_pipeline(class_labels=[1, 2], seed=1, **options)
    assert "\n" not in str(raised.value)


def test_given_tokens_must_be_of_the_whole_batch(class_pipeline):
    hook = EditHook(torch.zeros(1, SCHEDULE.total, dtype=torch.int64))
    with pytest.raises(ValueError, match="given tokens are of 1 images, the batch has 2"):
        class_pipeline(class_labels=[1, 2], seed=1, hooks=[hook])


# --- nextscale edit --------------------------------------------------------------------------------------------------


@pytest.fixture
def edit(text_folder, class_folder, tmp_path, capsys):
    """Runs `nextscale edit` on a picture of 8x8; gives (exit code, stdout, stderr)."""
    picture().save(tmp_path / "in.png")

    def run(*argv, model="text", image=tmp_path / "in.png"):
        folder = {"text": text_folder, "class": class_folder}[model]
        words = ["edit", image, "--model", folder, "--device", "cpu", *argv]
        if "--out" not in argv:
            words += ["--out", tmp_path / "out"]
        return nextscale.main([*map(str, words)]), *capsys.readouterr()

    return run


def levels_of(path):
    return np.asarray(Image.open(path))


def test_edits_on_the_command_line(edit, text_pipeline, tmp_path):
    words = ["a red star", "--seed", 4, "--guidance", 2]
    code, out, _ = edit(*words, "--box", "2,2,6,6", "--n", 3)
    assert code == 0 and out.endswith("(see a-red-star_grid.png): 3 edits (0 were there already)\n")
    what = {"image": picture(), "mask_image": box_mask(2, 2, 6, 6), "guidance_scale": 2.0}
    wanted = text_pipeline("a red star", num_images_per_prompt=3, seed=4, **what).images
    for i in range(3):
        assert np.array_equal(levels_of(tmp_path / "out" / f"a-red-star_seed{4 + i}.png"), np.asarray(wanted[i]))
    assert Image.open(tmp_path / "out" / "a-red-star_grid.png").size == (5 * (8 * 24 + 2) - 2, 8 * 24)
    assert "4 edits (3 were there already)" in edit(*words, "--box", "2,2,6,6", "--n", 4)[1]
    code, _, message = edit(*words, "--box", "2,2,7,6")
    assert code == 2 and "mask" in message and "choose another --out" in message
    fewer = ["--plan", "supernet:1", "--depth", 1, "--out", tmp_path / "fewer"]
    assert "was trained to run 1 of its 2 layers" in edit("a red star", "--box", "2,2,6,6", *fewer)[2]


def test_masks_of_every_kind(edit, tmp_path):
    out = tmp_path / "out"
    box_mask(0, 0, 16, 8, 16, 16).save(tmp_path / "mask.png")
    assert edit("--mask", tmp_path / "mask.png", "--class", 3, model="class")[0] == 0
    made, before = levels_of(out / "class-3_seed0.png"), levels_of(tmp_path / "in.png")
    assert np.array_equal(made[5:], before[5:]) and not np.array_equal(made[:4], before[:4])
    clear = box_mask(0, 0, 16, 8, 16, 16).convert("RGBA")
    clear.putalpha(box_mask(0, 0, 8, 8, 16, 16))
    clear.save(tmp_path / "clear.png")
    code, _, err = edit("--mask", tmp_path / "clear.png", "--class", 3, "--out", tmp_path / "x", model="class")
    assert code == 2 and "transparency may mean repaint or keep" in err
    assert edit("--box", "0,0,8,4", "--box", "0,4,4,8", "--invert", "--out", tmp_path / "b", model="class")[0] == 0
    made = levels_of(tmp_path / "b" / "class-5_seed0.png")  # the null class
    assert np.array_equal(made[:4], before[:4]) and np.array_equal(made[4:, :4], before[4:, :4])
    assert edit("a star", "--extend", "2,2,2,2", "--out", tmp_path / "c")[0] == 0
    assert np.array_equal(levels_of(tmp_path / "c" / "a-star_seed0.png")[2:10, 2:10], before)


@pytest.mark.parametrize(
    "how",
    [
        [],
        ["--plan", "supernet:2", "--depth", "1"],
        ["--plan", "self:2", "--depth", "1"],
        ["--plan", "code:2", "--refiner"],
        ["--search", "best", "--n", "2", "--reward", "edit_rewards:brightness", "--show-search"],
        ["--search", "4 cluster@1:2 best", "--reward", "edit_rewards:brightness", "--images", "2"],
        ["--cache", "window:80%"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("model", ["text", "class"])
def test_every_way_of_drawing_edits(edit, model, how, tmp_path, text_folder, class_folder, monkeypatch):
    rewards = types.ModuleType("edit_rewards")
    rewards.brightness = lambda images, prompts: images.mean(axis=(1, 2, 3)) / 255
    monkeypatch.setitem(sys.modules, "edit_rewards", rewards)
    how = [*how, {"text": text_folder, "class": class_folder}[model]] if how[-1:] == ["--refiner"] else how
    what = ["a red star"] if model == "text" else ["--class", 3]
    code, said, error = edit(*what, "--box", "2,1,6,7", "--feather", 2, "--guidance", 1, *how, model=model)
    assert code == 0, error
    assert (": an image took " in said) == ("--search" in how)
    made = sorted((tmp_path / "out").glob("*_seed*.png"))
    assert len(made) == (2 if "--images" in how else 1)
    kept = np.ones((8, 8), bool)
    kept[:, :] = [[not (0 <= x < 8 and 0 <= y < 8 and np.hypot(max(2 - x, x - 5, 0), max(1 - y, y - 6, 0)) < 3)
                   for x in range(8)] for y in range(8)]  # fmt: skip
    for path in made:
        assert np.array_equal(levels_of(path)[kept], levels_of(tmp_path / "in.png")[kept])
    assert (tmp_path / "out" / "search").is_dir() == ("--show-search" in how)


def test_a_batch_of_edits_counts_candidates(edit, tmp_path, monkeypatch, class_folder):
    from sample.pipeline import NextScalePipeline

    rewards, sizes, call = types.ModuleType("edit_rewards"), [], NextScalePipeline.__call__
    rewards.brightness = lambda images, prompts: images.mean(axis=(1, 2, 3)) / 255
    monkeypatch.setitem(sys.modules, "edit_rewards", rewards)

    def counted(self, *args, **options):
        sizes.append(len(options["seed"]))
        return call(self, *args, **options)

    monkeypatch.setattr(NextScalePipeline, "__call__", counted)
    words = ["a star", "--box", "1,1,4,4", "--search", "best", "--n", 4, "--images", 5, "--batch-size", 8]
    assert edit(*words, "--reward", "edit_rewards:brightness")[0] == 0
    assert sizes == [2, 2, 1]


def test_edits_that_are_not_finite_are_refused(edit, tmp_path, monkeypatch):
    from sample.pipeline import NextScalePipeline

    decode = NextScalePipeline.decode
    monkeypatch.setattr(NextScalePipeline, "decode", lambda *args: decode(*args) * float("nan"))
    code, _, message = edit("a star", "--box", "1,1,4,4")
    assert code == 2 and "seed 0, is not finite" in message and not list((tmp_path / "out").glob("*.png"))


def test_edits_of_a_model_that_has_moved_are_kept(edit, text_folder, tmp_path, monkeypatch):
    words = ["a star", "--box", "1,1,4,4", "--n", 2]
    assert edit(*words)[0] == 0
    monkeypatch.chdir(text_folder.parent)
    assert "2 edits (2 were there already)" in edit(*words, "--model", text_folder.name)[1]


@pytest.mark.parametrize("kind", ["16 bits", "transparent"])
def test_pictures_of_other_kinds_are_kept_as_they_look(edit, tmp_path, kind):
    if kind == "16 bits":
        levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
        given, wanted = Image.fromarray(levels), np.rint(levels / 257)
    else:
        given, wanted = Image.new("RGBA", (8, 8), (255, 0, 0, 0)), np.full((8, 8), 255)
    given.save(tmp_path / "other.png")
    assert edit("a red star", "--box", "0,0,3,3", image=tmp_path / "other.png")[0] == 0
    (made,) = (tmp_path / "out").glob("*_seed0.png")
    assert np.array_equal(levels_of(made)[4:], np.repeat(wanted[..., None], 3, axis=2)[4:])


def test_masks_are_of_the_picture_as_it_lies(class_pipeline):
    """A photograph that is to be turned when shown, and a mask made for its pixels; masks of more bits than 8."""
    turned = picture()
    turned.getexif()[274] = 6  # orientation
    levels = np.asarray(box_mask(1, 0, 4, 2))
    masks = [
        Image.fromarray(levels),
        Image.fromarray(levels.astype(np.int32)),
        Image.fromarray(levels.astype(np.uint16) * 257),
    ]
    made = [class_pipeline(image=turned, mask_image=mask, seed=3, output_type="np").images for mask in masks]
    kept = levels == 0
    assert np.array_equal((made[0][0] * 255).round()[kept], np.asarray(picture().convert("RGB"))[kept])
    assert np.array_equal(made[0], made[1]) and np.array_equal(made[0], made[2])


def test_feathering_reaches_into_the_kept_part():
    from sample.commands.edit_cli import feathered

    hard = box_mask(2, 2, 6, 6)
    soft = np.asarray(feathered(hard, 2))
    assert (soft[np.asarray(hard) == 255] == 255).all()
    assert soft[4].tolist() == [85, 170, 255, 255, 255, 255, 170, 85]
    assert feathered(hard, 0) is hard


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a star"], "say where to repaint"),
        (["a star", "--box", "1,1,4,4", "--extend", "1,1,1,1"], "say where to repaint"),
        (["a star", "--box", "1,1,4"], "--box must be four numbers of pixels, 0 or more, like 4,20,34,50; got '1,1,4'"),
        (["a star", "--box", "4,1,4,4"], "--box 4,1,4,4 must have x0 < x1 and y0 < y1 inside 8x8 pixels"),
        (["a star", "--extend", "0,0,0,0"], "--extend must be 0 or more pixels, and one above 0, got 0,0,0,0"),
        (["a star", "--mask", "none.png"], "--mask none.png is not a file"),
        (["a star", "--box", "1,1,4,4", "--feather", "-1"], "--feather must be a number of pixels, 0 or more, got -1"),
        (
            ["a star", "--box", "1,1,4,4", "--feather", "inf"],
            "--feather must be a number of pixels, 0 or more, got inf",
        ),
        (["a star", "--box", "1,1,4,4", "--out", "e.npz"], "--out must be a folder, got e.npz"),
        (
            ["a star", "--box", "1,1,4,4", "--seed", 2**63 - 1, "--n", 2],
            "seed must be in [0, 2**63 - 2] for 2 images, got 9223372036854775807",
        ),
        (["a star", "--box", "1,1,4,4", "--n", "0"], "--n must be 1 or more, got 0"),
        (["a star", "--box", "1,1,4,4", "--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["a star", "--box", "1,1,4,4", "--reward", "scenes"], "--reward needs --search"),
        (["a star", "--box", "1,1,4,4", "--search", "bset"], "bset"),
        (["--box", "1,1,4,4"], "this model reads texts: say what the whole picture is to show"),
        (["a star", "--box", "1,1,4,4", "--class", "1"], "this model reads texts"),
        (["a star", "--extend", "9,0,0,0"], "mask_image spans 9 pixels"),
        (["a star", "--box", "1,1,4,4", "--mask-rule", "half"], "invalid choice: 'half'"),
    ],
)
def test_mistakes_on_the_command_line(edit, argv, message):
    code, out, error = edit(*argv)
    assert (code, out, error.count("\n")) == (2, "", 1) and message in error


def test_more_mistakes_on_the_command_line(edit, tmp_path):
    assert "this model knows classes, not texts" in edit("a star", "--box", "1,1,4,4", model="class")[2]
    assert (
        "--class must be one class, got '0-2', which are 3"
        in edit("--box", "1,1,4,4", "--class", "0-2", model="class")[2]
    )
    (tmp_path / "broken.png").write_bytes((tmp_path / "in.png").read_bytes()[:50])
    assert "cannot be read as a picture" in edit("a star", "--box", "1,1,4,4", image=tmp_path / "broken.png")[2]
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png")
    assert "cannot be read as a picture" in edit("a star", "--box", "1,1,4,4", image=tmp_path / "bomb.png")[2]
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "mask.tif")
    message = f"--mask {tmp_path / 'mask.tif'}: float levels have no stated range"
    assert message in edit("a star", "--mask", tmp_path / "mask.tif")[2] and not (tmp_path / "out").exists()


def documented():
    """The `nextscale` commands of the pages about editing, ImageNet and official checkpoints, as words."""
    for page in ("editing.md", "imagenet.md", "official-checkpoints.md"):
        text = (Path(__file__).resolve().parents[1] / "docs" / page).read_text(encoding="utf-8")
        for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("nextscale "):
                    yield shlex.split(line.partition(" # ")[0])[1:]


@pytest.mark.parametrize("words", list(documented()), ids=" ".join)
def test_documented_commands_parse(words):
    parser = nextscale.Parser(prog=words[0], allow_abbrev=False)
    importlib.import_module(nextscale.COMMANDS[words[0]][0]).configure(parser)
    parser.parse_intermixed_args(words[1:])
