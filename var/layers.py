"""Building blocks of the transformer: attention, feed-forward, adaptive layer norm, 2-D rotary positions.

Shapes: B images, l query tokens, S key tokens, T text tokens, D width, H heads, d = D / H.
"""

from __future__ import annotations

from functools import partial
from math import log

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from tokenizer.schedule import ScaleSchedule
from var.cache import KVCache
from var.masks import Groups, Mask
from var.pruning import PrunedCache

EPS = 1e-6


def layer_norm(x_BlD: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """Layer norm without parameters."""
    return F.layer_norm(x_BlD, x_BlD.shape[-1:], eps=eps)


def modulate(x_BlD: torch.Tensor, scale_B1D: torch.Tensor, shift_B1D: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """Adaptive layer norm: LN(x) * (1 + scale) + shift."""
    return torch.addcmul(shift_B1D, layer_norm(x_BlD, eps), scale_B1D + 1)


def attention(
    q_BHld: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSd: torch.Tensor,
    mask: Mask | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention to (B, l, H*d): flex_attention where the mask is a BlockMask, else SDPA, a call a group."""
    if isinstance(mask, Groups):
        groups = [
            (q_BHld[:, :, begin:end], k_BHSd[:, :, first:end], v_BHSd[:, :, first:end])
            for begin, end, first in mask.spans
        ]
        masks = (mask.first_nn, *(None for _ in groups[1:]))
        return torch.cat([attention(*group, own, scale) for group, own in zip(groups, masks)], dim=1)
    if mask is None or isinstance(mask, torch.Tensor):
        out = F.scaled_dot_product_attention(q_BHld, k_BHSd, v_BHSd, attn_mask=mask, scale=scale)
    else:
        from var.flex import flex

        out = flex(q_BHld, k_BHSd, v_BHSd, mask, scale)
    return rearrange(out, "b h l d -> b l (h d)")


def rope_table(schedule: ScaleSchedule, scales: range, head_width: int, device: torch.device | str) -> torch.Tensor:
    """Complex rotations (l, d/2) of the tokens of `scales`: rows turn the first half of the pairs, columns the second.

    A cell i of h rows sits at round(i * grid_h / h) on the schedule's reference grid, so positions mean the same
    place at every scale (Infinity, "normalised" 2-D RoPE).
    """
    exponents = torch.arange(0, head_width // 2, 2, dtype=torch.float32, device=device) / (head_width // 2)
    frequencies = 10000.0**-exponents  # d/4 of them
    grid_h, grid_w = schedule.grid_hw
    angles = []
    for h, w in (schedule.sides[k] for k in scales):
        rows = (torch.arange(h, device=device) * (grid_h / h)).round()
        columns = (torch.arange(w, device=device) * (grid_w / w)).round()
        row_angle = torch.outer(rows, frequencies)[:, None].expand(h, w, -1)
        column_angle = torch.outer(columns, frequencies)[None].expand(h, w, -1)
        angles.append(rearrange(torch.cat([row_angle, column_angle], dim=-1), "h w f -> (h w) f"))
    angles_lf = torch.cat(angles)
    return torch.polar(torch.ones_like(angles_lf), angles_lf)


def rotate(x_BHld: torch.Tensor, table_lf: torch.Tensor) -> torch.Tensor:
    """Rotate the interleaved pairs (2m, 2m+1) of the head width by a `rope_table`."""
    pairs = torch.view_as_complex(x_BHld.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table_lf).flatten(-2).to(x_BHld.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention, with cosine logits when `qk_norm` (VAR, appendix; official biases: q and v, not k)."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool):
        super().__init__()
        self.heads, self.qk_norm = heads, qk_norm
        self.attend = attention  # or a faster function of the same arguments
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)
        if qk_norm:
            self.log_scale_H11 = nn.Parameter(torch.full((heads, 1, 1), log(4.0)))
        # Without the norm the official scale is 0.25 / sqrt(d).
        self.scale = 1.0 if qk_norm else 0.25 / (width // heads) ** 0.5

    def project(self, x_BlD: torch.Tensor, rope_lf: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, each (B, H, l, d), of (B, l, D)."""
        q, k, v = self._joint(x_BlD) if self._joins() else self._apart(x_BlD)  # each (B, l, H, d)
        if self.qk_norm:  # the norm runs in float32 under autocast; the cache gets the compute dtype
            strength_H1, q = self.log_scale_H11[:, 0].clamp(max=log(100.0)).exp(), q.float()
            norms_BlH1 = torch.linalg.vector_norm(q, dim=-1, keepdim=True).clamp(min=1e-12)
            q = (q * (strength_H1 / norms_BlH1)).to(v.dtype)
            k = F.normalize(k.float(), dim=-1).to(v.dtype)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # after the norm: so it compiles into one kernel each
        if rope_lf is not None:
            q, k = rotate(q, rope_lf), rotate(k, rope_lf)
        return q, k, v

    def _joins(self) -> bool:
        """Whether one product makes queries, keys and values: in training, but for layers with adapters."""
        plain = all(type(part) is nn.Linear for part in (self.to_q, self.to_k, self.to_v))
        return self.training and plain and torch.is_grad_enabled()

    def _apart(self, x_BlD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, each (B, l, H, d)."""
        return tuple(part(x_BlD).unflatten(-1, (self.heads, -1)) for part in (self.to_q, self.to_k, self.to_v))

    def _joint(self, x_BlD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same by one product: a third of the products forwards, and of the sums backwards."""
        weight = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])
        bias = torch.cat([self.to_q.bias, torch.zeros_like(self.to_q.bias), self.to_v.bias])
        return F.linear(x_BlD, weight, bias).unflatten(-1, (3, self.heads, -1)).unbind(2)

    def read(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        begin: int = 0,
    ) -> torch.Tensor:
        """What the queries read, (B, l, D); keys of earlier scales come from `cache`, which also takes the new ones."""
        if cache is not None:
            k, v = cache.update(layer, k, v, begin=begin, q_BHld=q, scale=self.scale)
        return self.attend(q, k, v, mask, self.scale)


class CrossAttention(nn.Module):
    """Multi-head attention to a text memory; keys and values are computed once an image by `memory`."""

    called_apart = ("memory",)  # beside `forward`: sharding must know

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)

    def memory(self, text_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, H, T, d) of the text."""
        k, v = (
            rearrange(project(text_BTD), "b t (h d) -> b h t d", h=self.heads) for project in (self.to_k, self.to_v)
        )
        return k, v

    def forward(
        self, x_BlD: torch.Tensor, memory: tuple[torch.Tensor, torch.Tensor], mask_B11T: torch.Tensor
    ) -> torch.Tensor:
        """(B, l, D) to (B, l, D)."""
        q = rearrange(self.to_q(x_BlD), "b l (h d) -> b h l d", h=self.heads)
        return self.to_out(attention(q, *memory, mask_B11T))


class FeedForward(nn.Module):
    """Linear, GELU (tanh), linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BlD: torch.Tensor) -> torch.Tensor:
        """(B, l, D) to (B, l, D)."""
        return self.fc2(F.gelu(self.fc1(x_BlD), approximate="tanh"))


class AdaLinear(nn.Sequential):
    """SiLU, then a linear layer to `parts` modulation vectors: (B, D) to (B, parts, D)."""

    def __init__(self, width: int, parts: int):
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))
        self.parts = parts

    def forward(self, cond_BD: torch.Tensor) -> torch.Tensor:
        """(B, D) to (B, parts, D)."""
        return super().forward(cond_BD).unflatten(-1, (self.parts, -1))


class Block(nn.Module):
    """Self-attention, optional cross-attention, feed-forward; each gated and modulated by the condition.

    Args:
        shared_ada: the modulation comes from a linear layer shared by all blocks, plus this block's own offset.
        cross: attend to a text memory between the two.
        cross_gate: first value of a learned gate a channel on what that adds; None for no gate.
        drop_path: probability that training skips a branch for an image.
        norm_eps: of the layer norms.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        qk_norm: bool,
        shared_ada: bool,
        cross: bool,
        cross_gate: float | None = None,
        drop_path: float = 0.0,
        norm_eps: float = EPS,
    ):
        super().__init__()
        self.drop_path, self.norm_eps = drop_path, norm_eps
        self.attn = SelfAttention(width, heads, qk_norm=qk_norm)
        self.ffn = FeedForward(width, hidden)
        if shared_ada:
            self.ada_offset_6D = nn.Parameter(torch.empty(6, width))
            self.called_apart = ("modulation",)
        else:
            self.ada = AdaLinear(width, 6)
        if cross:
            self.cross_norm = nn.LayerNorm(width, eps=norm_eps)
            self.cross = CrossAttention(width, heads)
        gated = cross and cross_gate is not None
        self.cross_gate_D = nn.Parameter(torch.full((width,), cross_gate)) if gated else None

    def modulation(self, cond_BD: torch.Tensor, shared_B6D: torch.Tensor | None) -> torch.Tensor:
        """This block's gamma1, gamma2, scale1, scale2, shift1, shift2 (official order), (B, 6, D)."""
        return self.ada(cond_BD) if shared_B6D is None else shared_B6D + self.ada_offset_6D

    def forward(
        self,
        x_BlD: torch.Tensor,
        ada_B6D: torch.Tensor,
        memory: tuple[torch.Tensor, torch.Tensor] | None = None,
        memory_mask: torch.Tensor | None = None,
        mask: Mask | None = None,
        rope_lf: torch.Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        begin: int = 0,
        kept_2B11: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, l, D) to (B, l, D); `kept_2B11` comes from `kept`."""
        if isinstance(cache, PrunedCache) and cache.acts(layer, begin + x_BlD.shape[1]):
            return self.pruned(x_BlD, ada_B6D, memory, memory_mask, mask, rope_lf, cache, layer, begin)
        kept = (1.0, 1.0) if kept_2B11 is None else kept_2B11
        x_BlD = x_BlD + self.self_branch(x_BlD, ada_B6D, mask, rope_lf, cache, layer, begin, kept[0])
        if memory is not None:
            x_BlD = x_BlD + self.text_branch(x_BlD, memory, memory_mask)
        return x_BlD + self.ffn_branch(x_BlD, ada_B6D, kept[1])

    def pruned(
        self,
        x_BlD: torch.Tensor,
        ada_B6D: torch.Tensor,
        memory: tuple[torch.Tensor, torch.Tensor] | None,
        memory_mask: torch.Tensor | None,
        mask: Mask | None,
        rope_lf: torch.Tensor | None,
        cache: PrunedCache,
        layer: int,
        begin: int,
    ) -> torch.Tensor:
        """The same where a cache chooses which tokens each branch computes (`var.pruning`)."""

        def tokens(few_BnD: torch.Tensor, places_Bn: torch.Tensor | None) -> torch.Tensor:
            rope = rope_lf if rope_lf is None or places_Bn is None else rope_lf[places_Bn][:, None]
            return self.self_branch(few_BnD, ada_B6D, mask, rope, cache, layer, begin)

        x_BlD = cache.add("self", layer, begin, x_BlD, tokens)
        if memory is not None:
            text = partial(self.text_branch, memory=memory, memory_mask=memory_mask)
            x_BlD = cache.add("text", layer, begin, x_BlD, lambda few_BnD, _: text(few_BnD))
        return cache.add("ffn", layer, begin, x_BlD, lambda few_BnD, _: self.ffn_branch(few_BnD, ada_B6D))

    def self_branch(
        self,
        x_BlD: torch.Tensor,
        ada_B6D: torch.Tensor,
        mask: Mask | None,
        rope_lf: torch.Tensor | None,
        cache: KVCache | None,
        layer: int,
        begin: int,
        kept: torch.Tensor | float = 1.0,
    ) -> torch.Tensor:
        """What self-attention adds, (B, l, D)."""
        gamma_B1D, _, scale_B1D, _, shift_B1D, _ = ada_B6D[:, :, None].unbind(dim=1)
        q, k, v = self.attn.project(modulate(x_BlD, scale_B1D, shift_B1D, self.norm_eps), rope_lf)
        return self.attn.to_out(self.attn.read(q, k, v, mask, cache, layer, begin)) * (gamma_B1D * kept)

    def text_branch(
        self, x_BlD: torch.Tensor, memory: tuple[torch.Tensor, torch.Tensor], memory_mask: torch.Tensor
    ) -> torch.Tensor:
        """What cross-attention adds, (B, l, D)."""
        read_BlD = self.cross(self.cross_norm(x_BlD), memory, memory_mask)
        return read_BlD if self.cross_gate_D is None else read_BlD * self.cross_gate_D

    def ffn_branch(self, x_BlD: torch.Tensor, ada_B6D: torch.Tensor, kept: torch.Tensor | float = 1.0) -> torch.Tensor:
        """What the feed-forward adds, (B, l, D)."""
        _, gamma_B1D, _, scale_B1D, _, shift_B1D = ada_B6D[:, :, None].unbind(dim=1)
        return self.ffn(modulate(x_BlD, scale_B1D, shift_B1D, self.norm_eps)) * (gamma_B1D * kept)

    @property
    def drops(self) -> bool:
        """Whether training skips branches of this block."""
        return self.training and self.drop_path > 0

    def kept(self, u_2B: torch.Tensor) -> torch.Tensor | None:
        """Stochastic depth: 1 / (1 - p) where a training image keeps its two branches, 0 where not, (2, B, 1, 1).

        Not in `forward`, where each block's own p would be compiled anew.

        Args:
            u_2B: uniform in [0, 1), for each branch and image.
        """
        keep = 1 - self.drop_path
        return (u_2B < keep).to(u_2B.dtype)[:, :, None, None] / keep if self.drops else None
