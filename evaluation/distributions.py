"""Which distribution figures a command asks for, and taking them from images in one pass a network.

Shapes: N images, D features.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evaluation import guards
from evaluation.evaluate_options import METRICS
from evaluation.extractors import ClipFeatures, DinoFeatures, clip_scores, cmmd
from evaluation.features import Described, Describer, describe_all
from evaluation.figures import (
    INCEPTION,
    NEED_REFERENCE,
    PARTS,
    Reference,
    frechet_figures,
    inception_figures,
    inception_reference,
    needs_images,
)
from evaluation.frechet import FEW, frechet_distance, inception_score, inception_score_interval, moments
from evaluation.inception import POOL_WIDTH, SPATIAL_WIDTH, InceptionFeatures
from evaluation.intervals import mean_interval
from evaluation.report import file_digest
from evaluation.scene_features import load_scene_features, scene_reference
from evaluation.scenes import TAGS, fresh_scenes, render
from evaluation.sources import (
    FileImages,
    Images,
    NpzImages,
    holds_images,
    image_sizes,
    open_images,
    progress,
    stored_moments,
)
from sample.load import resolve_device

NETWORKS = {  # network -> metrics on it
    "scenes": ("fd-scenes", "is-scenes"),
    "inception": INCEPTION,
    "dinov2": ("fd-dinov2",),
    "clip": ("cmmd", "clip-score"),
}


@dataclass(frozen=True)
class Measure:
    """Which distribution metrics to take, and what they need: networks and a reference.

    metrics: some of `evaluation.evaluate_options.METRICS`.  networks: those of `NETWORKS` that are needed.
    reference: real images; None where no metric looks at them.  reference_path: their file, which may hold statistics.
    resamples: behind intervals; None for the default.
    """

    metrics: tuple[str, ...]
    networks: dict[str, Describer]
    reference: Images | None
    reference_path: object
    resamples: int | None
    seed: int
    batch_size: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Measure":
        """What a command line asks for. Raises ValueError or FileNotFoundError if something is missing for it."""
        metrics = chosen_metrics(args.metrics, args.suite)
        for metric in metrics:
            if not any(metric in known for known in NETWORKS.values()):
                raise ValueError(f"--metrics {metric} is on no network: NETWORKS of evaluation/distributions.py")
            if metric in NEED_REFERENCE and args.reference is None:
                raise ValueError(f"--metrics {metric} needs --reference: real images, or their statistics")
        reference = None
        if args.reference is not None and needs_images(metrics, args.reference):
            reference = open_images(args.reference)
        device = resolve_device(args.device) if metrics else torch.device("cpu")
        networks = {
            name: load_network(name, args, device, spatial="sfid" in metrics)
            for name, known in NETWORKS.items()
            if set(known).intersection(metrics)
        }
        if "inception" in networks and args.reference is not None:
            check_statistics(args.reference)
        return cls(metrics, networks, reference, args.reference, args.bootstrap, args.seed, args.batch_size)

    def figures(self, images: Images, prompts: Sequence[str] | None = None) -> tuple[dict, list[str]]:
        """All figures of `metrics`, each with its interval under `NAME_ci95`, and cautions about the images.

        prompts: of every image, for clip-score. Raises ValueError if it is missing for that.
        """
        figures: dict = {}
        cautions: list[str] = []
        watch = guards.Watch(images)
        for name in self.networks:
            watch = guards.Watch(images)
            described = self._describe(name, watch, name, len(images))
            found, said = self.figures_of(name, described, prompts)
            figures |= found
            cautions += said
        if self.networks:
            cautions = [*image_cautions(images), *watch.cautions(), *self.reference_cautions(watch.sizes), *cautions]
        return figures, cautions

    def figures_of(
        self, name: str, described: Described, prompts: Sequence[str] | None = None
    ) -> tuple[dict, list[str]]:
        """The figures on one of `networks`, from images it has described, and cautions about them."""
        parts = {"scenes": self._scenes, "inception": self._inception, "dinov2": self._dinov2}
        return self._clip(described, prompts) if name == "clip" else parts[name](described)

    def settings(self) -> dict:
        """What decides the figures: extractors with digests of their weights, reference, protocol, resamples."""
        facts: dict = {"metrics": list(self.metrics), "bootstrap_resamples": self.resamples}
        facts["extractors"] = {network.name: network.digest for network in self.networks.values()}
        if self.reference is not None:
            facts["reference_n"] = len(self.reference)
        elif "fd-scenes" in self.metrics:
            facts["fd_scenes_reference"] = f"{scene_reference().n} fresh renders, all compositions, tags alike"
        if self.reference_path is not None and Path(self.reference_path).suffix == ".npz":
            facts["reference_digest"] = file_digest(self.reference_path)
        if "inception" in self.networks:
            facts["protocol"] = "TensorFlow 1 resize to 299, pool_3, IS without bias"
        if "is" in self.metrics:
            facts["is_parts"] = PARTS
        return facts

    def cautions(self, n: int, tags: Sequence[str] | None) -> list[str]:
        """What a reader of the figures must know of `n` images of these tags, one line each."""
        lines = guards.few_cautions([m for m in self.metrics if m in ("fid", "sfid", "fd-dinov2")], n)
        lines += guards.few_cautions([m for m in self.metrics if m == "fd-scenes"], n, FEW)
        if "fd-scenes" in self.metrics and self.reference is None and tags is not None:
            counts = Counter(tags)
            if len({counts[tag] for tag in TAGS}) > 1:
                lines.append("fd-scenes compares with all six tags alike, and these images are not spread like that")
        return lines

    def _describe(self, name: str, images: Iterable[np.ndarray], what: str, count: int) -> Described:
        return describe_all(self.networks[name], progress(images, what, count), batch_size=self.batch_size)

    def _described_reference(self, name: str) -> Described:
        return self._describe(name, self.reference, f"{name}: reference", len(self.reference))

    def reference_cautions(self, sizes: Counter) -> list[str]:
        """What the files, the number and the sizes of reference images say beside images of `sizes`."""
        if self.reference_path is None or not holds_images(self.reference_path):
            return []
        reference = self.reference or open_images(self.reference_path)
        lines = guards.file_cautions(reference.paths, "reference images") if isinstance(reference, FileImages) else []
        if self.reference is not None:
            of_images = {"fid", "sfid"} - {name for name in ("fid", "sfid") if self._is_stored(name)}
            for enough, names in ((guards.ENOUGH, {"fd-dinov2", *of_images}), (FEW, {"fd-scenes"})):
                few = [metric for metric in self.metrics if metric in names]
                lines += guards.few_cautions(few, len(reference), enough, what="reference images")
        return lines + guards.size_cautions(sizes, image_sizes(reference))

    def _is_stored(self, metric: str) -> bool:
        return stored_moments(self.reference_path, spatial=metric == "sfid") is not None

    def _scenes(self, described: Described) -> tuple[dict, list[str]]:
        figures: dict = {}
        if "fd-scenes" in self.metrics and self.reference is not None:
            reference = moments(self._described_reference("scenes").features)
            figures |= frechet_figures("fd_scenes", described.features, reference, self.resamples)
        elif "fd-scenes" in self.metrics:
            figures |= frechet_figures("fd_scenes", described.features, scene_reference(), self.resamples)
            fresh = (render(scene) for scene in fresh_scenes(len(described), self.seed))
            renders = self._describe("scenes", fresh, "fresh renders", len(described))
            figures["fd_scenes_of_as_many_renders"] = frechet_distance(moments(renders.features), scene_reference())
        if "is-scenes" in self.metrics:
            value = inception_score(described.log_posterior)[0]
            figures["is_scenes"] = value
            resamples = 200 if self.resamples is None else self.resamples
            if resamples:
                interval = inception_score_interval(described.log_posterior, value, resamples=resamples)
                figures["is_scenes_ci95"] = interval
        return figures, []

    def _inception(self, described: Described) -> tuple[dict, list[str]]:
        reference = Reference()
        if self.reference_path is not None:
            real = self._described_reference("inception") if self.reference is not None else None
            reference = inception_reference(self.reference_path, real)
        found, cautions = inception_figures(
            self.metrics, described, reference, seed=self.seed, resamples=self.resamples
        )
        if {"fid", "sfid"} <= {*self.metrics} and self._is_stored("fid") != self._is_stored("sfid"):
            here, there = ("fid", "sfid") if self._is_stored("fid") else ("sfid", "fid")
            cautions.append(
                f"{here} is against the statistics that {self.reference_path} holds, {there} against those of its "
                f"{len(self.reference)} images"
            )
        return found, cautions

    def _dinov2(self, described: Described) -> tuple[dict, list[str]]:
        reference = moments(self._described_reference("dinov2").features)
        return frechet_figures("fd_dinov2", described.features, reference, self.resamples), []

    def _clip(self, described: Described, prompts: Sequence[str] | None) -> tuple[dict, list[str]]:
        figures: dict = {}
        if "clip-score" in self.metrics:
            if prompts is None:
                raise ValueError("--metrics clip-score needs the prompts of the images: a GenEval tree and --suite")
            scores = clip_scores(described.features, self.networks["clip"].texts(prompts))
            figures |= {"clip_score": float(scores.mean()), "clip_score_ci95": mean_interval(scores.numpy())}
        if "cmmd" in self.metrics:
            figures["cmmd"] = cmmd(described.features, self._described_reference("clip").features)
        return figures, []


def check_statistics(path: str | Path) -> None:
    """Raise ValueError if a reference npz holds statistics that are no covariances, or not of Inception's features."""
    for spatial, width in ((False, POOL_WIDTH), (True, SPATIAL_WIDTH)):
        found = stored_moments(path, spatial=spatial)
        if found is not None and len(found.mean) != width:
            raise ValueError(f"npz {path} holds statistics of {len(found.mean)} features, and Inception's are {width}")


def image_cautions(images: Images) -> list[str]:
    """What files, stored seeds and stored labels say about a set."""
    if isinstance(images, FileImages):
        return [*guards.file_cautions(images.paths), *guards.seed_cautions(guards.stored_seeds(images.paths))]
    labels = images.labels.tolist() if isinstance(images, NpzImages) and images.labels is not None else None
    if labels is None:
        return []
    given = [label for label in labels if label >= 0]
    lines = [f"{len(labels) - len(given)} of {len(labels)} labels (arr_1) are below 0: none"] if given != labels else []
    if max(given) > 10 * len(given):  # ids of a data set: only those that are there are known
        place = {label: number for number, label in enumerate(sorted({*given}))}
        given = [place[label] for label in given]
    lines += guards.count_cautions(given, max(given) + 1)
    if guards.is_class_sorted(labels):
        lines.append("the npz is sorted by class: evaluators that take IS over parts in file order get far too little")
    return lines


def load_network(name: str, args: argparse.Namespace, device: torch.device, *, spatial: bool) -> Describer:
    """The describer of a key of `NETWORKS`. Raises as its loading does."""
    if name == "scenes":
        return load_scene_features().to(device)
    if name == "inception":
        return InceptionFeatures.load(args.inception_weights, device, spatial=spatial)
    return DinoFeatures(args.dino, device) if name == "dinov2" else ClipFeatures(args.clip, device)


def chosen_metrics(text: str | None, suite: str | None, known: Sequence[str] = METRICS) -> tuple[str, ...]:
    """The metrics of a comma-separated list; those of the scenes by default for the scenes suite, none otherwise.

    Raises ValueError if one is not of the `known` ones.
    """
    if text is None:
        return ("fd-scenes", "is-scenes") if suite == "scenes" else ()
    chosen = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    if not chosen:
        raise ValueError(f"--metrics must be of {', '.join(known)}, got {text!r}")
    unknown = [metric for metric in chosen if metric not in known]
    if unknown:
        raise ValueError(f"--metrics must be of {', '.join(known)}, got {', '.join(unknown)}")
    return chosen
