"""The network of FD-scenes and IS-scenes: trained on drawn scenes (`train.train_features`), shipped here.

Shapes: B images, h w pixels, c channels of a feature map, D features, P pairs of a shape and a colour.
"""

import itertools
import json
from pathlib import Path

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from evaluation.features import Described, weights_digest
from evaluation.frechet import Moments
from evaluation.scenes import CANVAS, COLOURS, SHAPES
from tokenizer.resize import average

SHIPPED = Path(__file__).parent / "scene_features.safetensors"
SIDE = int(CANVAS)  # pixels along the side of the images the scenes network reads
WIDTHS = (16, 32, 64, 128)  # channels at 64, 32, 16 and 8 cells a side
FEATURE_SCALE = 10.0  # of the features of FD-scenes, so that its values are of a handy size


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
            x = average(x, (SIDE, SIDE)).round()
        last = self.maps(x.div(127.5).sub(1))[-1]
        logits = self.head(last).cpu().double().split((1, len(SHAPES), len(COLOURS)), dim=1)
        return Described(last.cpu().double().mean((2, 3)) * FEATURE_SCALE, pair_posterior(*logits))


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
