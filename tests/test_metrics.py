"""Distribution metrics against independent float64 code, and everything that would make them mislead."""

import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg, stats

from evaluation import guards
from evaluation.compare import compare_frechet, compare_means, frechet_infinity, over_seeds
from evaluation.coverage import neighbourhoods
from evaluation.features import Described, describe_all, weights_digest
from evaluation.figures import score_figures
from evaluation.frechet import (
    frechet_distance,
    frechet_influence,
    frechet_interval,
    inception_score,
    inception_score_in_order,
    kernel_distance,
    moments,
    paired_frechet_interval,
)
from evaluation.inception import InceptionFeatures, load_inception
from evaluation.intervals import bootstrap_interval, mean_interval, wilson
from evaluation.run import shuffled_order
from evaluation.scene_features import load_scene_features
from evaluation.sources import open_images, stored_moments


def features(n: int, width: int = 8, *, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(n, width, generator=generator, dtype=torch.float64) @ mix + shift


def pictures(n: int, side: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), np.uint8)


# ----------------------------------------------------------------------------------------------------------- arithmetic


def frechet_by_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    """As the ADM evaluator computes it: scipy's root of the product."""
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(sigma_a @ sigma_b)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(sigma_a + sigma_b - 2 * root.real))


def test_the_distance_is_that_of_the_root_of_the_product():
    a, b = features(60), features(50, seed=1, shift=0.5) * 1.2
    expected = frechet_by_sqrtm(a.numpy(), b.numpy())
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-9)


def by_hand(samples: np.ndarray, reference: np.ndarray, k: int, dense_k: int) -> dict[str, float]:
    def apart(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    def radii(x, k):
        return np.sort(apart(x, x), axis=1)[:, k]

    between = apart(reference, samples)
    dense = between <= radii(reference, dense_k)[:, None]
    return {
        "precision": (between <= radii(reference, k)[:, None]).any(0).mean(),
        "recall": (between <= radii(samples, k)[None]).any(1).mean(),
        "density": dense.sum() / (dense_k * len(samples)),
        "coverage": dense.any(1).mean(),
    }


@pytest.mark.parametrize("block", [7, 4096])
def test_neighbourhoods_are_those_counted_by_hand(monkeypatch, block):
    monkeypatch.setattr("evaluation.coverage.BLOCK", block)
    samples, reference = features(70, 3), features(40, 3, seed=1, shift=0.7)
    expected = by_hand(samples.numpy(), reference.numpy(), 3, 5)
    assert neighbourhoods(samples, reference) == pytest.approx(expected, abs=1e-12)


def test_neighbours_at_equal_distances_count():
    """Small whole numbers, many of them alike: distances are exact, and on the edge of many balls."""
    generator = torch.Generator().manual_seed(0)
    samples, reference = (torch.randint(3, (n, 3), generator=generator).double() for n in (40, 30))
    squared = torch.cdist(reference, samples).square().round()
    own = torch.cdist(reference, reference).square().round().fill_diagonal_(torch.inf)
    radii = own.sort(dim=1).values[:, 4]
    expected = int((squared <= radii[:, None]).sum()) / 5 / 40
    assert neighbourhoods(samples, reference)["density"] == pytest.approx(expected, abs=1e-12)


def test_a_set_covers_itself_and_nothing_far_away():
    own = features(50) + 300
    found = neighbourhoods(own, own.flip(0))
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert set(neighbourhoods(own, own + 1000).values()) == {0.0}
    with pytest.raises(ValueError, match="6 images or more"):
        neighbourhoods(own[:5], own)
    with pytest.raises(ValueError, match="one network, got 8 and 3"):
        neighbourhoods(own, own[:, :3])


def test_the_inception_score_in_file_order_is_that_of_its_parts():
    logits = torch.randn(25, 6, generator=torch.Generator().manual_seed(0)).double() * 2
    scores = []
    for rows in (logits[:10], logits[10:20], logits[20:]):
        p = rows.softmax(1).numpy()
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    assert inception_score_in_order(logits.log_softmax(1), part=10) == pytest.approx(np.mean(scores), rel=1e-9)


def test_the_influence_of_images_gives_the_error_that_resampling_gives():
    sample, reference = features(600, 6, shift=0.4), moments(features(3000, 6, seed=1))
    influence = frechet_influence(sample, reference)
    low, high = bootstrap_interval(
        lambda rows: frechet_distance(moments(sample[rows]), reference), 10.0, 600, resamples=300
    )
    assert float(influence.std()) / 600**0.5 == pytest.approx((high - low) / 2 / 1.96, rel=0.15)
    without = [frechet_distance(moments(torch.cat([sample[:i], sample[i + 1 :]])), reference) for i in range(20)]
    slope = np.polyfit(influence[:20].numpy(), without, 1)[0]
    assert slope == pytest.approx(-1 / 600, rel=0.05)


def test_features_that_say_the_same_twice_count_twice():
    """Singular covariances, of the sample as of the reference: influences double, as the distance does."""
    sample, reference = features(100, 6, shift=0.4), features(300, 6, seed=1)
    once = frechet_influence(sample, moments(reference))
    doubled = frechet_influence(sample.repeat(1, 2), moments(reference.repeat(1, 2)))
    torch.testing.assert_close(doubled, 2 * once, rtol=1e-5, atol=1e-6)
    assert once.mean().abs() < 1e-9


def test_intervals_of_few_images_come_from_resampling():
    """Fewer than three images a feature: other resamples, another interval. Pairs are resampled as pairs."""
    reference = moments(features(200, 16, seed=1))
    for n, drawn in ((40, True), (48, False)):
        few = features(n, 16)
        ends = [frechet_interval(few, reference, 9.0, resamples=20, seed=seed) for seed in (0, 1)]
        assert (ends[0] != ends[1]) == drawn
    real = features(40, 16)
    low, high = paired_frechet_interval(real + 0.1, real, 0.16, resamples=20)  # every resample is 0.1 from its own
    assert (low, high) == pytest.approx((0.16, 0.16), abs=1e-6)


def test_scores_that_draw_are_the_same_for_the_same_seed():
    posterior = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    a, b = features(60, 4), features(60, 4, seed=1)
    for score in (
        lambda seed: inception_score(posterior, splits=4, seed=seed),
        lambda seed: kernel_distance(a, b, subsets=3, subset_size=10, seed=seed)[:2],
    ):
        torch.manual_seed(1)
        first = score(5)
        torch.manual_seed(2)
        assert score(5) == first != score(6)


def test_the_interval_of_a_kernel_distance_is_as_wide_as_fresh_sets_are_apart():
    torch.manual_seed(0)
    found = [
        kernel_distance(torch.randn(60, 4) + 0.5, torch.randn(60, 4), subsets=40, subset_size=20) for _ in range(60)
    ]
    halves = [(high - low) / 2 for _, (low, high), _ in found]
    assert np.mean(halves) / 1.96 == pytest.approx(np.std([value for value, *_ in found]), rel=0.12)


def test_extrapolation_takes_the_bias_out():
    reference = moments(features(20000, seed=1))
    biased = [frechet_distance(moments(features(200, seed=s)), reference) for s in range(10, 22)]
    found = [frechet_infinity(features(200, seed=s), reference) for s in range(10, 22)]
    assert abs(np.mean([f.value for f in found])) < 0.25 * np.mean(biased)
    assert found[0].counts[0] == 20 and found[0].counts[-1] == 200
    assert frechet_infinity(features(60), reference).counts[0] == 20  # 2.5 a feature
    apart = moments(features(20000, seed=1, shift=0.5))  # 8 x 0.5^2 from the others
    far = [frechet_infinity(features(120, seed=s), apart) for s in range(60)]
    assert all(one.ci95[0] <= one.value <= one.ci95[1] for one in (*found, *far))
    assert np.mean([one.ci95[0] <= 2 <= one.ci95[1] for one in far]) > 0.85
    with pytest.raises(ValueError, match="needs 50 images and 3 points"):
        frechet_infinity(features(40), reference)
    with pytest.raises(ValueError, match="needs 320 images and 3 points"):
        frechet_infinity(features(300, 64), moments(features(500, 64, seed=1)))


def test_the_interval_of_few_images_is_as_wide_as_fresh_sets_are_apart():
    """Four images a feature; resampling says nearly twice that."""
    reference, sets = moments(features(20000, 32, seed=1)), [features(128, 32, seed=s, shift=0.2) for s in range(2, 42)]
    values = [frechet_distance(moments(one), reference) for one in sets]
    halves = [(high - low) / 2 for low, high in (frechet_interval(s, reference, 1e3, resamples=0) for s in sets)]
    assert np.mean(halves) / 1.96 == pytest.approx(np.std(values, ddof=1), rel=0.6)


def test_common_seeds_show_a_difference_that_separate_ones_hide():
    reference = moments(features(5000, seed=1))
    a = features(400, seed=2, shift=0.3)
    b = a + 0.05 + features(400, seed=3) * 0.01
    paired = compare_frechet(b, a, reference)
    assert paired.images_saved > 10 and paired.difference_ci95[0] > 0 and paired.p_value < 0.01
    separate = compare_frechet(features(400, seed=4, shift=0.35), a, reference)
    assert separate.images_saved == pytest.approx(1, abs=0.3)
    assert separate.difference_ci95[0] < 0 < separate.difference_ci95[1]
    assert "A is better" in paired.sentence("FID", lower_is_better=False)
    assert "B is better" in paired.sentence("FID", lower_is_better=True)
    assert "no difference is shown" in separate.sentence("FID", lower_is_better=True)
    with pytest.raises(ValueError, match="same seeds on each side, got 400 and 399"):
        compare_frechet(a, a[1:], reference)


@pytest.mark.parametrize("worth", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_compared_with_nothing(worth):
    good = list(range(20))
    with pytest.raises(ValueError, match="finite numbers for every image"):
        compare_means([worth, *good[1:]], good)
    wrong = features(20)
    wrong[3, 1] = worth
    with pytest.raises(ValueError, match="finite numbers for every image"):
        compare_frechet(wrong, features(20), moments(features(50)))
    with pytest.raises(ValueError, match=r"1-dimensional numbers of images, got \(20, 2\)"):
        compare_means(np.zeros((20, 2)), np.zeros((20, 2)))


def test_a_paired_interval_covers_the_truth_as_often_as_it_says():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(300):
        common = rng.normal(size=60)
        low, high = compare_means(common + rng.normal(0.3, 1, 60), common).difference_ci95
        inside += low <= 0.3 <= high
    assert inside / 300 == pytest.approx(0.95, abs=0.04)


def test_variance_over_seeds():
    found = over_seeds([1.0, 2.0, 3.0])
    assert found["mean"] == 2 and found["sd_over_seeds"] == 1
    assert found["mean_ci95"][1] - 2 == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    with pytest.raises(ValueError, match="2 runs or more"):
        over_seeds([1.0])


# ------------------------------------------------------------------------------------------------------------ ADM files


def described(n: int, seed: int = 0) -> Described:
    generator = torch.Generator().manual_seed(seed)
    posterior = torch.randn(n, 5, generator=generator).double().log_softmax(1)
    return Described(features(n, seed=seed), posterior, torch.randn(n, 6, generator=generator))


def test_reference_files_hold_statistics_and_images(tmp_path):
    other, images = described(50, 1), pictures(3)
    own, spatial = moments(other.features), moments(other.spatial)
    arrays = {"mu": own.mean, "sigma": own.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
    np.savez(tmp_path / "ref.npz", arr_0=images, **{name: tensor.numpy() for name, tensor in arrays.items()})
    assert np.array_equal(np.stack(list(open_images(tmp_path / "ref.npz"))), images)
    one = described(40)
    for mine, theirs, is_spatial in ((one.features, other.features, False), (one.spatial, other.spatial, True)):
        kept = stored_moments(tmp_path / "ref.npz", spatial=is_spatial)
        wanted = frechet_by_sqrtm(mine.numpy(), theirs.numpy())
        assert frechet_distance(moments(mine), kept) == pytest.approx(wanted, rel=1e-4)


def test_samples_files_keep_labels(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=pictures(4), arr_1=np.array([3, 1, 2, 0]))
    assert open_images(tmp_path / "a.npz").labels.tolist() == [3, 1, 2, 0]


def test_a_shuffled_order_is_fixed_and_whole():
    assert sorted(shuffled_order(9)) == list(range(9)) and shuffled_order(9) == shuffled_order(9) != list(range(9))


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Random weights in torch-fidelity's Inception."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Fresh(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            """Keeps the weights it was made with."""

    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    torch.save(Fresh("inception-v3-compat", ["2048"], str(path)).state_dict(), path)
    return path


def test_inception_features_are_torch_fidelitys(inception):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(inception)).eval()
    ours = InceptionFeatures(load_inception(inception, check=False), spatial=True)
    images = pictures(3, 40)
    found = describe_all(ours, images, batch_size=2)
    with torch.no_grad():
        pool, logits = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert torch.allclose(found.features, pool.double(), atol=1e-5)
    assert torch.allclose(found.log_posterior, logits.double().log_softmax(1), atol=1e-5)
    maps = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, out: maps.append(out))
    theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert torch.allclose(found.spatial, maps[0][:, :7].permute(0, 2, 3, 1).reshape(3, 2023), atol=1e-5)
    assert ours.digest == InceptionFeatures(load_inception(inception, check=False)).digest
    with pytest.raises(ValueError, match="not the published file"):
        InceptionFeatures.load(inception)


def test_distances_are_torch_fidelitys():
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = features(90), features(60, seed=1, shift=0.5)
    fid = fid_statistics_to_metric(*(fid_features_to_statistics(x.float()) for x in (a, b)), False)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(fid["frechet_inception_distance"], rel=1e-4)
    settings = {"prc_neighborhood": 3, "prc_batch_size": 50, "save_cpu_ram": True, "verbose": False}
    theirs = prc_features_to_metric(a, b, **settings)
    found = neighbourhoods(a, b)
    assert (found["precision"], found["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]))


# --------------------------------------------------------------------------------------------------- refuses to mislead


def watched(images) -> guards.Watch:
    watch = guards.Watch(images)
    assert len(list(watch)) == len(images)
    return watch


def test_honest_images_raise_no_caution():
    images = list(pictures(20))
    assert watched(images).cautions() == []
    assert guards.count_cautions([i % 5 for i in range(20)], 5, 4) == []
    assert guards.seed_cautions(range(20)) == [] and guards.few_cautions(["fid"], 50_000) == []
    assert guards.size_cautions(watched(images).sizes, watched(images).sizes) == []
    assert guards.order_cautions(100.0, 101.0) == [] and guards.small_part_cautions(5000, 10) == []


def test_copies_and_mixed_sizes_are_noticed():
    images = [*pictures(5), *pictures(2), *pictures(1, 9)]
    said = watched(images).cautions()
    assert "2 sizes (8x8, 9x9)" in said[0] and "2 of 8 samples are exact copies" in said[1]


def test_lossy_files_are_noticed_by_content(tmp_path):
    for i, image in enumerate(pictures(3)):
        kind = "JPEG" if i < 2 else "PNG"
        Image.fromarray(image).save(tmp_path / f"{i}.png", format=kind)
    assert "2 of 3 samples are JPEG files" in guards.file_cautions(sorted(tmp_path.iterdir()))[0]


def test_references_of_another_size_are_noticed():
    small, large = watched(pictures(3)).sizes, watched(pictures(3, 16)).sizes
    assert "samples are 8x8 and the reference 16x16" in guards.size_cautions(small, large)[0]
    assert "reference is of 2 sizes" in guards.size_cautions(small, small + large)[0]


def test_wrong_counts_per_class_are_noticed():
    assert "3 of 3 classes do not have 50 images (class 0 has 2)" in guards.count_cautions([0, 0, 1, 2], 3, 50)[0]
    assert "1 of 3 classes do not have 2 images (class 2 has 1)" in guards.count_cautions([0, 0, 1, 1, 2], 3)[0]
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got 3"):
        guards.count_cautions([3], 3)


def test_files_sorted_by_class_are_noticed():
    assert guards.is_class_sorted([2, 2, 0, 0, 1, 1]) and not guards.is_class_sorted([2, 0, 2, 0, 1, 1])
    assert not guards.is_class_sorted([0, 0]) and not guards.is_class_sorted([0, 1, 2])
    labels = torch.arange(1000) // 100
    posterior = torch.full((1000, 10), -40.0).scatter(1, labels[:, None], 0.0).double().log_softmax(1)
    in_order = inception_score_in_order(posterior, part=100)
    shuffled = inception_score_in_order(posterior[shuffled_order(1000)], part=100)
    assert in_order == pytest.approx(1) and shuffled > 8
    assert "sorted by class" in guards.order_cautions(in_order, shuffled)[0]
    assert "is is over 10 parts of 5 images, and never above that number" in guards.small_part_cautions(5, 10)[0]


def test_shared_seeds_are_noticed(tmp_path):
    from sample.files import write_png

    for i, image in enumerate(pictures(4)):
        write_png(tmp_path / f"{i}.png", image, {"seed": str(i % 2)})
    assert guards.stored_seeds(sorted(tmp_path.iterdir())) == [0, 1, 0, 1]
    assert "4 of 4 images share their seed" in guards.seed_cautions([0, 1, 0, 1])[0]


def test_few_images_are_noticed():
    assert "fid and sfid of 500 images is biased upwards" in guards.few_cautions(["fid", "sfid"], 500)[0]


def test_a_truncated_png_is_named(tmp_path):
    for i, image in enumerate(pictures(3, 32)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    broken = tmp_path / "1.png"
    broken.write_bytes(broken.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"1\.png cannot be read"):
        list(open_images(tmp_path))


def test_poisoned_npz_files_are_named(tmp_path):
    def refused(name: str, said: str, **arrays) -> None:
        np.savez(tmp_path / name, **arrays)
        with pytest.raises(ValueError, match=said):
            stored_moments(tmp_path / name) if "mu" in arrays else open_images(tmp_path / name)

    floats = pictures(4).astype(np.float32)
    floats[2, 0, 0, 0] = np.nan
    refused("nan.npz", "arr_0 holds NaN or infinity in 1 of 4 rows, first in row 2", arr_0=floats)
    refused("float.npz", "has arr_0 float32", arr_0=np.zeros((2, 4, 4, 3), np.float32))
    refused("object.npz", "has arr_0 object", arr_0=np.array([{"a": 1}], dtype=object))
    refused("labels.npz", r"has 3 labels \(arr_1\) for 4 images", arr_0=pictures(4), arr_1=np.zeros(3, int))
    refused("empty.npz", "images of one pixel or more", arr_0=np.zeros((3, 0, 4, 3), np.uint8))
    refused("text.npz", "mu must be numbers", mu=np.array(["a", "b"]), sigma=np.eye(2))
    refused("mu.npz", "mu holds NaN", mu=np.array([1.0, np.nan]), sigma=np.eye(2))
    refused("sigma.npz", "no covariance", mu=np.zeros(2), sigma=-np.eye(2))
    refused("shape.npz", "must hold mu", mu=np.zeros(3), sigma=np.eye(2))


@pytest.mark.parametrize(
    "second", [np.full(4, -1), np.zeros(4), np.array(list("abcd")), np.zeros((4, 2), int)], ids=str
)
def test_what_is_no_label_is_not_looked_at(tmp_path, second):
    np.savez(tmp_path / "texts.npz", arr_0=pictures(4), arr_1=second)
    assert open_images(tmp_path / "texts.npz").labels is None


def test_images_of_all_kinds_are_read_and_results_are_not(tmp_path):
    """A folder one trained on is measured whole; the picture of an earlier result in it is no sample."""
    for i, suffix in enumerate((".png", ".tif", ".gif", ".jpg", ".bmp")):
        Image.fromarray(pictures(1, 16)[0]).save(tmp_path / f"{i}{suffix}")
    (tmp_path / "0.json").write_text('{"caption": "a sidecar"}')
    Image.fromarray(pictures(1, 16)[0]).save(tmp_path / "result.png")
    (tmp_path / "result.json").write_text('{"rows": [], "command": "", "versions": {}}')
    assert [path.stem for path in open_images(tmp_path).paths] == list("01234")


def test_the_interval_of_a_reconstruction_is_that_of_pairs():
    """Over fresh sets the distance of images to themselves, changed a little, hardly moves: both sides move alike."""
    values, halves = [], []
    for seed in range(30):
        real = features(400, 4, seed=seed)
        made = real + 0.1 * features(400, 4, seed=seed + 1000)
        value = frechet_distance(moments(made), moments(real))
        low, high = paired_frechet_interval(made, real, value, resamples=0)
        values.append(value)
        halves.append((high - low) / 2)
    assert np.mean(halves) / 1.96 == pytest.approx(np.std(values, ddof=1), rel=0.5)
    few = paired_frechet_interval(made[:30], real[:30], value, resamples=50)
    assert few[1] - few[0] < 0.2 * (frechet_interval(made[:30], moments(real[:30]), value, resamples=50)[1] - value)


def test_the_interval_of_kid_is_as_wide_as_fresh_sets_are_apart():
    sets = [(features(120, seed=s, shift=2), features(120, seed=s + 500)) for s in range(40)]
    found = [kernel_distance(*pair, subsets=50) for pair in sets]
    half = np.mean([(high - low) / 2 for _, (low, high), _ in found])
    assert half / 1.96 == pytest.approx(np.std([value for value, _, _ in found], ddof=1), rel=0.35)


def test_a_score_over_parts_counts_the_parts_there_are():
    described = Described(features(11, 4), torch.randn(11, 5).double().log_softmax(1))
    found, cautions = score_figures(described, seed=0)
    assert cautions == ["is is over 6 parts of 1 images, and never above that number: compare it at equal n only"]
    spread = inception_score(described.log_posterior, splits=6)[1]
    assert found["is_ci95"][1] - found["is"] == pytest.approx(1.959964 * spread / 6**0.5)


def test_damaged_npz_files_are_named(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=pictures(9, 32))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged in or after image"):
        list(open_images(path))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read as npz"):
        open_images(path)


def test_features_that_are_not_finite_name_their_image():
    network = load_scene_features()

    class Poisoned:
        def describe(self, images_BCHW):
            found = network.describe(images_BCHW)
            found.features[images_BCHW.float().mean((1, 2, 3)) == 0] = float("nan")
            return found

    images = pictures(7, 64)
    images[5] = 0
    with pytest.raises(ValueError, match="image 5 "):
        describe_all(Poisoned(), images, batch_size=2)


def test_an_image_that_is_not_finite_is_named_as_it_is_drawn(class_pipeline, monkeypatch):
    from sample.images import image_stream, make_requests

    call = type(class_pipeline).__call__

    def poisoned(self, *args, **settings):
        output = call(self, *args, **settings)
        output.images[1, 0, 0, 0] = np.nan
        return output

    monkeypatch.setattr(type(class_pipeline), "__call__", poisoned)
    with pytest.raises(ValueError, match="image of 3, seed 8, is not finite"):
        list(image_stream(class_pipeline, make_requests([2, 3, 4], seed=7)))


def test_without_pyarrow_parquet_is_refused_in_a_line(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read without pyarrow: pip install"):
        open_images(tmp_path / "a.parquet")


def test_parquet_is_read_like_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = pictures(5)
    rows = {"label": list(range(5)), "picture": [Image.fromarray(image) for image in images]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    found = open_images(tmp_path / "a.parquet")
    assert len(found) == 5 and np.array_equal(np.stack(list(found)), images)
    assert len(open_images(tmp_path)) == 5


def test_npz_images_are_streamed_from_compressed_files_too(tmp_path):
    images = pictures(6)
    np.savez_compressed(tmp_path / "a.npz", arr_0=images)
    assert np.array_equal(np.stack(list(open_images(tmp_path / "a.npz"))), images)
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("other.npy", b"")
    with pytest.raises(ValueError, match="has no arr_0"):
        open_images(tmp_path / "b.npz")


def test_a_score_of_few_images_says_so():
    described = Described(torch.zeros(40, 2), torch.randn(40, 10).double().log_softmax(1))
    figures, cautions = score_figures(described, seed=0)
    assert figures["is"] <= 4 and any("over 10 parts of 4 images" in line for line in cautions)


@pytest.mark.parametrize("count", [2, 7, 400])
def test_the_interval_of_a_mean(count):
    values = np.random.default_rng(0).normal(3.0, 5.0, count)
    wanted = stats.norm.interval(0.95, loc=values.mean(), scale=stats.sem(values))
    assert mean_interval(values) == pytest.approx(wanted, rel=1e-5)
    assert mean_interval(values[:1]) == [-np.inf, np.inf]


def test_a_proportions_interval_is_wilsons():
    for successes, n in ((0, 7), (3, 7), (7, 7), (812, 1000)):
        found = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
        assert wilson(successes, n) == pytest.approx([found.low, found.high], abs=1e-6)
    assert wilson(0, 0) == [0, 1]


def test_a_covariance_needs_two_images():
    assert moments(torch.tensor([[0.0], [2.0]])).covariance.item() == 2
    with pytest.raises(ValueError, match="at least 2 images on each side, got 1"):
        moments(torch.zeros(1, 3))


def test_kid_needs_four_images():
    assert np.isfinite(kernel_distance(features(4), features(5, seed=1))[0])
    with pytest.raises(ValueError, match="at least 4 images on each side, got 3"):
        kernel_distance(features(3), features(5, seed=1))


def test_a_digest_tells_weights_and_their_names_apart():
    one, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    other.load_state_dict(one.state_dict())
    assert weights_digest(one) == weights_digest(other)
    assert weights_digest(torch.nn.Sequential(one)) != weights_digest(one)
    with torch.no_grad():
        other.weight[0, 1] += 1
    assert weights_digest(one) != weights_digest(other)
