"""The search benchmark on a tiny random model: rows read, run, resumed, written; the reward's accuracy measured."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluation import search_benchmark
from evaluation.reward_accuracy import auc, auc_within
from evaluation.scenes import prompt_suite, render, sample_scene
from evaluation.search_runs import NoisyReward, Row, oracle_of, row_of, run_row, same_as_before, search_of
from evaluation.search_whole import choose_whole, is_whole, make_whole
from sample.images import make_requests
from sample.load import load_pipeline
from sample.rewards import Callback
from sample.scene_reward import load_scene_reward


def test_rows_are_read():
    assert Row.of("plain") == Row("plain", "plain")
    row = Row.of("tts@4+noise=2+draw=systematic+features=scenes")
    assert (row.method, row.budget, row.n, row.oracle) == ("tts", 4.0, None, False)
    assert row.marks == {"noise": 2.0, "draw": "systematic", "features": "scenes"}
    assert Row.of("best:8+oracle").n == 8.0 and Row.of("best:8+oracle").oracle
    assert Row.of("best:1+rounds=4+enough=0.9").marks == {"rounds": 4, "enough": 0.9}
    assert Row.of("12/cluster@1:8/resample@4:3/best+draw=systematic").method == "12/cluster@1:8/resample@4:3/best"
    for text in search_benchmark.default_rows():
        assert Row.of(text).text == text
    for text, named in (("tts", "METHOD@BUDGET"), ("vote@2", "vote"), ("tts@2+luck=3", "luck"), ("", "row")):
        with pytest.raises(ValueError, match=named):
            Row.of(text)


def test_auc_counts_pairs():
    scores, good = np.array([0.9, 0.2, 0.5, 0.5]), np.array([True, False, True, False])
    assert auc(scores, good) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert np.isnan(auc(scores, good | True))
    groups = np.array([0, 0, 1, 1])
    assert auc_within(scores, good, groups) == pytest.approx((1 + 0.5) / 2)
    assert np.isnan(auc_within(scores, good, np.arange(4)))


def test_noise_is_the_picture_s_own_and_weakens():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(80)]
    images = torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2)
    captions = [scene.caption for scene in scenes]
    captions[::2] = captions[1::2]
    good = np.array([own == scene.caption for own, scene in zip(captions, scenes)])
    reward = load_scene_reward()
    areas = []
    for noise in (0.0, 8.0, 50.0):
        noisy = NoisyReward(reward, noise)
        scores = noisy(images, captions)
        torch.testing.assert_close(scores[3:5], noisy(images[3:5], captions[3:5]), atol=1e-4, rtol=0)
        areas.append(auc(scores.numpy(), good))
    assert areas[0] > areas[1] > areas[2] and areas[0] > 0.85 and areas[2] < 0.7


def test_the_oracle_is_the_judge():
    metadatas = prompt_suite(1)
    scene = sample_scene(np.random.default_rng(0), tag="counting")
    image = torch.from_numpy(render(scene)).permute(2, 0, 1)[None]
    oracle = oracle_of([*metadatas, scene.metadata])
    assert isinstance(oracle, Callback) and oracle(image, [scene.caption]).tolist() == [1.0]
    assert oracle(image, [metadatas[1]["prompt"]]).tolist() == [0.0]


def test_the_benchmark_runs_resumes_and_writes(text_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    rows = "plain,best@900,tts:2,best:2+oracle,4/resample@1:2/best+noise=4,best:1+rounds=2+enough=0.99"
    words = ["--model", str(text_folder), "--rows", rows, "--per-tag", "1", "--n", "2", "--batch-size", "8"]
    words += ["--work", "work", "--out", "results/search.json"]
    assert search_benchmark.main(words) == 0
    assert "score" in capsys.readouterr().out
    content = json.loads((tmp_path / "results/search.json").read_text())
    assert [row["row"] for row in content["rows"]] == rows.split(",") and content["n"] == 12
    plain, best, tts, oracle, _, rounds = content["rows"]
    assert plain["compute"] == pytest.approx(1, abs=0.05) and plain["tokens_per_image"] == 21
    assert best["candidates"] > 1 and 450 < best["compute"] <= 950 and tts["candidates"] == 16
    assert oracle["reward"] == "oracle" and oracle["score"] >= plain["score"]
    assert 1 < rounds["rounds"] <= 2 and rounds["candidates"] == 1
    names = {row["reward"] for row in content["reward_by_scale"]}
    assert len(content["reward_by_scale"]) == 3 + len(names) - 1 and "scenes" in names
    assert content["paper"]["tts:2"] == 0.740
    assert (tmp_path / "results/search.md").is_file() and (tmp_path / "results/search.png").stat().st_size > 10_000
    monkeypatch.setattr("evaluation.search_runs._run_batch", None)  # nothing is made again
    monkeypatch.setattr("evaluation.search_whole._make_batch", None)
    monkeypatch.setattr("evaluation.reward_accuracy.by_scale", None)
    assert search_benchmark.main(words) == 0
    assert json.loads((tmp_path / "results/search.json").read_text())["rows"] == content["rows"]
    for wrong in (["--rows", "luck@2"], ["--out", "x.png"]):
        with pytest.raises(SystemExit, match="2"):
            search_benchmark.main([*words, *wrong])


def test_choosing_among_images_made_once_is_the_search_itself(text_folder, tmp_path, monkeypatch):
    """The same candidates win, with the same scores and costs, whatever the number of candidates made."""
    monkeypatch.setattr("evaluation.search_runs.judge", by_a_pixel)
    monkeypatch.setattr("evaluation.search_whole.judge", by_a_pixel)
    pipeline = load_pipeline(str(text_folder))
    pipeline.set_progress_bar_config(disable=True)
    metadatas = prompt_suite(1)
    reward = Callback(lambda images, prompts: (images.reshape(len(images), -1).mean(1) / 255).tolist(), "brightness")
    prompts = [metadata["prompt"] for metadata in metadatas]
    requests = make_requests(prompts, per_prompt=2, seed=3, metadata=metadatas)
    common = {"folder": tmp_path, "batch_size": 20}
    whole = make_whole(pipeline, requests, {reward.name: reward}, 4, settings={}, **common)
    assert len({score for batch in whole for row in batch["scores"]["brightness"] for score in row}) > 20
    assert len({good for batch in whole for row in batch["correct"] for good in row}) == 2
    for text in ("plain", "best:2", "best:4", "importance:3", "importance:3+draw=systematic", "best:3+oracle"):
        row = Row.of(text)
        search = search_of(row, pipeline, reward, metadatas)
        assert is_whole(search)
        made = choose_whole(search, whole, requests), run_row(row, pipeline, requests, search, **common)
        for name in ("correct", "scores"):
            one, two = ([value for batch in batches for value in batch[name]] for batches in made)
            assert one == (two if name == "correct" or None in two else pytest.approx(two, abs=1e-3)), (text, name)
        one, two = (row_of(row, search, batches, requests, 1e9, seed=0) for batches in made)
        for name in ("tokens_per_image", "decoder_calls_per_image", "reward_calls_per_image"):
            assert one[name] == two[name], (text, name)
        assert one["compute"] == pytest.approx(two["compute"], rel=0.05)  # texts are padded by the batch
    assert not is_whole(search_of(Row.of("tts:2"), pipeline, reward, metadatas))
    assert not is_whole(search_of(Row.of("best:1+rounds=2+enough=0.9"), pipeline, reward, metadatas))
    assert not is_whole(search_of(Row.of("importance:3+potential=difference"), pipeline, reward, metadatas))


def by_a_pixel(image, metadata):
    """A judge whose verdicts differ among pictures of noise."""
    return SimpleNamespace(correct=bool(image[3, 5, 0] // 8 % 2))


def test_results_of_another_search_are_not_taken_for_this_one(tmp_path):
    same_as_before(tmp_path / "a" / "search.json", {"search": "2 best@2:1"})
    same_as_before(tmp_path / "a" / "search.json", {"search": "2 best@2:1"})
    with pytest.raises(ValueError, match="another search"):
        same_as_before(tmp_path / "a" / "search.json", {"search": "3 best@2:1"})


def test_intervals_of_several_images_a_prompt_are_never_narrower():
    """Where all images are right, resampling prompts shows no spread at all."""
    metadatas = prompt_suite(2)
    requests = make_requests([m["prompt"] for m in metadatas], per_prompt=2, metadata=metadatas)
    ledger = {"tokens": 1, "calls": {}, "flops": 1.0}
    batches = [{"correct": [True] * len(requests), "rounds": [1], "seconds": None, "ledger": ledger}]
    found = row_of(Row.of("plain"), None, batches, requests, 1.0, seed=0)
    assert found["score"] == 1 and found["score_ci95"][0] < 1 and found["counting_ci95"][0] < 0.7
