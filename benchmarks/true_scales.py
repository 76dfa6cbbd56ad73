"""Where a model loses: `python -m benchmarks.true_scales --model scenes`.

Fresh scenes are tokenised; the model is given their captions and their true tokens of the first k scales, and draws
the rest. The score over k tells which scales are hard: at k = 0 it is the model's own, at all scales the tokenizer's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch

from evaluation.command import Parser, add_out, check_least, in_one_line
from evaluation.report import command_of, result, table, write_result
from evaluation.scenes import TAGS, Scene, render, sample_scene
from sample.pipeline import NextScalePipeline
from sample.state import GenerationState, Hook


class TrueScales(Hook):
    """Puts known tokens in the place of those drawn, on the first scales.

    Args:
        ids: (B, l) int64 of every scale.
        scales: how many of them to take.
    """

    def __init__(self, ids: list[torch.Tensor], scales: int):
        self.ids, self.scales = ids, scales

    def on_tokens(
        self, state: GenerationState, k: int, logits_BlV: torch.Tensor, tokens_Bl: torch.Tensor
    ) -> torch.Tensor:
        """The true tokens (B, l) of an early scale, else the drawn ones."""
        return self.ids[k].to(tokens_Bl.device) if k < self.scales else tokens_Bl


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m benchmarks.true_scales", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="scenes", help="scenes (bundled), a model folder, or a training run")
    parser.add_argument("--per-tag", type=int, default=40, help="scenes of each tag (40)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and images (0)")
    parser.add_argument("--batch-size", type=int, default=40, help="images at once (40)")
    add_out(parser, "results/true_scales.json", "result and its table")
    return parser


def scenes_of(per_tag: int, seed: int) -> list[Scene]:
    """Fresh scenes of every tag, of pairs trained on."""
    rng = np.random.default_rng((seed, 77))
    return [sample_scene(rng, tag=tag) for tag in TAGS for _ in range(per_tag)]


def finish(pipeline: NextScalePipeline, scenes: Sequence[Scene], scales: int, *, seed: int) -> np.ndarray:
    """Images of the scenes' captions with the first `scales` scales of the scenes themselves, (B, h, w, 3) uint8."""
    images = torch.stack([torch.from_numpy(render(scene)).permute(2, 0, 1) for scene in scenes])
    ids = pipeline.vqvae.image_to_tokens(images.float() / 127.5 - 1)
    prompts = [scene.caption for scene in scenes]
    seeds = list(range(seed, seed + len(scenes)))
    drawn = pipeline(prompts, seed=seeds, hooks=[TrueScales(ids, scales)], output_type="np").images
    return (drawn * 255).round().astype(np.uint8)


def measure(options: argparse.Namespace) -> list[dict]:
    """A row for each number of true scales, from none to all."""
    from evaluation.judge import judge_report
    from sample.load import load_pipeline

    pipeline = load_pipeline(options.model, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    scenes, rows = scenes_of(options.per_tag, options.seed), []
    batches = [slice(i, i + options.batch_size) for i in range(0, len(scenes), options.batch_size)]
    for scales in range(len(pipeline.transformer.schedule) + 1):
        made = [finish(pipeline, scenes[b], scales, seed=options.seed + b.start) for b in batches]
        report = judge_report(np.concatenate(made), [scene.metadata for scene in scenes])
        rows.append({"true_scales": scales, **report})
        print(f"{scales} true scales: {report['overall']:.3f}", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the result and its table."""
    parser = parser_of()
    options = parser.parse_args(argv)
    with in_one_line(parser):
        check_least(options, per_tag=1, batch_size=1, seed=0)
        rows = measure(options)
        command = command_of(parser, options)
        content = result(rows, command=command, n=len(TAGS) * options.per_tag, seeds=options.seed)
        write_result(options.out, content)
        print(table(rows, ["true_scales", "overall", *TAGS]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
