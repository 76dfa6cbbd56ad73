"""A cache of a model's own pictures: only good ones are kept, each can be made again, and training takes it."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from training_toys import in_child

from sample.load import load_pipeline
from train import cache_samples, cache_tokens, train_var
from train.config import exit_code
from train.token_cache import TokenCache

DATA = ["--data.source=scenes", "--data.size=8", "--data.num_scenes=300"]


def brightness(images: np.ndarray, prompts: list) -> list[float]:
    """A reward: the mean level of an image, as a share."""
    return [float(image.mean()) / 255 for image in images]


def stage(main, *arguments: str) -> int:
    """Exit code of a stage's command line in a child process."""
    return in_child(lambda: os._exit(exit_code(main, list(arguments))))


@pytest.fixture(scope="module")
def real_cache(tiny_vqvae, tmp_path_factory):
    """A cache of drawn scenes."""
    folder = tmp_path_factory.mktemp("real")
    tiny_vqvae.save_pretrained(folder / "vqvae")
    data = ["--data.source=scenes", "--data.size=8", "--data.num_scenes=40", "--data.val_fraction=0.2"]
    where = [f"--cache.folder={folder}/cache", f"--cache.tokenizer={folder}/vqvae"]
    assert stage(cache_tokens.main, *data, *where) == 0
    return folder / "cache"


@pytest.fixture(scope="module")
def enough(text_folder):
    """A score that about half of the pictures reach."""
    pipeline = load_pipeline(text_folder, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a ring"] * 40, seed=list(range(40)), output_type="np").images
    return float(np.median(brightness((images * 255).round(), [])))


def samples(text_folder, real_cache, folder, enough, *more: str) -> int:
    given = [f"--samples.model={text_folder}", f"--samples.val_cache={real_cache}", f"--samples.folder={folder}"]
    given += ["--samples.images=12", "--samples.shard_size=4", "--samples.batch_size=5", "--samples.device=cpu"]
    given += ["--samples.reward=test_cache_samples:brightness", f"--samples.enough={enough}", "--samples.fast=off"]
    return stage(cache_samples.main, *DATA, *given, "--samples.dtype=float32", *more)


def test_kept_pictures_are_good_and_can_be_made_again(text_folder, real_cache, enough, tiny_vqvae, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert samples(text_folder, real_cache, first, enough) == 0
    cache = TokenCache(first, "train", tiny_vqvae)
    assert len(cache) == 12 and 0 < json.loads((first / "train" / "manifest.json").read_text())["kept"] <= 1
    for item in (cache[i] for i in range(12)):
        ids = list(item["ids"][None].split(tiny_vqvae.schedule.lengths, dim=1))
        f_hat = tiny_vqvae.quantizer.partial_sums(ids, tiny_vqvae.schedule)[-1]
        with torch.no_grad():
            image = (tiny_vqvae.decode(f_hat).clamp(-1, 1) + 1) * 127.5
        assert brightness(image.numpy(), []) >= [enough - 0.01]
        assert item["caption"]

    assert samples(text_folder, real_cache, second, enough) == 0
    (second / "train" / "manifest.json").unlink()
    (second / "train" / "00001.npy").unlink()
    assert samples(text_folder, real_cache, second, enough) == 0  # goes on with what is missing
    for name in ("00000.npy", "00001.npy", "00002.npy", "00001.jsonl", "manifest.json"):
        assert (first / "train" / name).read_bytes() == (second / "train" / name).read_bytes()
    assert (second / "val" / "manifest.json").read_bytes() == (real_cache / "val" / "manifest.json").read_bytes()


def test_a_model_that_leaves_scales_out_is_refused(text_folder, real_cache, enough, tmp_path, capfd):
    shutil.copytree(text_folder, tmp_path / "model")
    index = tmp_path / "model/model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"sampling": {"prune": "100%"}}))
    assert samples(tmp_path / "model", real_cache, tmp_path / "made", enough) == 2
    assert "leaves out its last scales (prune)" in capfd.readouterr().err and not (tmp_path / "made").exists()


def test_training_takes_them(text_folder, real_cache, enough, tmp_path):
    assert samples(text_folder, real_cache, tmp_path / "own", enough) == 0
    run = ["--run.total_images=8", "--run.batch_size=4", "--run.workers=0", "--run.cpu=true", "--run.bar_every=60"]
    run += ["--run.previews=0", "--run.precision=no", "--run.validation_images=4", f"--run.run_dir={tmp_path}/run"]
    run += [f"--tokens.tokenizer={text_folder}/vqvae", f"--tokens.cache={tmp_path}/own", *DATA]
    run += [f"--start_from={text_folder}/transformer", f"--text.pretrained={text_folder}", "--text.train=false"]
    assert stage(train_var.main, *run, "--transformer.conditioning=text") == 0
    assert (tmp_path / "run" / "latest" / "transformer").is_dir()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples.images=13"], "samples.images must be a multiple of shard_size 4, got 13"),
        (["--samples.candidates=0"], "samples.candidates must be 1 or more, got 0"),
        (["--samples.enough=2.0"], "samples.enough 2.0: fewer than one picture in"),
        (["--samples.val_cache=none"], "samples.val_cache has no none/val/manifest.json"),
        (["--samples.reward=none"], "reward must be"),
    ],
)
def test_mistakes_are_one_line(arguments, words, text_folder, real_cache, enough, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(cache_samples, "MOST_TRIES", 5)
    assert samples(text_folder, real_cache, tmp_path / "bad", enough, *arguments) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1 and words in error[0]


def test_a_plan_is_not_mixed_with_another(text_folder, real_cache, enough, tmp_path, capfd):
    assert samples(text_folder, real_cache, tmp_path / "one", enough) == 0
    assert samples(text_folder, real_cache, tmp_path / "one", enough, "--samples.candidates=2") == 2
    assert "candidates is 2 and was 4" in capfd.readouterr().err
    for other, said in (
        (["--samples.dtype=auto"], "dtype is auto and was float32"),
        (["--data.num_scenes=200"], "200"),
    ):
        assert samples(text_folder, real_cache, tmp_path / "one", enough, *other) == 2
        assert said in capfd.readouterr().err
