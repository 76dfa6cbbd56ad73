"""What Windows lacks or forbids, emulated: no test of ours ever ran there.

For our own code modules and functions of POSIX are missing, and folders cannot be opened. For all code symbolic links
want a right, no process is forked, only files open for writing can be flushed, nothing that is open or mapped can be
renamed or removed, no folder is replaced, and names hold no `:` and the like. Text files without an encoding are found
by ruff (PLW1514).
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import importlib
import io
import multiprocessing
import os
import re
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OURS = tuple(str(ROOT / name) for name in ("nextscale.py", "tokenizer", "var", "sample", "train", "evaluation"))
MODULES = ("resource", "fcntl", "pwd", "grp", "termios", "pty")
FUNCTIONS = {
    "os": "fork sched_getaffinity getuid geteuid statvfs pread nice setsid killpg uname getloadavg posix_fadvise",
    "signal": "SIGKILL SIGHUP SIGUSR1 SIGALRM alarm sigwaitinfo pthread_sigmask",
}
FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]|[ .]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)


def passes_on_windows(*commands: tuple[str, Sequence[str]]) -> bool:
    """Whether commands, ("module:function", arguments), return nothing or 0, one after another in a fresh process."""
    child = multiprocessing.get_context("spawn").Process(target=_as_on_windows, args=commands)
    child.start()
    child.join(240)
    child.kill()  # if it hangs
    return child.exitcode == 0


def _as_on_windows(*commands: tuple[str, Sequence[str]]) -> None:
    multiprocessing.set_start_method("spawn", force=True)  # of data workers: nothing is forked
    _hide_from_us()
    _forbid_links()
    _forbid_names()
    _forbid_what_is_open()
    for place, arguments in commands:
        module, name = place.split(":")
        assert not getattr(importlib.import_module(module), name)(list(arguments)), (place, arguments)


def _hide_from_us() -> None:
    """Imports by our own files find what there is on Windows."""
    found = {name: _without(sys.modules[name], hidden.split()) for name, hidden in FUNCTIONS.items()}
    found["os"].name, found["os"].open, found["os"].kill = "nt", _open_file, _ask_to_end
    import_it = builtins.__import__

    def imported(name: str, globals: dict | None = None, *more: Any, **options: Any) -> Any:
        if str((globals or {}).get("__file__")).startswith(OURS):
            if name in MODULES:
                raise ImportError(f"there is no {name} on Windows")
            if name in found:
                return found[name]
        return import_it(name, globals, *more, **options)

    builtins.__import__ = imported


def _without(module: types.ModuleType, hidden: Sequence[str]) -> types.ModuleType:
    """The module without some of its names; it sees what is patched later."""

    class Rest(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name in hidden:
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return getattr(module, name)

    return Rest(module.__name__)


def _open_file(path: Any, *more: Any) -> int:
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "a folder cannot be opened", str(path))
    return os.open(path, *more)


def _ask_to_end(process: int, number: int) -> None:
    assert number != 0, "os.kill(process, 0) ends the process"
    os.kill(process, number)


def _forbid_links() -> None:
    """And flushing of what is not open for writing."""

    def link(source: Any, target: Any, *more: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, "a required privilege is not held by the client", str(source))

    flush = os.fsync

    def flushed(file: Any) -> None:
        number = file if isinstance(file, int) else file.fileno()
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "not open for writing")
        flush(number)

    os.symlink, os.fsync = link, flushed


def _forbid_names() -> None:
    def checked(call: Callable[..., Any], makes: Callable[[str], bool]) -> Callable[..., Any]:
        def named(path: Any, mode: Any = "r", *more: Any, **options: Any) -> Any:
            if isinstance(path, str | os.PathLike) and makes(str(mode)) and _is_no_name(path):
                raise OSError(errno.EINVAL, "no name for a file", str(path))
            return call(path, mode, *more, **options)

        return named

    builtins.open = io.open = checked(open, lambda mode: not mode.startswith("r"))
    make_folder = checked(os.mkdir, lambda mode: True)
    os.mkdir = lambda path, mode=0o777, *more, **options: make_folder(path, mode, *more, **options)


def _is_no_name(path: Any) -> bool:
    name = os.path.basename(path)
    return name not in ("", ".", "..") and FORBIDDEN.search(name) is not None


def _forbid_what_is_open() -> None:
    def guarded(call: Callable[..., Any], *, moves: bool, replaces: bool) -> Callable[..., Any]:
        def at(path: Any, *more: Any, **options: Any) -> Any:
            places = [_whole(path, options.get("dir_fd")), *(_whole(target, None) for target in more[:1] if moves)]
            if Path(sys._getframe(1).f_code.co_filename).name != "tempfile.py":  # its files there end when closed
                for place in places:
                    _check_closed(place)
            if moves and os.path.lexists(places[1]) and (not replaces or os.path.isdir(places[1])):
                raise PermissionError(errno.EACCES, "access is denied", places[1])
            if moves and _is_no_name(places[1]):
                raise OSError(errno.EINVAL, "no name for a file", places[1])
            return call(path, *more, **options)

        return at

    os.replace = guarded(os.replace, moves=True, replaces=True)
    os.rename = guarded(os.rename, moves=True, replaces=False)
    os.unlink = os.remove = guarded(os.unlink, moves=False, replaces=False)
    os.rmdir = guarded(os.rmdir, moves=False, replaces=False)


def _whole(path: Any, folder: int | None) -> str:
    parent = "" if folder is None else os.readlink(f"/proc/self/fd/{folder}")
    return os.path.abspath(os.path.join(parent, os.fsdecode(path)))


def _check_closed(path: str) -> None:
    with io.FileIO("/proc/self/maps") as file:
        used = [line.split(None, 5)[5] for line in file.readall().decode().splitlines() if line.count("/")]
    for number in os.listdir("/proc/self/fd"):
        try:
            used.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:  # the listing's own
            continue
    for file in used:
        if os.path.isfile(file) and (file == path or file.startswith(path + os.sep)):
            raise PermissionError(errno.EACCES, f"{file} is in use", path)
