"""Train the scenes reward: `python -m train.train_reward --tokenizer FOLDER`, a quarter of an hour of one CPU core.

A picture is paired with its own caption, with captions that differ from it in one thing (a shape, a colour, the count,
the relation, who has which), and with another scene's; a pair is labelled by GenEval's rules on what was *drawn*, never
by the judge's look at pixels. Some pictures have half of an object wiped out, which then does not count. With a
tokenizer, part of the pictures are its reconstructions after some scale, so that the reward can read what a search
shows it: pictures that are not finished. The convolutions are the scenes feature network's and stay as they are; their
cells are computed once for every picture.

Shapes: N pictures of the pool, P captions of a picture, T words, F numbers of a cell.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from tqdm import tqdm

from evaluation.features import SHIPPED as FEATURES
from evaluation.judge import UNKNOWN, Detection, apply_rules
from evaluation.scenes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    Caption,
    other_of,
    read_caption,
    render,
    sample_scene,
    scene_metadata,
)
from sample.rewards import to_images
from sample.scene_reward import SHIPPED, SIDE, SceneReward, load_scene_reward, word_ids
from tokenizer.model import MultiScaleVQ
from train.spoil import roughen, spoil

CAPTIONS = 6  # of a picture: its own, a wider one, three that differ in one thing, another scene's
SPOILED = 0.35  # share of pictures with an object that is none of the shapes
ROUGH = 0.15  # share of pictures with an object that is not quite true, and right all the same
CONVOLUTIONS = 0.3  # their learning rate over that of the attention part
DECODED = 0.8  # share of pictures that are reconstructions, where there is a tokenizer: a search shows nothing else
FINISHED = 0.4  # share of batches of these that are of all scales
POOL_STREAM, CHECK_STREAM = 11, 12  # independent streams of scenes of one seed


# --- captions --------------------------------------------------------------------------------------------------------


def make_metadata(caption: Caption) -> dict:
    """The metadata of what a caption names; its tag follows from it."""
    shapes, colours, count, relation = caption
    if count > 1:
        tag = "counting"
    elif len(shapes) == 1:
        tag = "colors" if colours else "single_object"
    else:
        tag = "position" if relation else "color_attr" if colours else "two_object"
    return scene_metadata(tag, shapes, colours, count=count, relation=relation)


def another(rng: np.random.Generator, caption: Caption) -> Caption:
    """A caption that differs in one thing; it may hold for the same picture all the same."""
    shapes, colours, count, relation = caption
    ways = ["shape", *["colour"] * bool(colours), *["swap"] * (len(shapes) > 1)]
    ways += ["count", "count"] * (count > 1) + ["relation", "relation"] * (relation is not None)
    way, place = ways[rng.integers(len(ways))], rng.integers(len(shapes))
    if way == "shape":
        return _put(shapes, place, other_of(rng, SHAPES, shapes)), colours, count, relation
    if way == "colour":
        return shapes, _put(colours, place, other_of(rng, COLOURS, colours)), count, relation
    if way == "count":
        return shapes, colours, int(other_of(rng, (2, 3, 4), (count,))), relation
    if way == "relation":
        return shapes, colours, count, str(other_of(rng, RELATIONS, (relation,)))
    if colours and (relation is None or rng.random() < 0.5):
        return shapes, colours[::-1], count, relation
    return shapes[::-1], colours, count, relation


def wider(rng: np.random.Generator, caption: Caption) -> Caption:
    """A caption that leaves more open, where there is one."""
    shapes, colours, count, relation = caption
    if relation and rng.random() < 0.5:
        return shapes, colours, count, None
    if colours and rng.random() < 0.5:
        return shapes, (), count, relation
    return (shapes[:1], colours[:1], count, None) if rng.random() < 0.5 else caption


def _put(values: tuple[str, ...], place: int, value: object) -> tuple[str, ...]:
    return (*values[:place], str(value), *values[place + 1 :])


# --- the pool --------------------------------------------------------------------------------------------------------


def example(rng: np.random.Generator) -> tuple[np.ndarray, list[str], list[bool]]:
    """A picture, uint8 (64, 64, 3), with `CAPTIONS` captions and whether each holds for what is drawn whole."""
    scene = sample_scene(rng, split="train")
    own = read_caption(scene.metadata)
    stranger = read_caption(sample_scene(rng, tag=scene.tag, split="train").metadata)
    captions = [own, wider(rng, own), *(another(rng, own) for _ in range(CAPTIONS - 3)), stranger]
    metadatas = [make_metadata(caption) for caption in captions]
    chance, whole, spoiled = rng.random(), scene, []
    if chance < SPOILED:
        image, whole, _ = spoil(rng, scene)
        spoiled = [Detection(UNKNOWN, UNKNOWN, 0.0, (0.0, 0.0, 1.0, 1.0))]
    else:
        image = roughen(rng, scene) if chance < SPOILED + ROUGH else render(scene, SIDE)
    truth = [Detection(item.shape, item.colour, 1.0, item.box) for item in whole.objects] + spoiled
    return image, [m["prompt"] for m in metadatas], [apply_rules(truth, m).correct for m in metadatas]


@torch.no_grad()
def unfinished(vqvae: MultiScaleVQ, images_BCHW: torch.Tensor, scale: int) -> torch.Tensor:
    """What the first scales, up to `scale`, of pictures look like decoded: uint8 to uint8 (B, 3, h, w)."""
    ids = vqvae.image_to_tokens(images_BCHW.float() / 127.5 - 1)
    return to_images(vqvae.decode(vqvae.quantizer.partial_sums(ids, vqvae.schedule)[scale]))


def make_pool(
    n: int, seed: int, stream: int, *, vqvae: MultiScaleVQ | None, scale: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (N, 3, 64, 64) uint8, words (N, P, T) int64 and labels (N, P) float32 of `n` pictures.

    scale: reconstruct every picture after this scale; `DECODED` of them, after any, when None and with a tokenizer.
    """
    rng = np.random.default_rng((seed, stream))
    pictures, captions, labels = [], [], []
    for begin in tqdm(range(0, n, 64), desc="drawing", unit="batch", disable=None):
        images, texts, goods = zip(*(example(rng) for _ in range(min(64, n - begin))))
        x_BCHW = rearrange(torch.from_numpy(np.stack(images)), "b h w c -> b c h w")
        if vqvae is not None:
            some, after, last = len(x_BCHW), scale, len(vqvae.schedule) - 1
            if scale is None:
                some, after = round(DECODED * some), int(rng.integers(min(1, last), last + 1))
                after = last if rng.random() < FINISHED else after
            x_BCHW = torch.cat([unfinished(vqvae, x_BCHW[:some].to(vqvae.device), after).cpu(), x_BCHW[some:]])
        pictures.append(x_BCHW)
        captions += [word_ids(row) for row in texts]
        labels += goods
    return torch.cat(pictures), torch.stack(captions), torch.tensor(labels, dtype=torch.float32)


# --- training --------------------------------------------------------------------------------------------------------


def new_network(seed: int, features: Path = FEATURES) -> SceneReward:
    """A network with the feature network's convolutions; its own part is random."""
    torch.manual_seed(seed)
    network = SceneReward()
    found = {name: w.float() for name, w in load_file(features).items() if name.startswith(("levels.", "head."))}
    network.load_state_dict(network.state_dict() | found)
    return network.eval()


def train(
    network: SceneReward, pool: tuple[torch.Tensor, ...], *, steps: int, seed: int, batch: int = 48, lr: float = 1.5e-3
) -> None:
    """Fit the network in place; true and false captions weigh alike. `batch` is in pictures."""
    images_NCHW, words_NPT, labels_NP = pool
    device = network.out.weight.device
    named = list(network.requires_grad_(True).named_parameters())
    looking = [p for name, p in named if name.startswith(("levels.", "head."))]
    reading = [p for name, p in named if not name.startswith(("levels.", "head."))]
    groups = [{"params": reading, "lr": lr}, {"params": looking, "lr": lr * CONVOLUTIONS}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.02)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.15)
    generator = torch.Generator().manual_seed(seed)
    weight = (1 - labels_NP).sum() / labels_NP.sum()
    with tqdm(range(steps), desc="training", disable=None) as bar:
        for step in bar:
            rows = torch.randint(len(images_NCHW), (batch,), generator=generator)
            words, labels = words_NPT[rows].flatten(0, 1).to(device), labels_NP[rows].flatten().to(device)
            with torch.autocast(device.type, torch.bfloat16):
                cells = network.cells(images_NCHW[rows].to(device))
                logits = network.logits(repeat(cells, "n m f -> (n p) m f", p=words_NPT.shape[1]), words)
            loss = F.binary_cross_entropy_with_logits(logits.float(), labels, pos_weight=weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(looking + reading, 1.0)
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def check(network: SceneReward, pool: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """`accuracy` with true and false captions weighing alike, and `auc`: how often a true one beats a false one."""
    images_NCHW, words_NPT, labels_NP = pool
    found, device = [], network.out.weight.device
    for begin in range(0, len(images_NCHW), 32):
        rows = slice(begin, begin + 32)
        cells = repeat(network.cells(images_NCHW[rows].to(device)), "n m f -> (n p) m f", p=words_NPT.shape[1])
        found.append(network.logits(cells, words_NPT[rows].flatten(0, 1).to(device)).cpu())
    scores, good = torch.cat(found), labels_NP.flatten() > 0.5
    above = torch.searchsorted(scores[~good].sort().values, scores[good])
    accuracy = ((scores[good] > 0).double().mean() + (scores[~good] < 0).double().mean()) / 2
    return {"accuracy": float(accuracy), "auc": float(above.double().mean() / (~good).sum())}


def save(network: SceneReward, path: Path, facts: dict) -> None:
    """Write float16 weights and `facts` (as metadata) to one safetensors file, atomically."""
    weights = {name: (w.half() if w.is_floating_point() else w).cpu() for name, w in network.state_dict().items()}
    partial = path.with_name(f".{path.name}.part")
    save_file(weights, partial, metadata={"facts": json.dumps(facts)})
    os.replace(partial, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, train, check on fresh scenes, write the file."""
    parser = argparse.ArgumentParser(prog="python -m train.train_reward", description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", type=Path, help="folder of a scenes tokenizer: also learn unfinished pictures")
    parser.add_argument(
        "--steps", type=int, default=2000, help="batches of 48 pictures, 6 captions each (default 2000)"
    )
    parser.add_argument("--pool", type=int, default=12000, help="pictures to train on (default 12000)")
    parser.add_argument("--check", type=int, default=500, help="fresh pictures to check on (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and weights (default 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (cpu)")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="file to write (default: the shipped one)")
    options = parser.parse_args(argv)
    if min(options.steps, options.pool, options.check) < 2 or options.seed < 0:
        parser.error("--steps, --pool and --check must be 2 or more, --seed 0 or more")
    if options.tokenizer is not None and not (options.tokenizer / "config.json").is_file():
        parser.error(f"--tokenizer {options.tokenizer} has no config.json")
    start = time.perf_counter()
    vqvae = MultiScaleVQ.from_pretrained(options.tokenizer).eval() if options.tokenizer is not None else None
    vqvae = vqvae.to(options.device) if vqvae is not None else None
    network = new_network(options.seed).to(options.device)
    try:
        train(
            network,
            make_pool(options.pool, options.seed, POOL_STREAM, vqvae=vqvae),
            steps=options.steps,
            seed=options.seed,
        )
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    facts = {name: getattr(options, name) for name in ("steps", "pool", "seed")}
    facts |= {"tokenizer": vqvae is not None, "right": {}}
    save(network, options.out, facts)
    rounded = load_scene_reward(options.out, device=options.device)
    scales = [None] if vqvae is None else [*range(len(vqvae.schedule)), None]
    for scale in scales:
        used = vqvae if scale is not None else None
        n = options.check if scale is None else max(options.check // 4, 2)
        pool = make_pool(n, options.seed, CHECK_STREAM, vqvae=used, scale=scale)
        name = "render" if scale is None else f"scale {scale}"
        facts["right"][name] = found = check(rounded, pool)
        print(f"{name}: accuracy {found['accuracy']:.4f}, auc {found['auc']:.4f}")
    save(rounded, options.out, facts)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
