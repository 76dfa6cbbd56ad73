"""Does a model read who has what? `python -m evaluation.binding --models before=FOLDER,now=scenes`.

The likelihood of a drawn scene's tokens under its own caption, against that under a caption changed in one thing: a
shape, a colour, the number, the two colours exchanged, the relation turned round. A model that reads captions as bags
of words gains nothing from the last two. No image is drawn by the model, so small changes show early in training.

Shapes: B images, L tokens, K scales.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch.nn import functional as F
from tqdm import tqdm

from evaluation.command import Parser, check_least, in_one_line
from evaluation.intervals import mean_interval, wilson
from evaluation.report import command_of, result, table, write_result
from evaluation.scenes import (
    COLOURS,
    COUNT_WORDS,
    OPPOSITE,
    SHAPES,
    Scene,
    other_of,
    read_caption,
    render,
    sample_scene,
    scene_metadata,
)
from sample.files import atomically
from sample.load import load_pipeline, model_digest
from sample.pipeline import NextScalePipeline

CHANGES = {  # what is changed, and the tag of the captions it is changed in
    "shape": "single_object",
    "colour": "colors",
    "number": "counting",
    "colours exchanged": "color_attr",
    "relation turned round": "position",
}
STREAM = 21  # keeps these scenes apart from those of other purposes


def changed(rng: np.random.Generator, metadata: dict, change: str) -> str:
    """The caption with one thing changed, another one drawn where there is a choice."""
    shapes, colours, count, relation = read_caption(metadata)
    if change == "shape":
        shapes = (other_of(rng, SHAPES, shapes),)
    elif change == "colour":
        colours = (other_of(rng, tuple(COLOURS), colours),)
    elif change == "number":
        count = other_of(rng, tuple(COUNT_WORDS), (count,))
    elif change == "colours exchanged":
        colours = colours[::-1]
    else:
        relation = OPPOSITE[relation]
    return scene_metadata(metadata["tag"], shapes, colours, count=count, relation=relation)["prompt"]


@torch.no_grad()
def nats(pipeline: NextScalePipeline, scenes: Sequence[Scene], captions: Sequence[str]) -> torch.Tensor:
    """Negative log-likelihood of every scale's tokens given the caption and the scales before, (B, K) float32."""
    vqvae, transformer = pipeline.vqvae, pipeline.transformer
    images = torch.from_numpy(np.stack([render(scene, vqvae.image_hw[0]) for scene in scenes]))
    pixels = rearrange(images, "b h w c -> b c h w").to(transformer.device).float() / 127.5 - 1
    ids = vqvae.image_to_tokens(pixels)
    inputs = vqvae.quantizer.teacher_inputs(ids, vqvae.schedule)
    cond = transformer.condition(pipeline.encode_prompt(captions))
    logits = transformer.logits(transformer(inputs, cond), cond)
    loss_N = F.cross_entropy(logits.float().flatten(0, -2), torch.cat(ids, dim=1).flatten(), reduction="none")
    loss_BL = loss_N.view(len(scenes), vqvae.schedule.total, -1).sum(dim=-1)  # bits of a token add up
    return torch.stack([part.sum(dim=1) for part in loss_BL.split(vqvae.schedule.lengths, dim=1)], dim=1).cpu()


def rows_of(name: str, pipeline: NextScalePipeline, *, n: int, seed: int, batch_size: int) -> list[dict]:
    """A row for every change: nats that the right caption gains, in all and by scale, and how often it gains any."""
    rows = []
    for index, (change, tag) in enumerate(CHANGES.items()):
        rng = np.random.default_rng((seed, STREAM, index))
        scenes = [sample_scene(rng, tag=tag) for _ in range(n)]
        wrong = [changed(rng, scene.metadata, change) for scene in scenes]
        gains = []
        bar = tqdm(range(0, n, batch_size), desc=f"{name}: {change}", unit="batch", disable=None, leave=False)
        for begin in bar:
            batch = scenes[begin : begin + batch_size]
            right = nats(pipeline, batch, [scene.caption for scene in batch])
            gains.append(nats(pipeline, batch, wrong[begin : begin + batch_size]) - right)
        gain_NK = torch.cat(gains).double()
        gain_N = gain_NK.sum(dim=1)
        wins = int((gain_N > 0).sum())
        row = {"model": name, "change": change, "n": n}
        row |= {"nats": float(gain_N.mean()), "nats_ci95": mean_interval(gain_N.numpy())}
        row |= {"right": wins / n, "right_ci95": wilson(wins, n)}
        by_scale = zip(pipeline.vqvae.schedule.names, gain_NK.mean(dim=0).tolist(), strict=True)
        rows.append(row | {f"nats_{scale}": gain for scale, gain in by_scale})
    return rows


def draw(rows: Sequence[dict], path: Path) -> None:
    """How often the right caption is the likelier one, for each change and model; a guess is right half the time."""
    import matplotlib
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    with matplotlib.rc_context({"font.size": 11}):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(models)
        for i, model in enumerate(models):
            own = [row for row in rows if row["model"] == model]
            places = np.arange(len(own)) + (i - (len(models) - 1) / 2) * width
            right, bounds = np.array([row["right"] for row in own]), np.array([row["right_ci95"] for row in own])
            axes.bar(places, right, width, label=model)
            reach = np.abs(bounds.T - right)
            axes.errorbar(places, right, reach, fmt="none", ecolor="black", capsize=3)
        axes.axhline(0.5, color="grey", ls="--", lw=1, label="a guess")
        axes.set_xticks(range(len(CHANGES)), [change.replace(" ", "\n", 1) for change in CHANGES])
        axes.set(ylabel="right caption is the likelier one", ylim=(0, 1))
        axes.set_title("Captions changed in one thing")
        figure.legend(loc="outside right upper")
    atomically(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m evaluation.binding", description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="scenes", metavar="NAME=MODEL,...", help="models, named or not (scenes)")
    parser.add_argument("--n", type=int, default=200, help="scenes for each change (200)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and changes (0)")
    parser.add_argument("--batch-size", type=int, default=50, help="scenes at once (50)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...")
    parser.add_argument("--out", type=Path, help="result, table and picture; none are written without it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the result, its table and its picture."""
    parser = parser_of()
    options = parser.parse_args(argv)
    with in_one_line(parser):
        check_least(options, n=2, batch_size=1, seed=0)
        if options.out is not None and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--out also draws a picture and needs matplotlib: pip install 'nextscale[plots]'")
        rows, digests = [], {}
        for text in options.models.split(","):
            name, _, model = text.rpartition("=")
            pipeline = load_pipeline(model, dtype=torch.float32, device=options.device)
            digests[name or model] = model_digest(model)
            rows += rows_of(name or model, pipeline, n=options.n, seed=options.seed, batch_size=options.batch_size)
        print(table(rows, ["model", "change", "nats", "right"]))
        if options.out is not None:
            command = command_of(parser_of(), options)
            settings = {"model_digests": digests}
            write_result(options.out, result(rows, command=command, n=options.n, seeds=options.seed, settings=settings))
            draw(rows, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
