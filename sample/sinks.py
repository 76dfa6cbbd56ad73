"""Where images end up: a folder, a GenEval tree, an npz. What is finished is never made again.

Every file is written under a temporary name and renamed, so what exists is whole.

Shapes: K scales, h w pixels, N images, which are uint8 RGB, (h, w, 3).
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from sample.files import atomically, read_png_text, write_png, write_text

if TYPE_CHECKING:
    from sample.images import Request


LARGEST = 256  # images in a shard of an npz


class Sink(Protocol):
    """Where images end up.

    Attributes:
        block: requests that must stay together in one process.
    """

    block: int

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """The requests that are not finished."""

    def write(self, request: Request, image: np.ndarray) -> None:
        """Take an image (h, w, 3), or the pictures (K, h, w, 3) after each scale."""

    def finish(self) -> None:
        """Called once, in one process, when all processes have written all images."""


class PngFolder:
    """DIR/<prompt>_seed<seed>.png for every request, with its request and settings in the PNG's text.

    Args:
        folder: made if missing.
        settings: what made the images, JSON-able; an image holding others is made again.
        informal: names of settings that may differ.
        every_scale: also keep DIR/scales/<name>.png, a row of the pictures after each scale.
        trees: an image is finished when DIR/search/<name>.png is there, too, which others write.
    """

    block = 1

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        *,
        informal: Sequence[str] = (),
        every_scale: bool = False,
        trees: bool = False,
    ):
        self.folder, self.settings, self.informal = Path(folder), settings, informal
        self.every_scale, self.trees = every_scale, trees

    def path(self, request: Request) -> Path:
        """Where the image of a request goes."""
        return self.folder / f"{file_stem(request.prompt)}_seed{request.seed}.png"

    def scales_path(self, request: Request) -> Path:
        """Where its row of scales goes."""
        return self.folder / "scales" / self.path(request).name

    def tree_path(self, request: Request) -> Path:
        """Where the family tree of its search goes."""
        return self.folder / "search" / self.path(request).name

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """The requests without a whole PNG of the same request and settings."""
        return [request for request in requests if not self._holds(request)]

    def write(self, request: Request, image: np.ndarray) -> None:
        """Write the PNG; for (K, h, w, 3) also the row of scales."""
        text = image_text(request, self.settings)
        if image.ndim == 4:
            write_png(self.scales_path(request), np.concatenate(image, axis=1), text)
            image = image[-1]
        write_png(self.path(request), image, text)

    def finish(self) -> None:
        """Nothing is left to do."""

    def _holds(self, request: Request) -> bool:
        paths = [self.path(request), *([self.scales_path(request)] if self.every_scale else [])]
        wanted = self._formal(image_text(request, self.settings))
        if any(self._formal(read_png_text(path)) != wanted for path in paths):
            return False
        return not self.trees or read_png_text(self.tree_path(request)) is not None

    def _formal(self, text: dict[str, str] | None) -> dict[str, Any] | None:
        """A PNG's text, its settings read, without the informal ones; None if it is not ours."""
        try:
            settings = json.loads(text["settings"])
            return {**text, "settings": {name: settings[name] for name in settings if name not in self.informal}}
        except (TypeError, KeyError, json.JSONDecodeError):
            return None


class GenEvalTree(PngFolder):
    """GenEval's tree: DIR/00000/metadata.jsonl and DIR/00000/samples/0000.png, a folder per prompt."""

    def path(self, request: Request) -> Path:
        """Where the image of a request goes."""
        return self.folder / f"{request.group:05d}" / "samples" / f"{request.place:04d}.png"

    def scales_path(self, request: Request) -> Path:
        """Where its row of scales goes."""
        return self.folder / f"{request.group:05d}" / "scales" / f"{request.place:04d}.png"

    def write(self, request: Request, image: np.ndarray) -> None:
        """Write the PNG, and first its prompt's metadata."""
        metadata = self.folder / f"{request.group:05d}" / "metadata.jsonl"
        if not metadata.exists():
            write_text(metadata, json.dumps(request.metadata or {"prompt": request.prompt}) + "\n")
        super().write(request, image)


class NpzFile:
    """One npz with `arr_0`, uint8 (N, h, w, 3) in the order of the requests: what ADM's evaluator reads.

    Of a class model there is `arr_1`, int64 (N,), too: the classes, as ADM's own sampler writes them. Until the file is
    complete, its shards lie in FILE.parts/.

    Args:
        path: the file.
        requests: all requests of all processes.
        block: images in a shard; an interrupted job loses at most one of them per process. 256, or fewer of a small
            job, so that many processes have some each, when None.
    """

    def __init__(self, path: Path, requests: Sequence[Request], *, block: int | None = None):
        self.path, self.requests = Path(path), list(requests)
        self.parts = self.parts_of(self.path)
        usual = block or (LARGEST if any(self.parts.glob("[0-9]" * 6 + ".npy")) else None)  # shards of earlier releases
        self.block = usual or min(LARGEST, max(1, len(self.requests) // 64))
        self._ending = ".npy" if usual else f"-of-{self.block}.npy"
        self._index = {(request.group, request.place): i for i, request in enumerate(self.requests)}
        self._waiting: dict[int, dict[int, np.ndarray]] = {}

    @staticmethod
    def parts_of(path: Path) -> Path:
        """The folder of a file's shards."""
        return path.with_name(f"{path.name}.parts")

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """The requests of shards that are not written; none when the file exists: a `Job` vouches for what made it."""
        if self.path.exists():
            return []
        numbers = [self._place(request) // self.block for request in requests]
        there = {number: self._shard(number).exists() for number in set(numbers)}
        return [request for request, number in zip(requests, numbers) if not there[number]]

    def write(self, request: Request, image: np.ndarray) -> None:
        """Keep the image until its shard is complete."""
        index = self._place(request)
        shard = index // self.block
        waiting = self._waiting.setdefault(shard, {})
        waiting[index] = image
        if len(waiting) == len(self.requests[shard * self.block : (shard + 1) * self.block]):
            stacked = np.stack([waiting[i] for i in sorted(waiting)])
            atomically(self._shard(shard), lambda partial: np.save(partial, stacked))
            del self._waiting[shard]

    def finish(self) -> None:
        """Join the shards into the file, one shard in memory at a time, and remove them."""
        if not self.path.exists():
            atomically(self.path, self._join)
        shutil.rmtree(self.parts, ignore_errors=True)

    def _place(self, request: Request) -> int:
        return self._index[request.group, request.place]

    def _shard(self, number: int) -> Path:
        return self.parts / f"{number:06d}{self._ending}"

    def _join(self, partial: Path) -> None:
        shards = [self._shard(number) for number in range(ceil(len(self.requests) / self.block))]
        found = [np.load(shard, mmap_mode="r").shape for shard in shards]
        if sum(shape[0] for shape in found) != len(self.requests):
            raise ValueError(f"{self.parts} holds other images than {self.path} is to have: remove it and draw again")
        shape = (len(self.requests), *found[0][1:])
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        labels = [request.prompt for request in self.requests if isinstance(request.prompt, int)]
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for shard in shards:
                    file.write(np.load(shard).tobytes())
            if len(labels) == len(self.requests):
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, np.array(labels, np.int64))


def file_stem(prompt: str | int) -> str:
    """A readable file name of a prompt or class; different prompts get different names."""
    if isinstance(prompt, int):
        return f"class-{prompt}"
    plain = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:80].rstrip("-")
    if plain == prompt.replace(" ", "-") and "-" not in prompt:  # "a-red-star" is not "a red star"
        return plain
    return f"{plain}-{zlib.crc32(prompt.encode()):08x}".lstrip("-")


def image_text(request: Request, settings: dict[str, Any]) -> dict[str, str]:
    """What a PNG says about itself: `prompt` or `class`, `seed`, and all `settings` as JSON."""
    kind = "class" if isinstance(request.prompt, int) else "prompt"
    return {kind: str(request.prompt), "seed": str(request.seed), "settings": json.dumps(settings, sort_keys=True)}


def grid(images: Sequence[Image.Image], *, columns: int | None = None, gap: int = 2, least: int = 192) -> Image.Image:
    """Pictures of one size side by side on white, `gap` pixels apart; about square unless `columns` are given.

    Pictures less than `least` pixels high are enlarged by a whole number, so that small ones can be seen.
    """
    factor = max(1, round(least / images[0].height))
    images = [image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) for image in images]
    columns = columns or ceil(sqrt(len(images)))
    rows = ceil(len(images) / columns)
    w, h = images[0].size
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (w + gap), i // columns * (h + gap)))
    return sheet
