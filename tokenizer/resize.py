"""Resizing of feature maps, as the official code does it and as each device can.

Resizing is linear, so it may as well be a matrix product. On GPUs bicubic interpolation is one, as CUDA's own kernel is
far slower; and so are averages, but on CUDA: Apple's MPS knows only those whose sizes divide each other.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional as F

from tokenizer.precision import product_precision

COMPLETE = ("cpu", "cuda")  # devices that resize to all sizes in all ways


def enlarge(x_BChw: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic interpolation: (B, C, h, w) to (B, C, *size), in the same dtype."""
    if x_BChw.device.type == "cpu":
        return F.interpolate(x_BChw, size=size, mode="bicubic")
    spread = _bicubic_matrix(tuple(x_BChw.shape[2:]), tuple(size), x_BChw.device)
    with product_precision("ieee"):
        return (x_BChw.flatten(2) @ spread.to(x_BChw.dtype)).unflatten(2, size)


def average(x_BCHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Area interpolation: (B, C, H, W) to (B, C, *size), every cell the mean of the cells that it covers."""
    if x_BCHW.device.type in COMPLETE:
        return F.interpolate(x_BCHW, size=size, mode="area")
    rows_Hh, cols_Ww = (_area_matrix(side, goal, x_BCHW.device) for side, goal in zip(x_BCHW.shape[2:], size))
    return (rows_Hh.T @ (x_BCHW.float() @ cols_Ww)).to(x_BCHW.dtype)


def shrink_smoothly(x_BCHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Antialiased bicubic interpolation, (B, C, H, W) to (B, C, *size); on the CPU where a device may lack it."""
    here = x_BCHW if x_BCHW.device.type in COMPLETE else x_BCHW.cpu()
    return F.interpolate(here, size=size, mode="bicubic", antialias=True).to(x_BCHW.device)


@cache
@torch.inference_mode(False)
def _bicubic_matrix(hw: tuple[int, int], size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """What each of h w cells adds to each of H W: (h w, H W) float32."""
    cells = torch.eye(hw[0] * hw[1]).view(-1, 1, *hw)
    return F.interpolate(cells, size=size, mode="bicubic").flatten(1).to(device)


@cache
@torch.inference_mode(False)
def _area_matrix(side: int, goal: int, device: torch.device) -> torch.Tensor:
    """The share that each of `side` cells in a row has in each of `goal`: (side, goal) float32."""
    return F.interpolate(torch.eye(side)[:, None], size=goal, mode="area")[:, 0].to(device)
