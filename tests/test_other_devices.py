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
from evaluation.extractors import IMAGENET_MEAN, IMAGENET_STD, square_inputs, squeezed_inputs
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
    assert trains_elsewhere(train, "tokenizer", tmp_path / "tokenizer", 24)
    for images in (24, 40):
        tokenizer = f"--tokens.tokenizer={tmp_path}/tokenizer/latest/vqvae"
        assert trains_elsewhere(train, "var", tmp_path / "var", images, tokenizer)
    for name, steps in (("tokenizer", 3), ("var", 5)):
        assert [line["step"] for line in curve(tmp_path / name, "train")] == [*range(1, steps + 1)]


def test_images_go_into_extractors_from_there_as_from_the_cpu():
    images = torch.randint(256, (2, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for make in (square_inputs, squeezed_inputs):
        here = make(images, 24, IMAGENET_MEAN, IMAGENET_STD, torch.device("cpu"))

        def same(make=make, here=here):
            there = make(images, 24, IMAGENET_MEAN, IMAGENET_STD, torch.device(THERE))
            assert there.device.type == NAME
            torch.testing.assert_close(there.cpu(), here)

        assert passes_elsewhere(same)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda x: x.double(), "no torch.float64"),
        (lambda x: x + torch.zeros(8, 8), "on two devices"),
        (lambda x: x.index_add(0, torch.tensor([0]), torch.zeros(1, 8)), "on two devices"),
        (lambda x: F.interpolate(x[None, None], size=3, mode="area"), "sizes that divide each other"),
        (lambda x: F.interpolate(x[None, None], size=3, mode="bicubic", antialias=True), "in PyTorch 2.6"),
        (torch.linalg.eigvals, "MPS has no"),
        (lambda x: x.numpy(), "brought to the CPU first"),
    ],
)
def test_the_emulated_device_refuses_what_mps_refuses(wrong, said):
    def refused():
        x = torch.zeros(8, 8, device=THERE)
        assert x[torch.tensor([1])].tolist() == [[0.0] * 8]  # indices may lie on the CPU
        with pytest.raises(AssertionError, match=said):
            wrong(x)

    assert passes_elsewhere(refused)


def test_kernels_are_looked_up_by_their_names():
    assert has_kernel("add.Tensor") and has_kernel("linear") and not has_kernel("_linalg_svd")
