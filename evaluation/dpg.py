"""DPG-Bench's own formats (ELLA, arXiv 2403.05135): its prompts, the grids its scorer cuts, and what that one finds.

A user with the scorer (github.com/TencentQQGYLab/ELLA, dpg_bench/) has our images scored unchanged: `nextscale evaluate
--suite FOLDER`, its folder of prompts, writes the grids, and `--dpg-results` takes in the file it writes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from evaluation.intervals import mean_interval
from evaluation.sources import FileImages, read_image
from sample.files import read_png_text, read_text, write_png

PROMPTS, PICTURES = 1065, 4  # of each prompt four pictures, two by two


# --- prompts and grids -----------------------------------------------------------------------------------------------


def read_prompts(folder: str | Path) -> dict[str, str]:
    """Key -> prompt of a folder of KEY.txt, by key, numbers in their order.

    Raises:
        ValueError: if it holds none, one is empty or not UTF-8, or two are the same.
    """
    files = sorted(Path(folder).glob("*.txt"), key=lambda file: [(len(n), n) for n in re.split(r"(\d+)", file.stem)])
    prompts = {file.stem: one_line(read_text("suite", file)) for file in files}
    if not prompts:
        raise ValueError(f"suite {folder} holds no KEY.txt, a prompt each, as DPG-Bench's folder of prompts does")
    keys: dict[str, str] = {}
    for key, prompt in prompts.items():
        if not prompt:
            raise ValueError(f"suite {folder}: {key}.txt is empty")
        if prompt in keys:
            raise ValueError(f"suite {folder}: {key}.txt and {keys[prompt]}.txt hold the same prompt")
        keys[prompt] = key
    return prompts


def one_line(text: str) -> str:
    """A prompt with single spaces between its words."""
    return " ".join(text.split())


def write_grids(images: FileImages, prompts: Sequence[str], suite: str | Path, folder: Path) -> int:
    """Write KEY.png of each prompt of a suite, its first four images two by two; grids of the same files stay.

    Args:
        images: of a tree of prompts; square, of one size.
        prompts: of every image.
        folder: made if missing; the scorer wants nothing else in it.

    Returns:
        The side of an image in pixels, the scorer's `--resolution`.

    Raises:
        ValueError: naming the first prompt that is none of the suite's, or has fewer images; or as `write_grid`.
    """
    keys = {prompt: key for key, prompt in read_prompts(suite).items()}
    paths: dict[str, list[Path]] = {}
    for path, prompt in zip(images.paths, map(one_line, prompts), strict=True):
        if prompt not in keys:
            raise ValueError(f"{path}: its prompt is none of {suite}: {prompt:.60}")
        paths.setdefault(prompt, []).append(path)
    side = 0
    for prompt, found in tqdm(paths.items(), desc="grids", unit="grid", disable=None, leave=False):
        if len(found) < PICTURES:
            raise ValueError(f"DPG-Bench's scorer cuts {PICTURES} images of a prompt, got {len(found)} of {prompt:.60}")
        side = write_grid(folder / f"{keys[prompt]}.png", found[:PICTURES], side)
    return side


def write_grid(place: Path, paths: Sequence[Path], side: int) -> int:
    """Write four images (h, w, 3) as one (2h, 2w, 3), by rows, unless that is there; returns their side.

    Raises ValueError, naming the path, if one is no square, or not of `side` pixels where that is not 0.
    """
    for path in paths:
        with Image.open(path) as image:
            width, height = image.size
        if width != height or side not in (0, width):
            raise ValueError(f"DPG-Bench's scorer cuts squares of one size, and {path} has {width}x{height} pixels")
        side = width
    made_of = {"images": hashlib.sha256(b"".join(map(Path.read_bytes, paths))).hexdigest()}
    if read_png_text(place) != made_of:
        rows = [np.concatenate([read_image(path) for path in paths[row : row + 2]], axis=1) for row in (0, 2)]
        write_png(place, np.concatenate(rows), made_of)
    return side


# --- results ---------------------------------------------------------------------------------------------------------


def read_results(path: str | Path) -> dict:
    """What the scorer's results file says, in percent: `n` grids, `dpg` with its 95 % interval over prompts, and the
    mean of each of its first-level categories, `dpg_entity`, ...

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no scores.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"results {path} is not a file")
    means: dict[str, float] = {}
    categories: dict[str, float] = {}
    listing = ""
    for line in read_text("results", path).splitlines():
        scored = re.fullmatch(r"(.+\.\w+)((?:, [\d.e-]+)+)", line)
        if scored:
            means[scored[1]] = float(scored[2].split(", ")[-1])
        elif line.endswith("category scores:"):
            listing = line[:2]
        elif listing == "L1" and (category := re.fullmatch(r"\t(.+): ([\d.e-]+)", line)):
            categories["dpg_" + re.sub(r"\W+", "_", category[1])] = float(category[2])
    if not means:
        raise ValueError(f"results {path} holds no line of DPG-Bench's scorer: IMAGE, its scores, their mean")
    values = 100 * np.array(list(means.values()))
    interval = np.clip(mean_interval(values), 0, 100).tolist()
    return {"n": len(means), "dpg": float(values.mean()), "dpg_ci95": interval, **categories}
