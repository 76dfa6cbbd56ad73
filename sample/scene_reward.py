"""The scenes reward: a small network that says how likely a picture, finished or not, shows its scenes caption.

It was trained by `python -m train.train_reward` on renders and on their unfinished reconstructions, labelled by what
was drawn. It is no part of the judge that scores results, and knows nothing of it.

Shapes: B images, h w pixels, N cells of an image, D width, T words of a caption.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from sample.rewards import Prompts, eval_without_gradients, texts

SHIPPED = Path(__file__).parent / "scene_reward.safetensors"
SIDE = 64  # pixels along the side of the images it reads
CHANNELS = (16, 32, 64, 128)  # at 64, 32, 16 and 8 cells a side
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
GRAMMAR = ("a", "an", "and", "two", "three", "four", "left", "right", "of", "above", "below")
PLURALS = tuple(f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES)
WORDS = {word: i for i, word in enumerate((*GRAMMAR, *SHAPES, *PLURALS, *COLOURS), start=1)}  # 0 is padding
LONGEST = 10  # words: "a red star left of a blue heart" has 8


def word_ids(captions: Sequence[str]) -> torch.Tensor:
    """Captions as (B, LONGEST) int64 word numbers, padded with 0.

    Raises:
        ValueError: if one is empty, too long or has a word that scenes captions do not have.
    """
    rows = torch.zeros(len(captions), LONGEST, dtype=torch.int64)
    for row, caption in zip(rows, captions):
        words = caption.lower().split()
        unknown = [word for word in words if word not in WORDS]
        if unknown or not 0 < len(words) <= LONGEST:
            raise ValueError(
                f"reward scenes reads captions of scenes, 1 to {LONGEST} words; cannot read {unknown or [caption]}"
            )
        row[: len(words)] = torch.tensor([WORDS[word] for word in words])
    return rows


class SceneReward(nn.Module):
    """Convolutions find and name the objects of 8 x 8 cells; words then look at the cells and at the object counts.

    The convolutions are those of the scenes feature network (same names). Args: width D, layers of attention.
    """

    name = "scenes"

    def __init__(self, width: int = 128, layers: int = 3):
        super().__init__()
        levels = [_block(3, CHANNELS[0], 1)]
        levels += [
            nn.Sequential(_block(low, high, 2), _block(high, high, 1)) for low, high in itertools.pairwise(CHANNELS)
        ]
        self.levels = nn.ModuleList(levels)
        self.head = nn.Conv2d(CHANNELS[-1], 1 + len(SHAPES) + len(COLOURS), 1)
        pairs = len(SHAPES) * len(COLOURS)
        self.of_cell = nn.Linear(CHANNELS[-1] + self.head.out_channels, width)
        self.of_counts = nn.Linear(pairs + len(SHAPES) + len(COLOURS) + 1, width)
        self.place = nn.Parameter(torch.randn((SIDE // 8) ** 2, width) * 0.1)
        self.word = nn.Embedding(len(WORDS) + 1, width, padding_idx=0)
        self.order = nn.Parameter(torch.randn(LONGEST, width) * 0.1)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 1)

    def cells(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, h, w), averaged to 64 x 64 if of another size, to cells (B, 64, 147): features, then logits."""
        x = images_BCHW.to(self.out.weight)
        if tuple(x.shape[-2:]) != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="area")
        x = x / 127.5 - 1
        for level in self.levels:
            x = level(x)
        return rearrange(torch.cat([x, self.head(x)], dim=1), "b c h w -> b (h w) c")

    def logits(self, cells_BNF: torch.Tensor, words_BT: torch.Tensor) -> torch.Tensor:
        """Cells and word numbers to the log-odds (B,) that the caption holds."""
        memory = torch.cat([self.of_cell(cells_BNF) + self.place, self.of_counts(_counts(cells_BNF))[:, None]], dim=1)
        x, padding = self.word(words_BT) + self.order, words_BT == 0
        for layer in self.layers:
            x = layer(x, memory, tgt_key_padding_mask=padding)
        kept = (~padding)[..., None].to(x.dtype)
        return self.out((self.norm(x) * kept).sum(dim=1) / kept.sum(dim=1))[:, 0]

    @torch.no_grad()
    def __call__(self, images_BCHW: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        """uint8 (B, 3, h, w) and B captions to probabilities (B,)."""
        words = word_ids(texts(prompts)).to(images_BCHW.device)
        return self.logits(self.cells(images_BCHW), words).sigmoid().float().cpu()


class SceneRewardFeatures:
    """The reward network's cells as features for clustering."""

    name = "scenes"

    def __init__(self, network: SceneReward):
        self.network = network

    @torch.no_grad()
    def __call__(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, h, w) to (B, 64, 128)."""
        return self.network.cells(images_BCHW)[..., : CHANNELS[-1]].float().cpu()


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


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def _counts(cells_BNF: torch.Tensor) -> torch.Tensor:
    """Expected numbers of objects in an image: of each pair, shape and colour, and of all (B, 99)."""
    there, shape, colour = cells_BNF[..., CHANNELS[-1] :].split((1, len(SHAPES), len(COLOURS)), dim=-1)
    there, shape, colour = there.sigmoid(), shape.softmax(dim=-1), colour.softmax(dim=-1)
    pairs = torch.einsum("bno,bns,bnc->bsc", there, shape, colour)
    return torch.cat([pairs.flatten(1), pairs.sum(2), pairs.sum(1), there.sum(1)], dim=1)
