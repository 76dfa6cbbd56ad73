"""ADM's protocol (guided-diffusion's evaluator), which published ImageNet figures follow: its files and its figures.

A samples file holds `arr_0`, uint8 (N, h, w, 3), and maybe labels `arr_1`. A reference file holds `mu` (2048,),
`sigma`, `mu_s` (2023,), `sigma_s` of the whole data set, and in `arr_0` 10,000 images for precision and recall.

The figures: FID on pool_3, sFID on the first 7 channels of Mixed_6d, IS over consecutive parts of 5000 images without
the logits' bias, precision and recall with k = 3 between the 10,000 reference images and all samples.

Shapes: N images, D pool features, S spatial features.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from evaluation.coverage import neighbourhoods
from evaluation.features import Described
from evaluation.frechet import Moments, frechet_distance, inception_score_in_order, moments
from sample.files import atomically

PROTOCOL = "ADM: TensorFlow 1 resize to 299, pool_3, Mixed_6d[:7], IS without bias in parts of 5000, k = 3"


def adm_figures(described: Described, pool: Moments, spatial: Moments | None, reference: Described | None) -> dict:
    """`fid`, `is` and, where possible, `sfid`, `precision` and `recall` as ADM's evaluator prints them.

    described: the samples, in file order.  pool, spatial: statistics of the reference.  reference: its 10,000 images.
    """
    figures = {
        "fid": frechet_distance(moments(described.features), pool),
        "is": inception_score_in_order(described.log_posterior),
    }
    if spatial is not None and described.spatial is not None:
        figures["sfid"] = frechet_distance(moments(described.spatial), spatial)
    if reference is not None:
        found = neighbourhoods(described.features, reference.features)
        figures |= {name: found[name] for name in ("precision", "recall")}
    return figures


def write_samples(path: str | Path, images_NHWC: np.ndarray, labels_N: Sequence[int] | None = None) -> None:
    """A samples file. Raises ValueError unless the images are uint8 (N, h, w, 3) and there is a label for each."""
    if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[-1] != 3:
        raise ValueError(f"images must be uint8 (N, h, w, 3), got {images_NHWC.dtype} {images_NHWC.shape}")
    arrays = {"arr_0": images_NHWC}
    if labels_N is not None:
        if len(labels_N) != len(images_NHWC):
            raise ValueError(f"labels must be one an image, got {len(labels_N)} for {len(images_NHWC)} images")
        arrays["arr_1"] = np.asarray(labels_N, np.int64)
    _write(path, arrays)


def write_reference(path: str | Path, described: Described, images_NHWC: np.ndarray | None = None) -> None:
    """A reference file: statistics of the described images, and `images_NHWC` (10,000 of them) as `arr_0`."""
    own = moments(described.features)
    arrays = {"mu": own.mean.numpy(), "sigma": own.covariance.numpy()}
    if described.spatial is not None:
        spatial = moments(described.spatial)
        arrays |= {"mu_s": spatial.mean.numpy(), "sigma_s": spatial.covariance.numpy()}
    if images_NHWC is not None:
        arrays["arr_0"] = images_NHWC
    _write(path, arrays)


def shuffled_order(count: int, seed: int = 0) -> list[int]:
    """A fixed order of `count` images, for files whose parts must not be sorted by class."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def _write(path: str | Path, arrays: dict[str, np.ndarray]) -> None:
    def save(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez(file, **arrays)

    atomically(Path(path), save)
