"""How good a tokenizer is on drawn scenes: `python -m evaluation.tokenizer_quality --tokenizer RUN/latest/vqvae`.

Fresh scenes (all compositions) are tokenised, decoded and judged: the share of reconstructions the judge accepts
bounds what any transformer on these tokens can score. PSNR and SSIM compare the 8-bit images.

Shapes: B images, l tokens of one scale, V codes, K scales.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from tqdm import tqdm

from evaluation.command import Parser, in_one_line
from evaluation.evaluate_options import check, configure, defaults
from evaluation.intervals import mean_interval
from evaluation.judge import judge_report
from evaluation.report import command_line, portable, result, table, write_result
from evaluation.scenes import TAGS, Scene, fresh_scenes, render
from sample.files import write_png
from sample.load import load_tokenizer
from tokenizer.model import MultiScaleVQ
from tokenizer.quantizer import USED_SHARE


@dataclass(frozen=True)
class Measured:
    """Figures of one tokenizer, and pairs of uint8 images (P, 2, h, w, 3), original then reconstruction."""

    row: dict
    pairs: np.ndarray


def to_floats(images_BHWC: np.ndarray) -> torch.Tensor:
    """uint8 (B, h, w, 3) to float32 (B, 3, h, w) in [-1, 1]."""
    return rearrange(torch.from_numpy(images_BHWC), "b h w c -> b c h w").float().div(127.5).sub(1)


def to_levels(image_BCHW: torch.Tensor) -> np.ndarray:
    """Floats (B, 3, h, w) in [-1, 1], clamped, to uint8 (B, h, w, 3). Raises ValueError if some are not finite."""
    if not image_BCHW.isfinite().all():
        raise ValueError("a reconstruction is not finite: the tokenizer's weights are damaged")
    levels = image_BCHW.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return rearrange(levels, "b c h w -> b h w c").cpu().numpy()


def reconstructions(
    model: MultiScaleVQ, scenes: Sequence[Scene], *, decode: int, batch_size: int = 50
) -> Iterator[tuple[np.ndarray, np.ndarray | None, list[torch.Tensor]]]:
    """Batches of (originals, reconstructions of the first `decode` scenes or None, ids per scale)."""
    side = model.image_hw[0]
    for begin in tqdm(range(0, len(scenes), batch_size), desc="tokenising", unit="batch", disable=None):
        originals = np.stack([render(scene, side) for scene in scenes[begin : begin + batch_size]])
        ids = model.image_to_tokens(to_floats(originals).to(model.device))
        rebuilt = None
        if begin < decode:
            rebuilt = to_levels(model.tokens_to_image([row[: decode - begin] for row in ids]))
        yield originals, rebuilt, ids


def pixel_quality(originals: np.ndarray, rebuilt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PSNR (dB, peak 255) and SSIM of each image: uint8 (N, h, w, 3) twice to (N,) twice."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    error = np.square(originals.astype(np.float64) - rebuilt).mean((1, 2, 3))
    psnr = 10 * np.log10(255**2 / np.maximum(error, 1e-10))
    floats = [to_floats(images).add(1).div(2) for images in (rebuilt, originals)]
    ssim = structural_similarity_index_measure(*floats, data_range=1.0, reduction="none")
    return psnr, ssim.numpy()


def usage(hits_KV: torch.Tensor, scales: Sequence[str]) -> dict[str, float]:
    """Shares of the codebook in use, from hit counts (K, V): per scale by a threshold, and used at least once.

    A code is in use from 0.08 of an equal split of its scale's hits. VAR's own figure splits those of the finest scale
    at all scales, and is lower at the coarser ones.
    """
    fair_K1 = hits_KV.sum(1, keepdim=True) / hits_KV.shape[1]
    shares: dict[str, float] = {}
    for name, used_KV in (("usage", hits_KV >= USED_SHARE * fair_K1), ("used_once", hits_KV > 0)):
        for scale, used_V in zip(scales, used_KV & (hits_KV > 0)):
            shares[f"{name}_{scale}"] = used_V.float().mean().item()
        shares[f"{name}_any_scale"] = (used_KV & (hits_KV > 0)).any(0).float().mean().item()
    return shares


def bit_usage(ones_Kn: torch.Tensor, scales: Sequence[str]) -> dict[str, float]:
    """The same of bitwise tokens, which have no codebook, from the share of ones of every bit, (K, n) in [0, 1].

    A bit is in use if both its values come, each in 4 % of the tokens or more. Beside it the bits'
    mean entropy, 1 where both values come alike.
    """
    rarer_Kn = torch.minimum(ones_Kn, 1 - ones_Kn)
    entropy_Kn = -(torch.special.xlogy(ones_Kn, ones_Kn) + torch.special.xlogy(1 - ones_Kn, 1 - ones_Kn)) / log(2)
    shares = {f"usage_{scale}": float(row) for scale, row in zip(scales, (rarer_Kn >= USED_SHARE / 2).double().mean(1))}
    return shares | {f"bit_entropy_{scale}": float(row) for scale, row in zip(scales, entropy_Kn.mean(1))}


class Uses:
    """How often every code, or every bit, comes at every scale."""

    def __init__(self, model: MultiScaleVQ):
        self.names, self.bitwise = model.schedule.names, model.config.bitwise
        width = model.quantizer.channels if self.bitwise else model.config.vocab_size
        self.hits_KV = torch.zeros(len(self.names), width, dtype=torch.int64)
        self.tokens_K1 = torch.zeros(len(self.names), 1, dtype=torch.int64)

    def add(self, ids: Sequence[torch.Tensor]) -> None:
        """Tokens (B, l), or bits (B, l, n), of every scale."""
        for k, ids_Bl in enumerate(ids):
            values = ids_Bl.cpu()
            self.tokens_K1[k] += values.shape[0] * values.shape[1]
            width = self.hits_KV.shape[1]
            self.hits_KV[k] += values.sum((0, 1)) if self.bitwise else torch.bincount(values.flatten(), minlength=width)

    def shares(self) -> dict[str, float]:
        """`usage`, or `bit_usage`."""
        if self.bitwise:
            return bit_usage(self.hits_KV.double() / self.tokens_K1, self.names)
        return usage(self.hits_KV, self.names)


@torch.no_grad()
def measure(model: MultiScaleVQ, *, n: int, usage_n: int, seed: int = 0, pairs: int = 24) -> Measured:
    """Measure a tokenizer on fresh scenes.

    n: scenes reconstructed and judged.  usage_n: scenes tokenised for the codebook's use (at least n are).
    seed: names the scenes.  pairs: originals and reconstructions to keep for a picture.
    Raises ValueError if n is smaller than the number of tags, or the tokenizer's images are not square.
    """
    if n < len(TAGS):
        raise ValueError(f"n must be at least {len(TAGS)}, one image per tag, got {n}")
    if model.image_hw[0] != model.image_hw[1]:
        raise ValueError(f"scenes are square; this tokenizer makes images of {model.image_hw} pixels (h, w)")
    scenes = fresh_scenes(max(n, usage_n), seed)
    uses, originals, rebuilt = Uses(model), [], []
    for images, decoded, ids in reconstructions(model, scenes, decode=n):
        uses.add(ids)
        if decoded is not None:
            originals.append(images[: len(decoded)])
            rebuilt.append(decoded)
    original, copy = np.concatenate(originals), np.concatenate(rebuilt)
    psnr, ssim = pixel_quality(original, copy)
    metadatas = [scene.metadata for scene in scenes[:n]]
    verdicts = judge_report(copy, metadatas)
    row = {"n": n, "psnr_db": float(psnr.mean()), "psnr_db_ci95": mean_interval(psnr)}
    row |= {"ssim": float(ssim.mean()), "ssim_ci95": mean_interval(ssim)}
    row |= {f"accepted_{name}": value for name, value in verdicts.items() if name != "n"}
    row["accepted_originals"] = judge_report(original, metadatas)["overall"]
    row |= {"usage_n": len(scenes), **uses.shares()}
    return Measured(row, np.stack([original[:pairs], copy[:pairs]], axis=1))


def comparison(pairs: np.ndarray, columns: int = 8, zoom: int = 2) -> Image.Image:
    """Pairs (P, 2, h, w, 3) as a picture: each reconstruction under its original, `columns` pairs a row."""
    pairs = pairs[: len(pairs) // columns * columns or None]
    columns = min(columns, len(pairs))
    gap = 4
    tiles = np.pad(pairs, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    grid = rearrange(tiles, "(rows columns) two h w c -> (rows two h) (columns w) c", columns=columns)
    image = Image.fromarray(grid[:-gap, :-gap])
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def picture_path(out: Path | None) -> Path:
    """Where the picture goes: beside `out`, or tokenizer.png here, and not among the samples in pictures/."""
    return out.with_suffix(".png") if out else Path("tokenizer.png")


def report(
    tokenizer: Path, *, n: int, usage_n: int, seed: int, out: Path | None, command: str, device: str = "cpu"
) -> None:
    """Measure a tokenizer, print its figures, write the picture and, if `out` is given, the result and its table.

    Raises as `load_tokenizer` and `measure` do.
    """
    model = load_tokenizer(tokenizer, device)
    measured = measure(model, n=n, usage_n=usage_n, seed=seed)
    row = {"tokenizer": portable(tokenizer), "schedule": model.schedule.text}
    row |= {"vocab_size": model.config.vocab_size, "parameters": sum(p.numel() for p in model.parameters())}
    row |= measured.row
    print(table([row], [name for name in row if not name.endswith("_ci95")]))
    write_png(picture_path(out), comparison(measured.pairs))
    print(f"each original above its reconstruction: {picture_path(out)}")
    if out:
        settings = {"scenes": "fresh, all compositions, tags in turn", "used_from_share_of_equal_split": USED_SHARE}
        write_result(out, result([row], command=command, n=n, seeds=seed, settings=settings))
        print(f"written: {out}")


def report_options(args: argparse.Namespace) -> None:
    """`report` for a checked command line."""
    report(
        args.tokenizer,
        n=args.n or 1200,
        usage_n=args.usage_n,
        seed=args.seed,
        out=args.out,
        command=command_line("nextscale evaluate", vars(args), defaults()),
        device=args.device,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`nextscale evaluate --tokenizer ...` without the rest of it."""
    parser = Parser(prog="python -m evaluation.tokenizer_quality")
    configure(parser)
    args = parser.parse_args(argv)
    with in_one_line(parser):
        check(args)
        report_options(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
