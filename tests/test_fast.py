"""The fast path computes what the plain path computes, and is one switch away from it."""

from __future__ import annotations

import copy
import ctypes
import pickle
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import TINY, liven
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional as F

from sample import fast, fast_cpu
from sample.costs import plan_flops
from sample.draw import Filter, keep_likeliest, keep_top_k, keep_top_p
from sample.generate import generate, play, start
from sample.graphs import GraphedSampler, Recorder
from sample.ledger import call_flops
from sample.load import load_pipeline, resolve_dtype
from sample.pipeline import NextScalePipeline
from sample.plan import plain
from tokenizer.model import MultiScaleVQ
from tokenizer.precision import native_bfloat16
from train.cache_tokens import CacheConfig, ready
from var.conditioning import ClassPrompt
from var.layers import FeedForward, attention
from var.transformer import NextScaleTransformer

CPU = torch.device("cpu")
packs = pytest.mark.skipif(not fast_cpu.can_pack(), reason="torch was built without oneDNN")
halves = pytest.mark.skipif(
    not fast.supported(CPU, torch.bfloat16).attention, reason="this CPU does not multiply bfloat16 in hardware"
)
CALL = {"class_labels": [0, 1, 2], "seed": 5, "guidance_scale": 2.0, "top_k": 9, "top_p": 0.8, "output_type": "pt"}


def pipeline(*, dtype=torch.float32, refiner=False):
    """Two levels, attention in the decoder, a shortcut in its residual blocks."""
    torch.manual_seed(0)
    vqvae = liven(MultiScaleVQ(channels=[8, 16], layers_per_block=1, norm_groups=4, **TINY), 1)
    sizes = {"width": 32, "heads": 2, "num_classes": 5, **TINY}
    models = [liven(NextScaleTransformer(depth=depth, **sizes), depth) for depth in (3, 2)]
    whole = NextScalePipeline(models[0], vqvae, refiner=models[1] if refiner else None)
    whole.set_progress_bar_config(disable=True)
    return whole.to(dtype)


def test_folded_convolution_is_the_plain_one():
    upsample, x = Upsample2D(6, use_conv=True, out_channels=6), torch.randn(2, 6, 5, 7)
    assert torch.allclose(fast.FoldedUpsample(upsample)(x), upsample(x), atol=1e-6)


@pytest.mark.parametrize("hw", [(3, 5), (16, 16), (64, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_silu(hw, dtype):
    norm = liven(nn.GroupNorm(4, 16, eps=1e-6), 3).to(dtype)
    x = (torch.randn(2, 16, *hw) * 3 + 20).to(dtype)
    expected = F.silu(F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6))
    error = (fast_cpu.NormSiLU(norm)(x) - expected).abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 0.1)


def test_norm_of_a_large_map_is_more_exact_than_torch_in_channels_last():
    norm = nn.GroupNorm(2, 8, eps=1e-6)
    x = (torch.randn(1, 8, 512, 512) * 0.5 + 3).contiguous(memory_format=torch.channels_last)
    expected = F.silu(F.group_norm(x.double(), 2, norm.weight.double(), norm.bias.double(), 1e-6))
    assert (fast_cpu.NormSiLU(norm)(x) - expected).abs().max() < 1e-5


@packs
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24)])
def test_packed_linear(shape, gelu):
    linear = nn.Linear(24, 40)
    expected = linear(torch.ones(shape))
    expected = F.gelu(expected, approximate="tanh") if gelu else expected
    packed = fast_cpu.PackedLinear(linear, gelu=gelu)
    assert torch.allclose(packed(torch.ones(shape)), expected, atol=1e-5)
    assert torch.equal(packed.state_dict()["weight"], linear.weight)


@packs
def test_packed_linear_reads_transposed_input():
    linear, x = nn.Linear(24, 8), torch.randn(24, 6, 2).permute(2, 1, 0)
    assert torch.allclose(fast_cpu.PackedLinear(linear)(x), linear(x), atol=1e-5)


@packs
def test_feed_forward():
    ffn, x = FeedForward(16, 64), torch.randn(2, 5, 16)
    assert torch.allclose(fast_cpu.FastFeedForward(ffn)(x), ffn(x), atol=1e-5)


@packs
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (1, 1)])
def test_packed_convolution(kernel, stride):
    conv = nn.Conv2d(6, 10, kernel, stride=stride, padding=kernel // 2)
    x = torch.randn(2, 6, 9, 11).contiguous(memory_format=torch.channels_last)
    packed, expected = fast_cpu.PackedConv(conv), conv(x)
    assert torch.allclose(packed(x), expected, atol=1e-5)
    onto = torch.randn_like(expected)
    kept = onto.clone()
    assert torch.allclose(packed(x, onto), expected + onto, atol=1e-5)
    assert torch.equal(onto, kept)
    assert torch.equal(packed.state_dict()["weight"], conv.weight)


@packs
@pytest.mark.parametrize("kernel", [3, 1])
def test_a_packed_weight_comes_in_the_layout_that_every_size_of_maps_wants(kernel, capfd, monkeypatch):
    """Else oneDNN rearranges it at every call, which took longer than the convolution."""
    monkeypatch.setattr(fast_cpu, "LAYOUTS", 9)
    conv = nn.Conv2d(192, 96, kernel, padding=kernel // 2)
    packed, shapes = fast_cpu.PackedConv(conv), [(1, 3), (2, 8), (1, 16), (4, 32), (1, 64)]
    maps = [torch.randn(B, 192, h, h).contiguous(memory_format=torch.channels_last) for B, h in shapes]
    for x in maps:
        assert torch.allclose(packed(x), conv(x), atol=1e-4)
    capfd.readouterr()
    for x in maps:
        packed(x)  # of a size again
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            packed(x, torch.zeros(len(x), 96, *x.shape[2:]).contiguous(memory_format=torch.channels_last))
    ctypes.CDLL(None).fflush(None)
    told = capfd.readouterr().out
    assert told.count("exec,cpu,convolution") == len(maps)
    assert not [line for line in told.splitlines() if ",reorder," in line and f"96x192x{kernel}x{kernel}" in line]
    kept = {id(pack) for pack in packed.packs.values()}
    assert len(packed.packs) == len(shapes) and len(kept) == len(packed.layouts)


@packs
def test_up_sampling_with_packed_weights(capfd):
    upsample = Upsample2D(48, use_conv=True, out_channels=48)
    packed = fast_cpu.PackedUpsample(fast.FoldedUpsample(upsample))
    maps = [torch.randn(B, 48, h, 2 * h).contiguous(memory_format=torch.channels_last) for B, h in ((1, 4), (2, 16))]
    for x in maps:
        assert torch.allclose(packed(x), upsample(x), atol=1e-5)
        assert packed(x).is_contiguous(memory_format=torch.channels_last)
    assert packed.state_dict().keys() == {"conv.weight", "conv.bias"}
    folded = fast.FoldedUpsample(upsample)
    assert call_flops(packed, maps[1]) == call_flops(folded, maps[1]) == 2 * 16 * 48 * 48 * maps[1].numel() // 48
    capfd.readouterr()
    for x in maps:
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            packed(x)
    ctypes.CDLL(None).fflush(None)
    told = capfd.readouterr().out
    assert told.count("exec,cpu,deconvolution") == len(maps) and ",reorder," not in told


@packs
def test_few_layouts_of_a_weight_are_kept(monkeypatch):
    monkeypatch.setattr(fast_cpu, "LAYOUTS", 1)
    conv = nn.Conv2d(64, 64, 3, padding=1)
    packed = fast_cpu.PackedConv(conv)
    for B, h in ((1, 3), (1, 8), (4, 32), (1, 3), (16, 16)):
        x = torch.randn(B, 64, h, h).contiguous(memory_format=torch.channels_last)
        assert torch.allclose(packed(x), conv(x), atol=1e-4)
        assert len(packed.layouts) == 1 and x.shape in packed.packs


@halves
def test_half_attention_is_as_exact_as_torch():
    q, k, v = (torch.randn(2, 3, count, 16).bfloat16() for count in (10, 30, 30))
    exact = attention(q.double(), k.double(), v.double(), None, 2.0)
    ours, torchs = (f(q, k, v, None, 2.0) for f in (fast_cpu.half_attention, attention))
    assert (ours - exact).abs().mean() < 1.5 * (torchs - exact).abs().mean()
    mask = torch.rand(10, 30) < 0.5
    mask[:, 0] = True
    assert torch.equal(fast_cpu.half_attention(q, k, v, mask, 2.0), attention(q, k, v, mask, 2.0))


@halves
def test_float32_products_stay_exact_afterwards():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError), fast_cpu.bfloat16_products():
        raise RuntimeError
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("plan", [None, "supernet:2", "code:2"])
def test_float32_tokens_are_those_of_the_plain_path(plan):
    call = {**CALL, "plan": plan, **({"depth": 2} if plan == "supernet:2" else {})}
    refiner = plan == "code:2"
    expected = pipeline(refiner=refiner)(**call)
    ours = fast.accelerate(pipeline(refiner=refiner))(**call)
    assert all(torch.equal(a, b) for a, b in zip(ours.tokens, expected.tokens))
    assert (ours.images - expected.images).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["fold", "convolutions", "linears", "attention"])
def test_each_part_alone(name):
    dtype = torch.bfloat16 if name == "attention" else torch.float32
    if not getattr(fast.supported(CPU, dtype), name):
        pytest.skip("not on this machine")
    only = fast.FastSettings(**{name: True})
    whole, ours = pipeline(dtype=dtype), fast.accelerate(pipeline(dtype=dtype), only)
    f_hat = torch.randn(2, 4, 4, 4)
    assert (ours.decode(f_hat, "pt") - whole.decode(f_hat, "pt")).abs().max() < 1e-5
    if dtype == torch.float32:
        assert all(torch.equal(a, b) for a, b in zip(ours(**CALL).tokens, whole(**CALL).tokens))


def test_an_image_does_not_depend_on_its_batch():
    ours = fast.accelerate(pipeline())
    together = ours(**CALL)
    alone = ours(**{**CALL, "class_labels": 2, "seed": 7})
    assert all(torch.equal(a[2:], b) for a, b in zip(together.tokens, alone.tokens))


def test_encoder_gives_the_same_tokens():
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    expected = pipeline().vqvae.image_to_tokens(images)
    assert all(torch.equal(a, b) for a, b in zip(fast.accelerate(pipeline()).vqvae.image_to_tokens(images), expected))


@halves
def test_bfloat16_stays_near_the_plain_path():
    whole, ours = pipeline(dtype=torch.bfloat16), fast.accelerate(pipeline(dtype=torch.bfloat16))
    f_hat = torch.randn(2, 4, 4, 4)
    assert (ours.decode(f_hat, "pt") - whole.decode(f_hat, "pt")).abs().mean() < 0.02
    assert ours(**CALL).images.shape == (3, 3, 8, 8)


@packs
def test_operations_are_counted_on_the_fast_path_too():
    """All but those that folding saves: 5 of 9 products of the convolution after an up-sampling."""
    plain_path, other = pipeline(), pipeline()
    fast.accelerate(other, fast.FastSettings(convolutions=True, linears=True))
    f_hat = torch.randn(2, plain_path.vqvae.config.latent_channels, *plain_path.transformer.schedule.latent_hw)
    for path in (plain_path, other):
        path.counted = plan_flops(path.make_plan()), call_flops(path.vqvae.decode, f_hat)
    assert plain_path.counted == other.counted and min(other.counted) > 1e5
    folded = fast.accelerate(pipeline())
    assert call_flops(folded.vqvae.decode, f_hat) < other.counted[1]


def test_saved_as_the_plain_model(tmp_path):
    ours, call = fast.accelerate(pipeline()), {**CALL}
    ours.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path, device="cpu")
    again.set_progress_bar_config(disable=True)
    for part in ("transformer", "vqvae"):
        before, loaded = (getattr(p, part).state_dict() for p in (pipeline(), again))
        assert before.keys() == loaded.keys()
        assert all(torch.equal(before[key], loaded[key]) for key in before)
    assert torch.equal(again(**call).images, pipeline()(**call).images)


def test_switch_of_load_pipeline(class_folder):
    loaded = {switch: load_pipeline(class_folder, device="cpu", dtype="float32", fast=switch) for switch in fast.FAST}
    assert loaded["off"].accelerated is None
    assert loaded["on"].accelerated == loaded["auto"].accelerated == fast.supported(CPU, torch.float32)
    for each in loaded.values():
        each.set_progress_bar_config(disable=True)
    tokens = {switch: each(**CALL).tokens for switch, each in loaded.items()}
    assert all(torch.equal(a, b) for a, b in zip(tokens["on"], tokens["off"]))
    with pytest.raises(ValueError, match="fast must be one of auto, on, off, got 'quick'"):
        load_pipeline(class_folder, fast="quick")


@pytest.mark.parametrize(
    "capability, dtype", [((6, 1), torch.float32), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_auto_dtype_is_what_a_gpu_multiplies(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", torch.device("cuda")) == dtype
    monkeypatch.setattr(torch.version, "hip", "7.0")  # AMD's
    assert resolve_dtype("auto", torch.device("cuda", 1)) == torch.bfloat16
    for fastest in (False, True):
        assert resolve_dtype("auto", torch.device("mps"), fastest=fastest) == torch.float32


def test_weights_are_packed_where_that_was_tried(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert fast.supported(CPU, torch.float32) == fast.FastSettings(fold=True)
    assert fast.supported(torch.device("mps"), torch.float32) == fast.FastSettings()


def test_auto_dtype():
    assert resolve_dtype("auto", CPU) == torch.float32
    fastest = torch.bfloat16 if native_bfloat16() else torch.float32
    assert resolve_dtype("auto", CPU, fastest=True) == fastest
    assert resolve_dtype("float32", CPU, fastest=True) == torch.float32


def test_mistakes():
    ours = fast.accelerate(pipeline())
    with pytest.raises(ValueError, match="accelerated already"):
        fast.accelerate(ours)
    with pytest.raises(ValueError, match="fast=off"):
        ours.to(torch.bfloat16)
    assert ours.to(torch.float32) is ours
    with pytest.raises(ValueError, match="fast setting attention cannot be used"):
        fast.accelerate(pipeline(), fast.FastSettings(attention=True))


@pytest.mark.parametrize("k, p", [(0, 0.7), (5, 1.0), (5, 0.7), (12, 0.3), (12, 0.999), (1, 0.5), (40, 0.5)])
@pytest.mark.parametrize("levels", [0, 6, 1])
def test_filter_sorts_no_more_than_it_keeps(k, p, levels):
    """The same set is kept, also where equal logits (a few levels of them) decide."""
    logits = torch.randn(3, 50, 32) * 3
    if levels:
        logits = (logits * levels / 6).round()
    expected = keep_top_p(keep_top_k(logits, k), p)
    assert torch.equal(keep_likeliest(logits, k, p), expected)
    assert torch.equal(Filter(top_k=k, top_p=p)(logits), expected)


def test_shapes_are_those_of_the_schedule():
    """Whatever is drawn, the same operators run on the same shapes, once weights are packed."""
    ours, seen = fast.accelerate(pipeline()), []
    ours(**CALL)
    for seed in (1, 2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as run:
            ours(**{**CALL, "seed": seed})
        events = run.key_averages(group_by_input_shape=True)
        seen.append(sorted((event.key, str(event.input_shapes), event.count) for event in events))
    assert seen[0] == seen[1]


def test_nothing_is_read_back_inside_the_loop(monkeypatch):
    """No operator of the plain loop waits for a number: a GPU would never be waited for."""
    monkeypatch.setattr("sample.draw._may_ask", lambda logits: False)  # as on a GPU
    whole = pipeline()
    plan, prompt = plain(whole.transformer, guidance=2.0, top_p=0.8), ClassPrompt(torch.tensor([0, 1]))
    state = start(plan, whole.vqvae.quantizer, prompt, [1, 2])
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
        play(state)
    assert state.finite.shape == () and bool(state.finite)
    names = {event.key for event in run.key_averages()}
    assert "aten::softmax" in names
    assert not names & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


@pytest.mark.parametrize("graphed", [False, True])
def test_logits_that_are_not_finite_are_told_after_the_loop(monkeypatch, graphed):
    """Where the draw cannot look: a damaged model is refused there, too, plainly and replayed."""
    monkeypatch.setattr("sample.draw._may_ask", lambda logits: False)
    whole = pipeline()
    plan, prompt = plain(whole.transformer), ClassPrompt(torch.tensor([0, 1]))
    recorder = Recorder(record=lambda function, _: lambda given: list(function(*given)))
    sampler = GraphedSampler(whole.vqvae, recorder)
    for damaged in (False, False, True, True):
        if damaged:
            whole.transformer.blocks[0].ffn.fc2.bias.data[0] = torch.nan
        with pytest.raises(ValueError, match="logits are not finite") if damaged else nullcontext():
            if graphed:
                sampler.generate(plan, prompt, [1, 2])
            else:
                generate(plan, whole.vqvae.quantizer, prompt, [1, 2])


def test_a_plain_pipeline_can_be_copied_and_an_accelerated_one_says_that_it_cannot():
    ours = pipeline()
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(**CALL).images, ours(**CALL).images)
    fast.accelerate(ours)
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled: load the model again"):
            duplicate(ours)
    for same in (NextScalePipeline.from_pipe(ours), NextScalePipeline(**ours.components)):  # of the same parts
        with pytest.raises(ValueError, match="an accelerated pipeline stays on its device and in its dtype"):
            same.to(torch.bfloat16)


def test_help_does_not_import_torch():
    code = "import nextscale, sys; nextscale.main([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_tokens_are_cached_alike_on_the_fast_path():
    tokens = []
    for quick in (False, True):
        vqvae = pipeline().vqvae
        ready(vqvae, CPU, CacheConfig(folder="", tokenizer="", fast=quick))
        images = torch.rand(3, 3, *vqvae.image_hw, generator=torch.Generator().manual_seed(0)) * 2 - 1
        tokens.append(torch.cat(vqvae.image_to_tokens(images), dim=1))
    assert torch.equal(*tokens) and len(tokens[0].unique()) > 2
