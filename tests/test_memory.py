"""Memory formulas against the real bytes of tensors, on small models."""

from __future__ import annotations

import pytest
import torch

from benchmarks.live import LiveBytes
from sample.memory import official_cache_bytes, predict
from sample.pipeline import NextScalePipeline
from sample.state import Hook
from tokenizer.model import MultiScaleVQ
from var.presets import PRESETS
from var.transformer import NextScaleTransformer

MARKOV = {"mask": "block_diagonal"}
AGAIN = {**MARKOV, "masked_layers": 2}  # passes over the last scale, the largest


def pipeline(
    *, vocab_size=64, depth=4, channels=(16, 16, 32), dtype=torch.float32, schedule="1,2,4,8", width=64, **options
):
    shared = {"vocab_size": vocab_size, "latent_channels": 8, "schedule": schedule}
    vqvae = MultiScaleVQ(channels=list(channels), layers_per_block=1, norm_groups=8, **shared).eval()
    transformer = NextScaleTransformer(depth=depth, width=width, heads=4, num_classes=10, **shared, **options).eval()
    transformer.init_weights(head_gain=4.0)  # else logits are so flat that ties decide
    whole = NextScalePipeline(transformer, vqvae)
    whole.set_progress_bar_config(disable=True)
    return whole.to(dtype)


class CachePeak(Hook):
    """Keeps the cache's own account."""

    def on_scale_end(self, state, k):
        self.stored, self.peak = state.cache.nbytes, state.cache.peak_nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [
        *({}, {"depth": 9}, {"vocab_size": 2048}, {"channels": (32, 32, 32)}),
        *(MARKOV, MARKOV | {"vocab_size": 2048}, AGAIN, AGAIN | {"vocab_size": 2048}),
    ],
    ids=str,
)
def test_predicted_memory_is_that_of_the_tensors(sizes, dtype):
    whole, batch = pipeline(dtype=dtype, **sizes), 4
    passes = {"mask_schedule": "1/4/16/16,16,32"} if "masked_layers" in sizes else {}
    plan = whole.make_plan(guidance_scale=1.5, top_k=sizes.get("vocab_size", 64) // 4, top_p=0.9, **passes)
    predicted, account = predict(plan, whole.vqvae, batch, dtype), CachePeak()
    with LiveBytes() as live, torch.no_grad():
        made = whole(class_labels=[1] * batch, seed=0, plan=plan, hooks=[account], output_type="latent")
        drawing = live.peak
        live.restart()
        whole.vqvae.decode(made.images)
        decoding = live.peak
    assert account.peak == predicted.cache
    assert 0.85 < drawing / (predicted.cache + predicted.step) < 1.15
    assert 0.85 < decoding / predicted.decoder < 1.15
    held = sum(p.numel() * p.element_size() for part in (whole.transformer, whole.vqvae) for p in part.parameters())
    assert predicted.weights == held


@pytest.mark.parametrize("depth", [2, 8])
@pytest.mark.parametrize(
    "words",
    [
        *({"guidance_until": until} for until in (0, 1, 2, 3)),
        *({"prune": prune} for prune in ("50%", "100%", "30%,60%")),
        {"plan": "self:3", "depth": 2},
        {"plan": "self:3", "depth": 2, "guidance_until": 3},
        {"plan": "self:3", "depth": 2, "guidance_until": 3, "guidance_blocks": [0]},
        {"plan": "self:2", "depth": 2, "prune": "50%"},
    ],
    ids=str,
)
def test_memory_of_a_plan_is_predicted(words, depth):
    whole, batch = pipeline(depth=depth), 4
    plan = whole.make_plan(**{"guidance_scale": 1.5, "guidance_ramp": "constant", "top_k": 16, "top_p": 0.9} | words)
    predicted, account = predict(plan, whole.vqvae, batch, torch.float32), CachePeak()
    with LiveBytes() as live, torch.no_grad():
        whole(class_labels=[1] * batch, seed=0, plan=plan, hooks=[account], output_type="latent")
    assert account.peak == predicted.cache or "plan" in words
    assert 0.85 < live.peak / (predicted.cache + predicted.step) < 1.15


@pytest.mark.parametrize("words", [{}, {"plan": "self:5", "depth": 2, "guidance_blocks": [0]}], ids=str)
def test_the_last_guided_scale_may_be_the_peak(words):
    """Both halves of it, or of all earlier tokens in a prefill, where the scales drawn later have one."""
    whole = pipeline(depth=2, schedule="1,4,6,7,7,7", width=256)
    plan = whole.make_plan(**words, guidance_until=5, guidance_scale=2.0, guidance_ramp="constant", top_k=16)
    predicted = predict(plan, whole.vqvae, 4, torch.float32)
    with LiveBytes() as live, torch.no_grad():
        whole(class_labels=[1] * 4, seed=0, plan=plan, output_type="latent")
    assert 0.85 < live.peak / (predicted.cache + predicted.step) < 1.15


def test_slices_give_the_same_images_in_less_memory():
    whole = pipeline()
    f_hat, images, peaks = torch.randn(5, 8, 8, 8), [], []
    for size in (None, 2, 1):
        whole.vqvae.disable_slicing() if size is None else whole.vqvae.enable_slicing(size)
        with LiveBytes() as live, torch.no_grad():
            images.append(whole.vqvae.decode(f_hat))
        peaks.append(live.peak)
    assert all(torch.allclose(images[0], other, atol=1e-5) for other in images[1:])
    assert peaks[0] > peaks[1] > peaks[2]
    with pytest.raises(ValueError, match="images must be 1 or more, got 0"):
        whole.vqvae.enable_slicing(0)


@pytest.mark.parametrize("size, schedule, batch", [("d30", "var256", 64), ("d36", "var512", 8)])
def test_published_sizes_need_a_fraction_of_the_official_cache(size, schedule, batch):
    with torch.device("meta"):
        transformer = NextScaleTransformer(**PRESETS[size], schedule=schedule)
        vqvae = MultiScaleVQ(schedule=schedule)
    plan = NextScalePipeline(transformer, vqvae).make_plan(guidance_scale=1.5, top_k=900, top_p=0.96)
    stored = 2 * batch * len(transformer.blocks) * transformer.schedule.begins[-1] * transformer.config.width * 2 * 2
    assert stored <= 0.42 * official_cache_bytes(plan, batch)
    sliced = predict(plan, vqvae, batch, torch.bfloat16, decode_batch=1)
    assert sliced.cache < 1.1 * stored
    assert sliced.peak == sliced.drawing  # the decoder is never the peak
