"""The kernels of a GPU's fast path equal the plain PyTorch they replace.

They run with `-m cuda` on a GPU or, where Triton is installed, with TRITON_INTERPRET=1 on a CPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from conftest import TINY, liven
from torch import nn
from torch.nn import functional as F

pytest.importorskip("triton", reason="this PyTorch comes without Triton")

from sample import fast, fast_cuda, kernels
from sample.draw import draw, keep_top_k, keep_top_p
from sample.pipeline import NextScalePipeline
from tokenizer.model import MultiScaleVQ
from var.cache import KVCache
from var.conditioning import TextPrompt
from var.layers import layer_norm
from var.transformer import NextScaleTransformer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALVES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]  # the interpreter cuts bfloat16 off
pytestmark = [] if INTERPRETED else [pytest.mark.cuda]
dtypes = pytest.mark.parametrize("dtype", HALVES)


def close(made: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Within the rounding of a dtype."""
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 8e-3}
    return made.dtype == dtype and torch.allclose(made.double(), expected.double(), **tolerance)


@dtypes
def test_gated_norm(dtype):
    x, branch, ada = (torch.randn(3, n, 96, device=DEVICE, dtype=dtype) for n in (5, 5, 6))
    gate, scale, shift = ada.float()[:, [0, 2, 4], None].unbind(1)
    expected = x.float() + gate * branch.float()
    summed, normed = kernels.gated_norm(x, ada[:, 2], ada[:, 4], branch, ada[:, 0])
    assert close(summed, expected, dtype)
    assert close(normed, layer_norm(expected) * (1 + scale) + shift, dtype)
    same, normed = kernels.gated_norm(x, ada[:, 2], ada[:, 4])
    assert torch.equal(same, x) and close(normed, layer_norm(x.float()) * (1 + scale) + shift, dtype)
    assert close(kernels.gated_sum(x, branch, ada[:, 0]), expected, dtype)


@dtypes
@pytest.mark.parametrize("heads, width", [(6, 16), (5, 8)])
def test_split_heads(heads, width, dtype):
    qkv = torch.randn(3, 5, 3 * heads * width, device=DEVICE, dtype=dtype)
    cache, strength = torch.zeros(2, 3, 20, heads, width, device=DEVICE, dtype=dtype), torch.rand(heads) + 1
    k, v = (own[:, 4:9].transpose(1, 2) for own in cache)
    parts = [part.unflatten(-1, (heads, width)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)]
    q = kernels.split_heads(qkv, k, v, strength.to(DEVICE))
    assert close(q, F.normalize(parts[0].float(), dim=-1) * strength.to(DEVICE)[:, None, None], dtype)
    assert close(k, F.normalize(parts[1].float(), dim=-1), dtype) and torch.equal(v, parts[2])
    assert not cache[:, :, :4].any() and not cache[:, :, 9:].any()
    assert torch.equal(kernels.split_heads(qkv, k, v, None), parts[0]) and torch.equal(k, parts[1])


@pytest.mark.parametrize("values", [3, 100, 4096])
@pytest.mark.parametrize(
    "k, p", [(0, 1.0), (2, 1.0), (0, 0.8), (50, 0.9), (90, 0.96), (4096, 0.5), (1, 0.3), (0, 1e-6)]
)
def test_keep_likeliest(values, k, p):
    logits = 2 * torch.randn(4, 6, values, device=DEVICE)
    logits[..., 1] = -torch.inf
    kept = kernels.keep_likeliest(logits, k, p)
    assert torch.equal(kept, keep_top_p(keep_top_k(logits, k), p))


def test_tokens_that_tie_stay():
    logits = torch.zeros(2, 64, device=DEVICE)
    assert torch.equal(kernels.keep_likeliest(logits, 5, 1.0), logits)
    logits[:, 3] = 1.0
    assert kernels.keep_likeliest(logits, 0, 0.9).isfinite().all()
    assert kernels.keep_likeliest(logits, 1, 0.9).isfinite().sum(-1).tolist() == [1, 1]
    signed = torch.tensor([[0.0, -0.0, -1.0]], device=DEVICE)
    assert kernels.keep_likeliest(signed, 1, 1.0).isfinite().tolist() == [[True, True, False]]


@pytest.mark.parametrize("values", [3, 100, 4096])
def test_draw(values):
    logits, uniforms = 2 * torch.randn(4, 50, values), torch.rand(4, 50)
    logits[..., ::3] = -torch.inf
    uniforms[0, :2] = torch.tensor([0.0, 1 - 2**-24])
    tokens = kernels.draw(logits.to(DEVICE), uniforms.to(DEVICE)).cpu()
    assert tokens.dtype == torch.int64 and logits.gather(-1, tokens[..., None]).isfinite().all()
    assert (tokens == draw(logits, uniforms)).float().mean() > 0.98  # but where a uniform meets a border's rounding
    cdf = F.pad(logits.double().softmax(-1).cumsum(-1), (1, 0))
    low, high = (cdf.gather(-1, tokens[..., None] + more)[..., 0] for more in (0, 1))
    assert (low - 1e-5 < uniforms).all() and (uniforms < high + 1e-5).all()


@dtypes
@pytest.mark.parametrize("channels, hw", [(40, (37, 41)), (160, (32, 32)), (32, (64, 48))])
def test_norm_and_silu(channels, hw, dtype):
    norm = liven(nn.GroupNorm(4, channels, eps=1e-6), 3).to(DEVICE, dtype)
    x = (torch.randn(2, channels, *hw, device=DEVICE) * 2 + 5).to(dtype)
    bias = torch.randn(channels, device=DEVICE).to(dtype)
    for before in (None, bias):
        given = x.double() if before is None else x.double() + bias.double()[:, None, None]
        expected = F.silu(F.group_norm(given, 4, norm.weight.double(), norm.bias.double(), 1e-6))
        made = kernels.norm_silu(x, norm, before)
        assert close(made, expected, dtype) and made.is_contiguous(memory_format=torch.channels_last)
    y = torch.randn_like(x)
    assert close(kernels.biased_sum(x, y, bias), x.double() + y.double() + bias.double()[:, None, None], dtype)


@pytest.mark.parametrize("mean, deviation, error", [(100.0, 1.0, 1e-4), (1000.0, 1.0, 1e-3), (300.0, 0.1, 1e-2)])
def test_norm_of_maps_far_from_zero(mean, deviation, error):
    norm = nn.GroupNorm(4, 32, device=DEVICE)
    x = mean + deviation * torch.randn(2, 32, 40, 40, device=DEVICE)
    expected = F.silu(F.group_norm(x.double(), 4, eps=norm.eps))
    assert (kernels.norm_silu(x, norm) - expected).abs().max() < error
    assert kernels.norm_silu(torch.full_like(x, 100.1), norm).abs().max() < 1e-2


MODELS = {
    "class": {},
    "class, one modulation, no norm": {"shared_ada": True, "qk_norm": False},
    "class, rotary": {"positions": "rope"},
    "class, levels again": {"positions": "both", "level_every": 2},
    "text": {"conditioning": "text", "text_width": 12, "text_length": 9},
    "text, gated": {"conditioning": "text", "text_width": 12, "text_length": 9, "cross_gate": 0.5, "positions": "rope"},
}


def whole_pipeline(options: dict, *, bitwise: bool = False, patch: int = 1) -> NextScalePipeline:
    torch.manual_seed(0)
    kind = {"schedule": TINY["schedule"], "latent_channels": 8, "bitwise": True} if bitwise else TINY
    vqvae = liven(MultiScaleVQ(channels=[32, 64], layers_per_block=1, norm_groups=4, patch=patch, **kind), 1)
    sizes = {"depth": 3, "width": 32, "heads": 2, "num_classes": 5, **kind, **options}
    whole = NextScalePipeline(liven(NextScaleTransformer(**sizes), 2), vqvae).to(DEVICE)
    whole.set_progress_bar_config(disable=True)
    return whole


def fused(whole: NextScalePipeline, monkeypatch: pytest.MonkeyPatch, **more: bool) -> NextScalePipeline:
    """The pipeline on the fast path of a GPU, but for graphs."""
    settings = fast.FastSettings(fold=True, kernels=True, channels_last=True, **more)
    monkeypatch.setattr(fast, "supported", lambda *_: settings)
    return fast.accelerate(whole, settings)


def prompts_of(whole: NextScalePipeline) -> dict:
    """Three prompts."""
    if whole.by_class:
        return {"class_labels": [0, 1, 2]}
    states = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(7)[None] < torch.tensor([7, 4, 1])[:, None]
    return {"prompt": TextPrompt(states.to(DEVICE), mask.to(DEVICE))}


@pytest.mark.parametrize("bitwise", [False, True])
@pytest.mark.parametrize("words", [{}, {"cache": "snapkv:50%"}, {"prune": "40%"}], ids=str)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_fused_pipeline_draws_the_tokens_of_the_plain_one(options, words, bitwise, monkeypatch):
    plain = whole_pipeline(options, bitwise=bitwise)
    ours = fused(whole_pipeline(options, bitwise=bitwise), monkeypatch)
    call = {"seed": 5, "guidance_scale": 2.0, "top_k": 9, "top_p": 0.8, "output_type": "pt", **words}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected, made = (whole(**prompts_of(whole), **call) for whole in (plain, ours))
    assert all(torch.equal(a, b) for a, b in zip(made.tokens, expected.tokens))
    assert (made.images - expected.images).abs().max() < 2e-5


@pytest.mark.parametrize("patch", [1, 4])
def test_fused_pipeline_is_saved_as_the_plain_one(patch, monkeypatch, tmp_path):
    plain, ours = whole_pipeline({}, patch=patch), fused(whole_pipeline({}, patch=patch), monkeypatch)
    f_hat = torch.randn(2, TINY["latent_channels"], *plain.vqvae.schedule.latent_hw, device=DEVICE)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert (ours.decode(f_hat, "pt") - plain.decode(f_hat, "pt")).abs().max() < 2e-5
    ours.save_pretrained(tmp_path)
    kept = NextScalePipeline.from_pretrained(tmp_path)
    for mine, theirs in ((kept.transformer, plain.transformer), (kept.vqvae, plain.vqvae)):
        whole = theirs.state_dict()
        assert all(torch.equal(value, whole[name].cpu()) for name, value in mine.state_dict().items())


def test_fused_block_holds_no_weight_twice():
    block = whole_pipeline({}).transformer.blocks[0]
    fast_cuda.fuse(block)
    assert block.attn.to_k.weight.data_ptr() == block.qkv_ED[32:].data_ptr()


def test_a_block_with_adapters_stays_plain():
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    block = whole_pipeline({}).transformer.blocks[0]
    x, ada = torch.randn(2, 5, 32, device=DEVICE), torch.randn(2, 6, 32, device=DEVICE)
    block.attn.to_v.__class__ = Adapted
    expected = block(x, ada)
    fast_cuda.fuse(block)
    assert torch.equal(block(x, ada), expected)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize(
    "rows, length, begin, chained",
    [
        (2, 9, 0, False),
        (128, 256, 424, False),
        (128, 169, 255, False),
        (2, 1, 0, True),
        (2, 9, 5, True),
        (2, 64, 91, True),
        (2, 100, 155, True),
        (2, 169, 255, True),
        (2, 256, 424, True),
    ],
)
def test_fused_block_in_bfloat16(rows, length, begin, chained):
    torch.manual_seed(0)
    model = NextScaleTransformer(depth=1, width=1920, heads=30)
    model.init_weights(gate_gain=0.5)
    model = model.cuda().bfloat16().eval()
    block, caches = model.blocks[0], [KVCache(1, 424) for _ in range(2)]
    x, ada = torch.randn(rows, length, 1920).cuda().bfloat16(), torch.randn(rows, 6, 1920).cuda().bfloat16()
    if begin:
        for own in caches:
            torch.manual_seed(1)
            own.update(0, *(torch.randn(rows, 30, begin, 64).cuda().bfloat16() for _ in range(2)))
    exact = block.double()(x.double(), ada.double(), cache=_doubled(caches[0]), begin=begin)
    block.bfloat16()
    plain = block(x, ada, cache=caches[0], begin=begin).double()
    fast_cuda.fuse(block, chained=chained)
    ours = block(x, ada, cache=caches[1], begin=begin).double()
    assert (ours - exact).norm() < 1.1 * (plain - exact).norm()
    assert torch.equal(caches[0].values[0][:, :, :begin], caches[1].values[0][:, :, :begin]) if begin else True


def _doubled(cache: KVCache) -> KVCache:
    made = KVCache(1, cache.capacity[0])
    if cache.keys[0] is not None:
        begin = cache.lengths[0]
        made.update(0, cache.keys[0][:, :, :begin].double(), cache.values[0][:, :, :begin].double())
    return made
