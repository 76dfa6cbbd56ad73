"""Which distribution figures a command asks for, and taking them: FID, IS, KID, FD-scenes, IS-scenes.

Shapes: N images, D features.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evaluation.features import (
    Described,
    InceptionFeatures,
    SceneFeatures,
    describe_all,
    load_scene_features,
    scene_reference,
)
from evaluation.frechet import (
    FEW,
    Z95,
    Moments,
    frechet_distance,
    frechet_interval,
    inception_score,
    inception_score_interval,
    kernel_distance,
    moments,
)
from evaluation.options import METRICS
from evaluation.scenes import TAGS, render
from evaluation.sources import Images, open_images, progress, stored_moments
from evaluation.tokenizer_quality import fresh_scenes
from sample.load import resolve_device

PARTS = 10  # of the published inception score


@dataclass(frozen=True)
class Measure:
    """Which distribution metrics to take, and what they need: networks and a reference.

    metrics: some of `evaluation.options.METRICS`.  reference: real images; None for the shipped reference of FD-scenes.
    stored: Inception statistics read from the reference file.  resamples: behind intervals; None for the default.
    """

    metrics: tuple[str, ...]
    scenes: SceneFeatures | None
    inception: InceptionFeatures | None
    reference: Images | None
    stored: Moments | None
    resamples: int | None
    seed: int
    batch_size: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Measure":
        """What a command line asks for. Raises ValueError or FileNotFoundError if something is missing for it."""
        metrics = chosen_metrics(args.metrics, args.suite)
        wants_inception = {"fid", "is", "kid"}.intersection(metrics)
        stored = stored_moments(args.reference) if args.reference is not None else None
        reference = None
        if args.reference is not None and (stored is None or {"kid", "fd-scenes"}.intersection(metrics)):
            reference = open_images(args.reference)
        for metric in {"fid", "kid"}.intersection(metrics):
            if args.reference is None:
                raise ValueError(f"--metrics {metric} needs --reference: a folder or .npz of real images")
        device = resolve_device(args.device) if metrics else torch.device("cpu")
        return cls(
            metrics,
            load_scene_features().to(device) if {"fd-scenes", "is-scenes"}.intersection(metrics) else None,
            InceptionFeatures.load(args.inception_weights, device) if wants_inception else None,
            reference,
            stored,
            args.bootstrap,
            args.seed,
            args.batch_size,
        )

    def figures(self, images: Images) -> dict:
        """All figures of `metrics`, each with its interval under `NAME_ci95`."""
        figures: dict = {}
        if self.scenes is not None:
            figures |= self._scene_figures(images)
        if self.inception is not None:
            figures |= self._inception_figures(images)
        return figures

    def settings(self) -> dict:
        """What decides the figures: reference, protocol, resamples."""
        facts: dict = {"metrics": list(self.metrics)}
        if self.reference is not None:
            facts["reference_n"] = len(self.reference)
        elif "fd-scenes" in self.metrics:
            facts["fd_scenes_reference"] = f"{scene_reference().n} fresh renders, all compositions, tags alike"
        if self.inception is not None:
            facts["inception"] = "torch-fidelity weights 2015-12-05, TensorFlow 1 resize to 299"
        if "is" in self.metrics:
            facts["is_parts"] = PARTS
        return facts

    def cautions(self, n: int, tags: Sequence[str] | None) -> list[str]:
        """What a reader of the figures must know, one line each."""
        lines = []
        distances = [metric for metric in self.metrics if metric in ("fid", "fd-scenes")]
        if distances and n < FEW:
            lines.append(
                f"{' and '.join(distances)} of {n} images is biased upwards: take {FEW} or more, and compare "
                "only figures of the same n"
            )
        if "fd-scenes" in self.metrics and self.reference is None and tags is not None:
            counts = Counter(tags)
            if len({counts[tag] for tag in TAGS}) > 1:
                lines.append("fd-scenes compares with all six tags alike, and these images are not spread like that")
        return lines

    def _describe(self, network: SceneFeatures | InceptionFeatures, images: Images, what: str) -> Described:
        return describe_all(network, progress(images, what, len(images)), batch_size=self.batch_size)

    def _frechet(self, name: str, features_ND: torch.Tensor, reference: Moments) -> dict:
        value = frechet_distance(moments(features_ND), reference)
        resamples = self.resamples if self.resamples is not None else (200 if features_ND.shape[1] <= 256 else 20)
        if resamples == 0:
            return {name: value}
        return {name: value, f"{name}_ci95": frechet_interval(features_ND, reference, value, resamples=resamples)}

    def _scene_figures(self, images: Images) -> dict:
        described = self._describe(self.scenes, images, "scene features")
        figures: dict = {}
        if "fd-scenes" in self.metrics and self.reference is not None:
            reference = moments(self._describe(self.scenes, self.reference, "reference").features)
            figures |= self._frechet("fd_scenes", described.features, reference)
        elif "fd-scenes" in self.metrics:
            figures |= self._frechet("fd_scenes", described.features, scene_reference())
            fresh = (render(scene) for scene in fresh_scenes(len(images), self.seed))
            renders = describe_all(self.scenes, progress(fresh, "fresh renders", len(images)))
            figures["fd_scenes_of_as_many_renders"] = frechet_distance(moments(renders.features), scene_reference())
        if "is-scenes" in self.metrics:
            value = inception_score(described.log_posterior)[0]
            figures["is_scenes"] = value
            resamples = 200 if self.resamples is None else self.resamples
            if resamples:
                interval = inception_score_interval(described.log_posterior, value, resamples=resamples)
                figures["is_scenes_ci95"] = interval
        return figures

    def _inception_figures(self, images: Images) -> dict:
        described = self._describe(self.inception, images, "Inception features")
        figures: dict = {}
        reference = None
        if "kid" in self.metrics or ("fid" in self.metrics and self.stored is None):
            reference = self._describe(self.inception, self.reference, "reference").features
        if "fid" in self.metrics:
            figures |= self._frechet("fid", described.features, self.stored or moments(reference))
        if "is" in self.metrics:
            parts = min(PARTS, len(images))
            value, spread = inception_score(described.log_posterior, splits=parts, seed=self.seed)
            half = Z95 * spread / parts**0.5
            figures |= {"is": value, "is_ci95": [value - half, value + half]}
            figures["is_one_part"] = inception_score(described.log_posterior)[0]
        if "kid" in self.metrics:
            value, interval, size = kernel_distance(described.features, reference, seed=self.seed)
            figures |= {"kid": value, "kid_ci95": interval, "kid_subset_size": size}
        return figures


def chosen_metrics(text: str | None, suite: str | None) -> tuple[str, ...]:
    """The metrics of a comma-separated list; those of the scenes by default for the scenes suite, none otherwise."""
    if text is None:
        return ("fd-scenes", "is-scenes") if suite == "scenes" else ()
    chosen = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    unknown = [metric for metric in chosen if metric not in METRICS]
    if unknown:
        raise ValueError(f"--metrics must be of {', '.join(METRICS)}, got {', '.join(unknown)}")
    return chosen
