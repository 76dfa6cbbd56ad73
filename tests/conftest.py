"""Tiny random-weight models and pipelines that every test file may use. They are built once and must not be changed.

Images are 8x8 pixels; the token pyramid is 1x1, 2x2, 4x4 with 16 codes of 4 channels.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other, above all on a busy machine

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
settings.load_profile("untimed")

TINY = {"vocab_size": 16, "latent_channels": 4, "schedule": "1,2,4"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--goldens", metavar="DIR", help="golden folders to compare with (default: tests/goldens)")


def pytest_configure(config: pytest.Config) -> None:
    """Only `-m cuda` sees a GPU: what runs on a CPU is the same everywhere, and children are forked."""
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if torch.backends.mps.is_available():  # on a Mac
            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
            torch.backends.mps.is_available = torch.accelerator.is_available = lambda: False
    config.pluginmanager.register(SeededFixtures())


class SeededFixtures:
    """Every fixture is made from the same random state, whichever tests ran before.

    A plugin of its own: hooks in this file are not called for fixtures of the whole session.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: object, request: object) -> None:
        """Before each fixture."""
        torch.manual_seed(0)


def liven(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """`module` in eval mode with noise on its weights: fresh gates are almost closed, and nothing would matter much."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def quiet_pipeline(model: torch.nn.Module, vqvae: torch.nn.Module):
    """A pipeline without a progress bar."""
    from sample.pipeline import NextScalePipeline

    made = NextScalePipeline(model, vqvae)
    made.set_progress_bar_config(disable=True)
    return made


def drawn_tokens(pipeline, **options) -> torch.Tensor:
    """The tokens (2, L) of two images of a class model, seeds 5 and 6."""
    made = pipeline(class_labels=[1, 3], seed=5, output_type="latent", **options)
    return torch.cat(made.tokens, dim=1)


@pytest.fixture(scope="session")
def tiny_vqvae():
    """A tokenizer of 8x8 images, stride 2."""
    from tokenizer.model import MultiScaleVQ

    return liven(MultiScaleVQ(channels=[8, 8], layers_per_block=1, attention=False, norm_groups=4, **TINY), 1)


@pytest.fixture(scope="session")
def tiny_class_model():
    """A transformer of 5 classes."""
    from var.transformer import NextScaleTransformer

    return liven(NextScaleTransformer(depth=2, width=32, heads=2, num_classes=5, **TINY), 2)


@pytest.fixture(scope="session")
def tiny_text_model():
    """A transformer of texts of up to 40 bytes (with the end mark)."""
    from var.transformer import NextScaleTransformer

    sizes = {"depth": 2, "width": 32, "heads": 2, "text_width": 16, "text_length": 40}
    return liven(NextScaleTransformer(conditioning="text", **sizes, **TINY), 3)


@pytest.fixture(scope="session")
def tiny_text_encoder():
    """(tokenizer, encoder): bytes, and a random T5 of width 16."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    tokenizer = ByT5Tokenizer()
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=len(tokenizer), **sizes, is_encoder_decoder=False, use_cache=False)
    torch.manual_seed(4)
    return tokenizer, T5EncoderModel(config).eval()


@pytest.fixture(scope="session")
def class_pipeline(tiny_class_model, tiny_vqvae):
    """NextScalePipeline of the class model, float32 on the CPU, silent."""
    from sample.pipeline import NextScalePipeline

    pipeline = NextScalePipeline(tiny_class_model, tiny_vqvae)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def text_pipeline(tiny_text_model, tiny_vqvae, tiny_text_encoder):
    """NextScalePipeline of the text model, float32 on the CPU, silent."""
    from sample.pipeline import NextScalePipeline

    tokenizer, encoder = tiny_text_encoder
    pipeline = NextScalePipeline(tiny_text_model, tiny_vqvae, tokenizer=tokenizer, text_encoder=encoder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def class_folder(class_pipeline, tmp_path_factory) -> Path:
    """The class pipeline as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("class-model")
    class_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(text_pipeline, tmp_path_factory) -> Path:
    """The text pipeline as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("text-model")
    text_pipeline.save_pretrained(folder)
    return folder
