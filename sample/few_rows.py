"""A transformer block of few rows on a GPU, as one image has them: seven kernels that overlap.

A product of few rows is as slow as its weights are read. So weights must be read all the time: every kernel starts
while the one before still runs (programmatic dependent launch), asks for weights that are needed later to be brought
into the L2 cache, and only then waits for its input. Long products are cut into parts, and the last part to arrive sums
them all, in their order, and finishes the row: bias, GELU, gate and residual.

`FastSettings.few_rows` switches it on; no device does by itself until it pays (`python -m benchmarks.few_rows`).

Shapes: R rows of a batch, l tokens, M = R l, N outputs and K inputs of a product, D width, H heads, d head width.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from sample.kernels import on_its_device
from var.cache import KVCache

try:
    import triton
    import triton.language as tl
    from triton.language.extra import cuda as tl_cuda
except ImportError:  # PyTorch without CUDA
    triton = None

if TYPE_CHECKING:
    from sample.fast_cuda import FusedBlock

ROWS = 128  # the most rows that a chain takes
ATTENDED = 1024  # and that attention alone takes, between PyTorch's products
COUNTERS = 4096  # output tiles of a product, at most
KEYS = 64  # keys that attention reads at once
HOPPER = (9, 0)  # the first GPUs whose kernels can begin before the one before has ended


@dataclass(frozen=True)
class Tile:
    """How a product is cut.

    Attributes:
        rows, outputs, inputs: of one step of one program; powers of two from 16.
        parts: programs that share a tile's inputs.
        stages: steps whose numbers are on their way at once.
        warps: of a program.
    """

    rows: int
    outputs: int
    inputs: int
    parts: int
    stages: int = 4
    warps: int = 4


# (M rounded up to a power of two, N, K) -> what was measured to be fastest; `tile_of` guesses the rest
TILES: dict[tuple[int, int, int], Tile] = {}


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device's kernels can overlap, and multiply a dtype on tensor cores."""
    if triton is None or not hasattr(tl_cuda, "gdc_wait") or device.type != "cuda" or dtype == torch.float32:
        return False
    if torch.version.hip is not None:  # AMD's capabilities are other numbers
        return False
    return torch.cuda.get_device_capability(device) >= HOPPER


def new_counters(device: torch.device) -> torch.Tensor:
    """What a block's products need to count their parts, (COUNTERS,) int32."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def fits(
    block: FusedBlock, x_RlD: torch.Tensor, cache: KVCache | None, others: tuple[torch.Tensor | None, ...]
) -> bool:
    """Whether a call of a block can go this way, its attention at least: few rows, a plain cache, nothing unusual."""
    R, length, D = x_RlD.shape
    plain = type(cache) is KVCache and all(other is None for other in others)
    d = D // block.attn.heads
    return plain and R * length <= ATTENDED and D % 64 == 0 and d >= 16 and d & (d - 1) == 0


@on_its_device
def run(
    x_RlD: torch.Tensor, ada_R6D: torch.Tensor, block: FusedBlock, cache: KVCache, layer: int, begin: int
) -> torch.Tensor:
    """A `FusedBlock`'s output (R, l, D), of a call that `fits`; its keys and values are written into the cache."""
    ffn, out, x_RlD, counters = block.ffn, block.attn.to_out, x_RlD.contiguous(), block.counters
    gamma1, gamma2, scale1, scale2, shift1, shift2 = ada_R6D.unbind(dim=1)  # each (R, D)
    ahead = ahead_of(block)
    normed = norm(x_RlD, scale1, shift1, block.norm_eps)
    qkv = product(normed, block.qkv_ED, block.bias_E, counters, ahead=ahead[0])
    read = attend(qkv, block, cache, layer, begin, ahead=ahead[1])
    x_RlD = product(read, out.weight, out.bias, counters, onto=x_RlD, gate_RD=gamma1, ahead=ahead[2])
    normed = norm(x_RlD, scale2, shift2, block.norm_eps)
    hidden = product(normed, ffn.fc1.weight, ffn.fc1.bias, counters, gelu=True, ahead=ahead[3])
    return product(hidden, ffn.fc2.weight, ffn.fc2.bias, counters, onto=x_RlD, gate_RD=gamma2, ahead=ahead[4])


def ahead_of(block: FusedBlock) -> tuple[torch.Tensor | None, ...]:
    """The weights that a block's first product, attention, and further three products bring into the L2 cache.

    About as much each, and one or two kernels before they are read: the cache holds 50 MB, a block of d30 has 88.
    """
    fc1, fc2 = block.ffn.fc1.weight, block.ffn.fc2.weight
    half = len(fc2) // 2
    return block.attn.to_out.weight, fc1, fc2[:half], fc2[half:], block.following_ED


def norm(x_RlD: torch.Tensor, scale_RD: torch.Tensor, shift_RD: torch.Tensor, eps: float) -> torch.Tensor:
    """LN(x) * (1 + scale) + shift; `kernels.gated_norm` but for what overlaps, which older Tritons do not know."""
    R, length, D = x_RlD.shape
    out, wide = torch.empty_like(x_RlD), triton.next_power_of_2(D)
    _norm[(R * length,)](
        x_RlD, scale_RD, shift_RD, out, length, D, scale_RD.stride(0), shift_RD.stride(0), eps,
        WIDE=wide, num_warps=4, **_overlapped(),
    )  # fmt: skip
    return out


def product(
    x_RlK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor,
    counters: torch.Tensor,
    *,
    gelu: bool = False,
    onto: torch.Tensor | None = None,
    gate_RD: torch.Tensor | None = None,
    ahead: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """x W^T + bias; then GELU (tanh), or times a gate and onto a residual, all of it float32 until it is stored.

    Args:
        counters: int32, zeros before and after; of no other work that runs meanwhile.
        ahead: weights that are needed soon, contiguous; they are brought into the L2 cache.
        tile: how to cut it; `tile_of` says where none is given.
    """
    R, length, K = x_RlK.shape
    M, N = R * length, len(weight_NK)
    tile = tile or tile_of(M, N, K, processors(x_RlK.device))
    grid = (triton.cdiv(N, tile.outputs), tile.parts, triton.cdiv(M, tile.rows))
    assert grid[0] * grid[2] <= COUNTERS, f"{grid[0] * grid[2]} output tiles of at most {COUNTERS}"
    steps, out = triton.cdiv(K, tile.inputs * tile.parts), x_RlK.new_empty(R, length, N)
    sums = counters  # not read where there is one part
    if tile.parts > 1:
        sums = x_RlK.new_empty(grid[0] * grid[1] * grid[2] * tile.rows * tile.outputs, dtype=torch.float32)
    gated = onto is not None
    _product[grid](
        x_RlK, weight_NK, bias_N, onto if gated else out, gate_RD if gated else out, out, sums, counters,
        *_ahead(ahead, out, grid[0] * grid[1] * grid[2] * 32 * tile.warps),
        M, N, K, length, gate_RD.stride(0) if gated else 0, tile.parts, steps,
        GELU=gelu, GATED=gated, SPLIT=tile.parts > 1, EVEN=steps * tile.parts * tile.inputs == K,
        TALL=tile.rows, WIDE=tile.outputs, DEEP=tile.inputs,
        num_warps=tile.warps, num_stages=tile.stages, THREADS=32 * tile.warps, **_overlapped(),
    )  # fmt: skip
    return out


def _ahead(ahead: torch.Tensor | None, other: torch.Tensor, threads: int) -> tuple[torch.Tensor, int, int]:
    """What is brought into the L2 cache, how many numbers it has, and how many of them each thread asks for."""
    if ahead is None:
        return other, 0, 0
    return ahead, ahead.numel(), 64 * -(-ahead.numel() // (64 * threads))


@on_its_device
def attend(
    qkv_RlE: torch.Tensor,
    block: FusedBlock,
    cache: KVCache,
    layer: int,
    begin: int,
    ahead: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention (R, l, D) of the queries in (R, l, 3 D) to the cache and to their own keys, which go into it."""
    R, length, E = qkv_RlE.shape
    H, d = block.attn.heads, E // 3 // block.attn.heads
    out, tall = qkv_RlE.new_empty(R, length, H * d), min(64, max(16, triton.next_power_of_2(length)))
    kept = begin + length <= cache.capacity[layer]  # the last scale's keys are read by nobody else
    if kept:
        _, _, keys, values = cache.slots(layer, begin, (R, H, length, d), qkv_RlE)
    else:
        keys, values = (cache.keys[layer], cache.values[layer]) if begin else (out[:, None],) * 2
    normed = block.strength_H is not None
    _attend[(R * H, triton.cdiv(length, tall))](
        qkv_RlE, block.strength_H if normed else out, keys, values, out, length, begin, H,
        *keys.stride()[:3], *values.stride()[:3], block.attn.scale,
        *_ahead(ahead, out, R * H * triton.cdiv(length, tall) * 128),
        NORMED=normed, KEPT=kept, WIDTH=d, TALL=tall, OWN=triton.cdiv(length, tall),
        KEYS=KEYS, STEPS=triton.cdiv(begin, KEYS), num_warps=4, num_stages=2, **_overlapped(),
    )  # fmt: skip
    return out


def tile_of(M: int, N: int, K: int, processors: int) -> Tile:
    """The measured cut, or one with about two programs a processor, each of which has a few steps to take."""
    room = room_of(M)
    if (room, N, K) in TILES:
        return TILES[room, N, K]
    rows = min(64 if M <= 256 else 128, room)
    outputs = 128 if rows == 128 else 64 if N // processors >= 32 else 32
    inputs = next(size for size in (64 if rows == 128 else 128, 64, 32, 16) if K % size == 0)
    tiles, steps = -(-N // outputs) * -(-M // rows), K // inputs
    parts = next((n for n in range(1, steps // 2 + 1) if steps % n == 0 and tiles * n >= 1.5 * processors), 1)
    return Tile(rows, outputs, inputs, parts, warps=8 if rows == 128 else 4)


def room_of(M: int) -> int:
    """M rounded up to a power of two from 16."""
    return max(16, 1 << (M - 1).bit_length())


@cache
def processors(device: torch.device) -> int:
    """How many programs run at once on a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _overlapped() -> dict[str, Any]:
    """What a launch is told so that it may begin early; the interpreter knows nothing of it."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return {"EARLY": not interpreted} | ({} if interpreted else {"launch_pdl": True})


if triton is not None:

    @triton.jit
    def _norm(
        x, scale, shift, out, length, D, scale_row, shift_row, eps, WIDE: tl.constexpr, EARLY: tl.constexpr
    ):  # fmt: skip
        token = tl.program_id(0)
        row = token // length
        i = tl.arange(0, WIDE)
        inside = i < D
        if EARLY:
            tl_cuda.gdc_launch_dependents()
        factor = tl.load(scale + row * scale_row + i, mask=inside, other=0.0).to(tl.float32) + 1.0
        offset = tl.load(shift + row * shift_row + i, mask=inside, other=0.0).to(tl.float32)
        if EARLY:
            tl_cuda.gdc_wait()
        value = tl.load(x + token * D + i, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, value - tl.sum(value, axis=0) / D, 0.0)
        centred *= tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
        tl.store(out + token * D + i, centred * factor + offset, mask=inside)

    @triton.jit
    def _bring(ahead, total, each, THREADS: tl.constexpr):
        """Ask for this program's share of `total` numbers to be brought into the L2 cache, `each` by every thread."""
        program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        first = (program * THREADS + tl.arange(0, THREADS)) * each
        size = tl.maximum(tl.minimum(total - first, each), 0) * (ahead.dtype.element_ty.primitive_bitwidth // 8)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r", [ahead + first, size], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip

    @triton.jit
    def _finish(
        total, bias, onto, gate, out, m, n, M, N, length, gate_row, GELU: tl.constexpr, GATED: tl.constexpr
    ):  # fmt: skip
        """Bias, then GELU or gate and residual, and store."""
        inside = (m < M)[:, None] & (n < N)[None, :]
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if GELU:
            total *= tl.sigmoid(1.5957691216057308 * (total + 0.044715 * total * total * total))
        where = m[:, None] * N + n[None, :]
        if GATED:
            row = m // length
            total *= tl.load(gate + row[:, None] * gate_row + n[None, :], mask=inside, other=0.0).to(tl.float32)
            total += tl.load(onto + where, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + where, total, mask=inside)

    @triton.jit(do_not_specialize=["total_ahead", "each_ahead", "M", "length", "gate_row", "parts", "steps"])
    def _product(
        x, weight, bias, onto, gate, out, sums, counters, ahead, total_ahead, each_ahead,
        M, N, K, length, gate_row, parts, steps,
        GELU: tl.constexpr, GATED: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
        TALL: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, THREADS: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        part = tl.program_id(1)
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        m = tl.program_id(2) * TALL + tl.arange(0, TALL)
        n = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
        begin = part * steps * DEEP
        if EARLY:
            tl_cuda.gdc_launch_dependents()
            _bring(ahead, total_ahead, each_ahead, THREADS)
            tl_cuda.gdc_wait()
        i = tl.arange(0, DEEP)
        rows, columns = x + m[:, None] * K, weight + n[None, :] * K
        short, narrow = (m < M)[:, None], (n < N)[None, :]
        total = tl.zeros((TALL, WIDE), tl.float32)
        for step in range(steps):
            k = begin + step * DEEP + i
            if EVEN:
                a = tl.load(rows + k[None, :], mask=short, other=0.0)
                b = tl.load(columns + k[:, None], mask=narrow, other=0.0)
            else:
                a = tl.load(rows + k[None, :], mask=short & (k < K)[None, :], other=0.0)
                b = tl.load(columns + k[:, None], mask=narrow & (k < K)[:, None], other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
        if not SPLIT:
            _finish(total, bias, onto, gate, out, m, n, M, N, length, gate_row, GELU, GATED)
        else:
            spot = tl.arange(0, TALL)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
            first = sums + tile * parts * TALL * WIDE + spot
            tl.store(first + part * TALL * WIDE, total)
            tl.debug_barrier()  # all of this program's sums are on their way before it is counted
            arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
            if arrived == parts - 1:
                total = tl.zeros((TALL, WIDE), tl.float32)
                for other in range(parts):
                    total += tl.load(first + other * TALL * WIDE, cache_modifier=".cg")
                tl.store(counters + tile, 0)
                _finish(total, bias, onto, gate, out, m, n, M, N, length, gate_row, GELU, GATED)

    @triton.jit
    def _unit(x, strength):
        """Rows of a length of `strength`."""
        wide = x.to(tl.float32)
        length = tl.maximum(tl.sqrt(tl.sum(wide * wide, axis=1)), 1e-12)
        return (wide * (strength / length)[:, None]).to(x.dtype)

    @triton.jit
    def _read(q, k, v, there, scale, best, mass, read):
        """Softmax as it goes on: these keys and values too."""
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        logits = tl.where(there[None, :], logits, -float("inf"))
        higher = tl.maximum(best, tl.max(logits, axis=1))
        fade, weights = tl.exp(best - higher), tl.exp(logits - higher[:, None])
        read = tl.dot(weights.to(v.dtype), v, read * fade[:, None], input_precision="ieee")
        return higher, mass * fade + tl.sum(weights, axis=1), read

    @triton.jit(do_not_specialize=["length", "begin", "total_ahead", "each_ahead"])
    def _attend(
        qkv, strength, keys, values, out, length, begin, H,
        k_row, k_head, k_token, v_row, v_head, v_token, scale, ahead, total_ahead, each_ahead,
        NORMED: tl.constexpr, KEPT: tl.constexpr, WIDTH: tl.constexpr, TALL: tl.constexpr, OWN: tl.constexpr,
        KEYS: tl.constexpr, STEPS: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        row, head, part = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1)
        i = tl.arange(0, WIDTH)
        keys += row.to(tl.int64) * k_row + head * k_head
        values += row.to(tl.int64) * v_row + head * v_head
        qkv += row * length * (3 * H * WIDTH) + head * WIDTH
        if EARLY:
            tl_cuda.gdc_launch_dependents()
            _bring(ahead, total_ahead, each_ahead, 128)
            tl_cuda.gdc_wait()
        token = part * TALL + tl.arange(0, TALL)
        q = tl.load(qkv + token[:, None] * (3 * H * WIDTH) + i[None, :], mask=(token < length)[:, None], other=0.0)
        if NORMED:
            q = _unit(q, tl.load(strength + head).to(tl.float32))
        best = tl.full((TALL,), -float("inf"), tl.float32)
        mass, read = tl.zeros((TALL,), tl.float32), tl.zeros((TALL, WIDTH), tl.float32)
        for step in range(OWN):
            t = step * TALL + tl.arange(0, TALL)
            there = (t < length)[:, None]
            own = qkv + t[:, None] * (3 * H * WIDTH) + i[None, :]
            k, v = tl.load(own + H * WIDTH, mask=there, other=0.0), tl.load(own + 2 * H * WIDTH, mask=there, other=0.0)
            if NORMED:
                k = _unit(k, 1.0)
            if KEPT and step == part:
                tl.store(keys + (begin + t)[:, None] * k_token + i[None, :], k, mask=there)
                tl.store(values + (begin + t)[:, None] * v_token + i[None, :], v, mask=there)
            best, mass, read = _read(q, k, v, t < length, scale, best, mass, read)
        for step in range(STEPS):
            s = step * KEYS + tl.arange(0, KEYS)
            there = (s < begin)[:, None]
            k = tl.load(keys + s[:, None] * k_token + i[None, :], mask=there, other=0.0)
            v = tl.load(values + s[:, None] * v_token + i[None, :], mask=there, other=0.0)
            best, mass, read = _read(q, k, v, s < begin, scale, best, mass, read)
        into = out + (row * length + token)[:, None] * (H * WIDTH) + head * WIDTH + i[None, :]
        tl.store(into, read / mass[:, None], mask=(token < length)[:, None])
