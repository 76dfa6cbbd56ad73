"""Inception v3 of 2015-12-05, the network of FID, sFID, IS and KID, from its published weights.

Shapes: B images, h w pixels, c channels of a feature map.
"""

import hashlib
import pickle
from pathlib import Path

import torch
from einops import rearrange
from torch import nn

from evaluation.features import Described, weights_digest

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
SPATIAL_CHANNELS = 7  # of Mixed_6d that sFID looks at
POOL_WIDTH, SPATIAL_WIDTH = 2048, SPATIAL_CHANNELS * 17 * 17  # features of FID, and of sFID: 2023


class InceptionFeatures:
    """Inception v3 of 2015-12-05 through torchmetrics and torch-fidelity: pool_3 features (2048) and class posterior.

    Images are resized to 299 as TensorFlow 1 did (the ADM evaluator's protocol). The posterior's logits have no bias,
    as in that evaluator. The spatial features are the first 7 channels of Mixed_6d (ADM's mixed_6/conv), flattened
    position by position: 17 x 17 x 7 = 2023.

    network: torchmetrics' NoTrainInceptionV3 with the one feature "2048".
    spatial: whether to give the spatial features too.
    """

    name = "inception-2015-12-05"

    def __init__(self, network: nn.Module, *, spatial: bool = False) -> None:
        self.network, self.spatial = network, spatial

    @classmethod
    def load(
        cls, weights: str | Path | None = None, device: str | torch.device = "cpu", *, spatial: bool = False
    ) -> "InceptionFeatures":
        """With the published weights: of a local `weights-inception-2015-12-05-6726825d.pth`, or downloaded (None).

        Raises FileNotFoundError if `weights` does not exist, ValueError if it is another file (its SHA-256 begins with
        6726825d), torch-fidelity is missing, or the download fails.
        """
        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"inception_weights {weights} does not exist: give the .pth file of torch-fidelity")
        return cls(load_inception(weights or _downloaded(INCEPTION_URL)).to(device), spatial=spatial)

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of the weights."""
        return weights_digest(self.network)

    @torch.no_grad()
    def describe(self, images_BCHW: torch.Tensor) -> Described:
        """uint8 (B, 3, h, w) of any size."""
        weight, maps = self.network.fc.weight, []
        watcher = self.network.Mixed_6d.register_forward_hook(lambda module, given, out: maps.append(out))
        try:
            features = self.network(images_BCHW.to(weight.device))
        finally:
            watcher.remove()
        spatial = rearrange(maps[0][:, :SPATIAL_CHANNELS], "b c h w -> b (h w c)").float() if self.spatial else None
        return Described(features.cpu().double(), (features @ weight.T).cpu().double().log_softmax(1), spatial)


def load_inception(weights: str | Path, *, check: bool = True) -> nn.Module:
    """torchmetrics' Inception with TensorFlow 1's resize, from a file; `check`: its SHA-256 must be the published one.

    Raises ValueError if torch-fidelity is missing or the file is another.
    """
    if check:
        with Path(weights).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith("6726825d"):
            raise ValueError(
                f"inception_weights {weights} is not the published file: SHA-256 {found[:8]}, not 6726825d"
            )
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights), antialias=False)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"FID, IS and KID need the eval extra: pip install 'nextscale[eval]' ({_first_line(error)})"
        ) from None
    except (RuntimeError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(f"Inception weights cannot be had from {weights} ({_first_line(error)})") from None


def _downloaded(url: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix="6726825d")
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"Inception weights cannot be had by download: use --inception-weights FILE offline "
                f"({_first_line(error)})"
            ) from None
    return path


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
