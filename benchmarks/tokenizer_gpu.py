"""The tokenizer on a GPU beside the official one: `python -m benchmarks.tokenizer_gpu --reference VAR`.

Encoding 8-bit images that lie on the device to tokens, as `train.cache_tokens` does, and decoding latents to images in
[0, 1]; random weights, one process, in turns. "autocast" is float32 weights under autocast (`--cache.precision=bf16`),
"fast" all that `sample.fast` can do there. The official quantiser is left out of autocast: it cannot search
half-precision latents. float32 convolutions run in TF32 where torch lets them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import OFFICIAL, Run, current_device, device_name, figures, in_turns, official_models, settled
from benchmarks.tables import measured
from benchmarks.tokenizer import random_images
from evaluation.command import Parser, add_out, check_least

Works = dict[str, Run]  # "encode" and "decode"
COLUMNS = ("work", "variant", "batch", "seconds", "images_per_s", "times_official_float32", "times_official_float16")
COLUMNS += ("times_official_bfloat16", "tokens_equal")
THEIRS = dict(zip(OFFICIAL, (torch.float32, torch.float16, torch.bfloat16)))
OURS = {  # variant -> (dtype of the weights, autocast to bfloat16, fast)
    "float32": (torch.float32, False, False),
    "autocast": (torch.float32, True, False),
    "bfloat16": (torch.bfloat16, False, False),
    "fast_float32": (torch.float32, False, True),
    "fast_bfloat16": (torch.bfloat16, False, True),
}


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m benchmarks.tokenizer_gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a checkout of FoundationVision/VAR")
    parser.add_argument("--schedule", default="var256", help="scales (var256)")
    parser.add_argument("--width", type=int, default=160, help="of the finest level (160)")
    parser.add_argument("--batch", type=int, default=64, help="images at once (64)")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each variant (3)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu only to try the command (cuda)")
    add_out(parser, "results/tokenizer_gpu.json", "result and table")
    return parser


def our_works(options: argparse.Namespace, pixels: torch.Tensor, latents: torch.Tensor) -> tuple[dict[str, Works], Any]:
    """Encoding and decoding by variant, and the plain float32 pipeline."""
    from benchmarks.models import random_pipeline
    from sample.fast import accelerate
    from train.prepare import as_floats

    def pipeline_of(dtype: torch.dtype, fast: bool) -> Any:
        with pixels.device:
            pipeline = random_pipeline("d6", options.schedule, width=options.width).to(dtype)  # same weights each time
        return accelerate(pipeline) if fast else pipeline

    def works_of(pipeline: Any, autocast: bool) -> Works:
        context = torch.autocast(pixels.device.type, torch.bfloat16, enabled=autocast)

        def encode() -> torch.Tensor:
            with context:
                return torch.cat(pipeline.vqvae.image_to_tokens(as_floats({"image": pixels})["image"]), dim=1)

        @torch.no_grad()
        def decode() -> torch.Tensor:
            with context:
                return pipeline.decode(latents, "pt")

        return {"encode": encode, "decode": decode}

    plain = pipeline_of(torch.float32, False)
    made = {}
    for name, (dtype, autocast, fast) in OURS.items():
        pipeline = plain if dtype == torch.float32 and not fast else pipeline_of(dtype, fast)
        made[name] = works_of(pipeline, autocast)
    return made, plain


def their_works(vae: Any, pixels: torch.Tensor, latents: torch.Tensor, dtype: torch.dtype) -> Works:
    """The same of the official tokenizer; its images are floats already, as its loader gives them."""
    images = pixels.float().div(127.5).sub(1)
    context = torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32)

    @torch.no_grad()
    def encode() -> torch.Tensor:
        with context:
            f_BCHW = vae.quant_conv(vae.encoder(images))
        return torch.cat(vae.quantize.f_to_idxBl_or_fhat(f_BCHW.float(), to_fhat=False), dim=1)

    @torch.no_grad()
    def decode() -> torch.Tensor:
        with context:
            return vae.fhat_to_img(latents).add_(1).mul_(0.5)

    return {"encode": encode, "decode": decode}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build and time; the result as `report.result` makes it."""
    from benchmarks.reference import check_checkout
    from evaluation.report import command_of, result

    check_least(options, batch=1, rounds=1)
    place = current_device(options.device)
    if options.reference is not None:
        check_checkout(options.reference)
    pixels = random_images(options.schedule, options.batch).add(1).mul(127.5).round().byte().to(place)
    noise = torch.Generator().manual_seed(1)
    h, w = (side // 16 for side in pixels.shape[2:])
    latents = torch.randn(options.batch, 32, h, w, generator=noise).to(place)
    works, plain = our_works(options, pixels, latents)
    if options.reference is not None:
        vae, _ = official_models(options.reference, plain, options.device)
        dtypes = {name: dtype for name, dtype in THEIRS.items() if place.type == "cuda" or dtype != torch.float16}
        works = {name: their_works(vae, pixels, latents, dtype) for name, dtype in dtypes.items()} | works
    rows, failed = [], {}
    for work in ("encode", "decode"):
        runs, made, stopped = settled({name: both[work] for name, both in works.items()}, times=3)
        (found, late), first = in_turns(runs, options.rounds, options.device), next(iter(runs))
        failed |= {f"{name} {work}": why for name, why in {**stopped, **late}.items()}
        for name in found:
            row = {"work": work, **figures(found, name, options.batch)}
            if work == "encode" and name != first:
                row["tokens_equal"] = float((made[name] == made[first]).float().mean())
            rows.append(row)
    settings = {"device": device_name(options.device), "schedule": options.schedule, "width": options.width}
    settings |= {"tokens_compared_with": rows[0]["variant"], "conv_tf32": torch.backends.cudnn.allow_tf32}
    command = command_of(parser_of(), options)
    return result(rows, command=command, n=options.rounds, seeds=0, settings=settings | {"failed": failed})


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result and its table."""
    parser = parser_of()
    return measured(parser, parser.parse_args(argv), measure, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
