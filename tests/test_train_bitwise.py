"""Training of bitwise tokens: both stages run to a pipeline; self-correction is keyed and reaches training only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_toys import curve, in_child

from sample.load import load_pipeline
from tokenizer.aspects import aspect_schedule, schedule_of
from tokenizer.model import MultiScaleVQ
from tokenizer.schedule import ScaleSchedule
from train import cache_text, cache_tokens, train_tokenizer, train_var
from train.buckets import AspectConfig, AspectImages
from train.prepare import draw_flips, preparer
from train.text_cache import TextCache
from train.token_cache import TokenCache
from train.var_objective import token_weights
from var.transformer import NextScaleTransformer

RUN = ["--run.total_images=24", "--run.batch_size=8", "--run.workers=0", "--run.cpu=true", "--run.precision=no"]
RUN += ["--run.validation_images=8", "--run.previews=2", "--run.validate_every=2", "--run.checkpoint_every=2"]
RUN += ["--run.log_every=1", "--data.source=scenes", "--data.size=32", "--data.num_scenes=64"]
TOKENIZER = ["--tokenizer.channels=[8,8,8]", "--tokenizer.layers_per_block=1", "--tokenizer.attention=false"]
TOKENIZER += ["--tokenizer.norm_groups=4", "--tokenizer.latent_channels=6", "--tokenizer.schedule=1,2,4"]
TOKENIZER += ["--tokenizer.bitwise=true", "--tokenizer.token_patch=2", "--tokenizer.entropy=0.1", "--loss.early=0.5"]
TRANSFORMER = ["--transformer.depth=2", "--transformer.width=32", "--transformer.heads=2"]
TRANSFORMER += ["--transformer.positions=rope"]
TRANSFORMER += ["--transformer.conditioning=text", "--transformer.text_length=64", "--transformer.pool_heads=4"]
TRANSFORMER += ["--text.d_model=16", "--text.layers=1", "--text.heads=2", "--text.d_ff=32", "--loss.weights=side"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bitwise")
    assert in_child(train_tokenizer.main, [f"--run.run_dir={folder}/tokenizer", *RUN, *TOKENIZER]) == 0
    return folder


def test_from_pixels_to_a_pipeline(trained: Path) -> None:
    vqvae = MultiScaleVQ.from_pretrained(trained / "tokenizer/latest/vqvae")
    assert vqvae.config.bitwise and vqvae.image_hw == (32, 32)
    assert "early" in curve(trained / "tokenizer", "train")[-1]
    tokens = [f"--tokens.tokenizer={trained}/tokenizer/latest/vqvae", "--tokens.flips=0.3"]
    assert in_child(train_var.main, [f"--run.run_dir={trained}/var", *RUN, *tokens, *TRANSFORMER]) == 0
    last = curve(trained / "var", "validation")[-1]
    assert 0.3 < last["accuracy"] < 0.8  # of bits
    pipeline = load_pipeline(trained / "var", device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline("a red star", seed=0, output_type="np")
    assert output.images.shape == (1, 32, 32, 3) and output.tokens[1].shape == (1, 4, 24)


def test_bits_are_cached_as_bytes(trained: Path, tmp_path: Path) -> None:
    tokenizer, cache = f"{trained}/tokenizer/latest/vqvae", tmp_path / "cache"
    options = [f"--cache.tokenizer={tokenizer}", f"--cache.folder={cache}", "--cache.latents=true", *RUN[-3:]]
    assert in_child(cache_tokens.main, options) == 0
    assert np.load(cache / "train/00000.npy").dtype == np.uint8
    vqvae = MultiScaleVQ.from_pretrained(tokenizer)
    item = TokenCache(cache, "train", vqvae, latents=True)[5]
    again = torch.cat(vqvae.quantizer.encode(item["latents"][None], vqvae.schedule), dim=1)[0]
    assert (again == item["ids"]).float().mean() > 0.97  # but for what float16 rounds over zero
    tokens = [f"--tokens.tokenizer={tokenizer}", f"--tokens.cache={cache}", "--tokens.flips=0.3"]
    assert in_child(train_var.main, [f"--run.run_dir={tmp_path}/var", *RUN, *tokens, *TRANSFORMER]) == 0


def test_flips_are_keyed_by_image(trained: Path) -> None:
    schedule = ScaleSchedule.of("1,2,4")
    both = draw_flips([3, 7], 24, schedule, largest=0.3, seed=1)
    alone = draw_flips([7], 24, schedule, largest=0.3, seed=1)
    assert all(torch.equal(a[0], b[1]) for a, b in zip(alone, both))
    many = draw_flips(range(200), 24, schedule, largest=0.3, seed=1)
    shares = many[2].float().mean(dim=(1, 2))
    assert shares.mean() == pytest.approx(0.15, abs=0.02) and shares.max() < 0.37 and shares.min() < 0.03
    assert not any(flips.any() for flips in draw_flips(range(9), 24, schedule, largest=0.0, seed=1))


def test_self_correction_is_for_training(trained: Path) -> None:
    vqvae = MultiScaleVQ.from_pretrained(trained / "tokenizer/latest/vqvae").eval()
    image = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = {"image": image, "label": torch.zeros(2, dtype=torch.int64), "counter": range(2)}
    with torch.no_grad():
        prepare, plain = preparer(vqvae, None, flips=0.3, seed=0), preparer(vqvae, None)(batch)
        validation, made = prepare(batch), prepare({**batch, "training": True})
    assert torch.equal(validation["ids"], plain["ids"]) and torch.equal(validation["inputs"], plain["inputs"])
    assert made["ids"].shape == (2, 21, 24) and torch.equal(made["ids"][:, 0], plain["ids"][:, 0])
    assert not torch.equal(made["ids"], plain["ids"]) and not torch.equal(made["inputs"], plain["inputs"])


def test_images_become_the_tokens_of_the_float32_tokenizer_under_autocast(trained: Path) -> None:
    vqvae = MultiScaleVQ.from_pretrained(trained / "tokenizer/latest/vqvae").eval()
    image = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = {"image": image, "label": torch.zeros(8, dtype=torch.int64), "counter": range(8)}
    prepare = preparer(vqvae, None)
    with torch.no_grad():
        expected = prepare(batch)["ids"]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(prepare(batch)["ids"], expected)


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> Path:
    """13 squares and 9 landscapes of 3:2 in Infinity's lists, one of them broken."""
    folder = tmp_path_factory.mktemp("lists")
    rng = np.random.default_rng(0)
    for name, (h, w), count in (("1.000_000000013", (300, 300), 13), ("0.666_000000009", (200, 310), 9)):
        rows = []
        for i in range(count):
            path = f"{name}-{i}.png"
            Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(folder / path)
            rows.append({"image_path": path, "h_div_w": h / w, "text": f"short {i}", "long_caption": f"long {i}"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "1.000_000000013-3.png").write_bytes(b"broken")
    return folder


def test_batches_have_one_shape_and_epochs_cover_it(lists: Path) -> None:
    data = AspectImages(AspectConfig(folder=str(lists), size="0.06M", val_fraction=0.1), "train", batch_size=4)
    assert len(data) == 20  # 12 of 12 squares (one is held out) and 8 of 9 landscapes
    for epoch in range(2):
        places = [data.place(position, seed=5, epoch=epoch) for position in range(len(data))]
        assert len(set(places)) == 20
        items = [data.at(place, epoch) for place in places]
        shapes = [tuple(item["image"].shape) for item in items]
        assert all(len(set(shapes[i : i + 4])) == 1 for i in range(0, 20, 4))
        assert set(shapes) == {(3, 256, 256), (3, 14 * 16, 21 * 16)}
    assert data.corrupt.count == 1 and {item["caption"].split()[0] for item in items} == {"short", "long"}
    held = AspectImages(data.config, "val", batch_size=4)
    assert len(held) == 1 and held[0]["image"].shape == (3, 256, 256)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_captions_is_short(lists: Path, share: float) -> None:
    config = AspectConfig(folder=str(lists), size="0.06M", short_captions=share, val_fraction=0.0)
    data = AspectImages(config, "train", batch_size=1)
    row = {"text": "short", "long_caption": "long"}
    drawn = [data._caption(row, epoch, image) == "short" for epoch in range(20) for image in range(20)]
    assert sum(drawn) / 400 == pytest.approx(share, abs=0.06) and (share % 1 or len(set(drawn)) == 1)
    assert data._caption({"text": "short"}, 0, 0) == "short" and data._caption({"long_caption": "long"}, 0, 0) == "long"
    with pytest.raises(ValueError, match=r"aspects\.short_captions must be in \[0, 1\], got 1\.1"):
        AspectConfig(short_captions=1.1)


def test_lists_of_one_shape_are_read_one_after_the_other(lists: Path, tmp_path: Path) -> None:
    (square,) = lists.glob("1.000*.jsonl")
    rows = square.read_text().splitlines(keepends=True)
    for name, part in (("1.000_a", rows[:5]), ("1.000_b", []), ("1.002_c", rows[5:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part).replace('"1.000', f'"{lists}/1.000'))
    data = AspectImages(AspectConfig(folder=str(tmp_path), size="0.06M", val_fraction=0.0), "train", batch_size=1)
    assert len(data) == 13
    assert [data.captions(i) for i in (0, 4, 5, 12)] == [(f"short {i}", f"long {i}") for i in (0, 4, 5, 12)]


def test_the_first_line_may_be_one_that_cannot_be_read(lists: Path, tmp_path: Path) -> None:
    (square,) = lists.glob("1.000*.jsonl")
    rows = square.read_text().replace('"1.000', f'"{lists}/1.000').splitlines(keepends=True)
    path = tmp_path / "1.000_a.jsonl"
    path.write_text("".join(['{"text": "no image"}\n', "[1]\n", *rows[:2]]))
    config = AspectConfig(folder=str(tmp_path), size="0.06M", val_fraction=0.0)
    assert len(AspectImages(config, "train", batch_size=1)) == 4
    path.write_text('{"text": "no image"}\n')
    with pytest.raises(ValueError, match="no line of its lists is a JSON object with an image_path"):
        AspectImages(config, "train", batch_size=1)


def test_lines_that_cannot_be_read_are_left_out_like_images(lists: Path, tmp_path: Path) -> None:
    (square,) = lists.glob("1.000*.jsonl")
    rows = square.read_text().replace('"1.000', f'"{lists}/1.000').splitlines(keepends=True)
    wrong = ["{cut\n", "\n", '{"image_path": null}\n', "[1]\n"]
    (tmp_path / "1.000_a.jsonl").write_text("".join([*rows[:2], *wrong, *rows[4:6], "\n", " \n"]))
    data = AspectImages(AspectConfig(folder=str(tmp_path), size="0.06M", val_fraction=0.0), "train", batch_size=1)
    assert len(data) == 7  # blank lines are none
    assert {data.at(i, 0)["caption"].split()[1] for i in range(7)} == {"0", "1", "4", "5"}
    assert data.corrupt.count == 3 and data.corrupt.names[0] == "image 2 of the lists of shape 1"
    with pytest.raises(ValueError, match=r"a line is no JSON \(.*\): \{cut"):
        data.captions(2)


def test_training_on_several_aspects(lists: Path, tmp_path: Path) -> None:
    sizes = {"layers_per_block": 1, "attention": False, "norm_groups": 4, "latent_channels": 6}
    vqvae = MultiScaleVQ(channels=[4, 4, 4, 4, 8], **sizes, schedule=aspect_schedule("1:1", "0.06M"), bitwise=True)
    vqvae.save_pretrained(tmp_path / "vqvae")
    options = [f"--tokens.tokenizer={tmp_path}/vqvae", "--tokens.flips=0.3", f"--aspects.folder={lists}"]
    options += ["--aspects.size=0.06M", "--transformer.level_table=15", *RUN[:5], "--run.batch_size=4"]
    assert in_child(train_var.main, [f"--run.run_dir={tmp_path}/var", *options, *TRANSFORMER]) == 0
    row = curve(tmp_path / "var", "train")[-1]
    assert row["step"] == 6 and np.isfinite(row["loss"])
    texts = [f"--text.pretrained={tmp_path}/var/latest", "--text.train=false", f"--text.cache={tmp_path}/states"]
    assert in_child(cache_text.main, [f"--run.run_dir={tmp_path}/var", *options, *TRANSFORMER, *texts]) == 0
    assert TextCache(tmp_path / "states").has(["short 0", "long 12"]).all()
    trained = NextScaleTransformer.from_pretrained(tmp_path / "var/latest/transformer")
    assert trained.schedule == aspect_schedule("1:1", "0.06M")
    with pytest.raises(ValueError, match="no template ends with 5x5"):
        schedule_of(5, 5)
    one_shape = ["--progressive.coarse=2", f"--run.run_dir={tmp_path}/no", *options, *TRANSFORMER]
    with pytest.raises(ValueError, match="progressive trains the scales of one shape"):
        train_var.main(one_shape)


def test_weights_by_side() -> None:
    weights = token_weights(ScaleSchedule.of("1,2,4x2"), "side")
    assert weights.sum() == pytest.approx(1)
    torch.testing.assert_close(weights / weights[0], torch.tensor([1.0] + [0.5] * 4 + [8**-0.5] * 8))
