"""Whether data is ever what training waits for: `python -m benchmarks.input_pipeline --device cuda`.

Makes JPEGs in class folders (random ones, of ImageNet's usual size) and a random tokenizer, encodes them with
`train.cache_tokens`, and trains `train.train_var` on that cache with one loading process, and on the JPEGs themselves,
which are then read, cropped and encoded on the fly. What a run writes to metrics.jsonl is the result: `data_wait` is
the share of time that the loop waited for a batch. A GPU may still be busy then, so it is an upper bound. Lines of the
start, when kernels are chosen and compiled, are left out. Caching is timed by its shards, loading processes included.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.gpu import device_name
from benchmarks.tables import lines, measured
from benchmarks.timing import spread
from evaluation.command import Parser

SIZES = {
    "cuda": {"size": "d16", "schedule": "var256", "width": 160, "batch": 64, "steps": 40}
    | {"images": 512, "passes": 16, "workers": 8},
    "cpu": {"size": "d6", "schedule": "1,2,3,4", "width": 32, "batch": 32, "steps": 40}
    | {"images": 256, "passes": 4, "workers": 1},
}
HELP = {
    "size": "published size of the transformer",
    "schedule": "scales; an image is 16 pixels a latent cell wide",
    "width": "of the tokenizer's finest level",
    "batch": "images of a step, and encoded at once",
    "steps": "of each training",
    "images": "JPEGs",
    "passes": "times they are encoded into the cache",
    "workers": "processes that read images",
}
LINES = 8  # of metrics.jsonl a run writes
STARTING = 2  # of them are of the start
PIXELS = (500, 375)  # across, down
COLUMNS = ("stage", "images_per_s", "data_wait", "workers")


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m benchmarks.input_pipeline", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda", help="decides the other defaults (cuda)")
    for name, what in HELP.items():
        kind = type(SIZES["cuda"][name])
        parser.add_argument(f"--{name}", type=kind, help=f"{what} ({', '.join(str(s[name]) for s in SIZES.values())})")
    parser.add_argument("--precision", choices=("no", "bf16"), help="(bf16 on CUDA, no on a CPU)")
    parser.add_argument("--no-compile", action="store_true", help="plain blocks on CUDA, too")
    parser.add_argument("--out", type=Path, help="result, table (overwrites results/input_pipeline_gpu.json or _cpu)")
    return parser


def make_images(folder: Path, count: int, classes: int = 8) -> None:
    """JPEGs of random blotches of several sizes, with as much in them as photographs have."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for index in range(count):
        made = Image.new("RGB", PIXELS)
        for octave, times in enumerate((128, 32, 8, 2), start=1):
            small = generator.integers(0, 256, (PIXELS[1] // times + 1, PIXELS[0] // times + 1, 3), dtype=np.uint8)
            made = Image.blend(made, Image.fromarray(small).resize(PIXELS, Image.Resampling.BILINEAR), 1 / octave)
        path = folder / f"class{index % classes}" / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        made.save(path, quality=90)


def make_tokenizer(folder: Path, width: int, schedule: str) -> int:
    """Save a random tokenizer of the official shape; the side of its images in pixels."""
    import torch

    from tokenizer.model import MultiScaleVQ

    torch.manual_seed(0)
    vqvae = MultiScaleVQ(channels=[width * times for times in (1, 1, 2, 2, 4)], schedule=schedule)
    vqvae.save_pretrained(folder)
    return vqvae.image_hw[0]


def words(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Settings by group as the words of a training command."""
    flat = {f"{group}.{name}": value for group, pairs in settings.items() for name, value in pairs.items()}
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in flat.items()]


def cached(work: Path, sizes: Mapping[str, Any], data: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """Run `train.cache_tokens`: images a second of its full shards but the first."""
    from train import cache_tokens

    shard = max(1, sizes["images"] * sizes["passes"] // 4)
    cache = {"folder": work / "cache", "tokenizer": work / "vqvae", "precision": precision, "shard_size": shard}
    cache |= {"batch_size": sizes["batch"], "passes": sizes["passes"], "workers": sizes["workers"]}
    cache_tokens.main(words({"data": data, "cache": cache}))
    ends = sorted(path.stat().st_mtime for path in (work / "cache" / "train").glob("*.npy"))[:3]
    speeds = [shard / (end - begin) for begin, end in pairwise(ends)]
    return told({"stage": "cache tokens", **spread("images_per_s", speeds), "workers": sizes["workers"]})


def told(row: dict[str, Any]) -> dict[str, Any]:
    """The row, after it was printed: the whole takes minutes."""
    print(lines([row], COLUMNS).splitlines()[-1], file=sys.stderr, flush=True)
    return row


def trained(
    run_dir: Path, sizes: Mapping[str, Any], given: Mapping[str, Mapping[str, Any]], run: Mapping[str, Any]
) -> dict[str, Any]:
    """Run `train.train_var`: its own images a second and share of waiting, but for the start.

    Raises:
        KeyboardInterrupt: if it was interrupted.
    """
    from train import train_var
    from train.session import Stopped
    from var.presets import PRESETS

    shape = {name: value for name, value in PRESETS[sizes["size"]].items() if name != "drop_path"}
    never = {"validate_every": 10**9, "checkpoint_every": 10**9, "validation_images": 1, "previews": 0}
    run = {**run, **never, "run_dir": run_dir, "log_every": max(1, sizes["steps"] // LINES), "bar_every": 60, "ema": 0}
    run |= {"batch_size": sizes["batch"], "total_images": sizes["batch"] * sizes["steps"]}
    try:
        train_var.main(words({**given, "transformer": shape, "run": run}))
    except Stopped as stopped:
        raise KeyboardInterrupt from stopped
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [line for line in metrics if line["kind"] == "train"][STARTING:]
    row = {"workers": run["workers"], **spread("images_per_s", [line["images_per_s"] for line in kept])}
    return row | spread("data_wait", [line["data_wait"] for line in kept])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make the data, encode, train twice; the result as `report.result` makes it."""
    from evaluation.report import command_of, result
    from sample.load import resolve_device
    from var.presets import PRESETS

    sizes = {name: vars(options)[name] or default for name, default in SIZES[options.device].items()}
    known = [name for name, shape in PRESETS.items() if "conditioning" not in shape]
    if sizes["size"] not in known:
        raise ValueError(f"--size must be one of {', '.join(known)}, got {sizes['size']!r}")
    if sizes["steps"] < LINES or sizes["images"] < 32 or min(sizes["batch"], sizes["workers"]) < 1:
        raise ValueError(f"--steps must be {LINES} or more, --images 32 or more, --batch and --workers 1 or more")
    resolve_device(options.device)
    if on_cpu := options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # for train.cache_tokens, which has no such flag
    fast = not on_cpu and not options.no_compile
    precision = options.precision or ("no" if on_cpu else "bf16")
    run = {"precision": precision, "compile": fast, "cpu": on_cpu}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_images(work / "images", sizes["images"])
        side = make_tokenizer(work / "vqvae", sizes["width"], sizes["schedule"])
        data = {"source": "folder", "path": work / "images", "size": side}
        rows = [cached(work, sizes, data, precision)]
        tokens = {"tokens": {"tokenizer": work / "vqvae", "cache": work / "cache"}}
        row = trained(work / "on-tokens", sizes, tokens, run | {"workers": 1})
        rows.append(told({"stage": "train on cached tokens", **row}))
        images = {"tokens": {"tokenizer": work / "vqvae"}, "data": data}
        row = trained(work / "on-images", sizes, images, run | {"workers": sizes["workers"]})
        rows.append(told({"stage": "train on images", **row}))
    settings = {**sizes, "side": side, "device": device_name(options.device), "precision": precision, "compile": fast}
    command = command_of(parser_of(), options)
    return result(rows, command=command, n=LINES - STARTING, seeds=0, settings=settings)


def out_of(options: argparse.Namespace) -> Path:
    """Where results of a device go."""
    return Path(f"results/input_pipeline_{'cpu' if options.device == 'cpu' else 'gpu'}.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result and its table."""
    parser = parser_of()
    return measured(parser, parser.parse_args(argv), measure, COLUMNS, out_of=out_of)


if __name__ == "__main__":
    sys.exit(main())
