"""True coarse scales: none of them is plain drawing, all of them is the tokenizer's own reconstruction."""

import pytest
import torch

from benchmarks import true_scales
from benchmarks.true_scales import finish, main, scenes_of
from sample.load import load_pipeline


def test_between_drawing_and_reconstructing(tmp_path):
    pipeline = load_pipeline("scenes", dtype=torch.float32, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    scenes = scenes_of(1, 0)[:2]
    plain = pipeline([scene.caption for scene in scenes], seed=[5, 6], output_type="np").images
    assert ((plain * 255).round() == finish(pipeline, scenes, 0, seed=5)).all()
    whole = finish(pipeline, scenes, len(pipeline.transformer.schedule), seed=5)
    assert (whole == finish(pipeline, scenes, len(pipeline.transformer.schedule), seed=9)).all()  # nothing is drawn
    assert (whole != finish(pipeline, scenes, 3, seed=5)).any()


def test_a_missing_model_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--model", str(tmp_path / "none"), "--per-tag", "1"])
    assert "none" in capsys.readouterr().err.splitlines()[-1]


def test_an_interruption_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(true_scales, "measure", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main(["--out", str(tmp_path / "r.json")])
    assert capsys.readouterr().err.strip() == "python -m benchmarks.true_scales: interrupted; nothing was written"
    assert not list(tmp_path.iterdir())
