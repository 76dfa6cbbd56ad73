"""Networks that describe images for distribution metrics: one trained on scenes, shipped here, and Inception.

Shapes: B images, h w pixels, c channels of a feature map, D features, P pairs of a shape and a colour.
"""

import hashlib
import itertools
import json
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from evaluation.frechet import Moments
from evaluation.guards import check_features
from evaluation.scenes import CANVAS, COLOURS, SHAPES

SHIPPED = Path(__file__).parent / "scene_features.safetensors"
SIDE = int(CANVAS)  # pixels along the side of the images the scenes network reads
WIDTHS = (16, 32, 64, 128)  # channels at 64, 32, 16 and 8 cells a side
FEATURE_SCALE = 10.0  # of the features of FD-scenes, so that its values are of a handy size


@dataclass(frozen=True)
class Described:
    """What a network says about N images: features (N, D) float64, and the log-posterior of its classes (N, P).

    spatial: features (N, S) float32 that keep positions, for sFID; None where nobody asked for them.
    """

    features: torch.Tensor
    log_posterior: torch.Tensor
    spatial: torch.Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence["Described"]) -> "Described":
        """The rows of all parts, in order, on the CPU."""
        spatial = None
        if parts[0].spatial is not None:
            spatial = torch.cat([part.spatial.cpu() for part in parts])
        features, log_posterior = (
            torch.cat([getattr(part, name).cpu() for part in parts]) for name in ("features", "log_posterior")
        )
        return cls(features, log_posterior, spatial)

    def __len__(self) -> int:
        return len(self.features)


class Describer(Protocol):
    """A network for distribution metrics: `describe` maps uint8 (B, 3, h, w) to `Described`, B rows each.

    name: as protocols call it.  digest: twelve hexadecimal digits of its weights.
    """

    name: str

    @property
    def digest(self) -> str: ...

    def describe(self, images_BCHW: torch.Tensor) -> Described: ...


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class SceneFeatures(nn.Module):
    """A small convolutional network that finds and names the objects of a scene.

    Four levels of 3x3 convolutions, `WIDTHS` channels at 64, 32, 16 and 8 cells a side. A linear head reads each of
    the 8 x 8 cells: whether an object is centred there, its shape (8) and its colour (10). From these:
    the features of FD-scenes are the last level averaged over its cells (D = 128), times `FEATURE_SCALE`;
    the classes of IS-scenes are the 80 pairs of shape and colour, and their posterior is that of one object of the
    image picked at random: cells weighted by how likely an object is centred in them;
    the feature maps of a perceptual loss are the four levels (`maps`).
    """

    name = "scenes"
    num_features = WIDTHS[-1]

    def __init__(self) -> None:
        super().__init__()
        levels = [_block(3, WIDTHS[0], 1)]
        for narrow, wide in itertools.pairwise(WIDTHS):
            levels.append(nn.Sequential(_block(narrow, wide, 2), _block(wide, wide, 1)))
        self.levels = nn.ModuleList(levels)
        self.head = nn.Conv2d(WIDTHS[-1], 1 + len(SHAPES) + len(COLOURS), 1)

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, 3, h, w) in [-1, 1] to four maps (B, c, h', w') at strides 1, 2, 4, 8; any h, w of 8 or more."""
        found = []
        for level in self.levels:
            x = level(x)
            found.append(x)
        return found

    def cells(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images in [-1, 1] to logits of every cell: object (B, 1, 8, 8), shape (B, 8, 8, 8), colour (B, 10, 8, 8)."""
        return self.head(self.maps(x)[-1]).float().split((1, len(SHAPES), len(COLOURS)), dim=1)

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of the weights."""
        return weights_digest(self)

    @torch.no_grad()
    def describe(self, images_BCHW: torch.Tensor) -> Described:
        """uint8 (B, 3, h, w) sRGB, averaged to 64 x 64 if of another size. Posterior classes: shape-major pairs.

        Raises ValueError if the images are not uint8.
        """
        if images_BCHW.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, got {images_BCHW.dtype}")
        x = images_BCHW.to(self.head.weight.device, torch.float32)
        if tuple(x.shape[-2:]) != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="area").round()
        last = self.maps(x.div(127.5).sub(1))[-1]
        logits = self.head(last).double().split((1, len(SHAPES), len(COLOURS)), dim=1)
        return Described(last.double().mean((2, 3)) * FEATURE_SCALE, pair_posterior(*logits))


def pair_posterior(object_B1hw: torch.Tensor, shape_Bshw: torch.Tensor, colour_Bchw: torch.Tensor) -> torch.Tensor:
    """Cell logits to the log-probability (B, 80) that an object picked at random is of a shape and colour."""
    weight = F.logsigmoid(object_B1hw)
    weight = weight - weight.logsumexp((1, 2, 3), keepdim=True)
    shape = rearrange(shape_Bshw.log_softmax(1), "b s h w -> b s 1 (h w)")
    colour = rearrange(colour_Bchw.log_softmax(1), "b c h w -> b 1 c (h w)")
    pairs = (shape + colour + rearrange(weight, "b 1 h w -> b 1 1 (h w)")).logsumexp(-1)
    return rearrange(pairs, "b s c -> b (s c)")


def scene_reference(path: str | Path = SHIPPED) -> Moments:
    """The statistics of fresh renders (all compositions, tags alike) that FD-scenes is measured from."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        mean, covariance = (file.get_tensor(f"reference_{name}").double() for name in ("mean", "covariance"))
    return Moments(mean, covariance, facts["reference_n"])


def load_scene_features(path: str | Path = SHIPPED) -> SceneFeatures:
    """The trained scenes network in eval mode, float32, gradients off. Raises FileNotFoundError without the file."""
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise FileNotFoundError(f"scene features {path} do not exist: make them with python -m train.train_features")
    network = SceneFeatures()
    weights = {name: w for name, w in load_file(path).items() if not name.startswith("reference_")}
    network.load_state_dict({name: w.float() if w.is_floating_point() else w for name, w in weights.items()})
    return network.eval().requires_grad_(False)


INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
SPATIAL_CHANNELS = 7  # of Mixed_6d that sFID looks at: 7 x 17 x 17 = 2023 features


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
        return Described(features.double(), (features @ weight.T).double().log_softmax(1), spatial)


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


def weights_digest(module: nn.Module) -> str:
    """Twelve hexadecimal digits that change with any weight of a network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def describe_all(describer: Describer, images: Iterable[np.ndarray], *, batch_size: int = 64) -> Described:
    """Describe a stream of uint8 (h, w, 3) images in batches of one size; rows in their order, on the CPU.

    Raises ValueError if there are none.
    """
    found: list[Described] = []
    batch: list[np.ndarray] = []

    def flush() -> None:
        described = describer.describe(rearrange(torch.from_numpy(np.stack(batch)), "b h w c -> b c h w"))
        check_features(described.features, first=sum(map(len, found)))
        found.append(Described.joined([described]))
        batch.clear()

    for image in images:
        if len(batch) == batch_size or (batch and batch[0].shape != image.shape):
            flush()
        batch.append(image)
    if batch:
        flush()
    if not found:
        raise ValueError("images must not be empty: there is nothing to describe")
    return Described.joined(found)
