"""Weights that wait in CPU memory: the same tokens and pixels, and less on the device."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import TINY, liven
from PIL import Image

from sample.fast import accelerate
from sample.load import check_fast, put
from sample.memory import predict
from sample.offload import Unit, keep_on_cpu
from sample.pipeline import NextScalePipeline
from tokenizer.model import MultiScaleVQ
from var.transformer import NextScaleTransformer

CPU = torch.device("cpu")
CALL = {"seed": 5, "guidance_scale": 2.0, "output_type": "pt"}


def pipeline(*, text=None, refiner=False, width=32, depth=3, channels=(8, 16)):
    """A small model of classes or, with (tokenizer, encoder), of texts."""
    torch.manual_seed(0)
    vqvae = liven(MultiScaleVQ(channels=list(channels), layers_per_block=1, norm_groups=4, **TINY), 1)
    kind = {"conditioning": "text", "text_width": 16, "text_length": 40} if text else {"num_classes": 5}
    sizes = {"width": width, "heads": 2, **kind, **TINY}
    models = [liven(NextScaleTransformer(depth=number, **sizes), number) for number in (depth, 2)]
    others = {"tokenizer": text[0], "text_encoder": text[1]} if text else {}
    whole = NextScalePipeline(models[0], vqvae, refiner=models[1] if refiner else None, **others)
    whole.set_progress_bar_config(disable=True)
    return whole


@pytest.fixture
def arrivals(monkeypatch):
    """Bytes on the device after each arrival of a unit, of all units that are there."""
    here, found = {}, []
    come, leave = Unit.come, Unit.leave

    def noted(unit, device):
        come(unit, device)
        assert all(own.data_ptr() != home.data_ptr() for own, home in unit.homes)
        here[id(unit)] = sum(home.nbytes for _, home in unit.homes)
        found.append(sum(here.values()))

    monkeypatch.setattr(Unit, "come", noted)
    monkeypatch.setattr(Unit, "leave", lambda unit: (here.pop(id(unit), None), leave(unit)))
    return found


PLANS = {"var": {}, "code": {"plan": "code:2"}, "supernet": {"plan": "supernet:2", "depth": 2}}
PLANS |= {"self": {"plan": "self:1", "depth": 2, "cache": "window:50%"}}


@pytest.mark.parametrize("how", ["model", "layers"])
@pytest.mark.parametrize("name", PLANS)
def test_every_plan_draws_the_same(name, how, arrivals):
    plain, offloaded = pipeline(refiner=True), keep_on_cpu(pipeline(refiner=True), how, CPU)
    call = {"class_labels": [0, 1, 2], **CALL, **PLANS[name]}
    expected, made = plain(**call), offloaded(**call)
    assert all(map(torch.equal, expected.tokens, made.tokens)) and torch.equal(expected.images, made.images)
    if how == "model":  # the transformer, the refiner if there is one, the decoder
        assert len(arrivals) == (3 if name == "code" else 2)


@pytest.mark.parametrize("how", ["model", "layers"])
def test_texts_and_edits_draw_the_same(how, tiny_text_encoder):
    plain, offloaded = (pipeline(text=deepcopy(tiny_text_encoder)) for _ in range(2))
    keep_on_cpu(offloaded, how, CPU)
    picture = {"image": Image.fromarray(np.full((8, 8, 3), 90, np.uint8)), "mask_image": np.eye(8) > 0}
    for extra in ({}, {"negative_prompt": "a ring"}, picture):
        expected, made = (whole("a red star", **CALL, **extra) for whole in (plain, offloaded))
        assert all(map(torch.equal, expected.tokens, made.tokens)) and torch.equal(expected.images, made.images)


@pytest.mark.parametrize("how", ["model", "layers"])
def test_what_comes_to_the_device_is_what_was_predicted(how, arrivals):
    whole = pipeline(width=128, depth=6, channels=(32, 64))
    plan = whole.make_plan(guidance_scale=2.0)
    plain, predicted = (predict(plan, whole.vqvae, 1, torch.float32, offload=name) for name in ("none", how))
    assert predicted.weights < (0.75 if how == "model" else 0.1) * plain.weights
    assert predicted.decoder_weights < plain.decoder_weights == plain.weights
    keep_on_cpu(whole, how, CPU)
    parts = (part for model in (whole.transformer, whole.vqvae) for part in model.modules())
    units = {id(part._hf_hook.unit): part._hf_hook.unit for part in parts if hasattr(part, "_hf_hook")}.values()
    staying = plain.weights - sum(home.nbytes for unit in units for _, home in unit.homes)
    made = whole(class_labels=0, seed=0, plan=plan, output_type="latent")
    assert staying + max(arrivals) == predicted.weights
    arrivals.clear()
    whole.decode(made.images)
    assert [staying + arrival for arrival in arrivals] == [predicted.decoder_weights]


def test_an_offloaded_pipeline_can_be_saved_and_stays(tmp_path):
    whole = keep_on_cpu(pipeline(), "layers", CPU)
    expected = whole(class_labels=3, **CALL)
    whole.save_pretrained(tmp_path)
    again = NextScalePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    for part in (again.transformer, again.vqvae):
        part.eval()
    assert torch.equal(again(class_labels=3, **CALL).images, expected.images)
    with pytest.raises(ValueError, match="an offloaded pipeline stays on its device and in its dtype"):
        whole.to(torch.bfloat16)
    with pytest.raises(ValueError, match="as it was loaded: on the CPU, with fast=off"):
        keep_on_cpu(whole, "model", CPU)
    with pytest.raises(ValueError, match="as it was loaded: on the CPU, with fast=off"):
        keep_on_cpu(accelerate(pipeline()), "model", CPU)


@pytest.mark.parametrize("name, how", [("model", "model"), ("sequential", "layers")])
def test_by_the_names_that_diffusers_has(name, how):
    whole = pipeline()
    getattr(whole, f"enable_{name}_cpu_offload")(device="cpu")
    assert whole.offloaded == how
    assert torch.equal(whole(class_labels=3, **CALL).images, pipeline()(class_labels=3, **CALL).images)


def test_the_text_encoder_may_be_elsewhere(tiny_text_encoder):
    whole = pipeline(text=deepcopy(tiny_text_encoder))
    put(whole, CPU, torch.float32, text_device="cpu", offload="model")
    assert whole.offloaded == "model" and not hasattr(whole.text_encoder, "_hf_hook")


@pytest.mark.parametrize(
    "fast, offload, device, message",
    [
        ("auto", "disk", "cuda", "offload must be one of none, model, layers, got 'disk'"),
        ("fastest", "none", "cpu", "fast must be one of auto, on, off, got 'fastest'"),
        ("auto", "model", "cpu", "device is the CPU"),
        ("on", "layers", "cuda", "fast on needs them in one place: give only one of them"),
    ],
)
def test_what_does_not_go_together(fast, offload, device, message):
    with pytest.raises(ValueError, match=message):
        check_fast(fast, offload, torch.device(device))
    check_fast("auto", "layers", torch.device("cuda"))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_less_memory_of_a_gpu_and_the_same_tokens(dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device, found = torch.device("cuda"), {}
    for how in ("none", "model", "layers"):
        whole = pipeline(refiner=True, width=512, depth=12, channels=(64, 128))
        put(whole, device, dtype, text_device=None, offload=how)
        plan = whole.make_plan("code:2", guidance_scale=2.0)
        base = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        made = whole(class_labels=[0, 1], seed=3, plan=plan, output_type="latent")
        peak = torch.cuda.max_memory_allocated(device)
        predicted = predict(plan, whole.vqvae, 2, dtype, offload=how)
        found[how] = torch.cat(made.tokens, dim=1), peak, predicted, base
        del whole, made, plan
        torch.cuda.empty_cache()
    tokens, full, predicted, _ = found["none"]
    for how in ("model", "layers"):
        assert torch.equal(found[how][0], tokens)
        saved = predicted.weights - found[how][2].weights
        assert full - found[how][1] == pytest.approx(saved, rel=0.15)
    assert found["layers"][1] < found["model"][1] < full
