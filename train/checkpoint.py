"""Checkpoints as directories that exist only when they are complete.

A checkpoint is written under `.tmp-step_...`, flushed to disk, then renamed: a kill at any instant leaves either no
`step_...` directory or a whole one. `latest` is a symbolic link swapped in one rename, where there are such links.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from sample.checkpoints import readable
from sample.files import flush, link_or_copy

STEP = re.compile(r"step_(\d+)$")
PARTIAL = ".tmp-"


@contextlib.contextmanager
def held_alone(folder: Path) -> Iterator[None]:
    """A run's folder for one training at a time, also where the one before was killed: the system drops its hold.

    Raises:
        ValueError: if another process holds it.
    """
    with contextlib.ExitStack() as until_then:
        with contextlib.suppress(ImportError, OSError):  # on Windows; where nothing can be written or locked
            import fcntl

            folder.mkdir(parents=True, exist_ok=True)
            file = until_then.enter_context((folder / ".lock").open("a"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"run.run_dir {str(folder)!r} is being trained by another process: wait for it or stop it, or give "
                    "another folder"
                ) from None
        yield


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint directory's name."""
    return int(STEP.match(checkpoint.name)[1])


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first. Anything else there, such as a write cut short, is ignored."""
    found = [path for path in folder.glob("step_*") if STEP.match(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def write_checkpoint(folder: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Make `folder/step_...` with what `write(directory)` puts into it. Call it in one process only."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover)
    final = folder / f"step_{step:08d}"
    partial = folder / f"{PARTIAL}{final.name}"
    partial.mkdir()
    try:
        write(partial)
    except BaseException:  # a full disk, above all: what is half written would fill it further
        shutil.rmtree(partial, ignore_errors=True)
        raise
    readable(partial)
    _flush_tree(partial)
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)
    flush(folder)
    return final


def drop_old(folder: Path, *, keep: int) -> None:
    """Drop all checkpoints but the newest `keep`; links should lead to the newest one by now."""
    for old in complete_checkpoints(folder)[:-keep]:
        # Renamed first: a kill while the files go must not leave half a directory under a complete one's name.
        doomed = old.with_name(f"{PARTIAL}old-{old.name}")
        os.rename(old, doomed)
        shutil.rmtree(doomed)


def point_link(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to `target` in one atomic step, replacing an older link.

    Where there are no symbolic links (Windows without the right to make them, exFAT, some network drives), it becomes
    a folder of the same files, which take no more space if the file system has hard links.
    """
    fresh, old = (link.with_name(f"{PARTIAL}{what}{link.name}") for what in ("", "old-"))
    for left in (fresh, old):
        _remove(left)
    try:
        fresh.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
    except OSError:
        shutil.copytree(target, fresh, copy_function=link_or_copy)
    try:
        os.replace(fresh, link)
    except OSError:  # a folder stands there, or a link to one on Windows: neither is replaced in one step
        os.rename(link, old)
        os.rename(fresh, link)
        _remove(old)


def _remove(path: Path) -> None:
    """Take a link, or a folder, away if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)
