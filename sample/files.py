"""Files as everything here reads and writes them: whole or not at all, in UTF-8, refused by the argument's name."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin


def check_place(name: str, path: str | Path, *, folder: bool) -> None:
    """Whether argument `name` can become a folder, or a file: before long work, not after it.

    Raises:
        ValueError: if a file stands where a folder must be, or the other way round; or nothing can be written there.
    """
    path = Path(path)
    if not folder and path.is_dir():
        raise ValueError(f"{name} must be a file, got {path}, which is a folder")
    places = (path, *path.parents) if folder else path.parents
    there = next((place for place in places if place.exists()), Path())
    if not there.is_dir():
        where = "a folder" if there == path else "in a folder"
        raise ValueError(f"{name} must be {where}, got {path}: {there} is a file")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"{name} must be where files can be made, got {path}: {there}: {error.strerror}") from None


def atomically(path: Path, write: Callable[[Path], Any], *, durable: bool = False) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it; the folder is made if missing.

    Args:
        durable: have it on the disk before the rename, so that not even a crash of the machine leaves half of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write(partial)
        if durable:
            flush(partial)
        os.replace(partial, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk says not where
    finally:
        partial.unlink(missing_ok=True)


def claim(path: Path, text: str) -> None:
    """Write a text file, atomically, unless there is one: of several processes that begin at once, one writes it."""
    if path.exists():
        return
    whole = path.with_name(f".claim-{os.getpid()}-{path.name}")
    write_text(whole, text)
    try:
        os.link(whole, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(whole, path)
    finally:
        whole.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have a file or folder on the disk. Windows does that to files opened for writing, and to no folder."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A second name of a file, or a copy where the file system has no such links or the target lies on another."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a text file, atomically; the folder is made if missing."""
    atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"), durable=durable)


def read_text(name: str, path: Path) -> str:
    """A text file in UTF-8, with or without the mark some programs begin it with; "-" is the standard input.

    Raises:
        ValueError: if it is none, naming it after `name`, what it is to the user.
    """
    try:
        return (sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} {path} must be text in UTF-8: byte {error.start} is none of it") from None


def write_png(path: Path, image: np.ndarray | Image.Image, text: dict[str, str] | None = None) -> None:
    """Write a PNG with text entries, atomically; the folder is made if missing."""
    info = PngImagePlugin.PngInfo()
    for name, value in (text or {}).items():
        info.add_text(name, value) if value.isascii() else info.add_itxt(name, value)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    atomically(path, lambda partial: picture.save(partial, pnginfo=info))


def read_png_text(path: Path) -> dict[str, str] | None:
    """The text entries of a PNG; None if it is missing or damaged."""
    try:
        with Image.open(path) as image:
            image.load()
            return dict(image.text)
    except (OSError, SyntaxError, AttributeError):
        return None
