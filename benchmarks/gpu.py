"""What the GPU benchmarks share: runs in turns in one process, and the official models with our weights."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from benchmarks.reference import check_checkout
from benchmarks.sampling_gpu import timed
from benchmarks.timing import spread
from sample import adapters
from sample.pipeline import NextScalePipeline

Run = Callable[[], Any]
OFFICIAL = ("official_float32", "official_float16", "official_bfloat16")


def settled(runs: dict[str, Run], times: int = 2) -> tuple[dict[str, Run], dict[str, Any], dict[str, str]]:
    """Every run done a few times, so that kernels are chosen, compiled and recorded.

    Returns:
        The runs that work; what each gave first; and by name what stopped the others, as too little memory does.
    """
    first, failed = {}, {}
    for name, run in runs.items():
        try:
            first[name] = run()
            for _ in range(times - 1):
                run()
        except RuntimeError as error:  # those of memory and of compilers are, too
            traceback.print_exc()
            failed[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    return {name: run for name, run in runs.items() if name not in failed}, first, failed


def in_turns(runs: dict[str, Run], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every run's rounds: A B A B."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(timed(lambda _, run=run: run(), 1, device))
    return found


def figures(found: dict[str, list[float]], name: str, batch: int, bases: Collection[str] = OFFICIAL) -> dict[str, Any]:
    """A variant's seconds, images a second, and how many times each base's seconds, round by round."""
    row: dict[str, Any] = {"variant": name, "batch": batch, **spread("seconds", found[name])}
    row["images_per_s"] = batch / row["seconds"]
    for base in bases:
        if base in found and base != name:
            row |= spread(f"times_{base}", [theirs / ours for theirs, ours in zip(found[base], found[name])])
    return row


def official_models(checkout: Path, pipeline: NextScalePipeline, device: str) -> tuple[Any, Any]:
    """The official (tokenizer, transformer) with a pipeline's weights, on a device, in eval mode.

    Building them changes torch's own classes for good: build all of ours before.
    """
    sys.path.insert(0, str(check_checkout(checkout).resolve()))
    shape, ours = pipeline.transformer.config, (pipeline.vqvae, pipeline.transformer)
    with contextlib.redirect_stdout(io.StringIO()), torch.device(device):
        made = importlib.import_module("models").build_vae_var(
            device=device,
            patch_nums=tuple(h for h, _ in shape.schedule),
            V=shape.vocab_size,
            Cvae=shape.latent_channels,
            ch=pipeline.vqvae.config.channels[0],
            num_classes=shape.num_classes,
            depth=shape.depth,
            shared_aln=shape.shared_ada,
            attn_l2_norm=shape.qk_norm,
        )
    for theirs, model, adapter in zip(made, ours, (adapters.VQVAE, adapters.VAR)):
        config = {key: value for key, value in model.config.items() if not key.startswith("_")}
        weights = adapters.to_official(adapter, model.state_dict(), config)
        theirs.load_state_dict(weights | adapter.official_buffers(config, torch.float32))
        theirs.eval().requires_grad_(False)
    return made
