"""A block of few rows as a chain of kernels equals the plain block.

Runs with `-m cuda` on a GPU or, where Triton is installed, with TRITON_INTERPRET=1 on a CPU.
"""

from __future__ import annotations

import pytest
import torch
from conftest import liven
from test_kernels import DEVICE, INTERPRETED, fused, prompts_of, whole_pipeline
from torch.nn import functional as F

pytest.importorskip("triton", reason="this PyTorch comes without Triton")

from sample import fast, fast_cuda, few_rows
from sample.few_rows import Tile
from var.cache import KVCache
from var.layers import layer_norm
from var.transformer import NextScaleTransformer

DTYPES = [torch.float32 if INTERPRETED else torch.bfloat16, torch.float16]  # the interpreter's bfloat16 is wrong
DTYPE = DTYPES[0]
ERRORS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
ERROR = ERRORS[DTYPE]
pytestmark = [] if INTERPRETED else [pytest.mark.cuda]
TILES = [Tile(16, 32, 16, 1), Tile(16, 64, 32, 2), Tile(32, 16, 16, 3), Tile(16, 32, 64, 5), Tile(64, 128, 32, 4)]


def error(made: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative to all of what is exact, which is float64."""
    assert made.isfinite().all()
    return float((made.double() - exact).norm() / exact.norm())


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


@pytest.mark.parametrize("kind", ["plain", "gelu", "gated"])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("R, length, N, K", [(2, 1, 96, 64), (2, 9, 80, 160), (3, 25, 48, 48)])
def test_product(R, length, N, K, tile, kind):
    x, weight, bias, onto = random(R, length, K), random(N, K, seed=1), random(N, seed=2), random(R, length, N, seed=3)
    gate, counters = random(R, 6, N, seed=4)[:, 2], few_rows.new_counters(x.device)
    exact = F.linear(x.double(), weight.double(), bias.double())
    options = {"tile": tile}
    if kind == "gelu":
        options["gelu"], exact = True, F.gelu(exact, approximate="tanh")
    if kind == "gated":
        options |= {"onto": onto, "gate_RD": gate}
        exact = onto.double() + gate.double()[:, None] * exact
    for _ in range(3):  # counters are zeros again
        assert error(few_rows.product(x, weight, bias, counters, **options), exact) < ERROR
    assert not counters.any()


def test_norm():
    x, ada = random(2, 7, 96), random(2, 6, 96, seed=1)
    exact = layer_norm(x.double(), 1e-6) * (1 + ada[:, 2, None].double()) + ada[:, 4, None].double()
    assert error(few_rows.norm(x, ada[:, 2], ada[:, 4], 1e-6), exact) < ERROR


@pytest.mark.parametrize("M", [2, 8, 18, 32, 50, 72, 128])
@pytest.mark.parametrize("N, K", [(5760, 1920), (1920, 1920), (7680, 1920), (1920, 7680), (96, 48)])
def test_every_tile_divides_its_product(M, N, K):
    tile = few_rows.tile_of(M, N, K, 132)
    assert K % (tile.inputs * tile.parts) == 0 and tile.rows >= min(M, 64)
    assert 1 <= tile.parts <= max(1, K // tile.inputs // 2)
    if N * K > 1e6:  # enough programs for all processors, and no more than they can do in a few turns
        assert 132 <= -(-N // tile.outputs) * -(-M // tile.rows) * tile.parts <= 6 * 132


def a_block(qk_norm: bool = True, dtype: torch.dtype = DTYPE) -> torch.nn.Module:
    model = liven(NextScaleTransformer(depth=1, width=64, heads=2, qk_norm=qk_norm), 3).to(DEVICE, dtype)
    return model.eval().blocks[0]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize(
    "R, length, begin, room",
    [(2, 1, 0, 9), (2, 9, 5, 14), (4, 16, 70, 70), (1, 25, 130, 155), (1, 70, 30, 30), (2, 130, 0, 130)],
)
def test_block(R, length, begin, room, qk_norm, dtype):
    block, caches = a_block(qk_norm, dtype), [KVCache(1, room) for _ in range(2)]
    x, ada = random(R, length, 64).to(dtype), random(R, 6, 64, seed=1).to(dtype)
    for cache, kind in zip(caches, (torch.float64, dtype)):
        if begin:
            pair = (F.normalize(random(R, 2, begin, 32, seed=s), dim=-1).to(dtype).to(kind) for s in (2, 3))
            cache.update(0, *pair)
    exact = block.double()(x.double(), ada.double(), cache=caches[0], begin=begin)
    fast_cuda.fuse(block.to(dtype), chained=True)
    made = block(x, ada, cache=caches[1], begin=begin)
    assert made.dtype == dtype and error(made, exact) < ERRORS[dtype]
    assert not block.counters.any() and caches[1].lengths == caches[0].lengths
    stored = caches[0].lengths[0]
    for ours, theirs in ((caches[1].keys, caches[0].keys), (caches[1].values, caches[0].values)):
        assert error(ours[0][:, :, :stored], theirs[0][:, :, :stored]) < ERRORS[dtype]


def test_blocks_bring_the_weights_of_the_next_one():
    blocks = NextScaleTransformer(depth=3, width=64, heads=2).blocks
    fast_cuda.fuse_all(list(blocks), chained=True)
    for block, following in zip(blocks, [*blocks[1:], blocks[0]]):
        assert few_rows.ahead_of(block)[-1].data_ptr() == following.qkv_ED.data_ptr()
        assert sum(weight.numel() for weight in few_rows.ahead_of(block)) == 12 * 64**2  # a block's worth


@torch.no_grad()
def test_what_does_not_fit_goes_the_other_way(monkeypatch):
    block = a_block()
    fast_cuda.fuse(block, chained=True)
    calls = []
    monkeypatch.setattr(few_rows, "run", lambda x, *_: calls.append(x.shape) or x)
    ada = random(2, 6, 64)
    block(random(2, few_rows.ROWS, 64), ada, cache=KVCache(1, 9))
    block(random(2, 4, 64), ada)
    assert not calls
    block(random(2, few_rows.ROWS // 2, 64), ada, cache=KVCache(1, 9))
    assert calls == [(2, few_rows.ROWS // 2, 64)]


def test_pipeline_draws_the_tokens_of_the_plain_one(monkeypatch):
    plain, ours, calls = whole_pipeline({"width": 64}), whole_pipeline({"width": 64}), []
    monkeypatch.setattr(fast, "few_rows", few_rows)
    monkeypatch.setattr(few_rows, "usable", lambda *_: True)
    own = few_rows.run
    monkeypatch.setattr(few_rows, "run", lambda *given: calls.append(given[0].shape) or own(*given))
    ours = fused(ours, monkeypatch, few_rows=True)
    call = {"seed": 5, "guidance_scale": 2.0, "top_k": 9, "top_p": 0.8, "output_type": "pt"}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected, made = (whole(**prompts_of(whole), **call) for whole in (plain, ours))
    assert calls and all(torch.equal(a, b) for a, b in zip(made.tokens, expected.tokens))
    assert (made.images - expected.images).abs().max() < 2e-5
