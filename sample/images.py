"""Requests to a stream of images, and the places where images end up. What is finished is never made again.

Every file is written under a temporary name and renamed, so what exists is whole. An image depends on its request and
the settings alone: any batch size and any number of processes give the same pictures, up to rounding
(docs/architecture.md).

Shapes: K scales, h w pixels. Images are uint8 RGB, (h, w, 3).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image

from sample.draw import seeds_from
from sample.files import atomically, claim, read_png_text, write_png, write_text
from sample.state import GenerationState, Hook

if TYPE_CHECKING:
    from sample.pipeline import NextScaleOutput, NextScalePipeline


@dataclass(frozen=True)
class Request:
    """One image to make.

    Attributes:
        prompt: a text, or an int: a class for a class model.
        seed: the image's name.
        group: which prompt of the job this is.
        place: which image of that prompt this is.
        metadata: the GenEval line of the prompt, if it came from such a file.
    """

    prompt: str | int
    seed: int
    group: int = 0
    place: int = 0
    metadata: dict[str, Any] | None = None


def make_requests(
    prompts: Sequence[str | int] | str | int,
    *,
    per_prompt: int = 1,
    seed: int = 0,
    metadata: Sequence[dict[str, Any]] | None = None,
) -> list[Request]:
    """`per_prompt` images of each prompt; image i of them all gets seed + i, as in one call of the pipeline.

    Args:
        prompts: texts or classes; one of them alone will do, too.

    Raises:
        ValueError: if a seed is not in [0, 2**63).
    """
    prompts = [prompts] if isinstance(prompts, str | int) else prompts
    seeds_from(seed, len(prompts) * per_prompt)
    return [
        Request(prompt, seed + group * per_prompt + place, group, place, metadata[group] if metadata else None)
        for group, prompt in enumerate(prompts)
        for place in range(per_prompt)
    ]


def image_stream(
    pipeline: NextScalePipeline,
    requests: Sequence[Request],
    *,
    batch_size: int = 16,
    every_scale: bool = False,
    on_output: Callable[[list[Request], NextScaleOutput], Any] | None = None,
    **settings: Any,
) -> Iterator[tuple[Request, np.ndarray]]:
    """Every request with its image, in order, made batch by batch as they are asked for.

    A request whose image a hook drops is left out; one that it copies comes several times.

    Args:
        requests: what to make; give `sink.missing(requests)` to leave out what is finished.
        batch_size: images made at once; with a search, about so many candidates.
        on_output: given every batch with the pipeline's output.
        every_scale: yield (K, h, w, 3), the picture after each scale, instead of the last one (h, w, 3).
        settings: of the pipeline's call: guidance_scale, top_k, plan, hooks, ...

    Raises:
        ValueError: on a setting that is not allowed.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    hooks = tuple(settings.pop("hooks", ()))
    searches = settings.get("search") is not None
    if searches:
        if every_scale:
            raise ValueError("every_scale shows images that go on to the end; a search drops some: leave out one")
        batch_size = max(1, batch_size // settings["search"].candidates)
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        left = History() if every_scale else Left() if hooks and not searches else None
        name = "class_labels" if isinstance(batch[0].prompt, int) else "prompt"
        output = pipeline(
            **{name: [request.prompt for request in batch]},
            seed=[request.seed for request in batch],
            output_type="latent" if every_scale else "np",
            hooks=hooks if left is None else (*hooks, left),
            **settings,
        )
        if on_output is not None:
            on_output(list(batch), output)
        scales = [pipeline.decode(f_hat, "np") for f_hat in left.f_hats] if every_scale else [output.images]
        batch = batch if left is None else [batch[origin] for origin in left.origins]
        for images in scales:
            check_finite(batch, images)
        pictures = np.stack([to_uint8(images) for images in scales], axis=1)
        yield from zip(batch, pictures if every_scale else pictures[:, 0], strict=True)


def check_finite(requests: Sequence[Request], images: np.ndarray) -> None:
    """Raise ValueError, naming the first image, if one holds NaN or infinity: its PNG would look like any other."""
    for request, image in zip(requests, images):
        if not np.isfinite(image).all():
            raise ValueError(
                f"the image of {request.prompt!r}, seed {request.seed}, is not finite: try another dtype (float32)"
            )


class Left(Hook):
    """Which image of the request each row is in the end; give it last.

    Attributes:
        origins: their numbers.
    """

    origins: list[int]

    def on_scale_end(self, state: GenerationState, k: int) -> None:
        """After scale k."""
        self.origins = state.origins


class History(Left):
    """Keeps the running reconstruction after each scale, too.

    Attributes:
        f_hats: after each scale, (B, C, H, W), of the rows there are in the end.
    """

    f_hats: list[torch.Tensor]

    def on_scale_end(self, state: GenerationState, k: int) -> None:
        """After scale k."""
        super().on_scale_end(state, k)
        state.extras[f"f_hat{k}"] = state.f_hat_BCHW
        self.f_hats = [state.extras[f"f_hat{earlier}"] for earlier in range(k + 1)]


def to_uint8(image: np.ndarray) -> np.ndarray:
    """[0, 1] floats to 0..255 by rounding: what a PNG of the image holds."""
    return (image * 255).round().astype(np.uint8)


def process_share(requests: Sequence[Request], block: int = 1) -> list[Request]:
    """This process's requests: blocks of `block` are dealt round to the processes that accelerate started."""
    from accelerate import PartialState

    state = PartialState()
    return [r for i, r in enumerate(requests) if i // block % state.num_processes == state.process_index]


# --- where images end up ---------------------------------------------------------------------------------------------


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
        self.block = block or min(256, max(1, len(self.requests) // 64))
        self.parts = self.parts_of(self.path)
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
        return self.parts / f"{number:06d}.npy"

    def _join(self, partial: Path) -> None:
        shards = [self._shard(number) for number in range(ceil(len(self.requests) / self.block))]
        shape = (len(self.requests), *np.load(shards[0], mmap_mode="r").shape[1:])
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


def npz_job(path: Path) -> Path:
    """The file that says what made the images kept at a path; FILE.json may be the result's."""
    return path.with_name(f"{path.name}.json")


@dataclass(frozen=True)
class Job:
    """The settings of a job, kept in a file beside its images so that no folder mixes images of different settings.

    Attributes:
        path: the file.
        settings: JSON-able.
        informal: names of settings that may differ.
        later: names of settings that jobs of before do not have; they say nothing where one side has none.
        outputs: files that only this job may have made: none may be there without its file.
        option: of the command, which names the place.
    """

    path: Path
    settings: dict[str, Any]
    informal: tuple[str, ...] = ()
    later: tuple[str, ...] = ()
    outputs: tuple[Path, ...] = ()
    option: str = "--out"

    def check(self) -> None:
        """Raise a ValueError that names the first difference, if other settings made what is there, or nobody knows."""
        if not self.path.exists():
            for output in filter(Path.exists, self.outputs):
                raise ValueError(
                    f"{output} is there, and no {self.path} says what made it: choose another {self.option}"
                )
            return
        there = self.kept()
        silent = {name for name in self.later if name not in there or self.settings.get(name) is None}
        names = {*there, *self.settings} - {*self.informal, *silent}
        for name in sorted(names, key=lambda name: (name != "model_digest", name)):  # another model explains the others
            before, now = there.get(name), self.settings.get(name)
            if before != now:
                said = f"{self.path} is of images with {name} {before!r}, not {now!r}"
                raise ValueError(f"{said}: choose another {self.option}")

    def kept(self) -> dict[str, Any]:
        """The settings in the file. Raises ValueError if it is no job's."""
        try:
            there = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError:
            there = None
        if not isinstance(there, dict):
            raise ValueError(f"{self.path} is not what nextscale wrote beside its images: choose another {self.option}")
        return there

    def save(self) -> None:
        """Write the file unless it is there. Raises ValueError, as `check`, if another job came first meanwhile."""
        claim(self.path, json.dumps(self.settings, indent=2) + "\n")
        self.check()


def requests_digest(requests: Sequence[Request]) -> str:
    """Twelve hexadecimal digits that change with any prompt, seed or their order."""
    lines = "\n".join(json.dumps([r.prompt, r.seed]) for r in requests)
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


def metadata_digest(requests: Sequence[Request]) -> str | None:
    """Twelve hexadecimal digits that change with any prompt's metadata or their order; None if there is none."""
    if all(request.metadata is None for request in requests):
        return None
    lines = "\n".join(json.dumps(request.metadata, sort_keys=True) for request in requests)
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


# --- files -----------------------------------------------------------------------------------------------------------


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
