"""How much memory drawing takes, computed from shapes: weights, caches, the largest step of a scale, the decoder.

Formulas, not measurements: `python -m benchmarks.memory` and the tests hold them against real runs.

Shapes: B images, R rows (B, or 2 B with guidance), l tokens of the last scale, D width, F hidden width, V codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sample import kernels
from sample.costs import cache_peak
from sample.draw import Filter
from sample.offload import decoding_units, drawing_units
from sample.plan import Plan, Stage

if TYPE_CHECKING:
    from tokenizer.model import MultiScaleVQ

FLOAT, LONG = 4, 8  # bytes
MAPS = 4  # of a residual block that live at once: its input, the first convolution's output, its norm, its output


@dataclass(frozen=True)
class Memory:
    """Bytes of a call of the pipeline, part by part.

    Attributes:
        weights: on the device while tokens are drawn; of all parameters, unless they are offloaded.
        cache: peak of the key/value caches, the joined keys and values of one layer and those of the text included.
        step: what a scale needs beside them, at most.
        decoder: what decoding needs, when the caches are gone.
        decoder_weights: on the device while images are decoded.
    """

    weights: int
    cache: int
    step: int
    decoder: int
    decoder_weights: int

    @property
    def drawing(self) -> int:
        """Peak until all tokens are drawn."""
        return self.weights + self.cache + self.step

    @property
    def peak(self) -> int:
        """Peak of the whole call."""
        return max(self.drawing, self.decoder_weights + self.decoder)


def predict(
    plan: Plan,
    vqvae: MultiScaleVQ,
    batch: int,
    dtype: torch.dtype,
    *,
    decode_batch: int | None = None,
    offload: str = "none",
    text_tokens: int = 0,
) -> Memory:
    """The memory of drawing `batch` images by a plan, without the text encoder's.

    Args:
        decode_batch: images decoded at once (`MultiScaleVQ.enable_slicing`); all of them when None.
        offload: what waits in CPU memory: "none", "model" or "layers", see `sample.offload`.
        text_tokens: length of the texts that a text model attends to.
    """
    models = list({id(stage.model): stage.model for stage in plan.stages}.values())
    weights = decoder_weights = sum(weight_bytes(model, dtype) for model in (*models, vqvae))
    if offload != "none":
        drawing, decoding = drawing_units(models, offload), decoding_units(vqvae)
        staying = weights - sum(unit_bytes(unit, dtype) for unit in (*drawing, *decoding))
        weights = staying + max(unit_bytes(unit, dtype) for unit in drawing)
        decoder_weights = staying + unit_bytes([vqvae.decoder], dtype)
    step = max(step_bytes(plan, place, batch, dtype) for place in range(len(plan.stages)))
    h, w = (vqvae.stride * side for side in plan.schedule.latent_hw)
    image = 2 * batch * 3 * h * w * torch.empty((), dtype=dtype).element_size()
    decoder = decoder_bytes(vqvae, min(batch, decode_batch or batch), dtype, (h, w)) + image
    rows, size = batch * (2 if plan.guided else 1), torch.empty((), dtype=dtype).element_size()
    read = [2 * rows * text_tokens * model.config.width * len(model.all_blocks) * size for model in models]
    cache = cache_peak(plan, batch, dtype) + max(read)
    return Memory(weights, cache, step, decoder, decoder_weights)


def official_cache_bytes(plan: Plan, batch: int) -> int:
    """Keys and values of the official code on a GPU: all scales, keys in float32 (its norm casts), values in half."""
    model, rows = plan.stages[0].model, batch * (2 if plan.guided else 1)
    return rows * len(model.blocks) * plan.schedule.total * model.config.width * (FLOAT + 2)


def step_bytes(plan: Plan, place: int, batch: int, dtype: torch.dtype) -> int:
    """Largest memory of a scale of one stage beside weights and caches: feed-forward, attention, or the draw.

    Or of what the stage reads of earlier scales before it begins.
    """
    stage, begins = plan.stages[place], plan.stages[place].scales.start
    drawn = [k for k in stage.scales if stage.draws(k)]
    doubled = [k for k in drawn if plan.doubles(stage, k)]
    sizes = [_scale_bytes(plan, stage, own[-1], batch, dtype) for own in (drawn, doubled) if own]
    if plan.joins(stage):
        rows = batch * (1 + plan.doubles(stage, begins, prefilling=True))
        sizes.append(rows * plan.schedule.begins[begins] * _token_bytes(stage, dtype))
    return max(sizes)


def _token_bytes(stage: Stage, dtype: torch.dtype) -> int:
    """Of one token in a block, the larger of feed-forward and attention."""
    D, size = stage.model.config.width, torch.empty((), dtype=dtype).element_size()
    F = round(D * stage.model.config.mlp_ratio)
    forward = size * (2 * D + 2 * F)  # the residual stream, its norm, hidden before and after GELU
    normed = FLOAT * (2 * D) + size * (5 * D)  # queries and keys in float32; the stream, its norm, q, k, v
    return max(forward, normed)


def _scale_bytes(plan: Plan, stage: Stage, k: int, batch: int, dtype: torch.dtype) -> int:
    """The largest memory of one scale."""
    config, length, rows = stage.model.config, plan.schedule.lengths[k], batch * (1 + plan.doubles(stage, k))
    D, size = config.width, torch.empty((), dtype=dtype).element_size()
    values = 2 * config.latent_channels if config.bitwise else config.vocab_size
    kernel = not config.bitwise and values <= kernels.ROW and kernels.usable(stage.model.device)
    draw = batch * length * _draw_bytes(stage.filter(k), values, stage.model.device, kernel)
    draw += 2 * rows * length * D * FLOAT  # the head's features before and after its norm
    if len(stage.settled(k)) > 1:
        draw += 2 * FLOAT * batch * length * values  # the logits of the pass before, and those of both together
    own = 0
    if not stage.model.reads_earlier:  # what is little beside a cache: keys and values of the scale, modulations
        own = rows * D * size * (2 * length + 6 * len(stage.model.all_blocks))
    most = max(stage.computed(layer, k) for layer in stage.active)  # the other tokens pass by, and are restored
    blocks = rows * (most * _token_bytes(stage, dtype) + (length - most) * 4 * D * size)
    return own + max(blocks, draw)


def _draw_bytes(filters: Filter, values: int, device: torch.device, kernel: bool) -> int:
    """Of one token: logits before and after the filters, and what was sorted to find them."""
    if kernel:
        return 2 * FLOAT * values  # logits before and after the filters: nothing is sorted or summed in memory
    if filters.top_p >= 1:
        return 4 * FLOAT * values  # logits, filtered ones, probabilities and their sums
    if device.type == "cuda" or not 0 < filters.top_k < values:
        return 5 * FLOAT * values + LONG * values  # two of logits; sorted ones, order, probabilities, sums
    return 3 * FLOAT * values + (2 * FLOAT + LONG + 1) * filters.top_k


def decoder_bytes(vqvae: MultiScaleVQ, batch: int, dtype: torch.dtype, image_hw: tuple[int, int]) -> int:
    """What the decoder's largest residual block holds, for so many images of a size at once."""
    config, (h, w) = vqvae.config, image_hw
    coarser = [*config.channels[1:], config.channels[-1]]  # what comes into a level lives as long as the level runs
    levels = [
        (entering + MAPS * width) * (h * w // 4**i // config.patch**2)
        for i, (width, entering) in enumerate(zip(config.channels, coarser))
    ]
    return batch * max(levels) * torch.empty((), dtype=dtype).element_size()


def weight_bytes(model: torch.nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a model cast to `dtype`, but for the modules it keeps in float32."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    size = torch.empty((), dtype=dtype).element_size()
    return sum(
        p.numel() * (size if kept.isdisjoint(name.split(".")) else FLOAT) for name, p in model.named_parameters()
    )


def unit_bytes(modules: Sequence[torch.nn.Module], dtype: torch.dtype) -> int:
    """Bytes of weights that come and go together, cast to `dtype`."""
    return sum(weight_bytes(module, dtype) for module in modules)
