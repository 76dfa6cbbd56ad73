"""What a tokenizer does to photographs: rFID, PSNR, SSIM and LPIPS of reconstructions against their originals.

Shapes: N images, B of a batch, h w pixels. Images are uint8 RGB.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import numpy as np
import torch
from PIL import Image

from evaluation.distributions import NETWORKS, chosen_metrics, load_network
from evaluation.evaluate_options import TOKENIZER_METRICS, defaults
from evaluation.features import Described, Describer, describe_all
from evaluation.figures import paired_figures
from evaluation.frechet import FEW
from evaluation.guards import few_cautions
from evaluation.intervals import mean_interval
from evaluation.report import command_line, portable, result, table, write_result
from evaluation.sources import FileImages, Images, open_images, progress
from evaluation.tokenizer_quality import (
    comparison,
    picture_path,
    pixel_quality,
    to_floats,
    to_levels,
)
from sample.files import write_png
from sample.load import load_tokenizer
from tokenizer.losses import LpipsLoss
from tokenizer.model import MultiScaleVQ

PICTURES = 24  # pairs in the picture


def centre_crop(image: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """ADM's crop: halve by averaging while twice too large, then bicubic to the shortest side, then the middle.

    image: (h, w, 3).  Returns (*hw, 3).
    """
    if image.shape[:2] == tuple(hw):
        return image
    picture = Image.fromarray(image)
    target = max(hw)
    while min(picture.size) >= 2 * target:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(hw[0] / picture.height, hw[1] / picture.width)
    size = (max(hw[1], round(picture.width * scale)), max(hw[0], round(picture.height * scale)))
    whole = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    top, left = ((have - want) // 2 for have, want in zip(whole.shape[:2], hw, strict=True))
    return whole[top : top + hw[0], left : left + hw[1]]


def pairs(
    model: MultiScaleVQ, images: Iterable[np.ndarray], batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of originals (B, h, w, 3), cropped to the model's size, and their reconstructions."""
    stream = iter(images)
    while batch := list(islice(stream, batch_size)):
        originals = np.stack([centre_crop(image, model.image_hw) for image in batch])
        with torch.no_grad():
            ids = model.image_to_tokens(to_floats(originals).to(model.device))
            yield originals, to_levels(model.tokens_to_image(ids))


def reconstruct(
    model: MultiScaleVQ,
    images: Iterable[np.ndarray],
    *,
    networks: Mapping[str, Describer],
    lpips: bool = False,
    batch_size: int = 32,
    resamples: int | None = None,
) -> tuple[dict, np.ndarray]:
    """A row of figures, and the first pairs of a picture (P, 2, h, w, 3).

    `psnr_db` and `ssim` always; for each of `networks` (keys of `evaluation.distributions.NETWORKS`) the Frechet
    distance to the originals themselves: `rfid`, `rfd_scenes`, `rfd_dinov2`; `lpips` (VGG) if asked for. Against other
    statistics, such as ADM's npz, an rFID is another, larger figure.
    Raises ValueError if LPIPS' packages are missing.
    """
    perceptual = LpipsLoss().to(model.device) if lpips else None
    quality, distances, kept = [], [], []
    described: dict[str, tuple[list[Described], list[Described]]] = {name: ([], []) for name in networks}
    for originals, rebuilt in pairs(model, images, batch_size):
        quality.append(np.stack(pixel_quality(originals, rebuilt), axis=1))
        if perceptual is not None:
            floats = [to_floats(x).to(model.device) for x in (rebuilt, originals)]
            distances += [float(perceptual(a[None], b[None])) for a, b in zip(*floats, strict=True)]
        for name, network in networks.items():
            for side, batch in zip(described[name], (originals, rebuilt), strict=True):
                side.append(describe_all(network, batch, batch_size=batch_size))
        if sum(map(len, kept)) < PICTURES:
            kept.append(np.stack([originals, rebuilt], axis=1))
    psnr, ssim = np.concatenate(quality).T
    row = {"n": len(psnr), "psnr_db": float(psnr.mean()), "psnr_db_ci95": mean_interval(psnr)}
    row |= {"ssim": float(ssim.mean()), "ssim_ci95": mean_interval(ssim)}
    if distances:
        row |= {"lpips": float(np.mean(distances)), "lpips_ci95": mean_interval(np.array(distances))}
    for name, sides in described.items():
        real, made = (Described.joined(side).features for side in sides)
        figure = "rfid" if name == "inception" else f"rfd_{name}"
        row |= paired_figures(figure, made, real, resamples)
    return row, np.concatenate(kept)[:PICTURES]


def some_of(images: Images, count: int, seed: int) -> Iterator[np.ndarray]:
    """`count` of the images drawn at random, in their order: a folder's first ones are of its first classes."""
    if count == len(images):
        return iter(images)
    places = np.sort(np.random.default_rng(seed).permutation(len(images))[:count]).tolist()
    if isinstance(images, FileImages):
        return iter(FileImages([images.paths[i] for i in places]))
    wanted = set(places)
    return (image for i, image in enumerate(images) if i in wanted)


def report_reconstructions(args: argparse.Namespace) -> None:
    """`nextscale evaluate --tokenizer T --reference IMAGES`: print the figures, write the picture and the result.

    Raises ValueError and FileNotFoundError as its parts do.
    """
    metrics = chosen_metrics(args.metrics, None, TOKENIZER_METRICS)
    images = open_images(args.reference)
    model = load_tokenizer(args.tokenizer, args.device)
    networks = {
        name: load_network(name, args, model.device, spatial=False)
        for name, known in NETWORKS.items()
        if set(known).intersection(metrics)
    }
    count = min(len(images), args.n or len(images))
    stream = progress(some_of(images, count, args.seed), "reconstructing", count)
    lpips = "lpips" in metrics
    options = {"lpips": lpips, "batch_size": args.batch_size, "resamples": args.bootstrap}
    figures, shown = reconstruct(model, stream, networks=networks, **options)
    row = {"tokenizer": portable(args.tokenizer), "images": portable(args.reference), **figures}
    print(table([row], [name for name in row if not name.endswith("_ci95")]))
    cautions = few_cautions([name for name in row if name in ("rfid", "rfd_dinov2")], count)
    cautions += few_cautions([name for name in row if name == "rfd_scenes"], count, FEW)
    for caution in cautions:
        print(f"caution: {caution}", file=sys.stderr)
    write_png(picture_path(args.out), comparison(shown))
    print(f"each original above its reconstruction: {picture_path(args.out)}")
    if args.out is not None:
        settings = {"images": f"{count} of {len(images)}, drawn by seed {args.seed}" if count < len(images) else "all"}
        settings |= {"crop": "ADM's, to the tokenizer's size", "reference": "the originals", "cautions": cautions}
        settings["extractors"] = {network.name: network.digest for network in networks.values()}
        command = command_line("nextscale evaluate", vars(args), defaults())
        write_result(args.out, result([row], command=command, n=count, seeds=None, settings=settings))
        print(f"written: {args.out}")
