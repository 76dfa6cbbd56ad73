"""The official code, run beside ours on the same weights: a checkout of FoundationVision/VAR that the user has cloned.

Nothing of it is part of this repository. It is imported only in the process that runs it: building its models changes
torch's own classes for good.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Job, Stages
from sample.draw import draw, image_uniforms
from tokenizer.schedule import ScaleSchedule

FILES = ("dist.py", "models/__init__.py", "models/var.py", "models/vqvae.py")


def check_checkout(folder: Path) -> Path:
    """The folder, if it is a checkout.

    Raises:
        ValueError: if a file of it is missing.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(f"--reference {folder} must be a checkout of FoundationVision/VAR: it has no {name}")
    return folder


def official_pair(
    checkout: Path, config: Mapping[str, Any], vqvae: Mapping[str, Any], device: str = "cpu"
) -> tuple[Any, Any]:
    """The official (tokenizer, transformer) of our transformer's and tokenizer's sizes, with weights of their own.

    Building them changes torch's own classes for good: build all of ours before.
    """
    sys.path.insert(0, str(check_checkout(checkout).resolve()))
    with contextlib.redirect_stdout(io.StringIO()), torch.device(device):
        return importlib.import_module("models").build_vae_var(
            device=device,
            patch_nums=tuple(h for h, _ in config["schedule"]),
            V=config["vocab_size"],
            Cvae=config["latent_channels"],
            ch=vqvae["channels"][0],
            num_classes=config["num_classes"],
            depth=config["depth"],
            shared_aln=config["shared_ada"],
            attn_l2_norm=config["qk_norm"],
        )


def build(checkout: Path, weights: Path, config: Mapping[str, Any], vqvae: Mapping[str, Any]) -> tuple[Any, Any]:
    """The official (tokenizer, transformer) in eval mode.

    Args:
        weights: a folder with vae.pth and transformer.pth, as `nextscale convert --back` writes.
        config, vqvae: of our transformer and tokenizer with these weights.
    """
    vae, var = official_pair(checkout, config, vqvae)
    for model, name in ((vae, "vae"), (var, "transformer")):
        model.load_state_dict(torch.load(weights / f"{name}.pth", weights_only=True, mmap=True), assign=True)
        model.eval().requires_grad_(False)
    return vae, var


def sampling_jobs(checkout: Path, weights: Path, config: Mapping[str, Any], vqvae: Mapping[str, Any]) -> dict[str, Job]:
    """Jobs "run" (labels, settings, autocast) and "tokens" (labels, settings, greedy); settings: cfg, top_k, top_p."""
    vae, var = build(checkout, weights, config, vqvae)
    stages, drawn = Stages(), []
    official = sys.modules[type(var).__module__]
    sampler = official.sample_with_top_k_top_p_

    def recorded(logits: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        drawn.append(sampler(logits, **kwargs))
        return drawn[-1]

    official.sample_with_top_k_top_p_ = recorded
    for block in var.blocks:
        stages.wrap(block, "forward", "blocks")
    stages.wrap(var, "get_logits", "head")
    stages.wrap(official, "sample_with_top_k_top_p_", "draw")
    stages.wrap(vae.quantize, "get_next_autoregressive_input", "quantiser")
    stages.wrap(vae, "fhat_to_img", "decoder")

    def run(labels: list[int], settings: dict[str, float], autocast: bool = False) -> dict[str, Any]:
        drawn.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            images = var.autoregressive_infer_cfg(len(labels), torch.tensor(labels), g_seed=0, **settings)
        return {"stages": stages.take(), "images": images}

    def timed(labels: list[int], settings: dict[str, float], autocast: bool = False) -> dict[str, Any]:
        return {"stages": run(labels, settings, autocast)["stages"]}

    def tokens(labels: list[int], settings: dict[str, float], greedy: bool) -> dict[str, Any]:
        """What is drawn greedily, or with the uniforms of our seeds 0, 1, ... instead of multinomial's own."""
        if greedy:
            images = run(labels, {**settings, "top_k": 1, "top_p": 0.0})["images"]
            return {"tokens": torch.cat([scale[:, :, 0] for scale in drawn], dim=1).numpy(), "images": images.numpy()}
        schedule = ScaleSchedule.of(config["schedule"])
        uniforms = torch.stack([image_uniforms(seed, schedule) for seed in range(len(labels))])[..., 0]
        made: list[torch.Tensor] = []

        def ours(logits: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            sampler(logits, **kwargs)  # it filters them in place
            k = len(made)
            made.append(draw(logits, uniforms[:, schedule.begins[k] : schedule.ends[k]]))
            return made[-1][..., None]

        before, official.sample_with_top_k_top_p_ = official.sample_with_top_k_top_p_, ours
        try:
            images = run(labels, settings)["images"]
        finally:
            official.sample_with_top_k_top_p_ = before
        return {"tokens": torch.cat(made, dim=1).numpy(), "images": images.numpy()}

    return {"run": timed, "tokens": tokens}
