"""Official checkpoint files to our pipeline folder, streamed, and such a folder back to official files."""

from __future__ import annotations

import glob
import json
import mmap
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from sample import adapters
from sample.adapters import Adapter
from sample.checkpoints import State, map_safetensors, read_state, readable, write_pth, write_safetensors
from sample.official import Component, Flags, read_components
from sample.pipeline import NextScalePipeline
from var import convert_infinity as infinity_keys

WEIGHTS = "diffusion_pytorch_model.safetensors"
BUFFERS = "official_buffers.safetensors"  # official statistics that we do not use, kept for the way back
MADE = ("model_index.json", "vae.pth")  # one of these is in every folder that is written here


def convert(
    out: str | Path,
    *,
    family: str,
    vae: str | Path,
    transformer: str | Path,
    refiner: str | Path | None = None,
    masked: str | Path | None = None,
    flags: Flags | None = None,
    text_encoder: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Component]:
    """Write official checkpoint files as our pipeline folder, a tensor at a time, and return what was found.

    The folder appears under its name when it is complete.

    Args:
        text_encoder: folder or Hub name of the text encoder to copy into it, for a text model.

    Raises:
        FileNotFoundError, ValueError: as `load_official`; and if `out` exists and `overwrite` is not set.
    """
    files = {"vae": vae, "transformer": transformer, "refiner": refiner, "masked": masked}
    components, settings = read_components(family, **files, flags=flags)
    with finished_folder(out, overwrite=overwrite, reads=list(files.values())) as folder:
        for name, component in components.items():
            component.on_meta().save_config(folder / name)
            write_safetensors(folder / name / WEIGHTS, component.weights)
            if component.buffers:
                write_safetensors(folder / name / BUFFERS, lambda component=component: component.buffers)
        models = {name: component.on_meta() for name, component in components.items()}
        text = {} if text_encoder is None else copy_text_encoder(text_encoder, folder)
        NextScalePipeline(**models, **text, **settings).save_config(folder)
    return components


def copy_text_encoder(source: str | Path, folder: Path) -> dict[str, object]:
    """Save a text encoder and its tokenizer under a pipeline's folder, in the precision they have.

    Raises:
        FileNotFoundError: if they cannot be had.
    """
    from transformers import AutoModelForTextEncoding, AutoTokenizer

    try:
        encoder = AutoModelForTextEncoding.from_pretrained(source, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"text encoder {source} could not be read: {str(error).splitlines()[0]}") from None
    encoder.save_pretrained(folder / "text_encoder")
    readable(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return {"text_encoder": encoder, "tokenizer": tokenizer}


def convert_back(
    model: str | Path, out: str | Path, *, family: str = "var", chunks: int = 8, overwrite: bool = False
) -> list[Path]:
    """Write a pipeline folder of ours as official `.pth` files: vae.pth, transformer.pth and, of CoDe, refiner.pth.

    Args:
        model: made by `convert` or `save_pretrained`, or a training run (its newest export).
        family: "var" (and CoDe), "hmar" (the whole model in one file) or "infinity".
        chunks: of Infinity: chunks the blocks are in (8 in 2B and 8B, 4 in the others).

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if the official code has no such model; or `out` exists and `overwrite` is not set.
    """
    from sample.load import BUNDLED, model_folder

    if str(model) != BUNDLED and not Path(model).is_dir():
        raise FileNotFoundError(f"model {model} is no folder")
    model, written = model_folder(model), []
    with finished_folder(out, overwrite=overwrite, reads=[model]) as folder:
        bitwise = family == "infinity"
        others = {"infinity": (adapters.BSQ, adapters.INFINITY), "hmar": (adapters.VQVAE, adapters.HMAR)}
        networks = others.get(family, (adapters.VQVAE, adapters.VAR))
        for name, adapter in zip(("vqvae", "transformer", "refiner"), (*networks, networks[1])):
            if name == "refiner" and not (model / name).is_dir():
                continue
            state, mappings = official_state(model / name, adapter)
            if bitwise:
                state = {"vae": state} if name == "vqvae" else infinity_keys.chunked(state, chunks)
            file = folder / f"{'vae' if name == 'vqvae' else name}.pth"
            write_pth(file, state, mappings)
            written.append(Path(out) / file.name)
    return written


def official_state(folder: Path, adapter: Adapter) -> tuple[State, list[mmap.mmap]]:
    """The complete official state dict of one of our components, and the mappings that hold most of it.

    Raises:
        FileNotFoundError: if there is no such component.
        ValueError: if a file is damaged, or the official code has no such model.
    """
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise FileNotFoundError(f"{folder} has no config.json with diffusion_pytorch_model*.safetensors")
    text = json.loads((folder / "config.json").read_text("utf-8"))
    config = {key: value for key, value in text.items() if not key.startswith("_")}
    mapped = [map_safetensors(file) for file in files]
    ours = {key: tensor for state, _ in mapped for key, tensor in state.items()}
    weights = adapters.to_official(adapter, ours, config)
    dtype = next(iter(weights.values())).dtype
    buffers = adapter.official_buffers(adapter.model.load_config(folder) | config, dtype)
    if (folder / BUFFERS).is_file():
        buffers |= read_state(folder / BUFFERS, adapter.roots, adapter.what)
    return weights | buffers, [mapping for _, mapping in mapped]


@contextmanager
def finished_folder(out: str | Path, *, overwrite: bool, reads: Sequence[str | Path | None] = ()) -> Iterator[Path]:
    """A folder to write in, renamed to `out` in the end; nothing stays, and nothing is lost, if writing fails.

    Args:
        reads: what the writing reads, which replacing `out` must not take away.

    Raises:
        ValueError: if `out` exists, is not an empty folder, and `overwrite` is not set; or holds something that was not
            written by `convert` or `convert_back`, or that they read.
    """
    out = Path(out)
    if out.is_symlink():  # what it leads to is replaced
        out = out.resolve()
    sweep(out)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        if not overwrite:
            raise ValueError(f"out {out} exists already: name another folder, or overwrite it")
        if not any((out / name).is_file() for name in MADE):
            raise ValueError(f"out {out} is no folder that was made by converting: name another one")
        inside = [path for path in reads if path and out.resolve() in (p := Path(path).resolve(), *p.parents)]
        if inside:
            raise ValueError(f"out {out} holds {inside[0]}, which is read: name another folder")
    folder, old = (out.with_name(f".{out.name}.{what}-{os.getpid()}") for what in ("partial", "old"))
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"out {out} cannot be made: {error.strerror}") from None
    try:
        yield folder
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(out, old)
        try:
            os.replace(folder, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
        if old.exists():
            gone = out.with_name(f".{out.name}.gone-{os.getpid()}")  # half of it may be left, and is not put back
            os.replace(old, gone)
            shutil.rmtree(gone, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(out: Path) -> None:
    """Remove what processes that were killed left beside `out`, and put back what they had moved out of its way."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.*-*"):
        found = re.fullmatch(r"(partial|gone|old)-(\d+)", left.name.removeprefix(f".{out.name}."))
        if not found or psutil.pid_exists(int(found[2])):
            continue
        if found[1] == "old" and not out.exists():
            os.replace(left, out)
        else:
            shutil.rmtree(left, ignore_errors=True)
