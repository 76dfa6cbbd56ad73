"""The fast path on a CPU: weights packed for oneDNN, layers joined, channels-last maps.

Shapes: B images, C channels, h w pixels, l tokens, S keys, H heads, d head width, N rows, I O widths of a layer.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from typing import TYPE_CHECKING

import torch
from diffusers.models.resnet import ResnetBlock2D
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from tokenizer.precision import SWITCHING
from var.layers import FeedForward, attention
from var.masks import Mask

if TYPE_CHECKING:
    from sample.fast import FoldedUpsample

ROWS = 512  # tokens the layout of a linear layer is chosen for; it serves other numbers as well
LAYOUTS = 4  # of a convolution's weight that are kept
LOGITS = 2**20  # attention logits computed at once, at most: 4 MiB, of which each core's cache holds its part
SLAB = 256  # pixels summed in one run: float32 sums of more lose digits


def can_pack() -> bool:
    """Whether torch has the oneDNN operators that take packed weights, on an x86 processor: no other was tried."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return on_x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Packed(nn.Module):
    """A layer whose weight is kept in the layout its operator wants; a state dict has it in the plain one.

    Args:
        packed: the weight as oneDNN keeps it.
        bias: (O,) or None.
    """

    def __init__(self, packed: torch.Tensor, bias: nn.Parameter | None):
        super().__init__()
        self.packed = packed
        self.bias = bias

    @property
    def weight(self) -> torch.Tensor:
        """The packed weight: its dtype and shape may be asked for, its numbers by `to_dense`."""
        return self.packed

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.packed.to_dense()
        super()._save_to_state_dict(destination, prefix, keep_vars)


class PackedLinear(Packed):
    """`nn.Linear` with a packed weight and, if wanted, the tanh GELU after it."""

    def __init__(self, linear: nn.Linear, *, gelu: bool = False):
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        super().__init__(packed, linear.bias)
        self.after = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def forward(self, x_NI: torch.Tensor) -> torch.Tensor:
        """(..., I) to (..., O), in the weight's dtype."""
        return torch.ops.mkldnn._linear_pointwise(x_NI, self.packed, self.bias, *self.after)


class FastFeedForward(nn.Module):
    """`FeedForward` with its GELU computed inside the first product."""

    def __init__(self, ffn: FeedForward):
        super().__init__()
        self.fc1, self.fc2 = PackedLinear(ffn.fc1, gelu=True), PackedLinear(ffn.fc2)

    def forward(self, x_BlD: torch.Tensor) -> torch.Tensor:
        """(B, l, D) to (B, l, D)."""
        return self.fc2(self.fc1(x_BlD))


class PackedByShape(nn.Module):
    """A convolution of channels-last maps whose weight is packed when maps of a shape come first, and kept by layout.

    How oneDNN wants the weight depends on the maps' size and number, and it rearranges what comes in another layout at
    every call, slowly.
    """

    reorder: str  # oneDNN's operator that lays the weight out
    where: tuple  # paddings, strides, dilations and groups, as it takes them

    def __init__(self):
        super().__init__()
        self.packs: dict[torch.Size, torch.Tensor] = {}  # by the shape of the maps
        self.layouts: dict[bytes, torch.Tensor] = {}  # the same ones, each once

    def packed(self, weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The weight as maps of that shape want it."""
        if shape not in self.packs:
            pack = getattr(torch.ops.mkldnn, self.reorder)(weight.detach(), *self.where, list(shape))
            layout = torch.ops.mkldnn._get_mkldnn_serialized_md(pack).numpy().tobytes()
            if len(self.layouts) >= LAYOUTS and layout not in self.layouts:
                self.packs.clear()
                self.layouts.clear()
            self.packs[shape] = self.layouts.setdefault(layout, pack)
        return self.packs[shape]


class PackedConv(PackedByShape):
    """A convolution with packed weights; it may add what it makes to another map."""

    reorder = "_reorder_convolution_weight"

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.where = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)

    def forward(self, x_BChw: torch.Tensor, onto_BChw: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C, h, w) to (B, O, h, w), plus `onto_BChw`."""
        packed = self.packed(self.weight, x_BChw.shape)
        if onto_BChw is None:
            return torch.ops.mkldnn._convolution_pointwise(x_BChw, packed, self.bias, *self.where, "none", [], "")
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x_BChw, onto_BChw, packed, self.bias, *self.where, "add", 1.0, None, [], None
        )


class PackedUpsample(PackedByShape):
    """`sample.fast.FoldedUpsample` with packed weights."""

    reorder = "_reorder_convolution_transpose_weight"
    where = ([1, 1], [0, 0], [2, 2], [1, 1], 1)  # padding, output padding, stride, dilation, groups

    def __init__(self, upsample: FoldedUpsample):
        super().__init__()
        self.conv = upsample.conv  # the plain one, for saving
        self.register_buffer("folded", upsample.folded, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to (B, O, 2h, 2w), channels-last."""
        x_BChw = hidden_states.contiguous(memory_format=torch.channels_last)
        packed = self.packed(self.folded, x_BChw.shape)
        transposed = torch.ops.mkldnn._convolution_transpose_pointwise
        return transposed(x_BChw, packed, self.conv.bias, *self.where, "none", [], "")


class NormSiLU(nn.Module):
    """GroupNorm, then SiLU, of channels-last maps.

    torch's float32 kernel for this layout sums all pixels of a channel in one run and is wrong by 1e-4 at 256 pixels;
    here sums are of `SLAB` pixels, and they are added up in float64.
    """

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.groups, self.eps, self.weight, self.bias = norm.num_groups, norm.eps, norm.weight, norm.bias

    def forward(self, x_BChw: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to (B, C, h, w), channels-last."""
        x_BChw = x_BChw.contiguous(memory_format=torch.channels_last)
        if x_BChw.dtype != torch.float32:
            return F.silu(F.group_norm(x_BChw, self.groups, self.weight, self.bias, self.eps), inplace=True)
        scale_BC11, shift_BC11 = self._affine(x_BChw)
        return F.silu(torch.addcmul(shift_BC11, x_BChw, scale_BC11), inplace=True)

    def _affine(self, x_BChw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm as a factor and an offset of every channel, (B, C, 1, 1) each."""
        pixels = rearrange(x_BChw, "b c h w -> b (h w) c")
        slabs_BnmC = pixels.unflatten(1, (-1, gcd(pixels.shape[1], SLAB)))
        parts = slabs_BnmC.split(16, dim=1)  # squares of so many stay in the processor's cache
        count = pixels.shape[1] * pixels.shape[2] // self.groups
        first = sum(part.sum(2).double().sum(1) for part in parts)
        second = sum(part.square().sum(2).double().sum(1) for part in parts)
        mean, power = (
            moment.unflatten(1, (self.groups, -1)).sum(2, keepdim=True) / count for moment in (first, second)
        )
        weight, bias = (own.double().unflatten(0, (self.groups, -1)) for own in (self.weight, self.bias))
        scale = (power - mean.square() + self.eps).rsqrt() * weight
        return tuple(rearrange(v.float(), "b g c -> b (g c) 1 1") for v in (scale, bias - mean * scale))


class FastResnet(nn.Module):
    """diffusers' residual block without time embedding, in channels-last."""

    def __init__(self, block: ResnetBlock2D):
        super().__init__()
        assert block.time_emb_proj is None and block.output_scale_factor == 1, "not a block of an autoencoder"
        self.norm1, self.norm2 = NormSiLU(block.norm1), NormSiLU(block.norm2)
        self.conv1, self.conv2 = PackedConv(block.conv1), PackedConv(block.conv2)
        self.conv_shortcut = None if block.conv_shortcut is None else PackedConv(block.conv_shortcut)

    def forward(self, input_tensor: torch.Tensor, temb: None = None) -> torch.Tensor:
        """(B, C, h, w) to (B, O, h, w), channels-last."""
        x_BChw = input_tensor.contiguous(memory_format=torch.channels_last)
        h_BOhw = self.conv1(self.norm1(x_BChw))
        beside = x_BChw if self.conv_shortcut is None else self.conv_shortcut(x_BChw)
        return self.conv2(self.norm2(h_BOhw), beside)


def half_attention(
    q_BHld: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSd: torch.Tensor,
    mask: Mask | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """`var.layers.attention` of bfloat16 tensors, logits in float32, few heads at once; with a mask, the plain one.

    Keys become float32 part by part, as oneDNN takes their transpose; tokens' heads lie side by side in the cache.
    """
    if mask is not None:
        return attention(q_BHld, k_BHSd, v_BHSd, mask, scale)
    B, H, length, d = q_BHld.shape
    factor, each = d**-0.5 if scale is None else scale, length * k_BHSd.shape[2]
    images = max(1, LOGITS // (H * each))
    heads = max(n for n in range(1, H + 1) if H % n == 0 and (n == 1 or n * each <= LOGITS))  # as many in every part
    out_BHld = q_BHld.new_empty(B, length, H, d).transpose(1, 2)
    for i in range(0, B, images):
        for j in range(0, H, heads):
            q, k, v, out = (x[i : i + images, j : j + heads] for x in (q_BHld, k_BHSd, v_BHSd, out_BHld))
            k_32 = k.to(torch.float32, memory_format=torch.contiguous_format)
            with bfloat16_products():
                logits = q.float() @ k_32.mT
            weights = (logits if factor == 1 else logits.mul_(factor)).softmax(dim=-1)
            out.copy_(weights.to(v.dtype) @ v)
    return rearrange(out_BHld, "b h l d -> b l (h d)")


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """float32 matrix products whose factors are bfloat16 numbers already, so that nothing is lost by rounding them.

    One thread at a time, as the switch is the whole process's: other threads should not multiply float32 meanwhile.
    """
    switch = torch.backends.mkldnn.matmul
    with SWITCHING:
        before = switch.fp32_precision
        switch.fp32_precision = "bf16"
        try:
            yield
        finally:
            switch.fp32_precision = before
