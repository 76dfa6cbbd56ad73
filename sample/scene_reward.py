"""The scenes reward: how likely a picture, finished or not, shows its scenes caption.

A small network, trained by `python -m train.train_reward`, says of 8 x 8 cells whether an object is centred there, how
likely that is whole, its shape, colour, place and size. What the caption asks for is then worked out from these
probabilities. It was trained on renders and their
reconstructions, labelled by what was drawn; it is no part of the judge that scores results.

Shapes: B images, h w pixels, N objects of an image (peaks among its cells), F numbers of a cell, S shapes, C colours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from sample.rewards import Prompts, eval_without_gradients, texts
from sample.scene_words import COLOURS, COUNTS, RELATION_THRESHOLD, RELATIONS, SHAPES
from tokenizer.resize import average

SHIPPED = Path(__file__).parent / "scene_reward.safetensors"
SIDE = 64  # pixels along the side of the images it reads
CELLS = 8  # along a side
CHANNELS = (24, 40, 80, 128)  # at 64, 32, 16 and 8 cells a side
DEPTHS = (0, 1, 1, 1)  # residual blocks there
SAYS = (1, 1, len(SHAPES), len(COLOURS), 3)  # of a cell: object there, whole, shape, colour; x, y from its centre, size
MOST = 8  # objects looked at, the likeliest
BLUR = 0.05  # a relation holds from GenEval's threshold on, give or take

_THING = rf"an? (?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"{_THING}(?: (and|{'|'.join(RELATIONS)}) {_THING})?")
_COUNTED = re.compile(rf"({'|'.join(COUNTS)}) (?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})(?:s|(?<=s)es)")


@dataclass(frozen=True)
class Caption:
    """What a caption names: one thing `count` times, or two things, each a colour (or None) and a shape."""

    things: tuple[tuple[str | None, str], ...]
    count: int = 1
    relation: str | None = None

    @classmethod
    def of(cls, text: str) -> Caption:
        """Read a caption of `evaluation.scenes`, or of things counted that have a colour, too.

        Raises:
            ValueError: on any other text.
        """
        words = " ".join(text.lower().split())
        if match := _COUNTED.fullmatch(words):
            return cls(((match[2], match[3]),), COUNTS[match[1]])
        if match := _CAPTION.fullmatch(words):
            things = ((match[1], match[2]), (match[4], match[5]))[: 1 + (match[3] is not None)]
            return cls(things, relation=match[3] if match[3] in RELATIONS else None)
        raise ValueError(f"reward scenes reads captions like 'a red star left of a ring'; cannot read {text!r}")


@dataclass(frozen=True)
class Objects:
    """What a network sees in images, object by object: B images, N objects.

    Attributes:
        there_BN: probability that there is an object.
        whole_BN: that it is whole, if there is one.
        shape_BNS, colour_BNC: that it has a shape, a colour.
        centre_BN2, size_BN: its place (x, y) and diameter, in cells.
    """

    there_BN: torch.Tensor
    whole_BN: torch.Tensor
    shape_BNS: torch.Tensor
    colour_BNC: torch.Tensor
    centre_BN2: torch.Tensor
    size_BN: torch.Tensor

    def like(self, thing: tuple[str | None, str], row: int) -> torch.Tensor:
        """Probabilities that the objects of an image are whole ones of this colour (or any) and shape: (N,)."""
        colour, shape = thing
        found = self.there_BN[row] * self.whole_BN[row] * self.shape_BNS[row, :, SHAPES.index(shape)]
        return found if colour is None else found * self.colour_BNC[row, :, list(COLOURS).index(colour)]

    def related(self, relation: str, row: int) -> torch.Tensor:
        """How surely each object stands in a relation to each other one, by GenEval's rule: (N, N) in [0, 1]."""
        centre, size = self.centre_BN2[row], self.size_BN[row]
        offset = centre[:, None] - centre[None, :]
        shrunk = offset.sign() * (offset.abs() - 0.1 * (size[:, None] + size[None, :])[..., None]).clamp(min=0)
        axis, sign = RELATIONS[relation]
        vector = sign * shrunk[..., axis] / offset.norm(dim=-1).clamp(min=1e-6)
        return ((vector - RELATION_THRESHOLD) / BLUR).sigmoid()

    def likelihood(self, caption: Caption, row: int) -> torch.Tensor:
        """Probability that an image shows a caption, objects taken as independent: a scalar."""
        found = [self.like(thing, row) for thing in caption.things]
        if caption.count > 1:
            return exactly(found[0], self.there_BN[row] * (1 - self.whole_BN[row]), caption.count)
        if caption.relation is not None:
            pairs = found[0][:, None] * found[1][None, :] * self.related(caption.relation, row)
            return 1 - (1 - pairs).prod()
        return torch.stack([1 - (1 - each).prod() for each in found]).prod()


def exactly(good_N: torch.Tensor, bad_N: torch.Tensor, count: int) -> torch.Tensor:
    """Probability that just `count` of N things are good ones and none is a bad one: a scalar. A thing is good, bad or
    neither, independently of the others.
    """
    found = good_N.new_zeros(count + 1)
    found[0] = 1.0
    for good, bad in zip(good_N, bad_N):
        found = found * (1 - good - bad).clamp(min=0) + good * torch.cat([found.new_zeros(1), found[:-1]])
    return found[count]


class SceneReward(nn.Module):
    """Convolutions that name the objects of 8 x 8 cells and say how whole they are."""

    name = "scenes"

    def __init__(self):
        super().__init__()
        levels = []
        for low, high, blocks in zip((3, *CHANNELS), CHANNELS, DEPTHS):
            levels += [_block(low, high, stride=1 if low == 3 else 2), *(Residual(high) for _ in range(blocks))]
        self.levels = nn.Sequential(*levels)
        self.head = nn.Conv2d(CHANNELS[-1], sum(SAYS), 1)

    def features(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, h, w), averaged to 64 x 64 if of another size, to (B, 128, 8, 8)."""
        x = images_BCHW.to(self.head.weight)
        if tuple(x.shape[-2:]) != (SIDE, SIDE):
            x = average(x, (SIDE, SIDE))
        return self.levels(x / 127.5 - 1)

    def cells(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, h, w) to what is said of every cell (B, F, 8, 8), see `SAYS`: logits, places, sizes."""
        return self.head(self.features(images_BCHW))

    def objects(self, images_BCHW: torch.Tensor) -> Objects:
        """uint8 (B, 3, h, w) to the likeliest objects: peaks among the cells, with what their neighbours add."""
        said = self.cells(images_BCHW).float()
        there = said[:, :1].sigmoid()
        peak = there == F.max_pool2d(there, 3, stride=1, padding=1)
        mass = (F.avg_pool2d(there, 3, stride=1, padding=1) * 9).clamp(max=1) * peak
        there_BN, places_BN = mass.flatten(1).topk(MOST)
        cells_BFM = said.flatten(2)
        cells_BNF = cells_BFM.gather(2, places_BN[:, None].expand(-1, cells_BFM.shape[1], -1)).mT
        _, whole, shape, colour, where = cells_BNF.split(SAYS, dim=-1)
        corner = torch.stack([places_BN % CELLS, places_BN // CELLS], dim=-1)
        centre_BN2, size_BN = corner + 0.5 + where[..., :2], where[..., 2].clamp(min=0)
        return Objects(there_BN, whole[..., 0].sigmoid(), shape.softmax(-1), colour.softmax(-1), centre_BN2, size_BN)

    def check(self, prompts: Prompts) -> None:
        """Raise ValueError naming the first prompt that is no caption."""
        for text in texts(prompts):
            Caption.of(text)

    @torch.no_grad()
    def __call__(self, images_BCHW: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        """uint8 (B, 3, h, w) and B captions to probabilities (B,)."""
        captions: Sequence[Caption] = [Caption.of(text) for text in texts(prompts)]
        seen = self.objects(images_BCHW)
        seen = Objects(*(getattr(seen, name).cpu() for name in Objects.__dataclass_fields__))
        return torch.stack([seen.likelihood(caption, row) for row, caption in enumerate(captions)])


class SceneRewardFeatures:
    """The reward network's cells as features for clustering."""

    name = "scenes"

    def __init__(self, network: SceneReward):
        self.network = network

    @torch.no_grad()
    def __call__(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, h, w) to (B, 64, 128)."""
        return rearrange(self.network.features(images_BCHW), "b c h w -> b (h w) c").float().cpu()


def load_scene_reward(path: str | Path | None = None, *, device: Any = "cpu") -> SceneReward:
    """The shipped reward, or one from a file, in float32. Raises FileNotFoundError if there is none."""
    from safetensors.torch import load_file

    path = Path(path or SHIPPED)
    if not path.is_file():
        raise FileNotFoundError(f"reward scenes: no file {path}; make it with python -m train.train_reward")
    network = SceneReward()
    weights = load_file(path)
    network.load_state_dict({name: w.float() if w.is_floating_point() else w for name, w in weights.items()})
    return eval_without_gradients(network).to(device)


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside the identity; (B, C, h, w) to the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = _block(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x_BChw: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to the same."""
        return F.relu(x_BChw + self.second(self.first(x_BChw)))


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())
