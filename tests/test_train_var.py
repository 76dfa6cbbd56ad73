"""What a transformer's training takes and refuses: attention backends, labels, cached text states."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_toys import in_child

from train import train_var
from train.config import exit_code
from train.objectives import VarLossConfig, VarObjective
from train.optimizers import OptimizerConfig

TINY = ["--run.log_every=1", "--run.checkpoint_every=4", "--run.validate_every=4", "--run.workers=0", "--run.cpu=true"]
TINY += ["--run.batch_size=4", "--run.total_images=16", "--run.validation_images=4", "--run.previews=2"]
TINY += ["--run.bar_every=60", "--run.precision=no", "--data.source=scenes", "--data.size=8", "--data.num_scenes=24"]
TINY += ["--transformer.depth=1", "--transformer.width=16", "--transformer.heads=2"]


def stage(main, *arguments: str) -> int:
    """Exit code of a stage's command line in a child process."""
    return in_child(lambda: os._exit(exit_code(main, list(arguments))))


@pytest.fixture(scope="module")
def vqvae_folder(tiny_vqvae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqvae")
    tiny_vqvae.save_pretrained(folder)
    return folder


class Recorder(torch.nn.Module):
    """Stands in for a transformer; keeps what it was called with."""

    gradient_checkpointing = False

    def forward(self, inputs, cond, **passes):
        self.passes = passes


def test_attention_backend_reaches_the_model_in_training(tiny_class_model):
    objective = VarObjective(tiny_class_model, VarLossConfig(), OptimizerConfig())
    objective.transformer, objective.attention = Recorder(), "flex"
    cond = SimpleNamespace(start_BD=torch.empty(1, device="meta"))
    objective.hidden(None, cond, layers=[0])
    assert objective.transformer.passes == {"layers": [0], "attention_backend": "flex"}
    with torch.no_grad():
        objective.hidden(None, cond)
    assert objective.transformer.passes == {}


@pytest.mark.parametrize(("backend", "words"), [("flex", "attention flex cannot train on a CPU"), ("flash", "sdpa")])
def test_attention_backends_that_cannot_train_are_one_line(vqvae_folder, tmp_path, capfd, backend, words):
    arguments = [*TINY, f"--tokens.tokenizer={vqvae_folder}", f"--run.run_dir={tmp_path}", f"--attention={backend}"]
    assert stage(train_var.main, *arguments) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and words in lines[0]


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_class_training_needs_labels(vqvae_folder, tmp_path, capfd, workers):
    from test_data import write_parquet

    path = write_parquet(tmp_path / "some.parquet", 20, label=[0, 1, None, 2] * 5, text=["a thing"] * 20)
    arguments = [*TINY, f"--tokens.tokenizer={vqvae_folder}", f"--run.run_dir={tmp_path}/run", "--data.source=parquet"]
    arguments += [f"--data.path={path}", f"--run.workers={workers}", f"--data.cache_dir={tmp_path}/arrow"]
    streamed = [*arguments, "--data.streaming=true", "--data.stream_val_images=1"]
    for given, words in (
        (arguments, "has no label: class-conditional training needs one"),
        (streamed, "data.num_classes must be given for class-conditional training"),
        ([*streamed, "--data.num_classes=3"], "a row has no label: class-conditional"),
    ):
        assert stage(train_var.main, *given) == 2
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
        assert len(errors) == 1 and words in errors[0] and "Traceback" not in errors[0]


def test_a_cache_with_unlabelled_images_trains_no_class_model(tiny_vqvae, tmp_path):
    from train.token_cache import TokenCache, tokenizer_hash, write_shard

    folder = tmp_path / "train"
    folder.mkdir()
    write_shard(folder, 0, np.zeros((2, 21), np.uint16), [{"label": label, "caption": ""} for label in (0, -1)])
    manifest = {"tokenizer_hash": tokenizer_hash(tiny_vqvae), "num_classes": 1, "images": 2, "shard_size": 8}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert len(TokenCache(tmp_path, "train", tiny_vqvae)) == 2
    with pytest.raises(ValueError, match=r"an image of cache .* has no label"):
        TokenCache(tmp_path, "train", tiny_vqvae, labelled=True)
