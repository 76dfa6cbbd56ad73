"""The curve of scores over training: every model once, in order of images, and a picture."""

import json

import pytest

from benchmarks import score_curve


def test_only_new_models_are_measured(tmp_path, monkeypatch):
    measured = []

    def measure(images, model, options):
        measured.append((images, model))
        shares = dict.fromkeys(score_curve.TAGS, images / 100)
        return {"images": images, "model_digest": model, **shares, "overall": images / 100, "overall_ci95": [0.0, 1.0]}

    monkeypatch.setattr(score_curve, "measure", measure)
    monkeypatch.setattr(score_curve, "model_digest", str)
    out = tmp_path / "curve.json"
    assert score_curve.main(["--models", "20=b,10=a", "--per-tag", "2", "--out", str(out)]) == 0
    assert score_curve.main(["--models", "20=b,10=a,30=c", "--per-tag", "2", "--out", str(out)]) == 0
    assert measured == [(10, "a"), (20, "b"), (30, "c")]
    kept = json.loads(out.read_text())
    assert [row["images"] for row in kept["rows"]] == [10, 20, 30] and kept["n"] == 12
    assert out.with_suffix(".png").stat().st_size > 1000 and "overall" in out.with_suffix(".md").read_text()
    assert score_curve.main(["--models", "10=b,20=b", "--per-tag", "2", "--out", str(out)]) == 0
    assert measured[3:] == [(10, "b")]  # another model of as many images
    assert score_curve.main(["--models", "10=a", "--per-tag", "3", "--out", str(out)]) == 0
    assert measured[4:] == [(10, "a")]  # with other settings everything is measured again


@pytest.mark.parametrize("models", ["a", "x=a", "10="])
def test_models_are_named_with_their_images(models, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        score_curve.main(["--models", models, "--out", str(tmp_path / "c.json")])
    assert stop.value.code == 2 and "IMAGES=MODEL" in capsys.readouterr().err
