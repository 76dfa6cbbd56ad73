"""Models with random weights for benchmarks: published sizes, made once and kept, as ours and as official files."""

from __future__ import annotations

from pathlib import Path

import torch

from sample.convert import convert_back
from sample.costs import plan_work
from sample.pipeline import NextScalePipeline
from sample.plan import plain
from tokenizer.model import MultiScaleVQ
from var.presets import PRESETS, VAR_SAMPLING
from var.transformer import NextScaleTransformer


def check_size(size: str) -> str:
    """The size, if it is one of VAR's.

    Raises:
        ValueError: if not.
    """
    known = [name for name in PRESETS if name.startswith("d")]
    if size not in known:
        raise ValueError(f"--size must be one of {', '.join(known)}, got {size!r}")
    return size


def random_transformer(size: str, schedule: str, *, vocab_size: int = 4096, channels: int = 32) -> NextScaleTransformer:
    """A published size with open gates and logits that are not flat, as after training."""
    shape = {key: value for key, value in PRESETS[size].items() if key != "drop_path"}
    model = NextScaleTransformer(**shape, schedule=schedule, vocab_size=vocab_size, latent_channels=channels)
    model.init_weights(gate_gain=0.5, ada_gain=0.5, head_gain=4.0)
    return model.eval()


def random_pipeline(size: str, schedule: str, *, width: int = 160, seed: int = 0) -> NextScalePipeline:
    """A whole model of random weights: VAR's tokenizer of `width` channels and a transformer, float32.

    The tokenizer is the official one's shape, (1, 1, 2, 2, 4) times `width`.
    """
    torch.manual_seed(seed)
    vqvae = MultiScaleVQ(channels=[width * times for times in (1, 1, 2, 2, 4)], schedule=schedule).eval()
    pipeline = NextScalePipeline(random_transformer(size, schedule), vqvae, sampling=VAR_SAMPLING)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def kept_models(folder: Path, size: str, schedule: str, *, width: int = 160, seed: int = 0) -> tuple[Path, Path]:
    """(our folder, official folder) of a random pipeline, made if they are not in `folder` yet."""
    ours, official = folder / "ours", folder / "official"
    if not (official / "transformer.pth").is_file():
        random_pipeline(size, schedule, width=width, seed=seed).save_pretrained(ours)
        convert_back(ours, official, overwrite=True)
    return ours, official


def image_flops(pipeline: NextScalePipeline) -> dict[str, float]:
    """Floating-point operations one guided image needs, by part, counted from shapes."""
    model, vqvae = pipeline.transformer, pipeline.vqvae
    config = model.config
    whole, blocks = (sum(work.flops for work in plan_work(plain(model), 1, head=head)) for head in (True, False))
    modulation = 0 if config.shared_ada else 2 * 2 * 6 * config.width**2 * config.depth
    return {"blocks": blocks + modulation, "head": whole - blocks, "decoder": decoder_flops(vqvae)}


def decoder_flops(vqvae: MultiScaleVQ) -> float:
    """Floating-point operations of decoding one image by the plain decoder, run on tensors without storage."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        copy = MultiScaleVQ.from_config(vqvae.config)
        latent = torch.empty(1, copy.config.latent_channels, *copy.schedule.latent_hw)
        with FlopCounterMode(display=False) as counter:
            copy.decode(latent)
    return float(counter.get_total_flops())
