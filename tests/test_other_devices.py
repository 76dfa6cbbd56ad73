"""The main jobs on an accelerator that is neither a CPU nor CUDA; see other_device.py."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from other_device import NAME, can_emulate, has_kernel, passes_elsewhere, trains_elsewhere
from PIL import Image
from torch.nn import functional as F
from training_toys import curve

import nextscale
from evaluation.scene_features import load_scene_features
from tokenizer.resize import average, enlarge
from train import train_tokenizer, train_var

pytestmark = pytest.mark.skipif(not can_emulate, reason="this PyTorch cannot emulate a device")
THERE = f"{NAME}:0"


def picture(path):
    """A file's pixels (h, w, 3), int."""
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "a red star left of a blue heart", "--n", "2"],
        ["sample", "two green rings", "--search", "best"],
        ["sample", "two green rings", "--cache", "snapkv:20%", "--guidance-until", "4"],
        ["sample", "two green rings", "--prune", "40%,50%"],
        ["edit", "given.png", "a blue square", "--box", "8,8,40,40", "--mask-rule", "whole"],
    ],
)
def test_commands_draw_what_they_draw_on_the_cpu(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), (240, 200, 20)).save("given.png")

    def draw(device):
        assert not nextscale.main([*words, "--device", device, "--dtype", "float32", "--out", device.split(":")[0]])

    draw("cpu")
    assert passes_elsewhere(draw, THERE)
    files = sorted((tmp_path / "cpu").rglob("*_seed*.png"))
    for file in files:
        there = tmp_path / NAME / file.relative_to(tmp_path / "cpu")
        assert np.abs(picture(there) - picture(file)).max() <= 2, file
    assert files


@pytest.mark.parametrize("more", [["--dtype", "bfloat16"], ["--search", "tts", "--features", "scenes"]])
def test_commands_draw_there(tmp_path, monkeypatch, more):
    """What rounding changes: half precision, and clusters of pictures."""
    monkeypatch.chdir(tmp_path)
    assert passes_elsewhere(nextscale.main, ["sample", "a red star", "--device", THERE, "--out", "there", *more])
    assert list((tmp_path / "there").glob("*.png"))


def test_scenes_are_described_there_as_on_the_cpu():
    images = torch.randint(256, (3, 3, 48, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    here = load_scene_features().describe(images)

    def describe():
        found = load_scene_features().to(THERE).describe(images)
        torch.testing.assert_close(found.features, here.features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.log_posterior, here.log_posterior, rtol=1e-4, atol=1e-4)

    assert passes_elsewhere(describe)


def test_maps_are_resized_there_as_on_the_cpu():
    x = torch.randn(2, 3, 13, 16, generator=torch.Generator().manual_seed(0))

    def resize():
        for size in product((1, 3, 8, 13, 20), (1, 5, 16, 17)):
            for ours, mode in ((average, "area"), (enlarge, "bicubic")):
                found = ours(x.to(THERE), size).cpu()
                torch.testing.assert_close(found, F.interpolate(x, size=size, mode=mode), rtol=1e-5, atol=1e-5)

    assert passes_elsewhere(resize)


def train(name, folder, images, *more):
    """A training of configs/NAME/tiny.yaml up to so many images."""
    torch.set_num_threads(1)
    settings = ["--run.workers=0", "--run.batch_size=8", "--run.log_every=1", "--run.validate_every=2", *more]
    command = {"tokenizer": train_tokenizer, "var": train_var}[name]
    command.main(
        [f"--config=configs/{name}/tiny.yaml", f"--run.run_dir={folder}", f"--run.total_images={images}", *settings]
    )


def test_both_models_train_and_resume_there(tmp_path):
    more = {"tokenizer": [], "var": [f"--tokens.tokenizer={tmp_path}/tokenizer/latest/vqvae"]}
    for name, words in more.items():
        for images in (24, 40):
            assert trains_elsewhere(train, name, tmp_path / name, images, *words)
        assert [line["step"] for line in curve(tmp_path / name, "train")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: torch.zeros(2, device=THERE).double(),
        lambda: torch.zeros(2, device=THERE) + torch.zeros(2),
        lambda: F.interpolate(torch.zeros(1, 1, 8, 8, device=THERE), size=3, mode="area"),
        lambda: torch.linalg.eigvals(torch.zeros(2, 2, device=THERE)),
        lambda: torch.zeros(2, device=THERE).numpy(),
    ],
)
def test_the_emulated_device_refuses_what_mps_refuses(wrong):
    assert not passes_elsewhere(wrong)


def test_kernels_are_looked_up_by_their_names():
    assert has_kernel("add.Tensor") and has_kernel("linear") and not has_kernel("_linalg_svd")
