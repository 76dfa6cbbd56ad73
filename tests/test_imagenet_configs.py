"""The ImageNet configurations are the official recipe, and each of them parses and fits its model."""

from pathlib import Path

import pytest
import torch

from tokenizer.model import MultiScaleVQ
from tokenizer.schedule import SCHEDULES
from train import train_tokenizer, train_var
from train.config import RunConfig
from var.presets import PRESETS
from var.transformer import NextScaleTransformer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
IMAGES = 1_281_167

# The README's commands: epochs, batch size, base rate at a batch of 256, alng, wpe, twde, parameters in millions.
RECIPE = {
    "imagenet256_d16": (200, 768, 1e-4, 1e-3, 0.1, None, 310),
    "imagenet256_d20": (250, 768, 1e-4, 1e-3, 0.1, None, 600),
    "imagenet256_d24": (350, 768, 8e-5, 1e-4, 0.01, None, 1030),
    "imagenet256_d30": (350, 1024, 8e-5, 1e-5, 0.01, 0.08, 2010),
    "imagenet512_d36": (350, 768, 8e-5, 5e-6, 0.01, 0.08, 2350),
}


def parsed(name, *flags):
    parser = train_var.parser()
    config = parser.parse_args(["--config", str(CONFIGS / "var" / f"{name}.yaml"), *flags])
    return parser.instantiate(config)


@pytest.mark.parametrize("name", RECIPE)
def test_official_recipe(name):
    epochs, batch, base, alng, wpe, twde, millions = RECIPE[name]
    config = parsed(name)
    assert config.run.total_images == epochs * IMAGES and config.run.batch_size == batch
    optimizer = config.optimizer
    assert optimizer.lr == pytest.approx(base * batch / 256) and optimizer.betas == (0.9, 0.95)
    assert (optimizer.weight_decay, optimizer.weight_decay_end) == (0.05, twde)
    assert (optimizer.schedule, optimizer.warmup, optimizer.end, optimizer.clip) == ("lin0", 1 / 50, wpe, 2.0)
    assert config.gate_gain == alng and config.run.ema == 0
    assert (config.loss.drop, config.loss.label_smoothing, config.loss.weights) == (0.1, 0.0, "token")
    assert not config.data.flip and config.data.resize_factor == 1.125
    assert config.progressive.until == 0
    sizes, pixels = vars(config.transformer), config.data.size
    assert {key: sizes[key] for key in PRESETS[name.split("_")[1]]} == PRESETS[name.split("_")[1]]
    with torch.device("meta"):
        model = NextScaleTransformer(**sizes, schedule=f"var{pixels}", num_classes=config.data.num_classes)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("name", RECIPE)
def test_batches_split_over_usual_numbers_of_gpus(name):
    run: RunConfig = parsed(name).run
    for processes in (1, 2, 4, 8, 16):
        run.check_split(processes)


def test_progressive_training_is_a_flag():
    config = parsed("imagenet512_d36", "--progressive.until", "0.5")
    assert config.progressive.stage(0.0, config.optimizer.warmup, 10) == (5, 1.0)
    two = train_var.parser().parse_args(
        ["--config", str(CONFIGS / "var" / "imagenet256_d16.yaml"), "--progressive.until=0.5", "--supernet.depths=[4]"]
    )
    with pytest.raises(ValueError, match=r"progressive and supernet\.depths are different trainings: leave one out"):
        train_var.check_training(train_var.parser().instantiate(two))


def test_the_tokenizer_has_the_official_shape_and_serves_512_pixels(tmp_path, tiny_vqvae):
    parser = train_tokenizer.parser()
    with torch.device("meta"):
        config = parser.parse_args(["--config", str(CONFIGS / "tokenizer" / "imagenet256.yaml")])
        official = MultiScaleVQ()
        made = parser.instantiate(config).tokenizer
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in official.state_dict().items()}
    assert made.image_hw == (256, 256)
    tiny_vqvae.save_pretrained(tmp_path)
    larger = MultiScaleVQ.from_pretrained(tmp_path, schedule="1,2,4,8")
    assert larger.image_hw == (16, 16) and tuple(larger.config.schedule[-1]) == (8, 8)
    assert torch.equal(larger.quantizer.codebook.weight, tiny_vqvae.quantizer.codebook.weight)
    larger.save_pretrained(tmp_path / "512")
    assert MultiScaleVQ.from_pretrained(tmp_path / "512").schedule == larger.schedule
    assert SCHEDULES["var512"].latent_hw == (32, 32)
