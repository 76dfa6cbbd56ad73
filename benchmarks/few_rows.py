"""Blocks of few rows as overlapping kernels, against those of today: `python -m benchmarks.few_rows`.

For a Hopper GPU. Random weights, one image with guidance. First every product of every scale is cut in several ways
(`sample.few_rows.Tile`), each timed over the weights of all blocks; the fastest go into the further runs and are
printed. Beside them stand PyTorch's own product, the fastest cut where nothing was read ahead ("cold"), and where all
weights are in the L2 cache already ("warm"). Then all blocks of a scale, and last whole images, each as CUDA graphs, in
turns: "fast" is `--fast on`, "few_rows" the same with `FastSettings.few_rows`, "attention" that without the chain of
kernels, "searched" that with cuDNN's own search for the fastest convolutions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product as every
from typing import Any

import torch

from benchmarks.gpu import current_device, device_name, figures, in_turns, settled
from benchmarks.tables import lines, measured
from evaluation.command import Parser, add_out, check_least
from sample import few_rows
from sample.few_rows import Tile
from sample.graphs import record_graph

Run = Callable[[], Any]
COLUMNS = ("part", "rows", "shape", "variant", "tile", "seconds", "microseconds", "tb_per_s", "times_fast", "error")
WIDTHS = {"qkv": (3, 1), "to_out": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}  # outputs and inputs, in widths of the model


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m benchmarks.few_rows", description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="d30", help="published size, random weights (d30)")
    parser.add_argument("--schedule", default="var256", help="scales (var256)")
    parser.add_argument("--width", type=int, default=160, help="of the tokenizer's finest level (160)")
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each variant (9)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... (cuda)")
    add_out(parser, "results/few_rows_gpu.json", "result and table")
    return parser


def candidates(M: int, N: int, K: int, processors: int) -> list[Tile]:
    """Ways to cut a product: what `tile_of` says, and others that fill the processors about once, twice and thrice."""
    made, room = [few_rows.tile_of(M, N, K, processors)], few_rows.room_of(M)
    for tall, wide, deep in every({min(64, room), min(128, room)}, (32, 64, 128, 256), (64, 128)):
        if K % deep or tall * wide > 16384 or tall * wide < 512 or (tall + wide) * deep > 16384:
            continue
        tiles, steps = -(-N // wide) * -(-M // tall), K // deep
        counts = [n for n in range(1, 17) if steps % n == 0 and steps // n >= 2]
        for filled in (1, 2, 3):
            parts = min(counts, key=lambda n: abs(tiles * n / processors - filled))
            if 0.7 <= tiles * parts / processors <= 4.5:
                for stages in (3, 4) if (tall + wide) * deep > 12288 else (4,):
                    made.append(Tile(tall, wide, deep, parts, stages, 8 if tall * wide >= 8192 else 4))
    return list(dict.fromkeys(made))


def shapes_of(D: int, lengths: Sequence[int]) -> Iterator[tuple[str, int, int, int]]:
    """Every product of a guided image through a chain, the longest of each `TILES` key: its layer, M, N and K."""
    longest = {few_rows.room_of(2 * length): 2 * length for length in sorted(lengths) if 2 * length <= few_rows.ROWS}
    for M in longest.values():
        for layer, (outputs, inputs) in WIDTHS.items():
            yield layer, M, outputs * D, inputs * D


def weights_of(block: Any, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A block's weight (N, K) and bias (N,)."""
    if layer == "qkv":
        return block.qkv_ED, block.bias_E
    part = block.attn.to_out if layer == "to_out" else getattr(block.ffn, layer)
    return part.weight, part.bias


def product_run(blocks: Sequence[Any], layer: str, M: int, tile: Tile, kind: str = "ahead") -> Run:
    """That product of the same inputs by every block, one after another.

    Args:
        kind: "ahead", each brings the next one's weights; "cold", none does; "warm", all have the first one's weights;
            "pytorch", PyTorch's product, with nothing after it.
    """
    N, K = weights_of(blocks[0], layer)[0].shape
    x, onto = (torch.randn(2, M // 2, n, device=blocks[0].counters.device).bfloat16() for n in (K, N))
    ends = {"gelu": True} if layer == "fc1" else {} if layer == "qkv" else {"onto": onto, "gate_RD": onto[:, 0]}

    def run() -> torch.Tensor:
        for block, following in zip(blocks, [*blocks[1:], blocks[0]]):
            weight, bias = weights_of(blocks[0] if kind == "warm" else block, layer)
            if kind == "pytorch":
                out = torch.nn.functional.linear(x, weight, bias)
            else:
                ahead = weights_of(following, layer)[0] if kind == "ahead" else None
                out = few_rows.product(x, weight, bias, block.counters, ahead=ahead, tile=tile, **ends)
        return out

    return run


class Warmed:
    """A Triton kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Run:
        return partial(self.kernel.warmup, grid=grid)


def compile_side_by_side(runs: Sequence[Run]) -> None:
    """Compile the products of all runs, by several threads where Triton knows how to; what fails, fails again later."""
    from triton import AsyncCompileMode

    kept, few_rows._product = few_rows._product, Warmed(few_rows._product)
    try:
        with ThreadPoolExecutor() as pool, AsyncCompileMode(pool, ignore_errors=True):
            for run in runs:
                run()
    finally:
        few_rows._product = kept


@torch.no_grad()
def tuned(blocks: Sequence[Any], lengths: Sequence[int]) -> tuple[dict[tuple[int, int, int], Tile], list[dict]]:
    """The fastest cut of every product; and rows for it, `tile_of`'s own, and what they are to be compared with."""
    from triton.testing import do_bench_cudagraph

    D, best, rows = blocks[0].qkv_ED.shape[1], {}, []
    count = few_rows.processors(blocks[0].qkv_ED.device)
    trials = {shape: candidates(*shape[1:], count) for shape in shapes_of(D, lengths)}
    compile_side_by_side([product_run(blocks[:1], *shape[:2], tile) for shape in trials for tile in trials[shape]])

    def microseconds(layer: str, M: int, tile: Tile, kind: str) -> float:
        run = product_run(blocks, layer, M, tile, kind)
        return 1e3 * do_bench_cudagraph(run, rep=5, return_mode="median") / len(blocks)

    for (layer, M, N, K), tiles in trials.items():
        taken = {}
        for tile in tiles:
            try:
                taken[tile] = microseconds(layer, M, tile, "ahead")
            except Exception as error:  # more shared memory than there is, say: another one serves
                print(f"{layer}, {M} rows: {tile} cannot be used: {str(error).splitlines()[0]}", file=sys.stderr)
        fastest = best[few_rows.room_of(M), N, K] = min(taken, key=taken.__getitem__)
        found = {"own": (tiles[0], taken.get(tiles[0])), "tuned": (fastest, taken[fastest])}
        found |= {kind: (fastest, microseconds(layer, M, fastest, kind)) for kind in ("cold", "warm", "pytorch")}
        for variant, (tile, took) in found.items():
            row = {"part": layer, "rows": M, "shape": f"{N}x{K}", "variant": variant}
            if took is not None:
                row |= {"microseconds": took, "tb_per_s": 2e-6 * N * K / took}
            rows.append(row if variant == "pytorch" else row | {"tile": str(tile)})
    return best, rows


def limited(run: Run, rows: int) -> Run:
    """A run in which no more rows go through a chain."""

    def inner() -> Any:
        kept, few_rows.ROWS = few_rows.ROWS, rows
        try:
            return run()
        finally:
            few_rows.ROWS = kept

    return inner


@torch.no_grad()
def blocks_run(pipeline: Any, k: int, x_RlD: torch.Tensor, ada_R6D: torch.Tensor) -> Run:
    """All blocks at scale k, as a CUDA graph."""
    model = pipeline.transformer
    begin, cache = model.schedule.begins[k], model.new_cache()
    if begin:
        shape = (2, model.config.heads, begin, model.config.width // model.config.heads)
        torch.manual_seed(k)
        keys = torch.nn.functional.normalize(torch.randn(shape, device=x_RlD.device), dim=-1).to(x_RlD.dtype)
        for i in range(len(model.blocks)):
            cache.update(i, keys, keys)

    def blocks(h_RlD: torch.Tensor, ada_R6D: torch.Tensor) -> list[torch.Tensor]:
        cache.lengths = [begin] * len(model.blocks)
        for i, block in enumerate(model.blocks):
            h_RlD = block(h_RlD, ada_R6D, cache=cache, layer=i, begin=begin)
        return [h_RlD]

    replay = record_graph(blocks, [x_RlD, ada_R6D])
    return lambda: (replay([x_RlD, ada_R6D]), cache)[0]  # the cache must live as long as the graph that reads it


def scale_rows(pipelines: dict[str, Any], rounds: int, device: str) -> list[dict[str, Any]]:
    """Seconds of all blocks by scale and variant, and how far each one's output lies from that of "fast"."""
    model, rows = pipelines["fast"].transformer, []
    for k, length in enumerate(model.schedule.lengths):
        if 2 * length > few_rows.ATTENDED:
            break
        generator = torch.Generator(device).manual_seed(k)
        x = torch.randn(2, length, model.config.width, generator=generator, device=device).bfloat16()
        ada = torch.randn(2, 6, model.config.width, generator=generator, device=device).bfloat16() / 2
        runs = {"fast": blocks_run(pipelines["fast"], k, x, ada)}
        recorded = partial(blocks_run, pipelines["few_rows"], k, x, ada)
        runs["attention"] = limited(recorded, 0)()
        if 2 * length <= few_rows.ROWS:
            runs["few_rows"] = recorded()
        found, _ = in_turns(runs, rounds, device)
        for name in found:
            row = {"part": "blocks", "rows": 2 * length} | figures(found, name, 1, bases=("fast",))
            if name != "fast":
                ours, theirs = (runs[variant]()[0].double() for variant in (name, "fast"))
                row["error"] = float((ours - theirs).norm() / theirs.norm())
            rows.append(row)
    return rows


def image_rows(pipelines: dict[str, Any], rounds: int, device: str) -> list[dict[str, Any]]:
    """Seconds of a whole image by variant."""
    from benchmarks.sampling_gpu import run_of

    def searched() -> Any:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
            return run_of(pipelines["searched"])(1)

    runs = {name: partial(run_of(pipelines[name]), 1) for name in pipelines if name != "searched"}
    runs = runs | {"attention": limited(runs["attention"], 0), "searched": searched}
    runs, _, failed = settled(runs, times=3)
    found, _ = in_turns(runs, rounds, device)
    if failed:
        print(failed, file=sys.stderr)
    return [{"part": "image"} | figures(found, name, 1, bases=("fast",)) for name in found]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Tune, then time; the result as `report.result` makes it."""
    from benchmarks.models import check_size, random_pipeline
    from evaluation.report import command_of, result
    from sample.fast import accelerate, supported

    check_size(options.size)
    check_least(options, rounds=1)
    place = current_device(options.device)
    if not few_rows.usable(place, torch.bfloat16):
        raise ValueError(f"--device must be a Hopper GPU with Triton, got {options.device}")
    pipelines, everything = {}, supported(place, torch.bfloat16)
    for name in ("fast", "attention", "few_rows", "searched"):
        with place:
            pipelines[name] = random_pipeline(options.size, options.schedule, width=options.width).to(torch.bfloat16)
        accelerate(pipelines[name], replace(everything, few_rows=name != "fast"))
    model = pipelines["few_rows"].transformer
    best, rows = tuned(model.blocks, model.schedule.lengths)
    for shape, tile in best.items():
        print(f"    {shape}: {tile},")
    few_rows.TILES.update(best)
    for part in (scale_rows, image_rows):
        made = part(pipelines, options.rounds, options.device)
        print(lines(made, COLUMNS), flush=True)
        rows += made
    settings = {"device": device_name(options.device), "size": options.size, "schedule": options.schedule}
    command = command_of(parser_of(), options)
    return result(rows, command=command, n=options.rounds, seeds=0, settings=settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result and its table."""
    parser = parser_of()
    return measured(parser, parser.parse_args(argv), measure, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
