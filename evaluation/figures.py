"""Figures of a described set, by the network that described it; the same for images on disk and straight from a model.

Shapes: N images, D features.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from evaluation.coverage import neighbourhoods
from evaluation.features import Described
from evaluation.frechet import (
    Moments,
    frechet_distance,
    frechet_interval,
    inception_score,
    inception_score_in_order,
    kernel_distance,
    moments,
    paired_frechet_interval,
)
from evaluation.guards import order_cautions, small_part_cautions
from evaluation.intervals import Z95
from evaluation.sources import stored_moments

PARTS = 10  # of the published inception score
INCEPTION = ("fid", "sfid", "is", "kid", "prdc")  # metrics on Inception features
NEED_REFERENCE_IMAGES = {"kid", "prdc", "fd-scenes", "fd-dinov2", "cmmd"}  # statistics do not do
NEED_REFERENCE = {"fid", "sfid", "kid", "prdc", "fd-dinov2", "cmmd"}


@dataclass(frozen=True)
class Reference:
    """The real side: described images, and statistics that may come from a file (ADM's are of a larger set)."""

    described: Described | None = None
    pool: Moments | None = None
    spatial: Moments | None = None

    @classmethod
    def of(cls, described: Described) -> "Reference":
        """Statistics of the described images themselves."""
        spatial = moments(described.spatial) if described.spatial is not None else None
        return cls(described, moments(described.features), spatial)


def needs_images(metrics: Collection[str], path: str | Path) -> bool:
    """Whether a reference's images must be described: statistics in the file do not serve all `metrics`."""
    if NEED_REFERENCE_IMAGES.intersection(metrics):
        return True
    if "fid" in metrics and stored_moments(path) is None:
        return True
    return "sfid" in metrics and stored_moments(path, spatial=True) is None


def inception_reference(path: str | Path, described: Described | None) -> Reference:
    """The reference of Inception metrics: statistics of the file where it has them, else of its described images."""
    own = Reference.of(described) if described is not None else Reference()
    stored = (stored_moments(path), stored_moments(path, spatial=True))
    return Reference(described, stored[0] or own.pool, stored[1] or own.spatial)


def frechet_figures(name: str, features_ND: torch.Tensor, reference: Moments, resamples: int | None) -> dict:
    """A Frechet distance under `name` and its interval; no interval with 0 resamples."""
    value, count = frechet_distance(moments(features_ND), reference), resample_count(features_ND, resamples)
    if count == 0:
        return {name: value}
    return {name: value, f"{name}_ci95": frechet_interval(features_ND, reference, value, resamples=count)}


def paired_figures(name: str, made_ND: torch.Tensor, real_ND: torch.Tensor, resamples: int | None) -> dict:
    """The Frechet distance of reconstructions to their own originals, row by row, and its interval."""
    value, count = frechet_distance(moments(made_ND), moments(real_ND)), resample_count(made_ND, resamples)
    if count == 0:
        return {name: value}
    return {name: value, f"{name}_ci95": paired_frechet_interval(made_ND, real_ND, value, resamples=count)}


def resample_count(features_ND: torch.Tensor, resamples: int | None) -> int:
    """Resamples behind an interval: 200 by default, 20 of wide features, whose distances take long."""
    return resamples if resamples is not None else (200 if features_ND.shape[1] <= 256 else 20)


def score_figures(described: Described, seed: int) -> tuple[dict, list[str]]:
    """`is` over 10 shuffled parts with its interval, over one part, and over consecutive parts as ADM; cautions."""
    part = -(-len(described) // PARTS)
    parts = -(-len(described) // part)  # as many as there are of that size: 6 of 11 images
    value, spread = inception_score(described.log_posterior, splits=parts, seed=seed)
    half = Z95 * spread / parts**0.5
    in_order = inception_score_in_order(described.log_posterior, part=part)
    figures = {"is": value, "is_ci95": [value - half, value + half], "is_in_file_order": in_order}
    figures["is_one_part"] = inception_score(described.log_posterior)[0]
    cautions = small_part_cautions(len(described) // parts, parts)
    return figures, cautions or order_cautions(in_order, value)  # few images are out of order by chance


def inception_figures(
    metrics: Collection[str], described: Described, reference: Reference, *, seed: int, resamples: int | None
) -> tuple[dict, list[str]]:
    """The chosen metrics of `INCEPTION`, and cautions about them."""
    figures, cautions = {}, []
    if "fid" in metrics:
        figures |= frechet_figures("fid", described.features, reference.pool, resamples)
    if "sfid" in metrics:
        figures |= frechet_figures("sfid", described.spatial, reference.spatial, resamples)
    if "is" in metrics:
        scores, cautions = score_figures(described, seed)
        figures |= scores
    if "kid" in metrics:
        value, interval, size = kernel_distance(described.features, reference.described.features, seed=seed)
        figures |= {"kid": value, "kid_ci95": interval, "kid_subset_size": size}
    if "prdc" in metrics:
        found = neighbourhoods(described.features, reference.described.features)
        figures |= {**found, "prdc_reference_n": len(reference.described)}
    return figures, cautions
