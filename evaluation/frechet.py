"""Distances and scores of image distributions from features: Frechet distance, inception score, KID, with intervals.

FID is the Frechet distance on Inception features, FD-scenes the one on the scenes network's; the arithmetic is the
same. Inception score and KID are torchmetrics'.

Shapes: N images, D features, P classes.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from evaluation.intervals import Z95, bootstrap_interval

FIRST_ORDER = 3  # images a feature from which the first-order interval is nearer to the truth than resampling
FEW = 2000  # below this many images a Frechet distance is mostly its own bias


@dataclass(frozen=True)
class Moments:
    """What a Frechet distance needs of a set: mean (D,), covariance (D, D), both float64; n, its size if known."""

    mean: torch.Tensor
    covariance: torch.Tensor
    n: int | None = None


def moments(features_ND: torch.Tensor) -> Moments:
    """Mean and unbiased covariance of (N, D) features. Raises ValueError if there are fewer than 2."""
    if len(features_ND) < 2:
        raise ValueError(f"a Frechet distance needs at least 2 images on each side, got {len(features_ND)}")
    features = features_ND.double()
    mean = features.mean(0)
    centred = features - mean
    return Moments(mean, centred.T @ centred / (len(features) - 1), len(features))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the squared 2-Wasserstein distance of two Gaussians.

    (Heusel et al. 2017, equation 6.) The trace of the root is that of the symmetric (R S_b R)^(1/2) with R = S_a^(1/2),
    so singular covariances need no care. Symmetric in a and b; never negative.
    Raises ValueError if the numbers of features differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features must be of one network, got {len(a.mean)} and {len(b.mean)} of them")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def frechet_influence(features_ND: torch.Tensor, reference: Moments) -> torch.Tensor:
    """How much each image moves the distance to a fixed reference: (N,) float64 of mean 0.

    The first-order term of the distance in the empirical distribution: with T the optimal map between the Gaussians,
    2 (mu - mu_r)^T (x - mu) + (x - mu)^T (I - T) (x - mu), centred. The standard error of the distance is
    std / sqrt(N), without resampling; that of a difference of two distances under common seeds comes from the
    difference of their influences. First order: needs clearly more images than features.
    """
    own = moments(features_ND)
    centred = features_ND.double() - own.mean
    values, vectors = torch.linalg.eigh(reference.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    values, vectors = torch.linalg.eigh(root @ own.covariance @ root)
    kept = values > values.max() * 1e-10
    inverse_root = torch.where(kept, values.clamp(min=1e-300).rsqrt(), 0.0)
    transport = root @ ((vectors * inverse_root) @ vectors.T) @ root
    influence = 2 * centred @ (own.mean - reference.mean)
    influence += (centred.square() - centred * (centred @ transport)).sum(1)
    return influence - influence.mean()


def frechet_interval(
    features_ND: torch.Tensor, reference: Moments, value: float, *, resamples: int, seed: int = 0
) -> list[float]:
    """95 % interval [low, high] around a Frechet distance to a fixed reference: what another sample might give.

    From `frechet_influence` from `FIRST_ORDER` images a feature on, else `bootstrap_interval`, which is too wide there.
    """
    if len(features_ND) >= FIRST_ORDER * features_ND.shape[1]:
        half = Z95 * float(frechet_influence(features_ND, reference).std()) / len(features_ND) ** 0.5
        return [max(value - half, 0.0), value + half]
    return bootstrap_interval(
        lambda rows: frechet_distance(moments(features_ND[rows]), reference),
        value,
        len(features_ND),
        resamples=resamples,
        seed=seed,
    )


def paired_frechet_interval(
    made_ND: torch.Tensor, real_ND: torch.Tensor, value: float, *, resamples: int, seed: int = 0
) -> list[float]:
    """95 % interval [low, high] around the Frechet distance of images and what was made of each of them.

    Row i of both sides is of one image, so nearly all of what sampling does to one side it does to the other. From the
    sum of both sides' influences from `FIRST_ORDER` images a feature on, else by resampling pairs.
    """
    if len(made_ND) >= FIRST_ORDER * made_ND.shape[1]:
        moved_N = frechet_influence(made_ND, moments(real_ND)) + frechet_influence(real_ND, moments(made_ND))
        half = Z95 * float(moved_N.std()) / len(made_ND) ** 0.5
        return [max(value - half, 0.0), value + half]
    return bootstrap_interval(
        lambda rows: frechet_distance(moments(made_ND[rows]), moments(real_ND[rows])),
        value,
        len(made_ND),
        resamples=resamples,
        seed=seed,
    )


class _Given(nn.Identity):
    """Stands where torchmetrics wants a network: the features are already there."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """torchmetrics shuffles with torch's global generator and warns of its buffers: seed the one, hush the other."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        yield


def inception_score(log_posterior_NP: torch.Tensor, *, splits: int = 1, seed: int = 0) -> tuple[float, float]:
    """exp(mean KL(p(y|x) || p(y))) over `splits` shuffled parts: (mean, standard deviation over parts, 0 for one).

    (Salimans et al. 2016.) Published scores use 10 parts of 5000 images. Raises ValueError if a part would be empty.
    """
    from torchmetrics.image.inception import InceptionScore

    if not 1 <= splits <= len(log_posterior_NP):
        raise ValueError(f"splits must be 1 to {len(log_posterior_NP)}, the number of images, got {splits}")
    with _drawing_from(seed):
        metric = InceptionScore(_Given(log_posterior_NP.shape[1]), splits=splits, sync_on_compute=False)
        metric.update(log_posterior_NP)
        mean, spread = metric.compute()
    return float(mean), float(spread) if splits > 1 else 0.0


def inception_score_in_order(log_posterior_NP: torch.Tensor, *, part: int = 5000) -> float:
    """The mean of exp(mean KL) over consecutive parts of `part` images, the last one maybe smaller: ADM's way."""
    scores = []
    for rows in log_posterior_NP.double().split(part):
        marginal = rows.logsumexp(0) - np.log(len(rows))
        scores.append(float((rows.exp() * (rows - marginal)).sum(1).mean().exp()))
    return float(np.mean(scores))


def inception_score_interval(
    log_posterior_NP: torch.Tensor, value: float, *, resamples: int, seed: int = 0
) -> list[float]:
    """`bootstrap_interval` of a one-part inception score."""
    return bootstrap_interval(
        lambda rows: inception_score(log_posterior_NP[rows])[0],
        value,
        len(log_posterior_NP),
        resamples=resamples,
        seed=seed,
    )


def kernel_distance(
    features_ND: torch.Tensor, reference_ND: torch.Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, list[float], int]:
    """KID (Binkowski et al. 2018): the polynomial-kernel MMD^2 averaged over random subsets.

    Returns (value, 95 % interval, subset size used: at most half of the smaller set). The interval scales the spread
    over subsets, which are drawn without replacement, to all images, and adds that of a mean over so many subsets:
    +-1.96 std sqrt(f / (1 - f) + 1 / subsets) with f = subset size / images of the smaller side, so it is about twice
    too wide where one side has many more. Raises ValueError on fewer than 4 images.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    fewest = min(len(features_ND), len(reference_ND))
    if fewest < 4:
        raise ValueError(f"KID needs at least 4 images on each side, got {fewest}")
    size = min(subset_size, fewest // 2)
    with _drawing_from(seed):
        network = _Given(features_ND.shape[1])
        metric = KernelInceptionDistance(network, subsets=subsets, subset_size=size, sync_on_compute=False)
        metric.update(reference_ND, real=True)
        metric.update(features_ND, real=False)
        mean, spread = metric.compute()
    half = Z95 * float(spread) * (size / (fewest - size) + 1 / subsets) ** 0.5
    return float(mean), [float(mean) - half, float(mean) + half], size
