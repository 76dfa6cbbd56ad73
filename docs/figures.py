"""The pictures of the docs, made by the bundled model: `python -m docs.figures` writes docs/images/*.png."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from evaluation.judge import judge
from evaluation.scenes import render, scene_at, scene_metadata
from evaluation.sheet import RIGHT, WRONG
from sample.files import write_png
from sample.load import load_pipeline
from sample.pipeline import NextScalePipeline
from sample.reward_names import load_reward
from sample.scene_reward import Caption
from sample.search import Search
from sample.search_steps import make_steps
from tokenizer.model import MultiScaleVQ

SIDE, GAP, MARGIN = 128, 6, 190  # pixels
PROMPTS = (
    "a star",
    "a purple heart",
    "three circles",
    "a ring and a square",
    "a triangle above a cross",
    "a red star left of a blue heart",
    "an orange diamond and a green ring",
    "a yellow circle below a black square",
)
LESS = ({}, {"guidance_until": 5}, {"guidance_until": 3}, {"prune": "25%"}, {"prune": "50%"}, {"prune": "100%"})


def code_colours(model: MultiScaleVQ) -> np.ndarray:
    """A colour per code, uint8 (V, 3): codes that are alike look alike (first three principal directions)."""
    codes_VC = model.quantizer.codebook.weight.detach().float()
    centred = codes_VC - codes_VC.mean(dim=0)
    axes_C3 = torch.linalg.svd(centred, full_matrices=False).Vh[:3].T
    ranks_V3 = (centred @ axes_C3).argsort(dim=0).argsort(dim=0)
    return (40 + 200 * ranks_V3 / len(codes_VC)).to(torch.uint8).numpy()


@torch.no_grad()
def pyramid(model: MultiScaleVQ, image: np.ndarray) -> np.ndarray:
    """Tokens of every scale above, the reconstruction after it below; uint8 (h, w, 3) from uint8 (h, w, 3)."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    ids = model.image_to_tokens(x)
    colours, columns = code_colours(model), []
    for (h, w), ids_Bl, f_hat in zip(model.schedule.sides, ids, model.quantizer.partial_sums(ids, model.schedule)):
        decoded = model.decode(f_hat)[0].clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        halves = [colours[ids_Bl[0].numpy().reshape(h, w)], decoded.permute(1, 2, 0).numpy()]
        columns.append(np.concatenate([label(f"{h}x{w}", SIDE), stack([enlarge(half) for half in halves], axis=0)]))
    original = stack([np.full((SIDE, SIDE, 3), 255, np.uint8), enlarge(image)], axis=0)
    columns.append(np.concatenate([label("the image", SIDE), original]))
    return stack(columns, axis=1)


def samples(pipeline: NextScalePipeline, columns: int = 2, each: int = 4) -> np.ndarray:
    """Seeds 0, 1, ... of every prompt of PROMPTS under its text, unselected; uint8 (h, w, 3)."""
    panels = []
    for prompt in PROMPTS:
        images = pipeline(prompt, num_images_per_prompt=each, seed=0).images
        row = stack([enlarge(np.asarray(image)) for image in images], axis=1)
        panels.append(np.concatenate([label(prompt, row.shape[1]), row]))
    rows = [stack(panels[i : i + columns], axis=1) for i in range(0, len(panels), columns)]
    return stack(rows, axis=0)


def searched(pipeline: NextScalePipeline, columns: int = 2, each: int = 4) -> np.ndarray:
    """The same seeds without a search (above) and with one (below), framed by the judge; uint8 (h, w, 3)."""
    candidates, steps = make_steps("best", 1, len(pipeline.transformer.schedule))
    search = Search(candidates=candidates, steps=steps, reward=load_reward("scenes"), rounds=4, enough=0.5)
    panels = []
    for prompt in PROMPTS:
        made = [pipeline(prompt, num_images_per_prompt=each, seed=0, search=way).images for way in (None, search)]
        rows = [stack([framed(np.asarray(image), metadata_of(prompt)) for image in row], axis=1) for row in made]
        panel = stack(rows, axis=0)
        panels.append(np.concatenate([label(prompt, panel.shape[1]), panel]))
    rows = [stack(panels[i : i + columns], axis=1) for i in range(0, len(panels), columns)]
    return stack(rows, axis=0)


def spared(pipeline: NextScalePipeline) -> np.ndarray:
    """Seed 0 of every prompt with less and less work, a row a setting with its words; uint8 (h, w, 3)."""
    rows = []
    for words in LESS:
        images = pipeline(list(PROMPTS), seed=0, **words).images
        name = " ".join(f"--{word.replace('_', '-')} {value}" for word, value in words.items()) or "everything"
        margin = np.full((SIDE, MARGIN, 3), 255, np.uint8)
        margin[SIDE // 2 - 13 : SIDE // 2 + 13] = label(name, MARGIN)
        rows.append(stack([margin, *(enlarge(np.asarray(image)) for image in images)], axis=1))
    return stack(rows, axis=0)


def metadata_of(prompt: str) -> dict:
    """A scenes caption as the judge wants it."""
    caption = Caption.of(prompt)
    colours, shapes = zip(*caption.things)
    named = {"colours": tuple(filter(None, colours)), "count": caption.count, "relation": caption.relation}
    return scene_metadata("counting" if caption.count > 1 else "two_object", shapes, **named)


def framed(image: np.ndarray, metadata: dict, width: int = 4) -> np.ndarray:
    """Enlarged, in a green frame if the judge finds it right, in a red one else."""
    colour = RIGHT if judge(image, metadata).correct else WRONG
    made = np.full((SIDE + 2 * width, SIDE + 2 * width, 3), colour, np.uint8)
    made[width:-width, width:-width] = enlarge(image)
    return made


def label(text: str, width: int) -> np.ndarray:
    """A line of text on white, uint8 (h, width, 3)."""
    image = Image.new("RGB", (width, 26), "white")
    ImageDraw.Draw(image).text((2, 3), text, fill="black", font=ImageFont.load_default(17))
    return np.asarray(image)


def enlarge(image: np.ndarray) -> np.ndarray:
    """To SIDE x SIDE, pixels kept square."""
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.NEAREST))


def stack(parts: list[np.ndarray], axis: int) -> np.ndarray:
    """Side by side, GAP white pixels apart."""
    shape = list(parts[0].shape)
    shape[axis] = GAP
    white = np.full(shape, 255, np.uint8)
    return np.concatenate([piece for part in parts for piece in (part, white)][:-1], axis=axis)


def main() -> None:
    """Draw everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="scenes", help="model whose tokenizer is shown")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    pipeline = load_pipeline(args.model, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    write_png(args.out / "pyramid.png", pyramid(pipeline.vqvae, render(scene_at(11, seed=1))))
    write_png(args.out / "samples.png", samples(pipeline))
    write_png(args.out / "search.png", searched(pipeline))
    write_png(args.out / "spared.png", spared(pipeline))


if __name__ == "__main__":
    main()
