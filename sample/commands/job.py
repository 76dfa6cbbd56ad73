"""A job of many images: what must not change between its runs, and what all its processes do together."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sample.files import claim

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from sample.images import Request
    from sample.pipeline import NextScaleOutput
    from sample.sinks import Sink


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


def npz_job(path: Path) -> Path:
    """The file that says what made the images kept at a path; FILE.json may be the result's."""
    return path.with_name(f"{path.name}.json")


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


def check_out(out: Path | None, *, npz: bool) -> None:
    """Raise ValueError if --out looks like a file that is not made: it would become a folder of that name."""
    pictures = (".png", ".jpg", ".jpeg", ".webp", ".npz")
    if out is not None and out.suffix.lower() in pictures and not out.is_dir() and not (npz and out.suffix == ".npz"):
        raise ValueError(f"--out must be a folder{', or FILE.npz' if npz else ''}, got {out}")


def settle(args: argparse.Namespace, make: Callable[[], tuple[Any, Job]]) -> tuple[Any, Job]:
    """The sink and the job that `make` gives for --out; without one that becomes the first default folder that fits.

    Raises:
        ValueError: if what is in the named folder was made otherwise, or nothing can be written here.
    """
    from sample.files import check_place

    if args.out is not None:
        sink, job = make()
        job.check()
        return sink, job
    check_place("--out", Path(), folder=True)
    for number in count(1):
        args.out = Path("pictures" if number == 1 else f"pictures-{number}")
        if args.out.exists() and not args.out.is_dir():
            continue
        sink, job = make()
        try:
            job.check()
        except ValueError:
            continue
        return sink, job


def of_all_processes(count: int) -> int:
    """The sum of every process's count; all of them must ask."""
    from accelerate.utils import gather_object

    return sum(gather_object([count]))


def write_all(stream: Iterator[tuple[Request, np.ndarray]], sink: Sink, job: Job, *, total: int, done: int) -> None:
    """Write what comes under a progress bar: `total` images, of which `done` are there. The job's settings go first."""
    from accelerate import PartialState
    from tqdm import tqdm

    quiet = not PartialState().is_local_main_process or None  # None: also off where stderr is no terminal
    with tqdm(total=total, initial=done, unit="image", disable=quiet) as bar:
        for number, (request, image) in enumerate(stream):
            if number == 0:
                job.save()
            sink.write(request, image)
            bar.update()


@dataclass(frozen=True)
class Made:
    """What a job has made.

    Attributes:
        sink: where it is.
        there: images that were there already, of all processes.
        new: images that this process made.
        seconds: that it took for them.
    """

    sink: Sink
    there: int
    new: int
    seconds: float


def carry_out(
    args: argparse.Namespace,
    requests: list[Request],
    make: Callable[[], tuple[Sink, Job]],
    draw: Callable[[Sink, list[Request]], Iterator[tuple[Request, np.ndarray]]],
    *,
    noun: str = "images",
) -> Made | None:
    """Make what is missing of a job and wait for the other processes; None when interrupted, which is told.

    Args:
        make: the sink and the job, as `settle` asks for them.
        draw: the stream of some requests.
        noun: what the user calls them.
    """
    from accelerate import PartialState

    from sample.images import process_share

    sink, job = settle(args, make)
    mine = process_share(requests, sink.block)
    todo = sink.missing(mine)
    there = len(requests) - of_all_processes(len(todo))
    stream, started = draw(sink, todo), time.perf_counter()
    try:
        write_all(stream, sink, job, total=len(mine), done=len(mine) - len(todo))
        seconds = time.perf_counter() - started
        PartialState().wait_for_everyone()
    except KeyboardInterrupt:
        done = len(requests) - len(sink.missing(requests))
        said = f"stopped with {done} of {len(requests)} {noun} done; the same command continues"
        print(f"\nnextscale: {said}", file=sys.stderr)
        return None
    return Made(sink, there, len(todo), seconds)


def write_trees(args: argparse.Namespace, sink: Sink, batch: list[Request], output: NextScaleOutput) -> None:
    """With --show-search, the family tree of each image of a batch: DIR/search/<its name>.png."""
    if not args.show_search:
        return
    from sample.files import write_png
    from sample.search_tree import family_tree

    for request, choices in zip(batch, output.search.choices):
        write_png(sink.tree_path(request), family_tree(choices, f"{request.prompt}, seed {request.seed}"))
