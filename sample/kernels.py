"""Triton kernels of the fast path on a GPU: what lies between matrix products, in one pass over memory each.

Every function says which plain PyTorch it replaces; sums are float32. Triton comes with PyTorch's CUDA builds and
compiles a kernel at its first use, for which it needs a C compiler: ask `usable` first.

Shapes: R rows of a batch, l tokens, D width, H heads, d head width, N any rows, V codes, B images, C channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch without CUDA
    triton = None

P, T = ParamSpec("P"), TypeVar("T")
ROW = 16384  # the longest row that one program holds
PIXELS = 1024  # of a map whose sums one program takes
FLAT = 2048  # numbers that one program of an elementwise kernel makes


def on_its_device(function: Callable[P, T]) -> Callable[P, T]:
    """Triton launches on the current device: make that the first argument's."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.cuda.device_of(args[0]):
            return function(*args, **kwargs)

    return run


@cache
def usable(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether kernels of a dtype can be compiled and run on a device; warns, once, where they should but cannot."""
    if triton is None or device.type != "cuda":
        return False
    x_RlD, kv = (torch.zeros(shape, device=device, dtype=dtype) for shape in ((1, 1, 48), (2, 1, 2, 1, 8)))
    norm, logits = torch.nn.GroupNorm(4, 48, device=device, dtype=dtype), torch.zeros(1, 48, device=device)
    try:
        gated_norm(x_RlD, x_RlD[0], x_RlD[0])
        split_heads(x_RlD, *kv, logits[0, :2])
        norm_silu(x_RlD.view(1, 48, 1, 1), norm)
        draw(keep_likeliest(logits, 2, 0.5), logits[:, 0])
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, or a GPU that it does not know: the plain path serves
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"kernels cannot be used on {device}, which makes drawing slower: {reason}", stacklevel=2)
        return False
    return True


@on_its_device
def gated_norm(
    x_RlD: torch.Tensor,
    scale_RD: torch.Tensor,
    shift_RD: torch.Tensor,
    branch_RlD: torch.Tensor | None = None,
    gate_RD: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + gate * branch (x itself without a branch), and of it LN(.) * (1 + scale) + shift, in x's dtype.

    The vectors of a row may be views with any stride between rows.
    """
    R, length, D = x_RlD.shape
    x_RlD, normed = x_RlD.contiguous(), torch.empty_like(x_RlD, memory_format=torch.contiguous_format)
    summed = x_RlD if branch_RlD is None else torch.empty_like(normed)
    branch, gate = (x_RlD, scale_RD) if branch_RlD is None else (branch_RlD.contiguous(), gate_RD)
    block, strides = triton.next_power_of_2(D), (gate.stride(0), scale_RD.stride(0), shift_RD.stride(0))
    _gated_norm[(R * length,)](
        x_RlD, branch, gate, scale_RD, shift_RD, summed, normed, length, D, *strides, eps,
        GATED=branch_RlD is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return summed, normed


@on_its_device
def gated_sum(x_RlD: torch.Tensor, branch_RlD: torch.Tensor, gate_RD: torch.Tensor) -> torch.Tensor:
    """x + gate * branch."""
    R, length, D = x_RlD.shape
    x_RlD, branch_RlD = x_RlD.contiguous(), branch_RlD.contiguous()
    out, block = torch.empty_like(x_RlD), triton.next_power_of_2(D)
    _gated_sum[(R * length,)](
        x_RlD, branch_RlD, gate_RD, out, length, D, gate_RD.stride(0), BLOCK=block, num_warps=_warps(block)
    )
    return out


@on_its_device
def split_heads(
    qkv_RlE: torch.Tensor, k_RHld: torch.Tensor, v_RHld: torch.Tensor, strength_H: torch.Tensor | None
) -> torch.Tensor:
    """Queries (R, H, l, d) of a product (R, l, 3 H d); its keys and values go where they are wanted.

    Args:
        k_RHld, v_RHld: written; views with any strides but 1 between the numbers of a head.
        strength_H: queries and keys are normalised and queries multiplied by it; None leaves them as they are.
    """
    R, H, length, d = k_RHld.shape
    qkv_RlE = qkv_RlE.contiguous()
    q_RHld = qkv_RlE.new_empty(R, length, H, d).transpose(1, 2)
    strides = [stride for x in (q_RHld, k_RHld, v_RHld) for stride in x.stride()[:3]]
    blocks = (triton.next_power_of_2(H), triton.next_power_of_2(d))
    _split_heads[(R * length,)](
        qkv_RlE, strength_H, q_RHld, k_RHld, v_RHld, length, H, d, *strides,
        NORMED=strength_H is not None, HEADS=blocks[0], WIDTH=blocks[1], num_warps=_warps(blocks[0] * blocks[1]),
    )  # fmt: skip
    return q_RHld


@on_its_device
def keep_likeliest(logits: torch.Tensor, k: int, p: float) -> torch.Tensor:
    """`sample.draw.keep_likeliest` of float32 logits (..., V) without a sort: borders are found by halving.

    Tokens that are equal to the one at top-p's border all stay.
    """
    V = logits.shape[-1]
    rows = logits.contiguous().view(-1, V)
    out, block = torch.empty_like(rows), triton.next_power_of_2(V)
    k = k if 0 < k < V else V
    _keep_likeliest[(len(rows),)](rows, out, V, k, 1 - p, NUCLEUS=p < 1, BLOCK=block, num_warps=_warps(block))
    return out.view(logits.shape)


@on_its_device
def draw(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """`sample.draw.draw` in one reading of the logits (..., V): int64 tokens (...)."""
    V = logits.shape[-1]
    rows, uniforms = logits.float().contiguous().view(-1, V), uniforms.float().contiguous()
    tokens, block = torch.empty(uniforms.shape, dtype=torch.int64, device=logits.device), triton.next_power_of_2(V)
    _draw[(len(rows),)](rows, uniforms, tokens, V, BLOCK=block, num_warps=_warps(block))
    return tokens


@on_its_device
def norm_silu(
    x_BChw: torch.Tensor,
    norm: torch.nn.GroupNorm,
    bias_C: torch.Tensor | None = None,
) -> torch.Tensor:
    """SiLU(GroupNorm(x + bias)) of channels-last maps; the bias is that of the convolution before."""
    x_BChw = x_BChw.contiguous(memory_format=torch.channels_last)
    B, C, h, w = x_BChw.shape
    chunks, wide = triton.cdiv(h * w, PIXELS), min(32, triton.next_power_of_2(C))
    sums = torch.empty(B, 2, chunks, C, device=x_BChw.device)
    _channel_sums[(chunks, triton.cdiv(C, wide), B)](x_BChw, sums, h * w, C, PIXELS=PIXELS, TALL=64, WIDE=wide)
    affine = torch.empty(B, 2, C, device=x_BChw.device)
    each = C // norm.num_groups
    _group_affine[(norm.num_groups, B)](
        x_BChw, sums, norm.weight, norm.bias, bias_C, affine, h * w, C, each, chunks, norm.eps,
        BIASED=bias_C is not None, TALL=triton.next_power_of_2(chunks), WIDE=triton.next_power_of_2(each),
    )  # fmt: skip
    out = torch.empty_like(x_BChw)
    _affine_silu[(triton.cdiv(h * w * C, FLAT), B)](x_BChw, affine, out, h * w * C, C, BLOCK=FLAT)
    return out


@on_its_device
def biased_sum(x_BChw: torch.Tensor, onto_BChw: torch.Tensor, bias_C: torch.Tensor) -> torch.Tensor:
    """x + bias + onto, of channels-last maps."""
    x_BChw, onto_BChw = (x.contiguous(memory_format=torch.channels_last) for x in (x_BChw, onto_BChw))
    B, C, h, w = x_BChw.shape
    out = torch.empty_like(x_BChw)
    _biased_sum[(triton.cdiv(h * w * C, FLAT), B)](x_BChw, onto_BChw, bias_C, out, h * w * C, C, BLOCK=FLAT)
    return out


def _warps(block: int) -> int:
    """16 numbers a thread, 32 of the longest rows."""
    return max(1, min(16, block // 512))


if triton is not None:

    @triton.jit
    def _gated_norm(
        x, branch, gate, scale, shift, summed, normed, length, D, gate_row, scale_row, shift_row, eps,
        GATED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        row = token // length
        i = tl.arange(0, BLOCK)
        inside = i < D
        value = tl.load(x + token * D + i, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            added = tl.load(branch + token * D + i, mask=inside, other=0.0).to(tl.float32)
            value += added * tl.load(gate + row * gate_row + i, mask=inside, other=0.0).to(tl.float32)
            tl.store(summed + token * D + i, value, mask=inside)
        centred = tl.where(inside, value - tl.sum(value, axis=0) / D, 0.0)
        centred *= tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
        factor = tl.load(scale + row * scale_row + i, mask=inside, other=0.0).to(tl.float32) + 1.0
        offset = tl.load(shift + row * shift_row + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + token * D + i, centred * factor + offset, mask=inside)

    @triton.jit
    def _gated_sum(x, branch, gate, out, length, D, gate_row, BLOCK: tl.constexpr):
        token = tl.program_id(0).to(tl.int64)
        row = token // length
        i = tl.arange(0, BLOCK)
        inside = i < D
        value = tl.load(x + token * D + i, mask=inside).to(tl.float32)
        added = tl.load(branch + token * D + i, mask=inside).to(tl.float32)
        value += added * tl.load(gate + row * gate_row + i, mask=inside).to(tl.float32)
        tl.store(out + token * D + i, value, mask=inside)

    @triton.jit
    def _split_heads(
        qkv, strength, q, k, v, length, H, d,
        q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
        NORMED: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        row, token = program // length, program % length
        head, i = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
        inside = (head < H) & (i < d)
        begin = qkv + program * 3 * H * d + head * d + i
        queries = tl.load(begin, mask=inside, other=0.0).to(tl.float32)
        keys = tl.load(begin + H * d, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(begin + 2 * H * d, mask=inside, other=0.0)
        if NORMED:
            times = tl.load(strength + head, mask=head < H, other=0.0).to(tl.float32)
            queries *= times / tl.maximum(tl.sqrt(tl.sum(queries * queries, axis=1)), 1e-12)[:, None]
            keys *= 1.0 / tl.maximum(tl.sqrt(tl.sum(keys * keys, axis=1)), 1e-12)[:, None]
        tl.store(q + row * q_row + head * q_head + token * q_token + i, queries, mask=inside)
        tl.store(k + row * k_row + head * k_head + token * k_token + i, keys, mask=inside)
        tl.store(v + row * v_row + head * v_head + token * v_token + i, values, mask=inside)

    @triton.jit
    def _keep_likeliest(logits, out, V, k, spare, NUCLEUS: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, BLOCK)
        inside = i < V
        value = tl.load(logits + row * V + i, mask=inside, other=-float("inf"))
        value += 0.0  # of -0.0 makes 0.0, which is as likely
        bits = value.to(tl.int32, bitcast=True)
        order = tl.where(inside, bits ^ ((bits >> 31) & 0x7FFFFFFF), -2147483648)  # integers in the numbers' order
        border = tl.where(tl.sum((order >= 0).to(tl.int32), axis=0) >= k, 0, -2147483648)
        for i_bit in range(31):  # the largest border that k tokens reach
            higher = border + (1 << (30 - i_bit))
            border = tl.where(tl.sum((order >= higher).to(tl.int32), axis=0) >= k, higher, border)
        kept = inside & (order >= border)
        if NUCLEUS:
            best = tl.max(order, axis=0)
            weight = tl.where(kept, tl.exp(value - tl.max(value, axis=0)), 0.0)
            spared = tl.sum(weight, axis=0) * spare
            below = tl.sum(tl.where(order < 0, weight, 0.0), axis=0)
            border = tl.where((below <= spared) & (best >= 0), 0, -2147483648)
            for i_bit in range(31):  # the largest border with no more than the spare probability below it
                higher = border + (1 << (30 - i_bit))
                below = tl.sum(tl.where(order < higher, weight, 0.0), axis=0)
                border = tl.where((below <= spared) & (best >= higher), higher, border)
            kept = kept & (order >= border)
        tl.store(out + row * V + i, tl.where(kept, value, -float("inf")), mask=inside)

    @triton.jit
    def _draw(logits, uniforms, tokens, V, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, BLOCK)
        value = tl.load(logits + row * V + i, mask=i < V, other=-float("inf"))
        weight = tl.exp(value - tl.max(value, axis=0))
        sums = tl.cumsum(weight, axis=0)
        target = tl.load(uniforms + row) * tl.max(sums, axis=0)
        last = tl.max(tl.where(weight > 0, i, 0), axis=0)  # where rounding leaves no sum above the target
        beyond = tl.where((sums > target) & (weight > 0), i, last)
        tl.store(tokens + row, tl.min(beyond, axis=0).to(tl.int64))

    @triton.jit
    def _channel_sums(x, sums, area, C, PIXELS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr):
        """Sums of each channel's difference from its first pixel, and of the squares: little is lost far from 0."""
        chunk, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
        channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
        pivot = tl.load(x + image * area * C + channel, mask=channel < C, other=0.0).to(tl.float32)
        first = tl.zeros((TALL, WIDE), tl.float32)
        second = tl.zeros((TALL, WIDE), tl.float32)
        for begin in range(0, PIXELS, TALL):
            pixel = chunk * PIXELS + begin + tl.arange(0, TALL)
            inside = (pixel < area)[:, None] & (channel < C)[None, :]
            where = x + image * area * C + pixel[:, None] * C + channel[None, :]
            value = tl.load(where, mask=inside, other=0.0).to(tl.float32)
            value = tl.where(inside, value - pivot[None, :], 0.0)
            first += value
            second += value * value
        into = sums + (image * 2 * tl.num_programs(0) + chunk) * C + channel
        tl.store(into, tl.sum(first, axis=0), mask=channel < C)
        tl.store(into + tl.num_programs(0) * C, tl.sum(second, axis=0), mask=channel < C)

    @triton.jit
    def _group_affine(
        x, sums, weight, bias, before, affine, area, C, each, chunks, eps,
        BIASED: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
        i = tl.arange(0, WIDE)
        channel = group * each + i
        own = i < each
        chunk = tl.arange(0, TALL)
        inside = (chunk < chunks)[:, None] & own[None, :]
        where = sums + (image * 2 * chunks + chunk[:, None]) * C + channel[None, :]
        first = tl.load(where, mask=inside, other=0.0).to(tl.float64)
        second = tl.load(where + chunks * C, mask=inside, other=0.0).to(tl.float64)
        mean, power = tl.sum(first, axis=0) / area, tl.sum(second, axis=0) / area  # of each channel, from its pivot
        variance = power - mean * mean
        mean += tl.load(x + image * area * C + channel, mask=own, other=0.0).to(tl.float64)
        shift = tl.zeros((WIDE,), tl.float64)
        if BIASED:
            shift = tl.load(before + channel, mask=own, other=0.0).to(tl.float64)
            mean += shift
        middle = tl.sum(tl.where(own, mean, 0.0), axis=0) / each
        away = mean - middle
        spread = tl.sum(tl.where(own, variance + away * away, 0.0), axis=0) / each
        factor = tl.load(weight + channel, mask=own, other=0.0).to(tl.float64) / tl.sqrt(spread + eps)
        offset = tl.load(bias + channel, mask=own, other=0.0).to(tl.float64) + (shift - middle) * factor
        tl.store(affine + image * 2 * C + channel, factor.to(tl.float32), mask=own)
        tl.store(affine + (image * 2 + 1) * C + channel, offset.to(tl.float32), mask=own)

    @triton.jit
    def _affine_silu(x, affine, out, count, C, BLOCK: tl.constexpr):
        image = tl.program_id(1).to(tl.int64)
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside, channel = i < count, i % C
        value = tl.load(x + image * count + i, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(affine + image * 2 * C + channel, mask=inside, other=0.0)
        value = value * factor + tl.load(affine + (image * 2 + 1) * C + channel, mask=inside, other=0.0)
        tl.store(out + image * count + i, value * tl.sigmoid(value), mask=inside)

    @triton.jit
    def _biased_sum(x, onto, bias, out, count, C, BLOCK: tl.constexpr):
        image = tl.program_id(1).to(tl.int64)
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < count
        value = tl.load(x + image * count + i, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(onto + image * count + i, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(bias + i % C, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + image * count + i, value, mask=inside)
