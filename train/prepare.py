"""From images or cached tokens to the batch of an objective: ids, inputs, and the disturbance of self-correction.

Shapes: B images, K scales, l tokens of one scale, N numbers of an image, C latent channels, n bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from tokenizer.aspects import schedule_of
from tokenizer.model import MultiScaleVQ
from tokenizer.schedule import ScaleSchedule
from train.order import image_draws
from train.session import Batch, brought


def image_format(device: torch.device) -> torch.memory_format:
    """Channels last on a GPU. On a CPU its group norm's backward costs more than its convolutions save."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def as_floats(batch: Batch) -> Batch:
    """The batch with its images, uint8 (B, 3, h, w), as float32 in [-1, 1].

    Raises:
        ValueError: if they are something else.
    """
    image_B3hw = batch["image"]
    if image_B3hw.dtype != torch.uint8 or image_B3hw.ndim != 4 or image_B3hw.shape[1] != 3:
        got = f"{str(image_B3hw.dtype).removeprefix('torch.')} {tuple(image_B3hw.shape)}"
        raise ValueError(f"images to train on must be uint8 (3, h, w) each, got a batch of {got}")
    floats_B3hw = image_B3hw.float().div(127.5).sub(1)
    return {**batch, "image": floats_B3hw.contiguous(memory_format=image_format(floats_B3hw.device))}


def preparer(
    vqvae: MultiScaleVQ,
    read: Callable[[list[str], torch.device], Batch] | None,
    *,
    flips: float = 0.0,
    noise: float = 0.0,
    codes: bool = False,
    seed: int = 0,
) -> Callable[[Batch], Batch]:
    """What turns a batch of images or cached tokens into an objective's batch, with frozen models.

    `read` makes the text entries of captions (`train.text.text_reader` or a `TextCache`); None without text. With
    `flips` (bits) or `noise` (codes) a batch for training has the ids and inputs of self-correction. With `codes` a
    batch has "codes" (B, L - l of scale 0, C), too: what the tokens of each scale add, for masked prediction.
    """

    def prepare(batch: Batch) -> Batch:
        device = batch["label"].device
        quantizer, schedule = brought(vqvae, device).quantizer, batch_schedule(batch, vqvae)
        made = {"counter": batch["counter"], "label": batch["label"]}
        if schedule is not vqvae.schedule:
            made["schedule"] = schedule
        if "ids" in batch:
            f_BCHW = batch.get("latents")
        else:
            with torch.autocast(device.type, enabled=False):  # tokens are those of the float32 encoder, as VAR's are
                f_BCHW = vqvae.encode(as_floats(batch)["image"])
        if batch.get("training") and (flips or noise):
            draws = partial(draw_flips, largest=flips) if flips else partial(draw_noise, largest=noise)
            drawn = draws(batch["counter"], quantizer.channels, schedule, seed=seed, device=device)
            ids, made["inputs"] = quantizer.corrected(f_BCHW, schedule, drawn)
        else:
            cached = batch["ids"].split(schedule.lengths, dim=1) if "ids" in batch else None
            ids = quantizer.encode(f_BCHW, schedule) if cached is None else list(cached)
            made["inputs"] = quantizer.teacher_inputs(ids, schedule)
        made["ids"] = torch.cat(ids, dim=1)
        if codes:
            own = [quantizer.scale_code(ids[k], k, schedule) for k in range(1, len(schedule))]
            made["codes"] = torch.cat(own, dim=1)
        return made if read is None else made | read(list(batch["caption"]), device)

    return prepare


def batch_schedule(batch: Batch, vqvae: MultiScaleVQ) -> ScaleSchedule:
    """The tokenizer's own schedule, or that of a template (`tokenizer.aspects`) for images of another shape."""
    hw = tuple(batch["image"].shape[-2:]) if "image" in batch else vqvae.image_hw
    return vqvae.schedule if hw == vqvae.image_hw else schedule_of(hw[0] // vqvae.stride, hw[1] // vqvae.stride)


def draw_flips(
    counters: Sequence[int],
    bits: int,
    schedule: ScaleSchedule,
    *,
    largest: float,
    seed: int,
    device: torch.device | str = "cpu",
) -> list[torch.Tensor]:
    """Which bits of each image are flipped: K bool tensors (B, l, bits), keyed by (seed, image counter).

    Each scale of each image has a share of its own, a whole percentage drawn evenly from 0 to `largest`.
    """
    K = len(schedule)
    u_BN = image_draws(counters, K + schedule.total * bits, seed, 5, device=device)
    share_BK = (u_BN[:, :K] * (round(100 * largest) + 1)).floor() / 100
    places = u_BN[:, K:].unflatten(1, (schedule.total, bits)).split(schedule.lengths, dim=1)
    return [u_Bln < share_B[:, None, None] for u_Bln, share_B in zip(places, share_BK.unbind(dim=1))]


def draw_noise(
    counters: Sequence[int],
    channels: int,
    schedule: ScaleSchedule,
    *,
    largest: float,
    seed: int,
    device: torch.device | str = "cpu",
) -> list[torch.Tensor]:
    """Noise for `MultiScaleQuantizer.corrected`: K tensors (B, C, h, w), keyed by (seed, image counter).

    Each scale of each image has a standard deviation of its own, drawn evenly from 0 to `largest`.
    """
    K = len(schedule)
    u_BN = image_draws(counters, K + schedule.total * channels, seed, 5, device=device)
    sigma_BK = u_BN[:, :K] * largest
    parts = normal_of(u_BN[:, K:]).split([n * channels for n in schedule.lengths], dim=1)
    shaped = (n.unflatten(1, (channels, *hw)) for n, hw in zip(parts, schedule.sides))
    return [normal * sigma_B[:, None, None, None] for normal, sigma_B in zip(shaped, sigma_BK.unbind(dim=1))]


def normal_of(uniforms: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers, all finite, of float32 in [0, 1) by inverse CDF."""
    largest = 1 - 2.0**-24  # below 1 in float32
    return torch.erfinv((uniforms * 2 - 1).clamp(-largest, largest)) * 2**0.5
