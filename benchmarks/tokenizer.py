"""Images a second of the tokenizer beside the official one: `python -m benchmarks.tokenizer --reference VAR`.

Encoding to tokens (what `train.cache_tokens` does for every image) and decoding, random weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.tables import measured
from benchmarks.timing import (
    Job,
    Worker,
    begin_timing,
    end_timing,
    interleave,
    possible,
    ratios,
    spread,
    summary,
    undisturbed,
)
from evaluation.command import Parser, add_out, check_least

OURS = {
    "plain_float32": ("float32", "off"),
    "plain_bfloat16": ("bfloat16", "off"),
    "fast_float32": ("float32", "on"),
    "fast_bfloat16": ("bfloat16", "on"),
}
COLUMNS = ("work", "variant", "batch", "seconds", "images_per_s", "times_official_float32", "times_plain_float32")
COLUMNS += ("peak_rss_mib", "foreign_share", "rounds", "disturbed")


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m benchmarks.tokenizer", description=__doc__.split("\n")[0])
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a checkout of FoundationVision/VAR")
    parser.add_argument("--schedule", default="var256", help="scales (var256)")
    parser.add_argument("--width", type=int, default=160, help="of the finest level (160)")
    parser.add_argument("--batch", type=int, default=1, help="images at once (1)")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each variant (3)")
    parser.add_argument("--threads", type=int, default=2, help="of each process (2)")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for idle processors (60)")
    parser.add_argument("--work", type=Path, default=Path("cache/speed"), help="where the weights are kept")
    parser.add_argument("--size", default="d16", help="of the random model whose tokenizer it is (d16)")
    add_out(parser, "results/tokenizer_cpu.json", "result and table")
    return parser


def random_images(schedule: str, batch: int) -> Any:
    """Images (B, 3, h, w) in [-1, 1], from seed 0."""
    import torch

    from tokenizer.schedule import ScaleSchedule

    h, w = ScaleSchedule.of(schedule).latent_hw
    return torch.rand(batch, 3, 16 * h, 16 * w, generator=torch.Generator().manual_seed(0)) * 2 - 1


def our_jobs(folder: Path, dtype: str, fast: str, schedule: str, batch: int) -> dict[str, Job]:
    """Jobs "encode" () and "decode" () of our tokenizer."""
    import torch

    from sample import fast as fast_path
    from sample.load import load_pipeline

    vqvae = load_pipeline(folder, dtype=dtype, device="cpu", fast=fast).vqvae
    if fast == "on":
        fast_path.keep_freed_memory()
    images = random_images(schedule, batch)
    latents = torch.randn(batch, vqvae.config.latent_channels, *vqvae.schedule.latent_hw)

    def encode() -> dict[str, Any]:
        return {"tokens": torch.cat(vqvae.image_to_tokens(images), dim=1).numpy()}

    @torch.no_grad()
    def decode() -> dict[str, Any]:
        return {"shape": tuple(vqvae.decode(latents).shape)}

    return {"encode": encode, "decode": decode}


def their_jobs(
    checkout: Path, weights: Path, config: Mapping[str, Any], vqvae: Mapping[str, Any], schedule: str, batch: int
) -> dict[str, Job]:
    """The same jobs of the official tokenizer."""
    import torch

    from benchmarks.reference import build

    vae, _ = build(checkout, weights, config, vqvae)
    images = random_images(schedule, batch)
    latents = torch.randn(batch, vae.Cvae, *(side // 16 for side in images.shape[2:]))

    @torch.no_grad()
    def encode() -> dict[str, Any]:
        return {"tokens": torch.cat(vae.img_to_idxBl(images), dim=1).numpy()}

    @torch.no_grad()
    def decode() -> dict[str, Any]:
        return {"shape": tuple(vae.fhat_to_img(latents).shape)}

    return {"encode": encode, "decode": decode}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build and time; the result as `report.result` makes it."""
    from benchmarks.models import check_size, kept_models
    from benchmarks.reference import check_checkout
    from evaluation.report import command_of, result
    from tokenizer.model import MultiScaleVQ
    from var.transformer import NextScaleTransformer

    check_least(options, batch=1, rounds=1, threads=1)
    size = check_size(options.size)
    checkout = check_checkout(options.reference) if options.reference is not None else None
    folder = options.work / f"{size}-{options.schedule}-{options.width}"
    ours, official = kept_models(folder, size, options.schedule, width=options.width)
    configs = (NextScaleTransformer.load_config(ours / "transformer"), MultiScaleVQ.load_config(ours / "vqvae"))
    made = (options.schedule, options.batch)
    variants, left_out = possible(OURS)
    makes = {name: partial(our_jobs, ours, *how, *made) for name, how in variants.items()}
    if checkout is not None:
        makes = {"official_float32": partial(their_jobs, checkout, official, *map(dict, configs), *made)} | makes
    rows, tokens = [], {}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(make, options.threads)) for name, make in makes.items()}
        for worker in workers.values():
            worker.built()
        begin_timing(workers.values())
        for name, worker in workers.items():  # kernels and memory settle
            tokens[name] = worker.call("encode")["tokens"]
            worker.call("decode")
        for work in ("encode", "decode"):
            runs = {name: (worker, work, ()) for name, worker in workers.items()}
            timed = interleave(runs, options.rounds, patience=options.patience)
            for name, answers in timed.items():
                row = {"work": work, "variant": name, "batch": options.batch}
                row |= spread("seconds", [run["seconds"] for run in undisturbed(answers)])
                row["images_per_s"] = options.batch / row["seconds"]
                for base in ("official_float32", "plain_float32"):
                    if base in timed and base != name:
                        row |= ratios(f"times_{base}", timed[base], answers)
                rows.append(row | summary(answers))
        end_timing()
    first = next(iter(tokens))
    for row in rows:
        if row["work"] == "encode" and row["variant"] != first:
            row["tokens_equal"] = float((tokens[row["variant"]] == tokens[first]).mean())
    command = command_of(parser_of(), options)
    settings = {"schedule": options.schedule, "width": options.width, "threads": options.threads}
    settings |= {"tokens_compared_with": first, "left_out": left_out}
    return result(rows, command=command, n=options.rounds, seeds=0, settings=settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result and its table."""
    parser = parser_of()
    return measured(parser, parser.parse_args(argv), measure, (*COLUMNS, "tokens_equal"))


if __name__ == "__main__":
    sys.exit(main())
