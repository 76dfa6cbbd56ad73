"""Low-rank adapters by diffusers' own methods: saved, loaded, merged, and then as fast as any model."""

import pytest
import torch

from sample.fast import accelerate
from sample.load import load_pipeline

peft = pytest.importorskip("peft")

TARGETS = ["to_q", "to_k", "to_v", "to_out", "fc1", "fc2"]


def draw(pipeline):
    """f_hat of two images."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(class_labels=[0, 3], seed=[1, 2], output_type="latent").images


def test_an_adapter_from_its_making_to_the_fast_path(class_folder, tmp_path):
    adapted, other = (load_pipeline(class_folder, device="cpu") for _ in range(2))
    plain, model = draw(adapted), adapted.transformer
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
    model.add_adapter(settings)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    wanted = draw(adapted)
    assert not torch.allclose(wanted, plain, atol=1e-3)

    model.save_lora_adapter(tmp_path / "lora")
    file = {"weight_name": "pytorch_lora_weights.safetensors", "prefix": None}
    other.transformer.load_lora_adapter(tmp_path / "lora", **file)
    torch.testing.assert_close(draw(other), wanted)

    other.transformer.fuse_lora()
    other.transformer.unload_lora()
    torch.testing.assert_close(draw(other), wanted, atol=1e-4, rtol=0)
    other.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(draw(load_pipeline(tmp_path / "merged", device="cpu")), draw(other))
    accelerate(other)
    torch.testing.assert_close(draw(other), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("targets", [["fc1"], ["fc2"], TARGETS])
def test_the_fast_path_keeps_adapters_that_are_on(class_folder, targets):
    adapted = load_pipeline(class_folder, device="cpu")
    plain = draw(adapted)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    adapted.transformer.add_adapter(settings)
    wanted = draw(adapted)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    torch.testing.assert_close(draw(accelerate(adapted)), wanted, atol=1e-4, rtol=0)


def test_a_model_with_an_adapter_is_not_saved_as_if_it_had_none(class_folder, tmp_path):
    adapted = load_pipeline(class_folder, device="cpu")
    adapted.transformer.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="transformer has an adapter: fuse_lora and unload_lora it first"):
        adapted.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
