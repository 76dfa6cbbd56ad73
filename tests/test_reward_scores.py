"""Mean rewards of finished images."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import nextscale
from evaluation.intervals import mean_interval
from evaluation.reward_scores import clustered_half, column_of, load_rewards, published, reward_figures
from evaluation.sources import open_images, tree_prompts
from sample.rewards import Callback


def brightness(images, prompts):
    """The mean of all pixels; found by the command as test_reward_scores:brightness."""
    assert len(images) == len(prompts)
    return images.mean(axis=(1, 2, 3))


def flat(level, side=8):
    """A gray picture."""
    return np.full((side, side, 3), level, dtype=np.uint8)


def test_the_mean_is_over_images_of_any_size_and_order():
    given = [flat(10), flat(20), flat(30, side=4), flat(40, side=4), flat(60)]
    seen = []

    def noted(images, prompts):
        seen.append((len(images), images.shape[1], list(prompts)))
        return brightness(images, prompts)

    figures = reward_figures(given, list("aabbc"), {"x": Callback(noted)}, batch_size=3)
    assert figures["x"] == pytest.approx(32)
    assert seen == [(2, 8, ["a", "a"]), (2, 4, ["b", "b"]), (1, 8, ["c"])]


def test_images_of_one_prompt_count_as_one_in_the_interval():
    scores = np.random.default_rng(0).normal(size=20)
    low, high = mean_interval(scores)
    once = clustered_half(scores, [str(i) for i in range(20)])
    assert once == pytest.approx((high - low) / 2)
    assert clustered_half(np.repeat(scores, 4), [str(i) for i in range(20) for _ in range(4)]) == pytest.approx(once)
    assert clustered_half(scores, ["one"] * 20) is None
    figures = reward_figures([flat(1), flat(3)], ["one"] * 2, {"x": Callback(brightness)}, batch_size=2)
    assert figures == {"x": 2.0}


@pytest.mark.parametrize("prompts", [["a"], ["a", "b", "c"]])
def test_a_prompt_an_image(prompts):
    with pytest.raises(ValueError, match="one prompt an image"):
        reward_figures([flat(1), flat(2)], prompts, {"x": Callback(brightness)}, batch_size=1)


def test_names():
    assert column_of("pickscore") == "reward_pickscore" and column_of("clip:/m/my-clip") == "reward_clip_my_clip"
    assert published("clip:/home/me/models/my-clip, hps") == "clip:models/my-clip,hps"
    assert list(load_rewards(" scenes, test_reward_scores:brightness ")) == [
        "reward_scenes",
        "reward_test_reward_scores_brightness",
    ]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """What `sample --prompts` makes of two prompts that no judge knows, two images each."""
    monkeypatch.chdir(tmp_path)
    for place, prompt in enumerate(("a cat in space", "a very long sentence")):
        folder = tmp_path / "drawn" / f"{place:05d}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
        for copy in range(2):
            Image.fromarray(flat(100 * place + 10 * copy)).save(folder / "samples" / f"{copy:04d}.png")
    return "drawn"


def test_the_command_scores_a_tree(tree, tmp_path, capfd):
    words = ["evaluate", "--images", tree, "--rewards", "test_reward_scores:brightness", "--out", "r/scores.json"]
    assert nextscale.main(words) == 0
    result = json.loads((tmp_path / "r/scores.json").read_text())
    row = result["rows"][0]
    assert row["reward_test_reward_scores_brightness"] == pytest.approx(55) and row["n"] == 4
    low, high = row["reward_test_reward_scores_brightness_ci95"]
    assert low < 5 and high > 105  # two prompts tell little
    assert result["settings"]["rewards"] == "test_reward_scores:brightness"
    assert "--rewards test_reward_scores:brightness" in result["command"]
    assert "reward_test_reward_scores_brightness" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--images", "drawn", "--rewards", "nothing"], "reward must be scenes, clip"),
        (["--images", "drawn", "--rewards", ","], "--rewards must name rewards"),
        (["--images", "drawn", "--rewards", "scenes,scenes"], "two figures named reward_scenes"),
        (["--images", "loose", "--rewards", "scenes"], "loose/a.png lies in no tree of sample --prompts"),
        (["--images", "drawn", "--rewards", "scenes"], "cannot read 'a cat in space'"),
        (["--tokenizer", "scenes", "--rewards", "scenes"], "--rewards scenes is for images with prompts"),
    ],
)
def test_mistakes_are_one_line(tree, tmp_path, capfd, words, said):
    (tmp_path / "loose").mkdir()
    Image.fromarray(flat(1)).save(tmp_path / "loose" / "a.png")
    assert nextscale.main(["evaluate", *words, "--out", "r.json"]) == 2
    told = capfd.readouterr().err
    assert said in told and told.count("\n") == 1
    assert not (tmp_path / "r.json").exists()


def test_pictures_of_ours_say_their_prompts_themselves(tmp_path, monkeypatch, text_folder):
    monkeypatch.chdir(tmp_path)
    draw = ["sample", "a red star", "two rings", "--n", "2", "--model", str(text_folder), "--device", "cpu"]
    assert nextscale.main([*draw, "--out", "mixed"]) == 0
    images = open_images("mixed")
    assert sorted(tree_prompts(images)) == ["a red star"] * 2 + ["two rings"] * 2
    assert nextscale.main(["evaluate", "--images", "mixed", "--rewards", "test_reward_scores:brightness"]) == 0
