"""How many digits numbers have: of a model's weights, and of float32 matrix products on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch

VOLTA, AMPERE = (7, 0), (8, 0)  # compute capabilities: since when tensor cores know float16, and bfloat16
SWITCHING = threading.RLock()  # held while a switch of the whole process is not what it was


def set_product_precision(precision: str) -> str | bool:
    """From now on compute them in "ieee" (float32) or "tf32" (TensorFloat-32, 10 bits of mantissa) on CUDA.

    Returns:
        What was set before, in PyTorch's own words.
    """
    switch = torch.backends.cuda.matmul
    if hasattr(switch, "fp32_precision"):  # since PyTorch 2.9, where the older switch may not be read any more
        before, switch.fp32_precision = switch.fp32_precision, precision
        return before
    before, switch.allow_tf32 = switch.allow_tf32, precision == "tf32"
    return before


@contextmanager
def product_precision(precision: str) -> Iterator[None]:
    """As `set_product_precision`, meanwhile; one thread at a time, as the switch is the whole process's."""
    with SWITCHING:
        before = set_product_precision(precision)
        try:
            yield
        finally:
            switch = torch.backends.cuda.matmul
            setattr(switch, "fp32_precision" if hasattr(switch, "fp32_precision") else "allow_tf32", before)


def native_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware.

    CPUs with AVX512-BF16 or AMX do, AMD's GPUs, and NVIDIA's from Ampere on; of others it is not known.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= AMPERE
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if device.type == "cpu" else ()
    return any(getattr(torch.cpu, name, bool)() for name in names)


def native_half(device: torch.device | str) -> torch.dtype:
    """The half precision that a device multiplies in hardware: bfloat16 if it can, float16; float32 if none."""
    device = torch.device(device)
    if native_bfloat16(device):
        return torch.bfloat16
    tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= VOLTA
    return torch.float16 if tensor_cores else torch.float32


def cast(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast a model's floating-point weights to `dtype`, but for those it wants kept in float32.

    A model of transformers wants so for float16 alone; what it names as strict, for bfloat16 as well.
    """
    name = "_keep_in_fp32_modules"
    kept = set(getattr(module, f"{name}_strict", None) or ())
    if dtype != torch.bfloat16 or not hasattr(module, f"{name}_strict"):
        kept |= set(getattr(module, name, None) or ())
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype if kept.isdisjoint(name.split(".")) else torch.float32)
