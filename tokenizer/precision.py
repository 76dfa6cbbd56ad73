"""How many digits numbers have: of a model's weights, and of float32 matrix products on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch

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
