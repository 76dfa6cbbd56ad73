"""What the scenes metrics say of images whose faults are known: `python -m evaluation.calibration`.

Fresh renders in several numbers show where the metrics start; blurred, repeated and incomplete ones show what moves
them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from evaluation.command import Parser, check_least, in_one_line
from evaluation.features import describe_all
from evaluation.frechet import (
    frechet_distance,
    frechet_interval,
    inception_score,
    inception_score_interval,
    moments,
)
from evaluation.judge import judge_report
from evaluation.report import command_of, result, table, write_result
from evaluation.scene_features import SceneFeatures, load_scene_features, scene_reference
from evaluation.scenes import TAGS, fresh_scenes, render

RESAMPLES = 200
LEAST = 120  # images in a set
Set = tuple[np.ndarray, list[dict]]  # (N, h, w, 3) uint8 images and the metadata of their captions


def blurred(images: np.ndarray, sigma: float) -> np.ndarray:
    """uint8 images (N, h, w, 3) under a Gaussian blur of `sigma` pixels."""
    soft = ndimage.gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0))
    return np.rint(soft).astype(np.uint8)


def faulty_sets(n: int, seed: int) -> dict[str, Set]:
    """Sets of images by what is wrong with them; `n` images (`LEAST` or more) each unless the name says otherwise."""
    scenes = fresh_scenes(n, seed)
    images = np.stack([render(scene) for scene in tqdm(scenes, desc="rendering", disable=None)])
    captions = [scene.metadata for scene in scenes]
    ringless = [i for i, scene in enumerate(scenes) if all(item.shape != "ring" for item in scene.objects)]
    turned = np.roll(np.arange(n), len(TAGS))  # each image gets another caption of its tag
    few = np.arange(n) % 60
    return {
        f"fresh renders, {n // 10} of them": (images[: n // 10], captions[: n // 10]),
        f"fresh renders, {n // 3} of them": (images[: n // 3], captions[: n // 3]),
        "fresh renders": (images, captions),
        "blurred by 0.5 pixels": (blurred(images, 0.5), captions),
        "blurred by 1 pixel": (blurred(images, 1.0), captions),
        "blurred by 2 pixels": (blurred(images, 2.0), captions),
        "another caption of the same tag": (images, [captions[i] for i in turned]),
        f"no rings, {len(ringless)} of them": (images[ringless], [captions[i] for i in ringless]),
        "60 images over and over": (images[few], [captions[i] for i in few]),
    }


def figures(network: SceneFeatures, images: np.ndarray, metadatas: Sequence[dict]) -> dict:
    """Score, FD-scenes and IS-scenes of a set, with 95 % intervals."""
    report = judge_report(images, metadatas)
    described = describe_all(network, images)
    distance = frechet_distance(moments(described.features), scene_reference())
    score = inception_score(described.log_posterior)[0]
    return {
        "n": len(images),
        "score": report["overall"],
        "score_ci95": report["overall_ci95"],
        "fd_scenes": distance,
        "fd_scenes_ci95": frechet_interval(described.features, scene_reference(), distance, resamples=RESAMPLES),
        "is_scenes": score,
        "is_scenes_ci95": inception_score_interval(described.log_posterior, score, resamples=RESAMPLES),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures of every set; write them if asked."""
    parser = Parser(prog="python -m evaluation.calibration", description=__doc__.split(":")[0])
    parser.add_argument("--n", type=int, default=6000, help="images in a set (default 6000)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the renders (default 1)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write FILE.json, and its table beside it")
    options = parser.parse_args(argv)
    with in_one_line(parser):
        check_least(options, n=LEAST, seed=0)
        sets = faulty_sets(options.n, options.seed)
        network, rows = load_scene_features(), []
        for name, (images, metadatas) in tqdm(sets.items(), desc="measuring", disable=None):
            rows.append({"images": name, **figures(network, images, metadatas)})
            print(table(rows[-1:], ["images", "score", "fd_scenes", "is_scenes"]), end="\n\n")
        if options.out is not None:
            command = command_of(parser, options)
            settings = {"bootstrap_resamples": RESAMPLES}
            write_result(options.out, result(rows, command=command, n=options.n, seeds=options.seed, settings=settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
