"""Train the scenes reward: `python -m train.train_reward --tokenizer FOLDER`, a quarter of an hour of two CPU cores.

The network learns to say of every cell of a picture what is centred there, and how likely that is whole. In most
pictures an object came out wrong, slightly or badly: drawn so (`train.spoil`), or with other scenes' tokens among its
own. How wrong is measured against the clean picture of the same scene, and never by the judge. With a tokenizer the
pictures are reconstructions, each finished and after an earlier scale, so that the reward can read what a search shows
it.

Shapes: N pictures of the pool, B of a batch, M cells of a picture (8 x 8), F numbers said of a cell.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

from evaluation.command import Parser, check_least, in_one_line
from evaluation.reward_accuracy import auc
from evaluation.scenes import CANVAS, COLOURS, SHAPES, Scene, render, sample_scene
from sample.files import atomically, check_place
from sample.load import resolve_device, resolve_dtype
from sample.rewards import to_images
from sample.scene_reward import CELLS, SAYS, SHIPPED, SIDE, SceneReward, load_scene_reward
from tokenizer.model import MultiScaleVQ
from train.spoil import damage, scramble, spoil, wholeness

SPOILED, SCRAMBLED = 0.4, 0.3  # shares of scenes drawn wrongly, and of scenes with wrong tokens
DRAWN = 0.1  # share of finished pictures that are as drawn and not reconstructed
TOGETHER = 64  # scenes drawn and tokenised at once
WHOLE = 2.0  # weight of the wholeness in the loss
POOL_STREAM, CHECK_STREAM = 11, 12  # independent streams of scenes of one seed


# --- the pool --------------------------------------------------------------------------------------------------------


@dataclass
class Pool:
    """Pictures to learn from.

    Attributes:
        images_NCHW: uint8 (N, 3, 64, 64).
        cells_NMF: float32 (N, 64, 7), of each cell: whether an object is centred there, how likely that is whole, its
            shape and colour (numbers), its centre's offset from the cell's (x, y; in cells) and its diameter (in
            cells). All 0 without an object.
    """

    images_NCHW: torch.Tensor
    cells_NMF: torch.Tensor

    def __len__(self) -> int:
        return len(self.images_NCHW)

    @classmethod
    def join(cls, pools: Sequence[Pool]) -> Pool:
        """Several as one."""
        return cls(torch.cat([p.images_NCHW for p in pools]), torch.cat([p.cells_NMF for p in pools]))


def cells_of(scene: Scene, wholes: np.ndarray) -> torch.Tensor:
    """What the cells of a picture hold, as in `Pool`: (64, 7). `wholes`: how likely each object is whole."""
    found = torch.zeros(CELLS, CELLS, 7)
    for item, whole in zip(scene.objects, wholes):
        x, y = item.cx * CELLS / CANVAS, item.cy * CELLS / CANVAS
        says = (1.0, whole, SHAPES.index(item.shape), list(COLOURS).index(item.colour))
        found[int(y), int(x)] = torch.tensor((*says, x % 1 - 0.5, y % 1 - 0.5, item.diameter * CELLS / CANVAS))
    return rearrange(found, "h w f -> (h w) f")


@torch.no_grad()
def reconstruct(
    rng: np.random.Generator,
    vqvae: MultiScaleVQ,
    pictures: Sequence[torch.Tensor],
    scenes: Sequence[Scene],
    *,
    scale: int,
    scrambled: Sequence[int],
) -> list[torch.Tensor]:
    """Clean and drawn pictures as the tokenizer gives them: both finished, and the drawn ones after a scale.

    Args:
        pictures: the clean and the drawn, uint8 (B, 3, h, w) each.
        scrambled: which of the drawn get wrong tokens.
    """
    clean, drawn = (vqvae.image_to_tokens(x.to(vqvae.device).float() / 127.5 - 1) for x in pictures)
    drawn = scramble(rng, drawn, vqvae.schedule, scenes, scrambled)
    sums = vqvae.quantizer.partial_sums(drawn, vqvae.schedule)
    found = vqvae.quantizer.partial_sums(clean, vqvae.schedule)[-1], sums[-1], sums[scale]
    return [to_images(vqvae.decode(f_hat)).cpu() for f_hat in found]


def make_batch(rng: np.random.Generator, n: int, *, vqvae: MultiScaleVQ | None, scale: int | None) -> Pool:
    """Pictures of `n` scenes: as drawn without a tokenizer; else after `scale`, or finished (a few as drawn) and after
    an earlier scale, the later the likelier (2 n).
    """
    scenes = [sample_scene(rng, split="train") for _ in range(n)]
    clean = [render(scene, SIDE) for scene in scenes]
    wrong = SPOILED if vqvae is not None else SPOILED + SCRAMBLED
    drawn = [spoil(rng, scene) if rng.random() < wrong else image for scene, image in zip(scenes, clean)]
    compared = [rearrange(torch.from_numpy(np.stack(x)), "b h w c -> b c h w") for x in (clean, drawn)]
    pictures = [compared[1]]
    if vqvae is not None:
        few, last = round(DRAWN * n) if scale is None else 0, len(vqvae.schedule) - 1
        after = scale if scale is not None else int(last * max(rng.random(), rng.random()))
        rest = [i for i in range(few, n) if drawn[i] is clean[i]]
        chosen = [i for i in rest if rng.random() < SCRAMBLED / (1 - SPOILED)]
        true, finished, partial = reconstruct(rng, vqvae, compared, scenes, scale=after, scrambled=chosen)
        whole = torch.cat([compared[1][:few], finished[few:]])
        compared, pictures = [true, finished], [partial] if scale is not None else [whole, partial]
    good, made = (rearrange(x, "b c h w -> b h w c").numpy() for x in compared)
    damages = (damage(*three) for three in zip(made, good, scenes))
    cells = torch.stack([cells_of(scene, wholeness(found)) for scene, found in zip(scenes, damages)])
    return Pool.join([Pool(images, cells) for images in pictures])


def make_pool(n: int, seed: int, stream: int, *, vqvae: MultiScaleVQ | None, scale: int | None = None) -> Pool:
    """Pictures of `n` scenes, see `make_batch`."""
    rng, batches = np.random.default_rng((seed, stream)), []
    with tqdm(total=n, desc="drawing", unit="scene", disable=None) as bar:
        for begin in range(0, n, TOGETHER):
            batches.append(make_batch(rng, min(TOGETHER, n - begin), vqvae=vqvae, scale=scale))
            bar.update(min(TOGETHER, n - begin))
    return Pool.join(batches)


def mirrored(pool: Pool) -> Pool:
    """Left and right exchanged: every shape is its own mirror image."""
    cells = rearrange(pool.cells_NMF, "n (h w) f -> n h w f", h=CELLS).flip(2)
    cells = cells * cells.new_tensor([1, 1, 1, 1, -1, 1, 1])
    return Pool(pool.images_NCHW.flip(-1), rearrange(cells, "n h w f -> n (h w) f"))


# --- training --------------------------------------------------------------------------------------------------------


def loss_of(said_BFhw: torch.Tensor, cells_BMF: torch.Tensor) -> torch.Tensor:
    """How far what is said of cells is from what they hold, averaged over objects: a scalar."""
    said_BMF = rearrange(said_BFhw.float(), "b f h w -> b (h w) f")
    centred = cells_BMF[..., 0] > 0
    found = F.binary_cross_entropy_with_logits(said_BMF[..., 0], cells_BMF[..., 0], reduction="sum") / centred.sum()
    _, whole, shape, colour, where = said_BMF[centred].split(SAYS, dim=-1)
    true = cells_BMF[centred]
    found = found + WHOLE * F.binary_cross_entropy_with_logits(whole[:, 0], true[:, 1])
    found = found + F.cross_entropy(shape, true[:, 2].long()) + F.cross_entropy(colour, true[:, 3].long())
    return found + F.l1_loss(where, true[:, 4:])


def train(network: SceneReward, pool: Pool, *, steps: int, seed: int, batch: int = 64, lr: float = 3e-3) -> None:
    """Fit the network in place. `batch` is in pictures."""
    device = network.head.weight.device
    network.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    with tqdm(range(steps), desc="training", disable=None) as bar:
        for step in bar:
            rows = torch.randint(len(pool), (batch,), generator=generator)
            shown = Pool(pool.images_NCHW[rows], pool.cells_NMF[rows])
            shown = mirrored(shown) if step % 2 else shown
            with torch.autocast(device.type, torch.bfloat16):
                images = shown.images_NCHW.to(device).contiguous(memory_format=torch.channels_last)
                said = network.cells(images)
            loss = loss_of(said, shown.cells_NMF.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    network.eval()


@torch.no_grad()
def check(network: SceneReward, pool: Pool) -> dict[str, float]:
    """Of the objects of fresh pictures: `named`, the share of whole ones whose shape and colour are told right, and
    `auc`, how often a whole one is thought likelier whole than a broken one.
    """
    device = network.head.weight.device
    said = torch.cat([network.cells(images.to(device)).cpu() for images in pool.images_NCHW.split(64)])
    true = pool.cells_NMF[pool.cells_NMF[..., 0] > 0]
    said = rearrange(said, "b f h w -> b (h w) f")[pool.cells_NMF[..., 0] > 0]
    _, whole, shape, colour, _ = said.split(SAYS, dim=-1)
    right = (shape.argmax(-1) == true[:, 2]) & (colour.argmax(-1) == true[:, 3])
    sound = true[:, 1] > 0.5
    return {"named": float(right[sound].float().mean()), "auc": auc(whole[:, 0].numpy(), sound.numpy())}


def save(network: SceneReward, path: Path, facts: dict) -> None:
    """Write float16 weights and `facts` (as metadata) to one safetensors file, atomically."""
    weights = {name: (w.half() if w.is_floating_point() else w).cpu() for name, w in network.state_dict().items()}
    atomically(path, lambda partial: save_file(weights, partial, metadata={"facts": json.dumps(facts)}))


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, train, check on fresh scenes, write the file."""
    parser = Parser(prog="python -m train.train_reward", description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", type=Path, help="folder of a scenes tokenizer: also learn unfinished pictures")
    parser.add_argument("--steps", type=int, default=7000, help="batches of 64 pictures (default 7000)")
    parser.add_argument("--pool", type=int, default=16000, help="scenes to train on (default 16000)")
    parser.add_argument("--check", type=int, default=1000, help="fresh pictures to check on (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and weights (default 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (cpu)")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="file to write (default: the shipped one)")
    options = parser.parse_args(argv)
    with in_one_line(parser):
        check_options(options)
        run(options)
    return 0


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError on options that make no sense, naming them."""
    check_least(options, steps=2, pool=2, check=2, seed=0)
    if options.tokenizer is not None and not (options.tokenizer / "config.json").is_file():
        raise ValueError(f"--tokenizer {options.tokenizer} has no config.json")
    if options.tokenizer is None and options.out == SHIPPED:
        raise ValueError("--tokenizer is needed to replace the shipped reward; give it, or another --out")
    check_place("--out", options.out, folder=False)


def run(options: argparse.Namespace) -> None:
    """Draw, train, check, write; nothing is written when it is interrupted."""
    start, vqvae, device = time.perf_counter(), None, resolve_device(options.device)
    if options.tokenizer is not None:
        dtype = resolve_dtype("auto", device, fastest=True)
        vqvae = MultiScaleVQ.from_pretrained(options.tokenizer, torch_dtype=dtype).eval().to(device)
    torch.manual_seed(options.seed)
    network = SceneReward().to(device)
    facts = {name: getattr(options, name) for name in ("steps", "pool", "seed")}
    facts |= {"tokenizer": vqvae is not None, "right": {}}
    draft = options.out.with_name(f".{options.out.name}.draft")  # takes the file's place when all is done
    try:
        pool = make_pool(options.pool, options.seed, POOL_STREAM, vqvae=vqvae)
        train(network, pool, steps=options.steps, seed=options.seed)
        save(network, draft, facts)
        rounded = load_scene_reward(draft, device=device)
        for scale in [None] if vqvae is None else [*range(len(vqvae.schedule)), None]:
            used = vqvae if scale is not None else None
            pool = make_pool(options.check, options.seed, CHECK_STREAM, vqvae=used, scale=scale)
            name = "render" if scale is None else f"scale {scale}"
            facts["right"][name] = found = check(rounded, pool)
            print(f"{name}: named {found['named']:.4f}, auc {found['auc']:.4f}", flush=True)
    finally:
        draft.unlink(missing_ok=True)
    save(rounded, options.out, facts)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
