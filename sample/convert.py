"""Official checkpoint files to our pipeline folder, streamed, and such a folder back to official files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sample import adapters
from sample.adapters import Adapter
from sample.checkpoints import State, read_state, write_safetensors
from sample.official import Component, Flags, read_components
from sample.pipeline import NextScalePipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"
BUFFERS = "official_buffers.safetensors"  # official statistics that we do not use, kept for the way back


def convert(
    out: str | Path,
    *,
    family: str,
    vae: str | Path,
    transformer: str | Path,
    refiner: str | Path | None = None,
    flags: Flags | None = None,
    overwrite: bool = False,
) -> dict[str, Component]:
    """Write official checkpoint files as our pipeline folder, a tensor at a time, and return what was found.

    The folder appears under its name when it is complete.

    Raises:
        FileNotFoundError, ValueError: as `load_official`; and if `out` exists and `overwrite` is not set.
    """
    components, settings = read_components(family, vae=vae, transformer=transformer, refiner=refiner, flags=flags)
    with finished_folder(out, overwrite=overwrite) as folder:
        for name, component in components.items():
            component.on_meta().save_config(folder / name)
            write_safetensors(folder / name / WEIGHTS, component.weights)
            if component.buffers:
                write_safetensors(folder / name / BUFFERS, lambda component=component: component.buffers)
        models = {name: component.on_meta() for name, component in components.items()}
        NextScalePipeline(**models, **settings).save_config(folder)
    return components


def convert_back(model: str | Path, out: str | Path, *, overwrite: bool = False) -> list[Path]:
    """Write a pipeline folder of ours as official `.pth` files: vae.pth, transformer.pth and, of CoDe, refiner.pth.

    Raises:
        FileNotFoundError: if `model` is not a folder of ours.
        ValueError: if the official code has no such model; or `out` exists and `overwrite` is not set.
    """
    model, written = Path(model), []
    with finished_folder(out, overwrite=overwrite) as folder:
        for name, adapter in (("vqvae", adapters.VQVAE), ("transformer", adapters.VAR), ("refiner", adapters.VAR)):
            if name == "refiner" and not (model / name).is_dir():
                continue
            state = official_state(model / name, adapter)
            file = folder / f"{'vae' if name == 'vqvae' else name}.pth"
            torch.save(state, file)
            written.append(Path(out) / file.name)
    return written


def official_state(folder: Path, adapter: Adapter) -> State:
    """The complete official state dict of one of our components."""
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise FileNotFoundError(f"{folder} has no config.json with diffusion_pytorch_model*.safetensors")
    text = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in text.items() if not key.startswith("_")}
    ours = {key: tensor for file in files for key, tensor in read_state(file, [""], adapter.what).items()}
    weights = adapters.to_official(adapter, ours, config)
    dtype = next(iter(weights.values())).dtype
    buffers = adapter.official_buffers(adapter.model.load_config(folder) | config, dtype)
    if (folder / BUFFERS).is_file():
        buffers |= read_state(folder / BUFFERS, adapter.roots, adapter.what)
    return weights | buffers


@contextmanager
def finished_folder(out: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write in, renamed to `out` in the end; nothing stays if writing fails.

    Raises:
        ValueError: if `out` exists, is not an empty folder, and `overwrite` is not set.
    """
    out = Path(out)
    if out.exists() and not overwrite and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"out {out} exists already: name another folder, or overwrite it")
    folder = out.with_name(f".{out.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        shutil.rmtree(out, ignore_errors=True)
        os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
