"""Measurements are right: known answers, invariances, the shipped feature network, and `nextscale evaluate`."""

import argparse
import io
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

import nextscale
from evaluation import binding, calibration, judge, run, search_benchmark, tokenizer_quality
from evaluation import evaluate_options as options
from evaluation.distributions import Measure, check_statistics, image_cautions
from evaluation.evaluate import make_images
from evaluation.features import describe_all
from evaluation.frechet import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
)
from evaluation.geneval import metadata_of
from evaluation.intervals import bootstrap_interval
from evaluation.report import WIDE, command_line, markdown, result, table, write_result
from evaluation.scene_features import SHIPPED, SceneFeatures, load_scene_features, scene_reference
from evaluation.scenes import COLOURS, SHAPES, TAGS, fresh_scenes, render, sample_scene
from evaluation.sources import geneval_tree, open_images, stored_moments
from evaluation.tokenizer_quality import bit_usage, comparison, measure, usage
from evaluation.verdicts import Judged, prompt_intervals
from train.train_features import IGNORED, loss_of, save, targets, train


@pytest.fixture(scope="module")
def network() -> SceneFeatures:
    return load_scene_features()


@pytest.fixture(scope="module")
def scenes():
    return fresh_scenes(96, seed=3)


@pytest.fixture(scope="module")
def renders(scenes) -> np.ndarray:
    return np.stack([render(scene) for scene in scenes])


def write_tree(folder: Path, per_tag: int, copies: int = 1) -> Path:
    """A GenEval tree whose images are true renders of their captions."""
    rng = np.random.default_rng(4)
    for number in range(per_tag * len(TAGS)):
        scene = sample_scene(rng, tag=TAGS[number % len(TAGS)], split="all")
        samples = folder / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(scene.metadata))
        for copy in range(copies):
            Image.fromarray(render(scene)).save(samples / f"{copy:04d}.png")
    return folder


# ------------------------------------------------------------------------------------------------------------- Frechet


def gaussian(mean: list[float], deviations: list[float], turn: torch.Tensor | None = None) -> Moments:
    covariance = torch.diag(torch.tensor(deviations, dtype=torch.float64) ** 2)
    if turn is not None:
        covariance = turn @ covariance @ turn.T
    return Moments(torch.tensor(mean, dtype=torch.float64), covariance)


@settings(max_examples=40)
@given(st.lists(st.tuples(*[st.floats(-5, 5)] * 2, *[st.floats(0, 4)] * 2), min_size=1, max_size=6), st.integers(0, 99))
def test_the_distance_of_gaussians_with_common_axes_is_known(axes, seed):
    mean_a, mean_b, a, b = map(list, zip(*axes))
    noise = torch.randn(len(a), len(a), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    turn = torch.linalg.qr(noise).Q
    expected = sum((x - y) ** 2 for x, y in zip(mean_a, mean_b)) + sum((x - y) ** 2 for x, y in zip(a, b))
    first, second = gaussian(mean_a, a, turn), gaussian(mean_b, b, turn)
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-5)
    assert frechet_distance(second, first) == pytest.approx(expected, abs=1e-5)


def test_the_distance_is_that_of_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(torch.nn.Identity):
        num_features = 12

    torch.manual_seed(0)
    a, b = torch.randn(50, 12).double() @ torch.randn(12, 12).double(), torch.randn(40, 12).double() + 1
    metric = FrechetInceptionDistance(feature=Given())
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet_distance(moments(b), moments(a)) == pytest.approx(float(metric.compute()), rel=1e-9)


def test_identical_sets_have_no_distance_even_with_fewer_images_than_features():
    features = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    shuffled = features[torch.randperm(10)]
    assert frechet_distance(moments(features), moments(shuffled)) == pytest.approx(0, abs=1e-4)


def test_mistakes_in_distances_are_named():
    with pytest.raises(ValueError, match="at least 2 images"):
        moments(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="one network, got 1 and 2"):
        frechet_distance(gaussian([0.0], [1.0]), gaussian([0.0, 0.0], [1.0, 1.0]))
    with pytest.raises(ValueError, match="at least 4 images"):
        kernel_distance(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match="splits must be 1 to 3"):
        inception_score(torch.zeros(3, 2), splits=4)


def test_the_inception_score_counts_sure_and_even_classes():
    sure = torch.full((40, 8), -60.0).scatter(1, torch.arange(40)[:, None] % 8, 0.0).log_softmax(1)
    assert inception_score(sure)[0] == pytest.approx(8, rel=1e-5)
    assert inception_score(torch.zeros(40, 8).log_softmax(1), splits=4) == (
        pytest.approx(1),
        pytest.approx(0, abs=1e-6),
    )
    state = torch.random.get_rng_state()
    assert inception_score(sure, splits=5, seed=1) == inception_score(sure, splits=5, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_kernel_distance_tells_equal_distributions_from_different_ones():
    features = torch.randn(300, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same, interval, size = kernel_distance(features[:150], features[150:], subsets=30)
    assert size == 75 and interval[0] < 0 < interval[1]
    far, (low, _), _ = kernel_distance(features[:150] + 1, features[150:], subsets=30)
    assert low > abs(same) and far > low


def test_a_bootstrap_interval_is_as_wide_as_theory_says():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)) + 5
    low, high = bootstrap_interval(lambda rows: float(values[rows].mean()), 5.0, 400, resamples=400)
    assert (low + high) / 2 == pytest.approx(5)
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)


# ------------------------------------------------------------------------------------------------------ feature network


def test_the_shipped_network_names_the_objects_of_fresh_scenes(network, scenes, renders):
    assert SHIPPED.stat().st_size <= 1.5e6
    names = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    described = describe_all(network, renders)
    assert torch.allclose(described.log_posterior.exp().sum(1), torch.ones(len(renders)).double())
    right = [
        names[i] in {(item.shape, item.colour) for item in scene.objects}
        for i, scene in zip(described.log_posterior.argmax(1).tolist(), scenes)
    ]
    assert np.mean(right) >= 0.98


def test_features_do_not_depend_on_batches_or_order(network, renders):
    whole = describe_all(network, renders, batch_size=96).features
    assert torch.allclose(describe_all(network, renders, batch_size=7).features, whole, atol=1e-4)
    assert torch.allclose(describe_all(network, renders[::-1], batch_size=32).features.flip(0), whole, atol=1e-4)


def test_images_of_several_sizes_can_follow_each_other(network, scenes):
    mixed = [render(scenes[0]), render(scenes[0], 128), render(scenes[1])]
    features = describe_all(network, mixed).features
    assert (features[0] - features[1]).norm() < 0.2 * (features[0] - features[2]).norm()
    with pytest.raises(ValueError, match="uint8"):
        network.describe(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="empty"):
        describe_all(network, [])


def test_fd_scenes_grows_with_what_is_wrong(network, renders):
    def distance(images: np.ndarray) -> float:
        return frechet_distance(moments(describe_all(network, images).features), scene_reference())

    soft = ndimage.gaussian_filter(renders.astype(float), (0, 2.5, 2.5, 0)).round().astype(np.uint8)
    assert distance(renders) < distance(soft) < distance(np.repeat(renders[:1], 96, axis=0))


def test_feature_maps_serve_a_perceptual_loss(network):
    from tokenizer.losses import PerceptualLoss

    x = torch.zeros(2, 3, 64, 64, requires_grad=True)
    maps = network.maps(x)
    assert [tuple(m.shape) for m in maps] == [(2, c, s, s) for c, s in ((16, 64), (32, 32), (64, 16), (128, 8))]
    PerceptualLoss(network.maps)(x, torch.rand(2, 3, 64, 64)).backward()
    assert x.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in network.parameters())


def test_training_targets_stand_where_objects_are(scenes, network, renders):
    shape, colour = targets(scenes)
    assert ((shape != IGNORED).sum((1, 2)) == torch.tensor([len(scene.objects) for scene in scenes])).all()
    x = torch.from_numpy(renders).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    assert loss_of(network, x, shape, colour) < loss_of(network, x, shape.flip(-1), colour.flip(-1))


def test_a_trained_network_is_saved_rounded_and_loads(tmp_path):
    trained = train(steps=2, pool=8, batch_size=8)
    save(trained, tmp_path / "n.safetensors", {}, {})
    loaded = load_scene_features(tmp_path / "n.safetensors")
    assert all(torch.equal(a.half().float(), b.float()) for a, b in zip(trained.parameters(), loaded.parameters()))
    with pytest.raises(FileNotFoundError, match="train_features"):
        load_scene_features(tmp_path / "none.safetensors")


# ------------------------------------------------------------------------------------------------------------- sources


def test_a_folder_is_read_without_what_sampling_put_beside_its_images(tmp_path):
    for name in ("b.png", "a/c.png", "all_grid.png", "all_scales.png", "scales/b.png", ".tmp/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), "red").save(tmp_path / name)
    assert len(open_images(tmp_path)) == 5  # a user's own images may be called so
    (tmp_path / "settings.json").write_text("{}")
    images = open_images(tmp_path)
    assert [path.name for path in images.paths] == ["c.png", "b.png"]
    assert next(iter(images)).shape == (4, 4, 3)


def test_images_of_sixteen_bits_are_scaled(tmp_path):
    Image.fromarray(np.full((2, 2), 257 * 50, np.uint16)).save(tmp_path / "x.png")
    assert (next(iter(open_images(tmp_path))) == 50).all()


def test_transparent_images_are_read_on_white(tmp_path):
    Image.new("RGBA", (2, 2), (9, 9, 9, 0)).save(tmp_path / "x.png")
    assert (next(iter(open_images(tmp_path))) == 255).all()


def test_npz_files_hold_images_or_statistics(tmp_path):
    images = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images)
    np.savez(tmp_path / "stats.npz", mu=np.arange(5.0), sigma=np.eye(5))
    assert np.array_equal(np.stack(list(open_images(tmp_path / "images.npz"))), images)
    assert stored_moments(tmp_path / "images.npz") is None
    assert stored_moments(tmp_path / "stats.npz").mean.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="must hold arr_0"):
        open_images(tmp_path / "stats.npz")
    (tmp_path / "broken.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        open_images(tmp_path / "broken.npz")
    (tmp_path / "bad.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"bad\.png"):
        list(open_images(tmp_path))


def test_an_unfinished_or_foreign_tree_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no GenEval tree"):
        geneval_tree(tmp_path)
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "metadata.jsonl").write_text('{"prompt": "a star"}')
    with pytest.raises(ValueError, match="tag, include and prompt"):
        geneval_tree(tmp_path)
    (tmp_path / "00000" / "metadata.jsonl").write_text('{"tag": "colors", "include": [], "prompt": ""}')
    with pytest.raises(ValueError, match=r"00000/metadata.jsonl: include must be a list"):
        geneval_tree(tmp_path)
    include = '[{"class": "star", "count": 1}]'
    (tmp_path / "00000" / "metadata.jsonl").write_text(f'{{"tag": "colors", "include": {include}, "prompt": ""}}')
    with pytest.raises(FileNotFoundError, match="not finished"):
        geneval_tree(tmp_path)
    (tmp_path / "00000/samples").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "00000/samples/0007.png")
    with pytest.raises(ValueError, match=r"0007.png: image must be a square"):
        Judged.of(tmp_path)


def test_labels_of_an_npz_may_be_ids(tmp_path):
    """Not as many classes as the largest of them says; some may have none."""
    images = np.zeros((6, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "ids.npz", images, np.array([10**9, 7, 10**9, 7, 7, -1]))
    lines = image_cautions(open_images(tmp_path / "ids.npz"))
    assert lines[0] == "1 of 6 labels (arr_1) are below 0: none"
    assert lines[1] == "1 of 2 classes do not have 2 images (class 0 has 3): FID compares the mix too"
    np.savez(tmp_path / "none.npz", images, np.full(6, -1))
    assert image_cautions(open_images(tmp_path / "none.npz")) == []  # then there are no classes


@pytest.mark.parametrize("pool, spatial, wrong", [(2048, 2023, None), (2047, 2023, 2047), (2048, 2024, 2024)])
def test_statistics_are_of_inceptions_features(tmp_path, pool, spatial, wrong):
    arrays = {"mu": np.zeros(pool), "sigma": np.eye(pool), "mu_s": np.zeros(spatial), "sigma_s": np.eye(spatial)}
    np.savez(tmp_path / "reference.npz", **arrays)
    if wrong is None:
        check_statistics(tmp_path / "reference.npz")
    else:
        with pytest.raises(ValueError, match=f"holds statistics of {wrong} features, and Inception's are"):
            check_statistics(tmp_path / "reference.npz")


def test_a_mix_of_tags_is_told_where_the_reference_has_another():
    measure = Measure(("fd-scenes",), {}, None, None, resamples=0, seed=0, batch_size=8)
    even = list(TAGS) * 400
    assert measure.cautions(len(even), even) == []
    assert measure.cautions(len(even), even[1:]) == [
        "fd-scenes compares with all six tags alike, and these images are not spread like that"
    ]


def test_parquet_files_that_differ_are_named(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "PNG")
    cell = {"bytes": content.getvalue(), "path": None}
    pq.write_table(pa.table({"image": [cell, None]}), tmp_path / "0.parquet")
    images = open_images(tmp_path)
    assert next(iter(images)).shape == (4, 4, 3)
    with pytest.raises(ValueError, match=r"0.parquet row 1 holds no image in its column 'image'"):
        list(images)
    pq.write_table(pa.table({"img": [cell]}), tmp_path / "1.parquet")
    with pytest.raises(ValueError, match=r"1.parquet has no column 'image', as 0.parquet has"):
        open_images(tmp_path)


# ------------------------------------------------------------------------------------------------------------ judging


def test_intervals_widen_when_images_of_a_prompt_agree():
    metadatas = [{"tag": "colors", "unseen": False}] * 200
    correct = [i // 10 % 2 == 0 for i in range(200)]
    alone = prompt_intervals(correct, metadatas, [Path(str(i)) for i in range(200)])["colors_ci95"]
    together = prompt_intervals(correct, metadatas, [Path(str(i // 10)) for i in range(200)])["colors_ci95"]
    assert together[1] - together[0] > 2.5 * (alone[1] - alone[0])


def test_seen_and_unseen_pairs_have_intervals_of_their_own():
    metadatas = [{"tag": "colors", "unseen": i % 4 == 0} for i in range(80)] + [{"tag": "counting"}] * 8
    correct = [not metadata.get("unseen") for metadata in metadatas]
    found = prompt_intervals(correct, metadatas, [Path(str(i)) for i in range(88)])
    assert found["seen_ci95"] == [1, 1] and found["unseen_ci95"] == [0, 0]
    assert found["counting_ci95"] == [1, 1] and 0.5 < found["colors_ci95"][0] < 0.75 < found["colors_ci95"][1] < 0.95
    assert "seen_ci95" not in prompt_intervals([True] * 8, metadatas[80:], [Path(str(i)) for i in range(8)])


def test_a_tree_of_true_renders_is_judged_right(tmp_path):
    write_tree(tmp_path, per_tag=4, copies=2)
    (tmp_path / "00000" / "samples" / ".tmp-7-0002.png").write_bytes(b"half")  # of a killed process
    judged = Judged.of(tmp_path)
    scores = judged.scores()
    assert scores["n"] == 48
    assert all(scores[tag] >= 0.75 for tag in TAGS) and scores["overall"] >= 0.95
    assert scores["overall_ci95"][0] < scores["overall"] <= scores["overall_ci95"][1]
    line = json.loads(next(judged.lines()))
    assert line["file"] == "00000/samples/0000.png" and line["tag"] == TAGS[0]


# ------------------------------------------------------------------------------------------------------------ tokenizer


def test_codebook_use_follows_the_threshold():
    hits = torch.tensor([[10, 10, 0, 0], [997, 1, 1, 1]])
    shares = usage(hits, ["1x1", "2x2"])
    assert shares["usage_1x1"] == 0.5 and shares["used_once_1x1"] == 0.5
    assert shares["usage_2x2"] == 0.25 and shares["used_once_2x2"] == 1.0
    assert shares["usage_any_scale"] == 0.5 and shares["used_once_any_scale"] == 1.0


def test_bits_in_use():
    ones = torch.tensor([[0.5, 0.5, 0.03, 0.97], [0.5, 0.25, 0.0, 0.5]], dtype=torch.float64)
    shares = bit_usage(ones, ["1x1", "2x2"])
    assert shares["usage_1x1"] == 0.5 and shares["usage_2x2"] == 0.75
    assert shares["bit_entropy_2x2"] == pytest.approx((1 + 0.8113 + 0 + 1) / 4, abs=1e-4)


def test_a_tokenizer_is_measured():
    from tokenizer.model import MultiScaleVQ

    torch.manual_seed(0)
    shape = {"channels": [8, 8], "layers_per_block": 1, "attention": False, "norm_groups": 4}
    model = MultiScaleVQ(**shape, latent_channels=4, vocab_size=16, schedule="1,2,12").eval()
    measured = measure(model, n=6, usage_n=8, pairs=4)
    assert measured.pairs.shape == (4, 2, 24, 24, 3)
    assert measured.row["n"] == 6 and measured.row["usage_n"] == 8
    assert 0 < measured.row["psnr_db"] < 40 and measured.row["accepted_overall"] == 0
    assert comparison(measured.pairs).size == (4 * 56 - 8, 2 * 56 - 8)
    with pytest.raises(ValueError, match="at least 6"):
        measure(model, n=5, usage_n=8)


def test_a_tokenizer_is_measured_on_images(tiny_vqvae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_vqvae.save_pretrained("vqvae")
    images = np.random.default_rng(0).integers(0, 256, (7, 20, 33, 3), np.uint8)
    np.savez("photos.npz", images)
    words = ["evaluate", "--tokenizer", "vqvae", "--reference", "photos.npz", "--metrics", "fd-scenes", "--n", "6"]
    assert nextscale.main([*words, "--batch-size", "4", "--out", "r/x.json"]) == 0
    content = json.loads(Path("r/x.json").read_text())
    row = content["rows"][0]
    assert (
        row["n"] == 6 and row["rfd_scenes"] > 0 and -1 <= row["ssim"] <= 1 and row["psnr_db_ci95"][0] < row["psnr_db"]
    )
    assert "biased upwards" in content["settings"]["cautions"][0] and Path("r/x.png").is_file()
    assert nextscale.main([*words[:5], "--metrics", "clip-score"]) == 2


def test_photographs_are_cropped_as_adm_does():
    from evaluation.reconstruction import centre_crop

    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 40:60] = 200
    assert np.array_equal(centre_crop(image, (40, 100)), image)
    small = centre_crop(image, (8, 8))
    assert small.shape == (8, 8, 3) and small[4, 4, 0] >= 195 and small[4, 0, 0] <= 5


# ------------------------------------------------------------------------------------------------------------- reports


def test_results_say_how_they_were_made_and_not_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"model": str(tmp_path / "runs/a"), "out": Path("/somewhere/else/x.json"), "n": 3, "top_k": None}
    by_scale = command_line("x", {"top_k": [900, 600], "guidance_blocks": [-5, -1]}, {})
    assert by_scale == "x --top-k 900,600 --guidance-blocks=-5,-1"
    command = command_line("nextscale evaluate", given, {"n": 1, "top_k": None})
    assert command == "nextscale evaluate --model runs/a --out else/x.json --n 3"
    row = {"score": 0.5, "score_ci95": [0.4, 0.6], "name": "a"}
    content = result([row], command=command, n=7, seeds=0)
    write_result(tmp_path / "x.json", content)
    stored = json.loads((tmp_path / "x.json").read_text())
    assert stored == content
    assert {"command", "commit", "hardware", "date", "versions", "seeds", "n", "settings", "rows"} == stored.keys()
    assert str(tmp_path) not in (tmp_path / "x.json").read_text()
    assert "| score | 0.5 [0.4, 0.6] |" in markdown([row])
    many = [{"row": i, **({"score": 0.25} if i else {})} for i in range(WIDE + 1)]
    assert markdown(many).splitlines()[:4] == ["| row | score |", "|---|---|", "| 0 |  |", "| 1 | 0.25 |"]
    assert table(many, ["row", "score", "none"]).splitlines()[1:3] == ["0    -    ", "1    0.25 "]


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "give one of --model, --images, --geneval-results, --dpg-results and --tokenizer, got none"),
        ("--model scenes --images x", "got --model and --images"),
        ("--model scenes", "--model needs --suite"),
        ("--images x", "--images needs --suite scenes"),
        ("--images . --metrics fd", "--metrics must be of fid"),
        ("--images . --metrics fid", "fid needs --reference"),
        ("--images nowhere --metrics is-scenes", "nowhere does not exist"),
        ("--images nowhere --metrics is", "--images nowhere does not exist"),
        ("--images . --metrics is --inception-weights nowhere.pth", "nowhere.pth does not exist"),
        ("--model nowhere --suite scenes", "nowhere"),
        ("--tokenizer nowhere", "nowhere has no config.json"),
        ("--tokenizer x --suite scenes", "--tokenizer takes no --suite"),
        ("--tokenizer x --metrics fid", "with the images to reconstruct: --reference"),
        ("--model scenes --suite scenes --per-tag 0", "--per-tag must be 1 or more, got 0"),
        ("--model scenes --suite bench", "invalid choice"),
        ("--images x --metrics is-scenes --out x.txt", "--out must be a .json file"),
        ("--images x --metrics is-scenes --bootstrap 1", "--bootstrap must be 0"),
        ("--images x --metrics is-scenes --verdicts v.jsonl", "--verdicts v.jsonl needs --suite"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert nextscale.main(["evaluate", *words.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and said in error[0]


def ended(module, words, code, capsys):
    """What a command that ends with a code says on stderr: one line."""
    with pytest.raises(SystemExit) as stop:
        module.main(words)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == code and "\n" not in error
    return error


def test_a_reconstruction_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        tokenizer_quality.to_levels(torch.full((1, 3, 2, 2), float("nan")))


@pytest.mark.parametrize("module", [binding, calibration, judge, run, search_benchmark, tokenizer_quality])
def test_unknown_options_are_one_line_without_the_usage(module, capsys):
    error = ended(module, ["--model", "m", "--suite", "scenes", "--colour", "red"], 2, capsys)
    assert error.startswith(f"python -m {module.__name__}: error: ")


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        (judge, "--n 5", "--n must be 6 or more, got 5"),
        (judge, "--seed -1", "--seed must be 0 or more, got -1"),
        (judge, "--n 6 --out {file}/r.json", "File exists"),
        (calibration, "--n 100", "--n must be 120 or more, got 100"),
        (search_benchmark, "--n 0", "--n must be 1 or more, got 0"),
        (binding, "--batch-size 0", "--batch-size must be 1 or more, got 0"),
    ],
)
def test_mistakes_of_modules_are_one_line_and_exit_code_2(module, words, said, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert said in ended(module, words.format(file=tmp_path / "file").split(), 2, capsys)


@pytest.mark.parametrize(
    ("module", "part", "kept"),
    [
        (judge, "self_check", "nothing was written"),
        (calibration, "faulty_sets", "nothing was written"),
        (binding, "load_pipeline", "nothing was written"),
        (search_benchmark, "measure", "the same command continues"),
    ],
)
def test_an_interruption_is_one_line_and_exit_code_130(module, part, kept, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, part, interrupted)
    assert ended(module, [], 130, capsys) == f"python -m {module.__name__}: interrupted; {kept}"


def test_options_are_read_without_torch():
    code = "import sys; from evaluation import evaluate_cli as c, evaluate_options as o; o.defaults(); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(nextscale.__file__).parent).returncode == 0


def test_images_are_scored_against_others(tmp_path, renders, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", renders[:40])
    words = "evaluate --images a.npz --metrics fd-scenes,is-scenes --bootstrap 5 --out r/x.json"
    assert nextscale.main([*words.split(), "--reference", "a.npz"]) == 0
    row = json.loads(Path("r/x.json").read_text())["rows"][0]
    assert row["n"] == 40 and row["fd_scenes"] == pytest.approx(0, abs=1e-3)
    assert row["is_scenes_ci95"][0] < row["is_scenes"] < row["is_scenes_ci95"][1]
    assert "caution: fd-scenes of 40 images is biased" in capsys.readouterr().err
    assert Path("r/x.png").is_file() and "fd_scenes" in Path("r/x.md").read_text()


@pytest.mark.parametrize("suite, per_prompt", [("geneval", 4), ("scenes", 1)])
def test_a_suite_says_how_many_images_of_a_prompt_are_made(text_folder, tmp_path, monkeypatch, suite, per_prompt):
    one = [{"tag": "colors", "include": [{"class": "star", "count": 1}], "prompt": "a red star"}]
    monkeypatch.setattr("evaluation.evaluate.suite_prompts", lambda args: one)
    parser = argparse.ArgumentParser()
    options.configure(parser)
    work = tmp_path / "work"
    args = parser.parse_args(["--model", str(text_folder), "--suite", suite, "--work", str(work), "--device", "cpu"])
    made, of_job, cautions = make_images(args)
    assert of_job["images_per_prompt"] == len(list(made.rglob("samples/*.png"))) == per_prompt and not cautions


def test_a_model_is_evaluated_and_finished_images_are_kept(text_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "--model", str(text_folder), "--suite", "scenes", "--per-tag", "1", "--n", "2"]
    words += ["--bootstrap", "3", "--work", "work", "--out", "r/x.json", "--verdicts", "r/v.jsonl"]
    assert nextscale.main(words) == 0
    content = json.loads(Path("r/x.json").read_text())
    assert content["n"] == 12 and content["settings"]["images_per_prompt"] == 2
    assert {*TAGS, "overall", "overall_ci95", "fd_scenes", "is_scenes"} <= content["rows"][0].keys()
    assert str(text_folder) not in Path("r/x.json").read_text()
    assert len(Path("r/v.jsonl").read_text().splitlines()) == 12

    first, second = Path("work/00000/samples/0000.png"), Path("work/00000/samples/0001.png")
    kept, made = second.stat().st_mtime_ns, first.read_bytes()
    first.unlink()
    assert nextscale.main([*words, "--batch-size", "5"]) == 0
    assert first.read_bytes() == made and second.stat().st_mtime_ns == kept
    assert json.loads(Path("r/x.json").read_text())["rows"] == content["rows"]
    capsys.readouterr()
    assert nextscale.main([*words, "--top-k", "3"]) == 2
    assert "top_k" in capsys.readouterr().err

    shutil.rmtree("r")
    assert nextscale.main(["evaluate", "--images", "work", "--suite", "scenes", "--bootstrap", "0"]) == 0
    assert "overall" in capsys.readouterr().out


def test_what_cannot_be_judged_is_measured(text_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [metadata_of("single_object", [name]) for name in ("cat", "dog")]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8-sig")
    words = ["evaluate", "--model", str(text_folder), "--suite", "prompts.jsonl", "--n", "2", "--work", "work"]
    for more, said in ((["--out", "r.json"], "nothing is measured"), (["--verdicts", "v.jsonl"], "no judge here")):
        assert nextscale.main([*words, *more]) == 2 and not Path("work").exists()
        assert said in capsys.readouterr().err
    assert nextscale.main([*words, "--metrics", "is-scenes", "--bootstrap", "0", "--out", "r.json"]) == 0
    content = json.loads(Path("r.json").read_text())
    assert content["n"] == 4 and content["settings"]["prompts"] == 2 and Path("r.png").is_file()
    assert content["rows"][0].keys() == {"model", "suite", "n", "is_scenes"}
    assert "GenEval's detector does" in capsys.readouterr().out
    lines[0]["include"][0]["count"] = 2  # other metadata of the same prompts
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert nextscale.main(words) == 2
    assert "is of images with metadata" in capsys.readouterr().err


def test_a_tree_of_all_pairs_is_none_of_unseen_ones(tmp_path, capsys):
    tree = write_tree(tmp_path, 1)
    assert (
        nextscale.main(["evaluate", "--images", str(tree), "--suite", "scenes-unseen", "--metrics", "is-scenes"]) == 2
    )
    assert "images in" in capsys.readouterr().err


def test_the_default_folder_of_a_job_follows_its_settings():
    from evaluation.evaluate import default_folder

    job = {"suite": "scenes", "model_digest": "abc", "seed": 0}
    assert default_folder(job) == default_folder(dict(job)) != default_folder({**job, "seed": 1})
    assert options.defaults()["per_tag"] == 100


def documented() -> list[list[str]]:
    text = (Path(nextscale.__file__).parent / "docs" / "scenes-benchmark.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("nextscale evaluate")]
    return [shlex.split(line)[2:] for line in lines]


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_documented_commands_make_sense(words):
    parser = argparse.ArgumentParser()
    options.configure(parser)
    options.check(parser.parse_args(words))


def test_a_file_that_is_no_result_is_not_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.json").write_text('{"model_digest": "8a2f"}')
    words = ["evaluate", "--images", "none.npz", "--metrics", "is-scenes", "--out", "job.json"]
    assert nextscale.main(words) == 2
    assert "--out job.json is there, and no result" in capsys.readouterr().err
    assert (tmp_path / "job.json").read_text() == '{"model_digest": "8a2f"}'
