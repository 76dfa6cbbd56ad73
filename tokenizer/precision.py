"""How many digits float32 matrix products on a GPU have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
    """As `set_product_precision`, meanwhile."""
    before = set_product_precision(precision)
    try:
        yield
    finally:
        switch = torch.backends.cuda.matmul
        setattr(switch, "fp32_precision" if hasattr(switch, "fp32_precision") else "allow_tf32", before)
