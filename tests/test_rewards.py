"""Rewards and features: tiny models of transformers, the scenes reward and its training, mistakes in one line."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.judge import Detection, apply_rules, judge
from evaluation.scenes import (
    COLOURS,
    SHAPES,
    TAGS,
    prompt_suite,
    read_caption,
    render,
    sample_scene,
)
from sample.reward_names import load_features, load_reward
from sample.rewards import Aesthetic, Callback, ClipScore, PixelFeatures, VisionFeatures, to_images
from sample.scene_reward import (
    SHIPPED,
    Caption,
    Objects,
    SceneReward,
    SceneRewardFeatures,
    exactly,
    load_scene_reward,
)
from tokenizer.schedule import ScaleSchedule
from train.spoil import TOLERATED, WAYS, damage, mask_of, scramble, spoil, wholeness
from train.train_reward import cells_of, loss_of, main, make_batch, mirrored

IMAGES = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP of a few thousand weights, as transformers saves one."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTextConfig,
        CLIPTokenizer,
        CLIPVisionConfig,
    )  # fmt: skip

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=16, eos_token_id=len(words) - 1, **sizes)
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **sizes)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).save_pretrained(
        folder
    )
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


# --- models of transformers ------------------------------------------------------------------------------------------


def test_clip_scores_are_cosines_of_each_pair(clip_folder):
    reward = load_reward(f"clip:{clip_folder}")
    assert isinstance(reward, ClipScore)
    prompts = ["a cat", "a much longer text than sixteen tokens hold", "dogs"]
    scores = reward(IMAGES, prompts)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and (scores.abs() <= 1).all()
    alone = torch.cat([reward(IMAGES[i : i + 1], prompts[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=0)
    assert not torch.equal(scores, reward(IMAGES, prompts[::-1]))
    with pytest.raises(TypeError, match="class 3"):
        reward(IMAGES[:1], [3])


def test_vision_features_are_patch_tokens(clip_folder):
    for name in (f"clip:{clip_folder}", f"vision:{clip_folder}"):
        features = load_features(name)
        assert isinstance(features, VisionFeatures) and features(IMAGES).shape == (3, 16, 16)


def test_dinov2_registers_and_class_token_are_left_out(tmp_path):
    from transformers import BitImageProcessor, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=4, **sizes)).save_pretrained(tmp_path)
    crop = {"height": 28, "width": 28}
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=crop).save_pretrained(tmp_path)
    assert load_features(f"vision:{tmp_path}")(IMAGES).shape == (3, 4, 16)


def test_the_aesthetic_head_reads_clip(clip_folder, tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {
        "layers.0.weight": torch.randn(4, 8, generator=generator), "layers.0.bias": torch.randn(4, generator=generator),
        "layers.2.weight": torch.randn(1, 4, generator=generator), "layers.2.bias": torch.randn(1, generator=generator),
    }  # fmt: skip
    torch.save(state, tmp_path / "head.pth")
    reward = Aesthetic(str(tmp_path / "head.pth"), str(clip_folder))
    scores = reward(IMAGES, [0, 0, 0])  # prompts are not read
    given = reward.processor(images=list(IMAGES), return_tensors="pt")
    with torch.no_grad():
        x = reward.model.visual_projection(reward.model.vision_model(**given).pooler_output)
    x = x / x.norm(dim=-1, keepdim=True)
    wanted = (x @ state["layers.0.weight"].T + state["layers.0.bias"]) @ state["layers.2.weight"].T
    torch.testing.assert_close(scores, (wanted + state["layers.2.bias"])[:, 0] / 10)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_reward("aesthetic:nowhere.pth")


# --- plain ones ------------------------------------------------------------------------------------------------------


def test_any_function_is_a_reward(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def longest(images, prompts):\n"
        "    assert images.shape == (3, 40, 40, 3) and images.dtype == 'uint8'\n"
        "    return [len(p) for p in prompts]\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = load_reward("my_rewards:longest")
    assert isinstance(reward, Callback) and reward(IMAGES, ["a", "abc", ""]).tolist() == [1, 3, 0]
    for name, said in (("my_rewards:number", "no function"), ("my_rewards:lost", "lost"), ("no_such:f", "no_such")):
        with pytest.raises(ValueError, match=said):
            load_reward(name)


@pytest.mark.parametrize("given", [None, ["a", "b", "c"], [[1, 2], [3]]])
def test_a_function_that_gives_no_numbers_is_named(given):
    with pytest.raises(ValueError, match="reward mine must give a number for each image, got"):
        Callback(lambda images, prompts: given, "mine")(IMAGES, ["", "", ""])


@pytest.mark.parametrize("name", ["praise", "", "pickscore:x", "aesthetic", "hps:x"])
def test_unknown_rewards_are_named(name):
    with pytest.raises(ValueError, match="reward must be"):
        load_reward(name)


def test_missing_packages_and_models_are_one_line(monkeypatch):
    for name, package in (("imagereward", "image-reward"), ("hps", "hpsv2")):
        with pytest.raises(ValueError, match=f"pip install {package}"):
            load_reward(name)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_reward("clip:./nowhere")
    with pytest.raises(ValueError, match="features must be"):
        load_features("eyes")
    assert load_features("latent") is None


def test_pixel_features_are_patch_means():
    flat = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    found = PixelFeatures(2)(flat)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 0.2]).expand(1, 4, 3))
    assert isinstance(load_features("pixels"), PixelFeatures)


def test_decoded_images_become_what_a_png_holds():
    decoded = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5)
    assert to_images(decoded).flatten().tolist() == [0, 0, 128, 255, 255]


# --- the scenes reward -----------------------------------------------------------------------------------------------


def test_every_caption_of_scenes_can_be_read():
    for metadata in prompt_suite(60):
        shapes, colours, count, relation = read_caption(metadata)
        things = tuple(zip(colours or (None,) * len(shapes), shapes))
        assert Caption.of(metadata["prompt"]) == Caption(things, count, relation)
    assert Caption.of("Two green rings") == Caption((("green", "ring"),), 2)
    for bad in ("a mauve star", "", "a star " * 6, "five stars", "a star left of", "starfish"):
        with pytest.raises(ValueError, match="reward scenes"):
            Caption.of(bad)


def renders(n, seed):
    scenes = [sample_scene(np.random.default_rng((seed, i)), split="train") for i in range(n)]
    images = torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2)
    return images, [scene.caption for scene in scenes]


def test_the_shipped_reward_tells_captions_apart():
    assert SHIPPED.stat().st_size < 3e6
    reward = load_reward("scenes")
    images, captions = renders(96, 123)
    right = reward(images, captions)
    wrong = reward(images, captions[1:] + captions[:1])
    assert right.shape == (96,) and ((right >= 0) & (right <= 1)).all()
    assert (right > wrong).float().mean() > 0.9
    alone = reward(images[5:6], captions[5:6])
    torch.testing.assert_close(alone, right[5:6], atol=1e-5, rtol=0)
    larger = torch.nn.functional.interpolate(images.float(), scale_factor=2).byte()
    torch.testing.assert_close(reward(larger, captions), right, atol=1e-4, rtol=0)
    features = load_features("scenes")
    assert isinstance(features, SceneRewardFeatures) and features(images[:2]).shape == (2, 64, 128)


def seen_exactly(scenes, doubt=0.0):
    """What a network that makes no mistake says, but for a doubt that each object is whole."""
    objects = [scene.objects for scene in scenes]
    there, whole, size = (torch.zeros(len(scenes), 8) for _ in range(3))
    shape, colour = torch.zeros(len(scenes), 8, 8), torch.zeros(len(scenes), 8, 10)
    centre = torch.rand(len(scenes), 8, 2)
    for i, row in enumerate(objects):
        for n, item in enumerate(row):
            there[i, n], whole[i, n], size[i, n] = 1.0, 1.0 - doubt, item.diameter / 8
            shape[i, n, SHAPES.index(item.shape)] = colour[i, n, tuple(COLOURS).index(item.colour)] = 1.0
            centre[i, n] = torch.tensor([item.cx, item.cy]) / 8
    return Objects(there, whole, shape, colour, centre, size)


@pytest.mark.parametrize("tag", TAGS)
def test_certain_objects_are_scored_as_the_rules_of_geneval_have_it(tag):
    """On true objects the likelihood of a caption is its verdict: near 0 or 1, for its own caption and others'."""
    rng = np.random.default_rng(9)
    scenes = [sample_scene(rng, tag=tag) for _ in range(40)]
    seen, doubted = seen_exactly(scenes), seen_exactly(scenes, doubt=0.1)
    for row, scene in enumerate(scenes):
        truth = [Detection(item.shape, item.colour, 1.0, item.box) for item in scene.objects]
        for other in (scene, scenes[row - 1]):
            verdict = apply_rules(truth, other.metadata).correct
            caption = Caption.of(other.caption)
            assert (float(seen.likelihood(caption, row)) > 0.5) == verdict
            if tag != "position":
                assert float(seen.likelihood(caption, row)) == pytest.approx(float(verdict), abs=1e-5)
        needed = len(scene.objects)
        own = Caption.of(scene.caption)
        expected = float(seen.likelihood(own, row)) * 0.9**needed
        assert float(doubted.likelihood(own, row)) == pytest.approx(expected, abs=1e-4)


def test_an_object_between_two_cells_is_one_object(monkeypatch):
    """Two cells that are half sure make one object that is there, and further ones stay apart."""
    said = torch.full((1, 23, 8, 8), -9.0)
    said[0, 0, 2, 3], said[0, 0, 2, 4] = 0.01, -0.01  # logits of a half
    said[0, 0, 6, 1] = 9.0
    said[0, 20:, 2, 3] = torch.tensor([0.5, 0.0, 2.0])  # its place, from the cell's centre, and size
    network = SceneReward().eval()
    monkeypatch.setattr(network, "cells", lambda images: said)
    seen = network.objects(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    order = seen.size_BN[0].argsort(descending=True)
    assert seen.there_BN[0].sort(descending=True).values[:3].tolist() == pytest.approx([1, 1, 0], abs=0.03)
    assert seen.centre_BN2[0, order[0]].tolist() == [4.0, 2.5] and float(seen.size_BN[0, order[0]]) == 2.0


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6), st.integers(1, 4))
def test_exactly_so_many_good_ones_and_none_bad(pairs, count):
    """Against the sum over all outcomes."""
    events = [(good, (1 - good) * bad) for good, bad in pairs]
    wanted = 0.0
    for outcome in itertools.product((0, 1), repeat=len(events)):
        if sum(outcome) == count:
            wanted += np.prod([good if hit else 1 - good - bad for hit, (good, bad) in zip(outcome, events)])
    good, bad = (torch.tensor(column, dtype=torch.float64) for column in zip(*events))
    assert float(exactly(good, bad, count)) == pytest.approx(wanted, abs=1e-9)


def test_cells_say_what_is_centred_there():
    scene = sample_scene(np.random.default_rng(3), tag="counting")
    wholes = np.linspace(0.2, 0.9, len(scene.objects))
    cells = cells_of(scene, wholes).reshape(8, 8, 7)
    assert cells[..., 0].sum() == len(scene.objects)
    for item, whole in zip(scene.objects, wholes):
        there, sound, shape, colour, dx, dy, size = cells[int(item.cy / 8), int(item.cx / 8)].tolist()
        assert (there, SHAPES[int(shape)], tuple(COLOURS)[int(colour)]) == (1.0, item.shape, item.colour)
        assert sound == pytest.approx(whole) and size == pytest.approx(item.diameter / 8)
        assert (int(item.cx / 8) + 0.5 + dx) * 8 == pytest.approx(item.cx, abs=1e-4)
        assert (int(item.cy / 8) + 0.5 + dy) * 8 == pytest.approx(item.cy, abs=1e-4)


def test_damage_is_none_for_what_is_as_drawn_and_one_for_what_is_missing():
    rng = np.random.default_rng(2)
    for _ in range(40):
        scene = sample_scene(rng)
        clean, rest = render(scene), replace(scene, objects=scene.objects[1:])
        found = damage(render(rest), clean, scene)
        assert damage(clean, clean, scene).tolist() == [0.0] * len(scene.objects)
        assert found[0] == pytest.approx(1, abs=0.3) and (found[1:] < 0.02).all()
        assert damage(255 - clean, clean, scene).min() > 0.3
    assert wholeness(np.array([0.0, TOLERATED, 1.0])) == pytest.approx([1, 0.5, 0], abs=0.01)


def test_spoiling_leaves_the_rest_of_a_picture(monkeypatch):
    monkeypatch.setattr("train.spoil.FURTHER", 0.0)
    rng = np.random.default_rng(12)
    for _ in range(60):
        scene = sample_scene(rng)
        y, x = np.nonzero((spoil(rng, scene) != render(scene)).any(-1))
        far = [np.hypot(x + 0.5 - item.cx, y + 0.5 - item.cy) / item.diameter for item in scene.objects]
        assert not len(x) or min(distance.max() for distance in far) < 1.6


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_drawing_wrongly_go_from_slight_to_bad(way):
    rng, found = np.random.default_rng(4), []
    for _ in range(60):
        item = sample_scene(rng, tag="colors").objects[0]
        mask, true = WAYS[way](rng, item), mask_of(item)
        assert mask.shape == (64, 64) and mask.min() >= -1e-9 and mask.max() <= 1 + 1e-9
        found.append(np.abs(mask - true).sum() / true.sum())
    assert min(found) < 0.25 and max(found) > 0.12 and max(found) > 2 * min(found)


def test_the_judge_mistrusts_what_is_damaged_and_takes_what_is_not():
    """Damage and the judge were made apart and agree."""
    rng, whole, broken = np.random.default_rng(5), [], []
    for _ in range(400):
        scene = sample_scene(rng, tag="colors")
        image = spoil(rng, scene)
        found = damage(image, render(scene), scene)[0]
        if found < 0.1 or found > 0.3:
            (whole if found < 0.1 else broken).append(judge(image, scene.metadata).correct)
    assert len(whole) > 15 and np.mean(whole) > 0.85
    assert len(broken) > 20 and np.mean(broken) < 0.3


def test_scrambling_touches_one_object_of_the_chosen_only():
    schedule, rng = ScaleSchedule.of("1,2,4,8"), np.random.default_rng(6)
    scenes = [sample_scene(rng) for _ in range(16)]
    ids = [torch.arange(16 * h * w).reshape(16, h * w) for h, w in schedule.sides]
    bits = [torch.stack([x, -x], dim=-1) for x in ids]
    touched = scramble(np.random.default_rng(7), ids, schedule, scenes, range(5, 16))
    assert all(torch.equal(new[:5], old[:5]) for new, old in zip(touched, ids))
    assert torch.equal(touched[0], ids[0])  # the first scale stays
    for i in range(5, 16):
        boxes = [item.box for item in scenes[i].objects]
        changed = [np.nonzero((new[i] != old[i]).numpy())[0].tolist() for new, old in zip(touched, ids)]
        inside = [
            all(
                (p % w + 1) * 64 / w > x0
                and p % w * 64 / w < x1
                and (p // w + 1) * 64 / h > y0
                and p // w * 64 / h < y1
                for (h, w), places in zip(schedule.sides, changed)
                for p in places
            )
            for x0, y0, x1, y1 in boxes
        ]
        assert any(inside)  # all within one object
    assert sum(any((new[i] != old[i]).any() for new, old in zip(touched, ids)) for i in range(5, 16)) > 5
    assert all((new < len(old.flatten())).all() for new, old in zip(touched, ids))
    again = scramble(np.random.default_rng(7), bits, schedule, scenes, range(5, 16))
    assert all(torch.equal(new[..., 0], old) and torch.equal(new[..., 1], -old) for new, old in zip(again, touched))


def test_a_batch_without_a_tokenizer_is_as_drawn():
    pool = make_batch(np.random.default_rng(8), 24, vqvae=None, scale=None)
    assert pool.images_NCHW.shape == (24, 3, 64, 64) and pool.images_NCHW.dtype == torch.uint8
    assert pool.cells_NMF.shape == (24, 64, 7) and 24 <= pool.cells_NMF[..., 0].sum() <= 96
    whole = pool.cells_NMF[..., 1][pool.cells_NMF[..., 0] > 0]
    assert 0.2 < whole.mean() < 0.8 and whole.min() < 0.1 and whole.max() > 0.9


def test_mirrored_pictures_have_mirrored_cells():
    pool = make_batch(np.random.default_rng(10), 4, vqvae=None, scale=None)
    again = mirrored(mirrored(pool))
    assert torch.equal(again.images_NCHW, pool.images_NCHW) and torch.equal(again.cells_NMF, pool.cells_NMF)
    there = pool.cells_NMF[..., 0].reshape(4, 8, 8)
    assert torch.equal(mirrored(pool).cells_NMF[..., 0].reshape(4, 8, 8), there.flip(2))
    offsets = [p.cells_NMF[..., 4].sum() for p in (pool, mirrored(pool))]
    assert float(offsets[0]) == pytest.approx(-float(offsets[1]), abs=1e-5)


def test_the_loss_is_least_for_what_is_true():
    pool = make_batch(np.random.default_rng(11), 8, vqvae=None, scale=None)
    true = pool.cells_NMF.reshape(8, 8, 8, 7)
    said = torch.zeros(8, 23, 8, 8)
    said[:, 0] = 40 * true[..., 0] - 20
    said[:, 1] = torch.logit(true[..., 1], eps=1e-6)
    said[:, 2:10] = 20 * torch.nn.functional.one_hot(true[..., 2].long(), 8).permute(0, 3, 1, 2)
    said[:, 10:20] = 20 * torch.nn.functional.one_hot(true[..., 3].long(), 10).permute(0, 3, 1, 2)
    said[:, 20:] = true[..., 4:].permute(0, 3, 1, 2)
    least = loss_of(said, pool.cells_NMF)
    for channel in range(23):
        worse = said.clone()
        worse[:, channel] += 30.0
        assert loss_of(worse, pool.cells_NMF) > least


def test_training_takes_a_few_steps_and_writes_what_loads(tmp_path, capsys):
    from tokenizer.model import MultiScaleVQ

    torch.manual_seed(0)
    sizes = {"channels": [8, 8], "layers_per_block": 1, "attention": False, "norm_groups": 4, "patch": 4}
    MultiScaleVQ(vocab_size=16, latent_channels=4, schedule="1,2,8", **sizes).save_pretrained(tmp_path / "vqvae")
    words = ["--steps", "2", "--pool", "8", "--check", "8", "--out", str(tmp_path / "reward.safetensors")]
    assert main([*words, "--tokenizer", str(tmp_path / "vqvae")]) == 0
    printed = capsys.readouterr().out
    assert "scale 2: named" in printed and "render: named" in printed
    loaded = load_scene_reward(tmp_path / "reward.safetensors")
    shipped = load_scene_reward()
    trained = {n for n, p in loaded.named_parameters() if not torch.equal(p, shipped.get_parameter(n))}
    assert trained
    assert isinstance(loaded, SceneReward) and not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(FileNotFoundError, match="train_reward"):
        load_scene_reward(tmp_path / "none")
