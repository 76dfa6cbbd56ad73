"""Is A better than B? Differences of two sets under common seeds, extrapolation to infinitely many images, seeds.

Image i of A and image i of B are of one seed (and prompt or class), so what they share cancels in the difference.

Shapes: N images, D features.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from evaluation.frechet import Moments, frechet_distance, frechet_influence, moments
from evaluation.intervals import Z95
from evaluation.scene_features import scene_reference
from evaluation.shards import has_column, networks_in, read_column, read_described, shard_paths
from evaluation.sources import stored_moments

EXTRAPOLATED = 5  # images a feature that FID-infinity needs; with fewer it is wrong, whatever its interval says


@dataclass(frozen=True)
class Difference:
    """A minus B of one figure, and what may be said about it.

    difference_ci95: [low, high].  p_value: two-sided, of no difference.  images_saved: how many times more images
    would be needed for the same interval without common seeds (1: common seeds bring nothing).
    """

    a: float
    b: float
    difference: float
    difference_ci95: list[float]
    p_value: float
    images_saved: float

    def sentence(self, figure: str, *, lower_is_better: bool, names: tuple[str, str] = ("A", "B")) -> str:
        """One line: which is better, or that neither is shown to be."""
        low, high = self.difference_ci95
        shown = f"{figure} differs by {self.difference:.4g} [{low:.4g}, {high:.4g}], p = {self.p_value:.2g}"
        if low <= 0 <= high:
            return f"no difference is shown: {shown}"
        better = names[0] if (self.difference < 0) == lower_is_better else names[1]
        return f"{better} is better: {shown}"

    def row(self) -> dict:
        """As an object of a results file."""
        return asdict(self)


def _difference(a: float, b: float, effects_a: np.ndarray, effects_b: np.ndarray) -> Difference:
    """From what each image contributes: the figures are (to first order) means of effects."""
    n = len(effects_a)
    error = float((effects_a - effects_b).std(ddof=1)) / n**0.5
    apart = float(effects_a.var(ddof=1) + effects_b.var(ddof=1)) / n
    half = Z95 * error
    difference = a - b
    p_value = 2 * float(stats.norm.sf(abs(difference) / error)) if error > 0 else float(difference == 0)
    saved = apart / error**2 if error > 0 else 1.0
    return Difference(a, b, difference, [difference - half, difference + half], p_value, saved)


def compare_frechet(a_ND: torch.Tensor, b_ND: torch.Tensor, reference: Moments) -> Difference:
    """The difference of two Frechet distances to one reference, rows paired by seed.

    From `frechet_influence`: a joint resampling of the pairs would give the same to first order. The bias of finite N
    is common to both sides and largely cancels. Raises ValueError if the numbers of images differ or are under 10.
    """
    _check_pairs(a_ND, b_ND, ndim=2)
    influences = [frechet_influence(x, reference).numpy() for x in (a_ND, b_ND)]
    values = [frechet_distance(moments(x), reference) for x in (a_ND, b_ND)]
    return _difference(*values, *influences)


def compare_means(a_N: Sequence[float], b_N: Sequence[float]) -> Difference:
    """The difference of two means over images (scores, shares of images judged right), rows paired by seed.

    Raises ValueError if the numbers of images differ or are under 10, or one has none.
    """
    a, b = (np.asarray(x, np.float64) for x in (a_N, b_N))
    _check_pairs(a, b, ndim=1)
    return _difference(float(a.mean()), float(b.mean()), a, b)


def _check_pairs(a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor, *, ndim: int) -> None:
    if len(a) != len(b) or len(a) < 10:
        said = f"got {len(a)} and {len(b)}"
        raise ValueError(f"a paired comparison needs 10 or more images of the same seeds on each side, {said}")
    for side in (a, b):
        if side.ndim != ndim:
            raise ValueError(f"a paired comparison needs {ndim}-dimensional numbers of images, got {tuple(side.shape)}")
        if not np.isfinite(np.asarray(side)).all():
            raise ValueError("a paired comparison needs finite numbers for every image, got NaN or infinity")


@dataclass(frozen=True)
class Extrapolated:
    """A Frechet distance at infinitely many images, and the distances at fewer that it comes from."""

    value: float
    ci95: list[float]
    counts: list[int]
    distances: list[float]


def frechet_infinity(features_ND: torch.Tensor, reference: Moments, *, points: int = 10, seed: int = 0) -> Extrapolated:
    """FID-infinity (Chong & Forsyth 2020): a line through distances at up to N images against 1/n, read off at 1/n = 0.

    The bias of a Frechet distance is close to linear in 1/n where there are several images a feature; sets of different
    size can be compared by this figure. It begins at N/10 images, and not below 2.5 a feature (theirs: 5,000 of 50,000
    for 2,048). The subsets are windows of one shuffled order. The interval is to first order in each image's influence,
    with its weight in the intercept; like the value, it may go below 0. Raises ValueError under 3 points, 50 images, or
    `EXTRAPOLATED` images a feature.
    """
    total, width = features_ND.shape
    least = max(50, EXTRAPOLATED * width)
    if total < least or points < 3:
        raise ValueError(f"extrapolation needs {least} images and 3 points or more, got {total} and {points}")
    counts = np.unique(np.linspace(max(total / 10, 2.5 * width), total, points).astype(int))
    begins = (total - counts) * np.arange(len(counts)) // max(len(counts) - 1, 1)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(total))
    shuffled = features_ND[order]
    distances = [frechet_distance(moments(shuffled[b : b + c]), reference) for b, c in zip(begins, counts, strict=True)]
    weights = np.linalg.pinv(np.stack([np.ones(len(counts)), 1 / counts], axis=1))[0]
    share = np.zeros(total)  # of each image in the intercept
    for weight, begin, count in zip(weights, begins, counts, strict=True):
        share[begin : begin + count] += weight / count
    value = float(weights @ distances)
    half = Z95 * float(frechet_influence(features_ND, reference).std()) * float(np.square(share).sum() ** 0.5)
    return Extrapolated(value, [value - half, value + half], counts.tolist(), distances)


def over_seeds(values: Sequence[float]) -> dict[str, float | list[float] | int]:
    """Mean of a figure over runs of different seeds, its 95 % interval (Student's t) and the spread of single runs.

    Raises ValueError under 2 runs.
    """
    if len(values) < 2:
        raise ValueError(f"variance over seeds needs 2 runs or more, got {len(values)}")
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * spread / len(values) ** 0.5
    return {"mean": mean, "mean_ci95": [mean - half, mean + half], "sd_over_seeds": spread, "runs": len(values)}


def compare_works(a: Path, b: Path, reference: Path | None) -> tuple[dict, list[str]]:
    """All that two work folders of `evaluation.run` can be compared by: a row of figures, and what they say.

    Inception features need `reference`, an npz with statistics; those of the scenes network are compared with fresh
    renders. Images without a partner of the same seed and class or text are left out.
    Raises ValueError if nothing can be compared, FileNotFoundError if a folder holds no features.
    """
    works = (a, b)
    paths, names = [shard_paths(work) for work in works], names_apart(a, b)
    keys = image_keys(works, paths)
    rows = common_rows(*keys)
    row: dict = {"a": names[0], "b": names[1], "n": len(rows[0])}
    counted = zip(works, paths, map(len, keys), strict=True)
    sentences = [line for work, p, there in counted for line in _left_out(work, p, there, len(rows[0]))]
    statistics = stored_moments(reference) if reference is not None else None
    if reference is not None and statistics is None:
        raise ValueError(f"--reference must be an npz with mu and sigma, got {reference}")
    if reference is not None and set(networks_in(paths[0])) <= {"scenes"}:
        sentences.append("caution: the reference is not used: features of the scenes network are compared with renders")
    if "scenes" in networks_in(paths[0]) and settings_of(a).get("suite", "scenes") != "scenes":
        sentences.append("caution: fd_scenes here is the distance to drawn scenes, whatever the runs were measured by")
    for network in sorted(set(networks_in(paths[0])) & set(networks_in(paths[1]))):
        real = scene_reference() if network == "scenes" else statistics
        if real is None:
            continue
        sides = [
            read_described(p, network).features[torch.tensor(r, dtype=torch.long)]
            for p, r in zip(paths, rows, strict=True)
        ]
        widths = {len(real.mean), *(side.shape[1] for side in sides)}
        if len(widths) > 1:
            sentences.append(f"caution: {network} is left out: features and reference have {sorted(widths)} numbers")
            continue
        figures, said = compare_features(figure_of(network), *sides, real, names)
        row |= figures
        sentences += said
    if all(has_column(p, "correct") for p in paths):
        sides = [read_column(p, "correct").astype(float)[r] for p, r in zip(paths, rows, strict=True)]
        found = compare_means(*sides)
        sentences.append(found.sentence("score", lower_is_better=False, names=names))
        row |= {f"score_{key}": value for key, value in found.row().items()}
    if len(row) == 3:
        raise ValueError("nothing to compare: give --reference, statistics of the network that described them")
    return row, sentences


def _left_out(work: Path, paths: Sequence[Path], there: int, paired: int) -> list[str]:
    """Cautions about a folder's images that are not there yet, or that have no partner in the other one."""
    planned = max(settings_of(work).get("count", there), there)
    missing = sorted({*range(len(paths))} - {int(path.stem) for path in paths})
    lines = []
    if there < planned or missing:
        shown = f"{there} of {planned} images" if there < planned else f"no shard {missing[0]:06d}"
        lines.append(f"caution: {work} has {shown}: its run is not finished")
    if paired < there:
        lines.append(
            f"caution: {there - paired} of {there} images of {work} have no partner in the other, and are left out"
        )
    return lines


def figure_of(network: str) -> str:
    """What a Frechet distance on a network's features is called."""
    return {"scenes": "fd_scenes", "inception": "fid", "dinov2": "fd_dinov2"}.get(network, f"fd_{network}")


def compare_features(
    name: str, a_ND: torch.Tensor, b_ND: torch.Tensor, real: Moments, names: tuple[str, str]
) -> tuple[dict, list[str]]:
    """Figures of the Frechet distance `name` of two paired sets, at N and at infinitely many images; what they say.

    The latter only of sets that are large enough for it.
    """
    found = compare_frechet(a_ND, b_ND, real)
    sentences = [found.sentence(name, lower_is_better=True, names=names)]
    row: dict = {f"{name}_{key}": value for key, value in found.row().items()}
    if len(a_ND) < 3 * a_ND.shape[1]:
        sentences.append(f"caution: {len(a_ND)} pairs are few for {a_ND.shape[1]} features: intervals are rough")
    if len(a_ND) >= max(50, EXTRAPOLATED * a_ND.shape[1]):
        if len(a_ND) < 10 * a_ND.shape[1]:
            sentences.append(f"caution: {name} at infinitely many images is rough from {len(a_ND)}: have ten a feature")
        for side, features in (("a", a_ND), ("b", b_ND)):
            extrapolated = frechet_infinity(features, real)
            row[f"{name}_infinity_{side}"] = extrapolated.value
            row[f"{name}_infinity_{side}_ci95"] = extrapolated.ci95
    return row, sentences


def names_apart(a: Path, b: Path) -> tuple[str, str]:
    """Two folders by the last parts of their paths that tell them apart; by the last one if they are the same."""
    parts = [Path(os.path.abspath(path)).parts for path in (a, b)]
    count = next((n for n in range(1, max(map(len, parts)) + 1) if parts[0][-n:] != parts[1][-n:]), 1)
    return tuple(Path(*part[-count:]).as_posix() for part in parts)


def image_keys(works: Sequence[Path], paths: Sequence[Sequence[Path]]) -> list[list[tuple]]:
    """What tells a folder's images apart, by row: seed, class and, for texts, a digest of the prompt.

    Shards of texts made before digests were kept have none; then both runs must be of the same requests.
    Raises ValueError if the folders are of other suites, or prompts cannot be paired.
    """
    there = [settings_of(work) for work in works]
    _check_alike(works, there, ["suite", "extractors"])
    columns = [[read_column(p, "seeds"), read_column(p, "labels")] for p in paths]
    texts = any((labels < 0).any() for _, labels in columns)
    if texts and all(has_column(p, "prompts") for p in paths):
        columns = [[*found, read_column(p, "prompts")] for found, p in zip(columns, paths, strict=True)]
    elif texts:
        _check_alike(works, there, ["per_class", "seed", "images"], "; no digests of the prompts are kept to pair by")
        if any("images" not in settings for settings in there):
            raise ValueError(f"{works[0]} and {works[1]} do not say which prompts their images show: make them again")
    return [list(zip(*(column.tolist() for column in found), strict=True)) for found in columns]


def settings_of(work: Path) -> dict:
    """What made a work folder's images; nothing where it does not say."""
    path = Path(work) / "settings.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _check_alike(works: Sequence[Path], there: Sequence[dict], names: Sequence[str], why: str = "") -> None:
    """Raise ValueError at the first of these settings that both folders say and that differs."""
    for name in names:
        a, b = (settings.get(name) for settings in there)
        if name == "extractors" and a and b:  # only networks that both have are compared
            a, b = ({network: found[network] for network in sorted(a.keys() & b.keys())} for found in (a, b))
        if a is not None and b is not None and a != b:
            raise ValueError(f"{works[0]} is of {name} {a!r} and {works[1]} of {b!r}: they cannot be paired{why}")


def common_rows(a: Sequence[tuple], b: Sequence[tuple]) -> tuple[list[int], list[int]]:
    """Row numbers of what both sides hold, in the order of `a`."""
    place = {key: row for row, key in enumerate(b)}
    pairs = [(row, place[key]) for row, key in enumerate(a) if key in place]
    return [first for first, _ in pairs], [second for _, second in pairs]
