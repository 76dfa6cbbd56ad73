"""DINOv2 and CLIP as extractors, on tiny random models, and `nextscale evaluate` with them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import nextscale
from evaluation.extractors import ClipFeatures, DinoFeatures, clip_scores, cmmd, square_inputs, squeezed_inputs
from evaluation.features import describe_all


def pictures(n: int, h: int = 20, w: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), np.uint8)


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    from transformers import ByT5Tokenizer, CLIPConfig, CLIPModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**part, "vocab_size": 384, "max_position_embeddings": 40, "eos_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config={**part, "image_size": 16, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


def test_images_are_squared_by_their_middle():
    x = torch.zeros(1, 3, 10, 30, dtype=torch.uint8)
    x[..., 10:20] = 255
    assert torch.allclose(square_inputs(x, 10, (0, 0, 0), (1, 1, 1), torch.device("cpu")), torch.ones(1, 3, 10, 10))
    shrunk = square_inputs(x, 5, (0.5,) * 3, (0.5,) * 3, torch.device("cpu"))
    assert shrunk.shape == (1, 3, 5, 5) and float(shrunk.mean()) > 0.8


def test_dino_sees_the_whole_picture_squeezed():
    """As EDM2's: of other shapes too, and beyond black and white where bicubic weights overshoot."""
    x = torch.randint(2, (2, 3, 20, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)) * 255
    seen = squeezed_inputs(x, 14, (0, 0, 0), (1, 1, 1), torch.device("cpu"))
    wanted = torch.nn.functional.interpolate(x.float(), (14, 14), mode="bicubic", antialias=True) / 255
    assert torch.equal(seen, wanted)
    bright = squeezed_inputs(x, 60, (0.5,) * 3, (0.5,) * 3, torch.device("cpu"))
    assert float(bright.min()) < -1 and float(bright.max()) > 1


def test_features_do_not_depend_on_batches(dino, clip):
    for extractor in (DinoFeatures(dino, side=28), ClipFeatures(clip)):
        images = pictures(5)
        whole = describe_all(extractor, images)
        assert torch.allclose(describe_all(extractor, images, batch_size=2).features, whole.features, atol=1e-5)
        assert len(extractor.digest) == 12 and len(whole) == 5


def test_cmmd_is_the_published_formula():
    a, b = (torch.nn.functional.normalize(torch.randn(n, 4).double(), dim=1) for n in (9, 7))

    def kernel(x, y):
        return np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / 200).mean()

    x, y = a.numpy(), b.numpy()
    assert cmmd(a, b) == pytest.approx(1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)), rel=1e-9)
    assert cmmd(a, a.flip(0)) == pytest.approx(0, abs=1e-9)


def test_clip_scores_pair_images_with_their_texts(clip):
    extractor = ClipFeatures(clip)
    images = describe_all(extractor, pictures(2)).features
    texts = extractor.texts(["a star", "two rings and a very long caption that must be cut somewhere"], batch_size=1)
    assert torch.allclose(texts.norm(dim=1), torch.ones(2).double())
    assert clip_scores(texts, texts).tolist() == pytest.approx([100, 100])
    assert clip_scores(images, texts).shape == (2,) and clip_scores(texts, -texts).tolist() == [0, 0]
    with pytest.raises(ValueError, match="got 1 for 2 images"):
        clip_scores(images, texts[:1])


def test_models_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="nothing cannot be had as Dinov2Model"):
        DinoFeatures(tmp_path / "nothing")


def test_evaluate_takes_them_and_says_what_it_used(dino, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", arr_0=pictures(12), arr_1=np.arange(12) // 6)
    np.savez("b.npz", arr_0=pictures(12, 30, 30, seed=1))
    words = ["evaluate", "--images", "a.npz", "--reference", "b.npz", "--metrics", "fd-dinov2,cmmd", "--out", "r.json"]
    assert nextscale.main([*words, "--dino", str(dino), "--clip", str(clip), "--bootstrap", "2"]) == 0
    content = json.loads(Path("r.json").read_text())
    assert content["rows"][0]["fd_dinov2"] > 0 and content["rows"][0]["cmmd"] > 0
    assert {len(digest) for digest in content["settings"]["extractors"].values()} == {12}
    said = " ".join(content["settings"]["cautions"])
    for word in ("samples are 20x20 and the reference 30x30", "sorted by class", "biased upwards"):
        assert word in said
    assert nextscale.main([*words[:3], "--metrics", "clip-score", "--clip", str(clip)]) == 2
    assert "prompts of the images are needed" in capsys.readouterr().err
