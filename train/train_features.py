"""Train the scenes feature network: `python -m train.train_features`, minutes on two CPU cores.

It learns to say of each of 8 x 8 cells whether an object is centred there, and its shape and colour. Half of the images
are noised or slightly blurred, so that the missing noise of a reconstruction is not all it sees. Weights are rounded to
float16 before the reference statistics of FD-scenes are taken with them; both go into one file, written atomically.

Shapes: N images of the pool, B of a batch, 8 x 8 cells.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

from evaluation.command import Parser, check_least, in_one_line
from evaluation.features import describe_all
from evaluation.scene_features import SHIPPED, SIDE, SceneFeatures, load_scene_features
from evaluation.scenes import CANVAS, COLOURS, SHAPES, Scene, render, sample_scene
from sample.files import atomically, check_place

CELLS = 8  # along a side
IGNORED = -1  # target of cells without an object
POOL_STREAM, CHECK_STREAM, REFERENCE_STREAM = 1, 2, 3  # independent streams of scenes of one seed


def fresh_scenes(n: int, seed: int, stream: int) -> list[Scene]:
    """`n` scenes of all compositions; `stream` keeps training, check and reference apart."""
    rng = np.random.default_rng((seed, stream))
    return [sample_scene(rng, split="all") for _ in range(n)]


def targets(scenes: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Shape and colour index of the object centred in each cell, else `IGNORED`: (N, 8, 8) int64 twice."""
    shape = torch.full((len(scenes), CELLS, CELLS), IGNORED)
    colour = shape.clone()
    names = list(COLOURS)
    for i, scene in enumerate(scenes):
        for item in scene.objects:
            cell = i, int(item.cy * CELLS / CANVAS), int(item.cx * CELLS / CANVAS)
            shape[cell], colour[cell] = SHAPES.index(item.shape), names.index(item.colour)
    return shape, colour


def augment(images_BCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """uint8 (B, 3, h, w) to floats in [-1, 1]: a quarter blurred by 0.4 to 1 pixel, a quarter noised."""
    x = images_BCHW.float()
    quarter = len(x) // 4
    sigma = 0.4 + 0.6 * torch.rand((), generator=generator)
    taps = torch.exp(-torch.arange(-2, 3.0).square() / (2 * sigma**2))
    taps = taps / taps.sum()
    soft = F.pad(x[:quarter], (2, 2, 2, 2), mode="replicate")
    soft = F.conv2d(soft, taps.view(1, 1, 1, 5).expand(3, 1, 1, 5), groups=3)
    soft = F.conv2d(soft, taps.view(1, 1, 5, 1).expand(3, 1, 5, 1), groups=3)
    rough = x[quarter : 2 * quarter]
    level = 8 * torch.rand(len(rough), 1, 1, 1, generator=generator)
    rough = rough + level * torch.randn(rough.shape, generator=generator)
    return torch.cat([soft, rough, x[2 * quarter :]]).clamp(0, 255).div(127.5).sub(1)


def loss_of(network: SceneFeatures, x: torch.Tensor, shape: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of objects (summed over an image's cells) plus cross-entropies of shape and colour."""
    found, shape_logits, colour_logits = network.cells(x)
    present = (shape != IGNORED).float()[:, None]
    loss = F.binary_cross_entropy_with_logits(found, present, reduction="sum") / len(x)
    for logits, wanted in ((shape_logits, shape), (colour_logits, colour)):
        loss = loss + F.cross_entropy(logits, wanted, ignore_index=IGNORED)
    return loss


def train(*, steps: int, pool: int, batch_size: int = 64, lr: float = 4e-3, seed: int = 0) -> SceneFeatures:
    """Train on `pool` renders, mirrored at random (every shape is its own mirror image), for `steps` batches."""
    torch.manual_seed(seed)
    scenes = fresh_scenes(pool, seed, POOL_STREAM)
    images = torch.stack([_image(scene) for scene in tqdm(scenes, desc="rendering", disable=None)])
    shape, colour = targets(scenes)
    network = SceneFeatures().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    with tqdm(range(steps), desc="training", disable=None) as bar:
        for step in bar:
            rows = torch.randint(pool, (batch_size,), generator=generator)
            x, wanted = augment(images[rows], generator), (shape[rows], colour[rows])
            if step % 2:
                x, wanted = x.flip(-1), tuple(t.flip(-1) for t in wanted)
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(network, x, *wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return network.eval()


def _image(scene: Scene) -> torch.Tensor:
    return rearrange(torch.from_numpy(render(scene, SIDE)), "h w c -> c h w")


@torch.no_grad()
def check(network: SceneFeatures, n: int, seed: int) -> dict[str, float]:
    """Shares right on fresh renders: shape and colour at the centres of objects, and the number of objects."""
    scenes = fresh_scenes(n, seed, CHECK_STREAM)
    wanted_shape, wanted_colour = targets(scenes)
    right = {"shape": 0, "colour": 0, "pair": 0, "count": 0}
    for begin in range(0, n, 64):
        rows = slice(begin, begin + 64)
        images = torch.stack([_image(scene) for scene in scenes[rows]])
        found, shape, colour = network.cells(images.float().div(127.5).sub(1))
        there = wanted_shape[rows] != IGNORED
        shape_right = (shape.argmax(1) == wanted_shape[rows])[there]
        colour_right = (colour.argmax(1) == wanted_colour[rows])[there]
        right["shape"] += int(shape_right.sum())
        right["colour"] += int(colour_right.sum())
        right["pair"] += int((shape_right & colour_right).sum())
        right["count"] += int((found.sigmoid().sum((1, 2, 3)).round() == there.sum((1, 2))).sum())
    objects = sum(len(scene.objects) for scene in scenes)
    return {name: count / (n if name == "count" else objects) for name, count in right.items()}


def save(network: SceneFeatures, path: Path, reference: dict[str, torch.Tensor], facts: dict) -> None:
    """Write float16 weights, the reference statistics and `facts` (as metadata) to one safetensors file, atomically."""
    weights = {name: w.half() if w.is_floating_point() else w for name, w in network.state_dict().items()}
    content = {**weights, **reference}
    atomically(path, lambda partial: save_file(content, partial, metadata={"facts": json.dumps(facts)}))


def main(argv: Sequence[str] | None = None) -> int:
    """Train, check, take the reference statistics, write the file."""
    parser = Parser(prog="python -m train.train_features", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1200, help="batches of 64 (default 1200)")
    parser.add_argument("--pool", type=int, default=16000, help="renders to train on (default 16000)")
    parser.add_argument("--reference", type=int, default=20000, help="renders behind the statistics (default 20000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and weights (default 0)")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="file to write (default: the shipped one)")
    options = parser.parse_args(argv)
    with in_one_line(parser):
        check_least(options, steps=2, pool=2, reference=2, seed=0)
        check_place("--out", options.out, folder=False)
        run(options)
    return 0


def run(options: argparse.Namespace) -> None:
    """Train, check, take the reference statistics, write; nothing is written when it is interrupted."""
    start, out = time.perf_counter(), options.out
    facts = {"steps": options.steps, "pool": options.pool, "seed": options.seed, "reference_n": options.reference}
    network = train(steps=options.steps, pool=options.pool, seed=options.seed)
    draft = out.with_name(f".{out.name}.draft")
    save(network, draft, {}, facts)
    rounded = load_scene_features(draft)
    draft.unlink()
    facts["right"] = check(rounded, 2000, options.seed)
    print(", ".join(f"{name} {share:.4f}" for name, share in facts["right"].items()))
    scenes = fresh_scenes(options.reference, options.seed, REFERENCE_STREAM)
    bar = tqdm(scenes, desc="reference", disable=None)
    features = describe_all(rounded, (render(scene, SIDE) for scene in bar)).features
    reference = {"reference_mean": features.mean(0), "reference_covariance": torch.cov(features.T)}
    save(rounded, out, {name: t.float().contiguous() for name, t in reference.items()}, facts)
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
