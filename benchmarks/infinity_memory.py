"""GPU memory that Infinity needs for one guided image at 1M pixels, computed from shapes: no weights are made.

python -m benchmarks.infinity_memory --out results/infinity_memory.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import nn

from evaluation.command import Parser, add_out, in_one_line
from evaluation.report import portable, result, table, write_result
from sample.memory import unit_bytes, weight_bytes
from sample.offload import decoding_units, drawing_units
from tokenizer.aspects import aspect_schedule
from tokenizer.model import MultiScaleVQ
from var.presets import PRESETS
from var.transformer import NextScaleTransformer

GIB = 2**30
DTYPE, BF16 = torch.bfloat16, 2  # bytes
ROWS = 2  # conditional and unconditional
TOKENIZERS = {  # latent bits of a cell, cells along a token's side, widths
    "infinity-2b": {"latent_channels": 32, "token_patch": 1, "channels": [128, 256, 512, 512, 512]},
    "infinity-8b": {"latent_channels": 14, "token_patch": 2, "channels": [128, 256, 512, 512]},
}


def text_encoder() -> nn.Module:
    """FLAN-T5-XL's encoder, on the meta device."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32}
    with torch.device("meta"):
        return T5EncoderModel(T5Config(**sizes, vocab_size=32128, feed_forward_proj="gated-gelu"))


def measure(name: str) -> dict[str, object]:
    """One row: GiB of each part, and of the whole with less and less of it on the GPU."""
    schedule = aspect_schedule("1:1", "1M")
    with torch.device("meta"):
        model = NextScaleTransformer(**PRESETS[name], schedule=schedule)
        vqvae = MultiScaleVQ(**TOKENIZERS[name], layers_per_block=2, attention=False, schedule=schedule, bitwise=True)
    width, last = model.config.width, schedule.lengths[-1]
    hidden = round(width * model.config.mlp_ratio)
    parts = {
        "transformer": weight_bytes(model, DTYPE),
        "text_encoder": weight_bytes(text_encoder(), DTYPE),
        "tokenizer": weight_bytes(vqvae, DTYPE),
        "cache": ROWS * len(model.blocks) * schedule.begins[-1] * width * 2 * BF16,
        # the last scale's feed-forward and residual stream, and one layer's joined keys and values
        "activations": ROWS * BF16 * (last * (2 * hidden + 6 * width) + 2 * schedule.total * width),
        # four maps of the widest kind at full size, when the cache is gone
        "decoding": 4 * BF16 * vqvae.config.channels[1] * 1024**2,
    }
    gib = {f"{part}_gib": size / GIB for part, size in parts.items()}
    weights = parts["transformer"] + parts["tokenizer"]
    drawing = parts["cache"] + parts["activations"]
    kept = 0.1 * parts["cache"] + parts["activations"]
    layers = [unit_bytes(unit, DTYPE) for unit in drawing_units([model], "layers")]
    halves = [unit_bytes(unit, DTYPE) for unit in decoding_units(vqvae)]  # the encoder, the decoder
    staying = weights - sum(layers) - sum(halves)
    needs = (parts["text_encoder"], max(layers) + drawing, halves[1] + parts["decoding"])
    return {
        "model": name,
        **gib,
        "peak_gib": (weights + parts["text_encoder"] + max(drawing, parts["decoding"])) / GIB,
        "peak_text_elsewhere_gib": (weights + max(drawing, parts["decoding"])) / GIB,
        "peak_text_elsewhere_cache_10_gib": (weights + max(kept, parts["decoding"])) / GIB,
        "peak_offload_layers_gib": (staying + max(needs)) / GIB,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Compute, print and write."""
    parser = Parser(prog="python -m benchmarks.infinity_memory", description=__doc__.split("\n")[0])
    add_out(parser, "results/infinity_memory.json", "result and table")
    out = parser.parse_args(argv).out
    with in_one_line(parser):
        rows = [measure(name) for name in TOKENIZERS]
        print(table(rows, list(rows[0])))
        command = f"python -m benchmarks.infinity_memory --out {portable(out)}"
        write_result(out, result(rows, command=command, n=1, seeds=None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
