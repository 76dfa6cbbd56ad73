"""Rewards and features: tiny models of transformers, the scenes reward and its training, mistakes in one line."""

import json

import numpy as np
import pytest
import torch

from evaluation.judge import Detection, apply_rules, detect, judge
from evaluation.scenes import COLOURS, SHAPES, prompt_suite, read_caption, render, sample_scene
from sample.reward_names import load_features, load_reward
from sample.rewards import Aesthetic, Callback, ClipScore, PixelFeatures, VisionFeatures, to_images
from sample.scene_reward import SHIPPED, SceneReward, SceneRewardFeatures, load_scene_reward, word_ids
from train.spoil import WAYS, roughen, spoil
from train.train_reward import another, example, main, make_metadata, wider

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
    captions = [metadata["prompt"] for metadata in prompt_suite(60)]
    words = word_ids(captions)
    assert words.shape == (360, 10) and (words > 0).any(1).all()
    assert len(torch.unique(words, dim=0)) == len(set(captions))
    for bad in ("a mauve star", "", "a star " * 6):
        with pytest.raises(ValueError, match="reward scenes"):
            word_ids([bad])


def test_its_names_are_those_of_the_scenes():
    from sample import scene_reward

    assert scene_reward.SHAPES == SHAPES and tuple(COLOURS) == scene_reward.COLOURS


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


def test_captions_are_read_and_written_back():
    rng = np.random.default_rng(0)
    for metadata in prompt_suite(40):
        caption = read_caption(metadata)
        assert make_metadata(caption)["prompt"] == metadata["prompt"]
        assert make_metadata(caption)["tag"] == metadata["tag"]
        assert make_metadata(another(rng, caption))["prompt"] != metadata["prompt"]
        make_metadata(wider(rng, caption))


def test_examples_are_labelled_by_what_was_drawn():
    rng = np.random.default_rng(1)
    labels = np.array([example(rng)[2] for _ in range(400)])
    assert 0.55 < labels[:, 0].mean() < 0.75  # its own caption, but for objects that were spoiled
    assert 0.55 < labels[:, 1].mean() < 0.75  # a wider caption
    assert labels[:, 2:5].mean() < 0.2 and labels[:, 5].mean() < 0.3


def test_spoiling_touches_one_object_only():
    """The others and the background far from it are as drawn; what is left does not show the caption."""
    rng, seen = np.random.default_rng(2), set()
    for _ in range(60):
        scene = sample_scene(rng)
        image, rest, way = spoil(rng, scene)
        seen.add(way)
        assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
        assert len(rest.objects) == len(scene.objects) - 1
        gone = next(item for item in scene.objects if item not in rest.objects)
        assert (image != render(scene)).any()
        y, x = np.nonzero((image != render(rest)).any(-1))
        reach = 1.5 * gone.diameter  # the longest way that a stretched, skewed or smeared object goes
        assert (np.hypot(x + 0.5 - gone.cx, y + 0.5 - gone.cy) < reach).all()
        truth = [Detection(item.shape, item.colour, 1.0, item.box) for item in rest.objects]
        assert not apply_rules(truth, scene.metadata).correct
    assert seen == set(WAYS)


def test_the_judge_mistrusts_what_was_spoiled_and_takes_what_was_roughened():
    rng = np.random.default_rng(5)
    spoiled = []
    for _ in range(120):
        image, rest, _ = spoil(rng, sample_scene(rng))
        clear = [found for found in detect(image) if found.shape in SHAPES]
        spoiled.append(len(clear) <= len(rest.objects))
    assert np.mean(spoiled) > 0.9
    scenes = [sample_scene(rng) for _ in range(40)]
    assert np.mean([judge(roughen(rng, scene), scene.metadata).correct for scene in scenes]) > 0.95


def test_training_takes_a_few_steps_and_writes_what_loads(tmp_path, capsys):
    from tokenizer.model import MultiScaleVQ

    torch.manual_seed(0)
    sizes = {"channels": [8, 8], "layers_per_block": 1, "attention": False, "norm_groups": 4, "patch": 4}
    MultiScaleVQ(vocab_size=16, latent_channels=4, schedule="1,2,8", **sizes).save_pretrained(tmp_path / "vqvae")
    words = ["--steps", "2", "--pool", "8", "--check", "8", "--out", str(tmp_path / "reward.safetensors")]
    assert main([*words, "--tokenizer", str(tmp_path / "vqvae")]) == 0
    printed = capsys.readouterr().out
    assert "scale 2: accuracy" in printed and "render: accuracy" in printed
    loaded = load_scene_reward(tmp_path / "reward.safetensors")
    shipped = load_scene_reward()
    trained = {n for n, p in loaded.named_parameters() if not torch.equal(p, shipped.get_parameter(n))}
    assert trained
    assert isinstance(loaded, SceneReward) and not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(FileNotFoundError, match="train_reward"):
        load_scene_reward(tmp_path / "none")
