"""Train the scenes reward: `python -m train.train_reward --tokenizer FOLDER`, minutes on one CPU core.

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
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from tqdm import tqdm

from evaluation.features import SHIPPED as FEATURES
from evaluation.judge import Detection, apply_rules
from evaluation.scenes import COLOURS, RELATIONS, SHAPES, Scene, render, sample_scene, scene_metadata
from sample.rewards import to_images
from sample.scene_reward import SHIPPED, SIDE, SceneReward, load_scene_reward, word_ids
from tokenizer.model import MultiScaleVQ

CAPTIONS = 6  # of a picture: its own, a wider one, three that differ in one thing, another scene's
WIPED = 0.15  # share of pictures with an object half wiped out
UNFINISHED = 0.4  # share of pictures that are reconstructions, where there is a tokenizer
POOL_STREAM, CHECK_STREAM = 11, 12  # independent streams of scenes of one seed

Caption = tuple[tuple[str, ...], tuple[str, ...], int, str | None]  # shapes, colours, count, relation


# --- captions --------------------------------------------------------------------------------------------------------


def read_caption(metadata: dict) -> Caption:
    """What a caption names, in the order it names it: the arguments of `scene_metadata`."""
    include = metadata["include"]
    named = include[::-1] if "position" in include[-1] else include
    relation = include[-1]["position"][0] if "position" in include[-1] else None
    colours = tuple(item["color"] for item in named if "color" in item)
    return tuple(item["class"] for item in named), colours, named[0]["count"], relation


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
        return _put(shapes, place, _other(rng, SHAPES, shapes)), colours, count, relation
    if way == "colour":
        return shapes, _put(colours, place, _other(rng, COLOURS, colours)), count, relation
    if way == "count":
        return shapes, colours, int(_other(rng, (2, 3, 4), (count,))), relation
    if way == "relation":
        return shapes, colours, count, str(_other(rng, RELATIONS, (relation,)))
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


def _other(rng: np.random.Generator, all_of: Sequence, but: Sequence) -> object:
    left = [value for value in all_of if value not in but]
    return left[rng.integers(len(left))]


# --- the pool --------------------------------------------------------------------------------------------------------


def example(rng: np.random.Generator) -> tuple[np.ndarray, list[str], list[bool]]:
    """A picture, uint8 (64, 64, 3), with `CAPTIONS` captions and whether each holds for what is drawn whole."""
    scene = sample_scene(rng, split="train")
    own = read_caption(scene.metadata)
    stranger = read_caption(sample_scene(rng, tag=scene.tag, split="train").metadata)
    captions = [own, wider(rng, own), *(another(rng, own) for _ in range(CAPTIONS - 3)), stranger]
    metadatas = [make_metadata(caption) for caption in captions]
    image, whole = render(scene, SIDE), scene
    if rng.random() < WIPED:
        image, whole = wipe(rng, scene)
    truth = [Detection(item.shape, item.colour, 1.0, item.box) for item in whole.objects]
    return image, [m["prompt"] for m in metadatas], [apply_rules(truth, m).correct for m in metadatas]


def wipe(rng: np.random.Generator, scene: Scene) -> tuple[np.ndarray, Scene]:
    """The render with a third to two thirds of one object wiped out, and the scene without that object."""
    victim = int(rng.integers(len(scene.objects)))
    rest = replace(scene, objects=tuple(item for i, item in enumerate(scene.objects) if i != victim))
    x0, y0, x1, y1 = scene.objects[victim].box
    share, side = rng.uniform(1 / 3, 2 / 3), rng.integers(4)
    if side < 2:
        cut = y0 + share * (y1 - y0)
        y0, y1 = (y0, cut) if side == 0 else (cut, y1)
    else:
        cut = x0 + share * (x1 - x0)
        x0, x1 = (x0, cut) if side == 2 else (cut, x1)
    image, window = render(scene, SIDE), (slice(int(y0), int(np.ceil(y1))), slice(int(x0), int(np.ceil(x1))))
    image[window] = render(rest, SIDE)[window]
    return image, rest


@torch.no_grad()
def unfinished(vqvae: MultiScaleVQ, images_BCHW: torch.Tensor, scale: int) -> torch.Tensor:
    """What the first scales, up to `scale`, of pictures look like decoded: uint8 to uint8 (B, 3, h, w)."""
    ids = vqvae.image_to_tokens(images_BCHW.float() / 127.5 - 1)
    return to_images(vqvae.decode(vqvae.quantizer.partial_sums(ids, vqvae.schedule)[scale]))


def make_pool(
    network: SceneReward, n: int, seed: int, stream: int, *, vqvae: MultiScaleVQ | None, scale: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cells (N, 64, F) float16, words (N, P, T) int64 and labels (N, P) float32 of `n` pictures.

    scale: reconstruct every picture after this scale; at random, `UNFINISHED` of them, when None and with a tokenizer.
    """
    rng = np.random.default_rng((seed, stream))
    cells, captions, labels = [], [], []
    for begin in tqdm(range(0, n, 64), desc="drawing", unit="batch", disable=None):
        images, texts, goods = zip(*(example(rng) for _ in range(min(64, n - begin))))
        x_BCHW = rearrange(torch.from_numpy(np.stack(images)), "b h w c -> b c h w").to(network.out.weight.device)
        if vqvae is not None:
            some = len(x_BCHW) if scale is not None else round(UNFINISHED * len(x_BCHW))
            after = scale if scale is not None else int(rng.integers(1, len(vqvae.schedule)))
            x_BCHW = torch.cat([unfinished(vqvae, x_BCHW[:some], after), x_BCHW[some:]])
        with torch.no_grad():
            cells.append(network.cells(x_BCHW).half().cpu())
        captions += [word_ids(row) for row in texts]
        labels += goods
    return torch.cat(cells), torch.stack(captions), torch.tensor(labels, dtype=torch.float32)


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
    """Fit the attention part in place; true and false captions weigh alike. `batch` is in pictures."""
    cells_NMF, words_NPT, labels_NP = pool
    device = network.out.weight.device
    own = [p for name, p in network.named_parameters() if not name.startswith(("levels.", "head."))]
    optimizer = torch.optim.AdamW(own, lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    generator = torch.Generator().manual_seed(seed)
    weight = (1 - labels_NP).sum() / labels_NP.sum()
    with tqdm(range(steps), desc="training", disable=None) as bar:
        for step in bar:
            rows = torch.randint(len(cells_NMF), (batch,), generator=generator)
            cells = repeat(cells_NMF[rows].to(device).float(), "n m f -> (n p) m f", p=words_NPT.shape[1])
            words, labels = words_NPT[rows].flatten(0, 1).to(device), labels_NP[rows].flatten().to(device)
            with torch.autocast(device.type, torch.bfloat16):
                logits = network.logits(cells, words)
            loss = F.binary_cross_entropy_with_logits(logits.float(), labels, pos_weight=weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(own, 1.0)
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def check(network: SceneReward, pool: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """`accuracy` with true and false captions weighing alike, and `auc`: how often a true one beats a false one."""
    cells_NMF, words_NPT, labels_NP = pool
    found, device = [], network.out.weight.device
    for begin in range(0, len(cells_NMF), 32):
        rows = slice(begin, begin + 32)
        cells = repeat(cells_NMF[rows].to(device).float(), "n m f -> (n p) m f", p=words_NPT.shape[1])
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
    parser.add_argument("--steps", type=int, default=600, help="batches of 48 pictures, 6 captions each (default 600)")
    parser.add_argument("--pool", type=int, default=6000, help="pictures to train on (default 6000)")
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
            make_pool(network, options.pool, options.seed, POOL_STREAM, vqvae=vqvae),
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
        pool = make_pool(rounded, n, options.seed, CHECK_STREAM, vqvae=used, scale=scale)
        name = "render" if scale is None else f"scale {scale}"
        facts["right"][name] = found = check(rounded, pool)
        print(f"{name}: accuracy {found['accuracy']:.4f}, auc {found['auc']:.4f}")
    save(rounded, options.out, facts)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
