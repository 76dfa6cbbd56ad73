"""Weight files of other projects: read without running code, streamed tensor by tensor, refused in one clear line."""

from __future__ import annotations

import json
import mmap
import os
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from sample.files import atomically

State = dict[str, torch.Tensor]

DAMAGED = (RuntimeError, EOFError, OSError, ValueError, TypeError, AssertionError, AttributeError, struct.error)
_WRAPPERS = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile
_SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def read_state(path: str | Path, roots: Sequence[str], what: str) -> State:
    """The state dict in a `.pth`, `.ckpt` or `.safetensors` file, mapped into memory rather than read.

    A folder with an index (`model.safetensors.index.json`) or the index itself is read as all of its shards. A
    trainer's file may hold several state dicts in nested dictionaries: the one with the most keys that begin with one
    of `roots` is taken, the first of equals.

    Args:
        what: what is looked for, for the message, e.g. "VAR transformer".

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a Git LFS pointer, damaged, a pickle that holds more than data, or holds no such model.
    """
    path = _index_in(Path(path))
    nested = _read_shards(path) if path.name.endswith(".index.json") else _read_file(path)
    best = max(_state_dicts(nested), key=lambda state: _matches(state, roots), default={})
    if not _matches(best, roots):
        shown = ", ".join(list(best)[:3]) or "no tensor at all"
        raise ValueError(f"{path} holds no {what}; it has {shown}")
    return best


def stream(
    make_state: Callable[[], Mapping[str, torch.Tensor]], budget: int = 2**28
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (key, tensor) of a mapped state dict, mapping the file anew each `budget` bytes.

    Pages of a mapped file that were touched count as memory until the mapping ends; so the peak stays near `budget`
    plus the largest tensor, whatever the size of the file. A tensor is valid until the next one is asked for.
    """
    state, touched = make_state(), 0
    for key in list(state):
        if touched > budget:
            state = None  # before it is made anew
            state, touched = make_state(), 0
        touched += state[key].nbytes
        yield key, state[key]


def write_safetensors(path: str | Path, make_state: Callable[[], Mapping[str, torch.Tensor]]) -> None:
    """Write a state dict to one safetensors file, a tensor at a time, atomically.

    Raises:
        ValueError: if a weight is not a number.
    """
    path, header, offset = Path(path), {"__metadata__": {"format": "pt"}}, 0
    for key, tensor in make_state().items():
        end = offset + tensor.nbytes
        header[key] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key, tensor in stream(make_state):
                if tensor.is_floating_point() and torch.isnan(tensor).any():
                    raise ValueError(f"{key} holds NaN: the weights are of a run that had failed")
                file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))

    atomically(path, write)


def readable(place: Path) -> None:
    """Give weight files that safetensors made (a file, or all in a folder) the rights that other new files have.

    The library keeps them to their owner alone, whatever the umask says, so that a group could not share its models.
    """
    os.umask(umask := os.umask(0o077))
    for path in [place] if place.is_file() else place.rglob("*.safetensors"):
        with suppress(OSError):  # a link to another user's file
            path.chmod(0o666 & ~umask)


def map_safetensors(path: Path) -> tuple[State, mmap.mmap]:
    """The tensors of a safetensors file as views of its mapping, read-only, and the mapping.

    Raises:
        ValueError: if the file is damaged or cut short.
    """
    _read_safetensors(path)  # every tensor's place is checked, none is read
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    types = {name: dtype for dtype, name in _SAFETENSORS_NAMES.items()}
    state: State = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        for key, entry in header.items():
            if key != "__metadata__":
                begin, end = entry["data_offsets"]
                dtype = types[entry["dtype"]]
                count = (end - begin) // dtype.itemsize
                where = {"dtype": dtype, "offset": 8 + length + begin, "count": count}
                flat = torch.frombuffer(mapping, **where) if count else torch.empty(0, dtype=dtype)
                state[key] = flat.view(entry["shape"])
    return state, mapping


def write_pth(path: Path, state: object, mappings: Sequence[mmap.mmap]) -> None:
    """`torch.save`, which forgets mapped pages as it goes: they count as memory no longer than they are needed."""
    with written(path), open(path, "wb") as file:
        torch.save(state, _Forgetting(file, mappings))


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Raise OSError, naming the path, for what torch and safetensors raise inside when a disk is full."""
    try:
        yield
    except (RuntimeError, SafetensorError, OSError) as error:
        full = any(word in str(error) for word in ("inline_container", "PytorchStreamWriter"))
        if getattr(error, "filename", None) is not None or (isinstance(error, RuntimeError) and not full):
            raise
        raise OSError(f"{path} cannot be written; is the disk full? ({_first_sentence(error).strip()})") from None


class _Forgetting:
    """A file to write to, after each `budget` bytes of which mappings are emptied."""

    def __init__(self, file: BinaryIO, mappings: Sequence[mmap.mmap], budget: int = 2**27):
        self.file, self.mappings, self.budget, self.written = file, mappings, budget, 0

    def write(self, data: bytes) -> int:
        self.written += len(data)
        if self.written > self.budget and hasattr(mmap, "MADV_DONTNEED"):
            self.written = 0
            for mapping in self.mappings:
                mapping.madvise(mmap.MADV_DONTNEED)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _index_in(path: Path) -> Path:
    """The index of a folder of shards; any other path as it is."""
    found = sorted(path.glob("*.index.json")) if path.is_dir() else []
    return found[0] if found else path


def shard_names(index: Path) -> list[str]:
    """The files that the index of a sharded checkpoint names.

    Raises:
        ValueError: if it is no such index.
    """
    try:
        return sorted({*map(_text, json.loads(index.read_text("utf-8"))["weight_map"].values())})
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{index} is not the index of a sharded checkpoint") from None


def _text(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(name)
    return name


def _read_shards(index: Path) -> State:
    _refuse_pointers(index)
    whole: State = {}
    for name in shard_names(index):
        whole |= next(_state_dicts(_read_file(index.parent / name)), {})
    return whole


def _read_file(path: Path) -> object:
    _refuse_pointers(path)
    return _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)


def _refuse_pointers(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a weight file is needed")
    start = _start(path, 64)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` first")
    if not start:
        raise ValueError(f"{path} is empty")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{path} is a web page, not weights: the download failed")


def _start(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


def _is_safetensors(path: Path) -> bool:
    start = _start(path, 9)
    return path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{")


def _read_safetensors(path: Path) -> State:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short: {_first_sentence(error)}") from None


def _read_pickle(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what cannot be read is said below
            return _load(path)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        foreign = [found[1]] if found else _foreign_names(path)
        if foreign:
            raise ValueError(
                f"{path} is a pickle that would run or build {foreign[0]}; only plain tensors are read"
            ) from None
        if "Unsupported operand" in str(error) and _start(path, 2) in (b"PK", b"\x80\x04", b"\x80\x05"):
            raise ValueError(
                f"{path} has a newer pickle protocol than torch reads: save it with torch.save's"
            ) from None
        raise ValueError(f"{path} is not a weight file torch can read") from None
    except LookupError:
        raise ValueError(f"{path} is not a weight file torch can read") from None
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged or cut short: {_first_sentence(error)}") from None


def _load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError) as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6


def _foreign_names(path: Path) -> list[str]:
    """What a pickle would import beside torch's tensors; nothing of it is run."""
    names: list[str] = []
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        else:
            data = path.read_bytes()
        names.extend(_imports(data))
    except (ValueError, StopIteration, OSError, zipfile.BadZipFile):
        pass  # no pickle
    return [name for name in names if not name.startswith(("torch.", "collections.OrderedDict"))]


def _imports(data: bytes) -> Iterator[str]:
    """The names of a pickle's imports, off its opcodes, as far as it can be read."""
    memo: list[str | None] = []  # of protocol 4 and on: texts by the order in which they were kept
    texts: list[str] = []
    with suppress(ValueError):
        before = ""
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                yield argument.replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                yield ".".join(texts[-2:])
            elif opcode.name == "MEMOIZE":
                memo.append(texts[-1] if "UNICODE" in before else None)
            elif opcode.name in ("BINGET", "LONG_BINGET") and argument < len(memo) and memo[argument]:
                texts.append(memo[argument])
            elif isinstance(argument, str):
                texts.append(argument)
            before = opcode.name


def _first_sentence(error: Exception) -> str:
    return re.split(r"\.?\s*\n|\. ", str(error) or type(error).__name__)[0]


def _state_dicts(nested: object) -> Iterator[State]:
    """The state dicts in a dictionary, at any depth; one that holds itself is looked into once."""
    waiting, seen = [nested], set()
    while waiting:
        held = waiting.pop()
        if not isinstance(held, Mapping) or id(held) in seen:
            continue
        seen.add(id(held))
        tensors: State = {}
        for key, value in held.items():
            if isinstance(value, torch.Tensor):
                name = _unwrapped(key)
                if name in tensors and not torch.equal(tensors[name], value):
                    raise ValueError(f"two tensors of the file are {name}, as {key} is, and differ: leave one out")
                tensors[name] = value
        if tensors:
            yield tensors
        waiting += reversed(held.values())


def _unwrapped(key: object) -> str:
    key = str(key)
    while key.startswith(_WRAPPERS):
        key = key.split(".", 1)[1]
    return key


def _matches(state: Mapping[str, torch.Tensor], roots: Sequence[str]) -> int:
    return sum(key.startswith(tuple(roots)) for key in state)
