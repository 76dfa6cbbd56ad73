"""The fast path on a GPU: a transformer block and a residual block of the tokenizer in few launches.

Matrix products stay PyTorch's; what lies between them is one kernel of `sample.kernels` each.

Shapes: B images, R rows of a batch, l tokens, S keys, D width, H heads, d head width, C O channels, h w pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional as F

from sample import few_rows, kernels
from tokenizer.precision import product_precision
from var.cache import KVCache, Pair
from var.heads import CategoricalHead
from var.layers import Block, rotate
from var.masks import Mask
from var.pruning import PrunedCache

NARROW = 32  # output channels that a convolution needs to run on tensor cores (cuDNN 9)


class FusedBlock(Block):
    """A block that computes the same in few launches, made of a `Block` in place by `fuse`; for inference.

    Attributes:
        qkv_ED: weights of queries, keys and values joined, (3 D, D); the block's own are views of it.
        bias_E: their biases, (3 D,).
        strength_H: what normed queries are multiplied by, float32; None without the norm.
        counters: of `few_rows.product`; None where calls of few rows go the way of the others.
        following_ED: joined weights of the block that is called next, which `few_rows` reads ahead; None if not known.
    """

    qkv_ED: torch.Tensor
    bias_E: torch.Tensor
    strength_H: torch.Tensor | None
    counters: torch.Tensor | None
    following_ED: torch.Tensor | None = None

    @torch.no_grad()
    def forward(
        self,
        x_RlD: torch.Tensor,
        ada_R6D: torch.Tensor,
        memory: Pair | None = None,
        memory_mask: torch.Tensor | None = None,
        mask: Mask | None = None,
        rope_lf: torch.Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        begin: int = 0,
        kept_2B11: None = None,
    ) -> torch.Tensor:
        """(R, l, D) to (R, l, D); the arguments are those of `Block.forward`."""
        if isinstance(cache, PrunedCache) and cache.acts(layer, begin + x_RlD.shape[1]):
            return self.pruned(x_RlD, ada_R6D, memory, memory_mask, mask, rope_lf, cache, layer, begin)
        few = self.counters is not None and few_rows.fits(self, x_RlD, cache, (memory, mask, rope_lf))
        if few and len(x_RlD) * x_RlD.shape[1] <= few_rows.ROWS:
            return few_rows.run(x_RlD, ada_R6D, self, cache, layer, begin)
        attn, eps = self.attn, self.norm_eps
        gamma1, gamma2, scale1, scale2, shift1, shift2 = ada_R6D.unbind(dim=1)  # each (R, D)
        _, normed = kernels.gated_norm(x_RlD, scale1, shift1, eps=eps)
        if few:
            read = few_rows.attend(F.linear(normed, self.qkv_ED, self.bias_E), self, cache, layer, begin)
        else:
            read = attn.attend(*self.project(normed, rope_lf, cache, layer, begin), mask, attn.scale)
        read = attn.to_out(read)
        if memory is None:
            x_RlD, normed = kernels.gated_norm(x_RlD, scale2, shift2, read, gamma1, eps=eps)
        else:
            x_RlD = kernels.gated_sum(x_RlD, read, gamma1)
            read = self.cross(self.cross_norm(x_RlD), memory, memory_mask)
            x_RlD = x_RlD + (read if self.cross_gate_D is None else read * self.cross_gate_D)
            _, normed = kernels.gated_norm(x_RlD, scale2, shift2, eps=eps)
        return kernels.gated_sum(x_RlD, self.feed_forward(normed), gamma2)

    def project(
        self, normed_RlD: torch.Tensor, rope_lf: torch.Tensor | None, cache: KVCache | None, layer: int, begin: int
    ) -> tuple[torch.Tensor, ...]:
        """Queries (R, H, l, d), and keys and values of all they may see, written straight into a plain cache."""
        attn, (R, length, D) = self.attn, normed_RlD.shape
        qkv = F.linear(normed_RlD, self.qkv_ED, self.bias_E)
        shape = (R, attn.heads, length, D // attn.heads)
        if type(cache) is KVCache and rope_lf is None:
            k, v, keys, values = cache.slots(layer, begin, shape, qkv)
            return kernels.split_heads(qkv, k, v, self.strength_H), keys, values
        k, v = (qkv.new_empty(shape) for _ in range(2))
        q = kernels.split_heads(qkv, k, v, self.strength_H)
        if rope_lf is not None:
            q, k = rotate(q, rope_lf), rotate(k, rope_lf)
        if cache is not None:
            k, v = cache.update(layer, k, v, begin=begin, q_BHld=q, scale=attn.scale)
        return q, k, v

    def feed_forward(self, normed_RlD: torch.Tensor) -> torch.Tensor:
        """`FeedForward` with its GELU computed at the end of the first product."""
        first, second = self.ffn.fc1, self.ffn.fc2
        rows = normed_RlD.flatten(0, 1)
        if rows.dtype == torch.float32:  # no such product there
            return self.ffn(normed_RlD)
        hidden = torch._addmm_activation(first.bias, rows, first.weight.mT, use_gelu=True)
        return second(hidden).view(normed_RlD.shape)


def fuse(block: Block, *, chained: bool = False) -> None:
    """Make a `FusedBlock` of a block; not of one whose layers have adapters, which act when they are called.

    Args:
        chained: calls of few rows go through `sample.few_rows`.
    """
    attn = block.attn
    parts = (attn.to_q, attn.to_k, attn.to_v)
    if not all(type(part) is nn.Linear for part in (*parts, block.ffn.fc1, block.ffn.fc2)):
        return
    block.qkv_ED = torch.cat([part.weight.data for part in parts])
    for part, own in zip(parts, block.qkv_ED.chunk(3)):
        part.weight.data = own  # so that no weight is held twice
    q_bias, v_bias = attn.to_q.bias.data, attn.to_v.bias.data
    block.bias_E = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    strength = attn.log_scale_H11.data.float().clamp(max=log(100.0)).exp().flatten() if attn.qk_norm else None
    block.strength_H = strength
    chained = chained and type(attn.to_out) is nn.Linear
    block.counters = few_rows.new_counters(block.qkv_ED.device) if chained else None
    block.__class__ = FusedBlock


def fuse_all(blocks: Sequence[Block], *, chained: bool = False) -> None:
    """`fuse` the blocks of a transformer, which are called in turn, scale after scale."""
    for block in blocks:
        fuse(block, chained=chained)
    for block, following in zip(blocks, [*blocks[1:], blocks[0]]):
        if chained and isinstance(block, FusedBlock):
            block.following_ED = getattr(following, "qkv_ED", None)


def fuse_head(head: CategoricalHead) -> None:
    """Let a head's product take TensorFloat-32, which has the digits of the official code's float16."""
    plain = head.project

    def project(features_BlD: torch.Tensor) -> torch.Tensor:
        with product_precision("tf32"):
            return plain(features_BlD)

    head.project = project


class FusedNormSiLU(nn.Module):
    """GroupNorm, then SiLU, of channels-last maps."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.num_groups, self.eps, self.weight, self.bias = norm.num_groups, norm.eps, norm.weight, norm.bias

    def forward(self, x_BChw: torch.Tensor, bias_C: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C, h, w), plus a bias before the norm, to (B, C, h, w), channels-last."""
        return kernels.norm_silu(x_BChw, self, bias_C)


class FusedResnet(nn.Module):
    """diffusers' residual block without time embedding, in channels-last; biases are added by the next kernel."""

    def __init__(self, block: ResnetBlock2D):
        super().__init__()
        assert block.time_emb_proj is None and block.output_scale_factor == 1, "not a block of an autoencoder"
        self.norm1, self.norm2 = FusedNormSiLU(block.norm1), FusedNormSiLU(block.norm2)
        self.conv1, self.conv2, self.conv_shortcut = block.conv1, block.conv2, block.conv_shortcut

    def forward(self, input_tensor: torch.Tensor, temb: None = None) -> torch.Tensor:
        """(B, C, h, w) to (B, O, h, w), channels-last."""
        h_BOhw = without_bias(self.conv1, self.norm1(input_tensor))
        h_BOhw = without_bias(self.conv2, self.norm2(h_BOhw, self.conv1.bias))
        if self.conv_shortcut is None:
            return kernels.biased_sum(h_BOhw, input_tensor, self.conv2.bias)
        return kernels.biased_sum(h_BOhw, self.conv_shortcut(input_tensor), self.conv2.bias)


def without_bias(conv: nn.Conv2d, x_BChw: torch.Tensor) -> torch.Tensor:
    """A convolution but for its bias."""
    return F.conv2d(x_BChw, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


class WidenedConv(nn.Module):
    """A convolution of stride 1 to a few channels, made with enough of them for tensor cores."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias, self.padding = conv.weight, conv.bias, conv.padding
        wide = F.pad(conv.weight.detach(), (0, 0, 0, 0, 0, 0, 0, NARROW - conv.out_channels))
        self.register_buffer("wide", wide.contiguous(memory_format=torch.channels_last), persistent=False)

    def forward(self, x_BChw: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to (B, O, h, w)."""
        return F.conv2d(x_BChw, self.wide, padding=self.padding)[:, : len(self.bias)] + self.bias[:, None, None]
