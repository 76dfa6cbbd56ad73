"""A pipeline to hand out: half the size, with its sampling defaults, and never over another one unasked."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sample.load import load_pipeline
from sample.pipeline import NextScalePipeline
from train.config import exit_code
from train.export import main


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_an_export_draws_as_the_model_does(class_folder, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["--model", str(class_folder), "--out", str(out), "--dtype=float32", "--guidance_scale=2.0", "--top_k=5"]
    assert exit_code(main, given) == 0
    assert "MB of weights" in capsys.readouterr().out
    made, own = (load_pipeline(str(folder), device="cpu") for folder in (out, class_folder))
    assert made.config.sampling["guidance_scale"] == 2.0 and made.config.sampling["top_k"] == 5
    chosen = {"guidance_scale": 2.0, "guidance_ramp": "linear", "top_k": 5, "top_p": 1.0, "seed": 3}
    drawn = [p(class_labels=[1, 2], output_type="pt", **chosen).images for p in (made, own)]
    assert torch.equal(*drawn)
    assert str(tmp_path) not in (out / "transformer/config.json").read_text()


def test_what_is_not_given_stays_the_models_own(class_pipeline, tmp_path):
    own = {"guidance_scale": 0.5, "guidance_ramp": "constant", "top_p": 0.5, "cache": "window:50%"}
    model = NextScalePipeline(class_pipeline.transformer, class_pipeline.vqvae, sampling=own)
    model.save_pretrained(tmp_path / "model")
    assert exit_code(main, ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--top_p=0.9"]) == 0
    assert load_pipeline(tmp_path / "out", device="cpu").config.sampling == own | {"top_p": 0.9}


def test_parts_that_cannot_be_moved_leave_the_old_ones(class_folder, tmp_path, monkeypatch, capsys):
    out, rename = tmp_path / "out", Path.rename
    given = ["--model", str(class_folder), "--out", str(out)]
    assert exit_code(main, given) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def full(path, target):
        if path.name == "vqvae" and path.parent.name.startswith(".tmp-"):
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    assert exit_code(main, [*given, "--top_k=7", "--overwrite=true", "--dtype=float16"]) == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_refiner_is_exported_too(class_pipeline, tmp_path):
    twin = NextScalePipeline(class_pipeline.transformer, class_pipeline.vqvae, refiner=class_pipeline.transformer)
    twin.save_pretrained(tmp_path / "twin")
    assert exit_code(main, ["--model", str(tmp_path / "twin"), "--out", str(tmp_path / "out")]) == 0
    assert load_pipeline(tmp_path / "out", device="cpu").refiner is not None


def test_half_the_size_and_not_over_another(class_folder, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["--model", str(class_folder), "--out", str(out)]
    assert exit_code(main, given) == 0
    assert size(out) < 0.75 * size(class_folder)
    (out / "notes.txt").write_text("mine")
    before = json.loads((out / "model_index.json").read_text())
    capsys.readouterr()
    assert exit_code(main, [*given, "--top_k=7"]) == 2
    assert f"out {str(out)!r} holds a pipeline: name another folder" in capsys.readouterr().err
    assert json.loads((out / "model_index.json").read_text()) == before
    assert exit_code(main, [*given, "--top_k=7", "--overwrite=true"]) == 0
    assert json.loads((out / "model_index.json").read_text())["sampling"]["top_k"] == 7
    assert (out / "notes.txt").read_text() == "mine" and not list(tmp_path.glob(".tmp-*"))


def test_defaults_that_cannot_be_are_refused(class_folder, tmp_path, capsys):
    given = ["--model", str(class_folder), "--out", str(tmp_path / "out"), "--top_p=2"]
    assert exit_code(main, given) == 2 and not (tmp_path / "out").exists()
    assert "top_p must be in (0, 1], got 2.0" in capsys.readouterr().err


def test_a_place_where_nothing_can_be_written_is_found_first(tmp_path, capsys):
    """Before the model, which is not there at all, is looked for."""
    (tmp_path / "file").write_text("")
    for out, message in (("", "out must name a folder"), (tmp_path / "file/out", "out must be in a folder, got")):
        assert exit_code(main, ["--model", "nowhere", f"--out={out}"]) == 2
        assert message in capsys.readouterr().err


def test_a_mask_schedule_is_kept_and_checked(class_folder, tmp_path, capsys):
    given = ["--model", str(class_folder), "--out", str(tmp_path / "out")]
    assert exit_code(main, [*given, "--mask_schedule=off"]) == 0
    assert json.loads((tmp_path / "out/model_index.json").read_text())["sampling"]["mask_schedule"] == "off"
    assert exit_code(main, [*given, "--overwrite=true", "--mask_schedule=1/1,3"]) == 2
    assert "mask_schedule 1/1,3 is for a model of masked prediction" in capsys.readouterr().err
