"""The measured edits: cases are fair, a perfect edit is right and a wrong one is not, the command writes its result."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import liven
from PIL import Image

from evaluation.editing import FIGURES, case_at, judge_edit, main
from evaluation.editing_sheet import BOX, Column, editing_sheet
from evaluation.scenes import COLOURS, SceneObject, render
from evaluation.sheet import RIGHT, WRONG
from sample.edit import RULES

TINY = {"vocab_size": 16, "latent_channels": 4, "schedule": "1,2,4"}


def perfect(case):
    """The case's scene with the new object drawn into the middle of the mask."""
    x0, y0, x1, y1 = case.box
    diameter = max(min(x1 - x0 - 2, y1 - y0 - 2, 28), 14)
    shape, colour = case.new
    new = SceneObject(shape, colour, COLOURS[colour], (x0 + x1) / 2, (y0 + y1) / 2, diameter, 0.0)
    return render(replace(case.scene, objects=(case.kept, new) if case.kept is not None else (new,)))


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize("index", range(25))
def test_cases_are_fair(index, objects):
    case = case_at(index, 1, objects)
    given, without = case.image("replace"), case.image("add")
    assert np.array_equal(given[~case.mask], without[~case.mask])  # the mask covers all of the old object
    assert not np.array_equal(given, without)
    x0, y0, x1, y1 = case.box
    if objects == 2:  # and nothing of the kept one
        kx0, ky0, kx1, ky1 = case.kept.box
        assert x1 <= kx0 or kx1 <= x0 or y1 <= ky0 or ky1 <= y0
        assert case.kept.shape in case.metadata["prompt"]
    assert min(x1 - x0, y1 - y0) >= 18
    for item in case.scene.objects:
        assert item.shape != case.new[0] and item.colour != case.new[1]
    assert case.new[0] in case.metadata["prompt"]
    assert case == case_at(index, 1, objects) != case_at(index + 1, 1, objects)


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize("index", range(15))
def test_perfect_edits_are_right_and_others_wrong(index, objects):
    case = case_at(index, 2, objects)
    given, made = case.image("add"), perfect(case)
    assert all(judge_edit(case, given, made).values())
    touched = made.copy()
    touched[np.argwhere(~case.mask)[0][0], np.argwhere(~case.mask)[0][1]] ^= 1
    verdict = judge_edit(case, given, touched)
    assert not verdict["unchanged_outside"] and not verdict["right"]
    nothing = judge_edit(case, case.image("replace"), case.image("replace"))
    assert nothing["kept_object"] and not nothing["new_object"] and not nothing["old_object_gone"]
    assert not judge_edit(case, given, given)["right"]
    assert judge_edit(case, None, made)["right"]  # drawn afresh, the same picture would pass as well


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_text_model, tiny_text_encoder):
    from sample.pipeline import NextScalePipeline
    from tokenizer.model import MultiScaleVQ

    vqvae = MultiScaleVQ(channels=[8, 8], layers_per_block=1, attention=False, norm_groups=4, patch=8, **TINY)
    tokenizer, encoder = tiny_text_encoder
    path = tmp_path_factory.mktemp("scenes-model")
    NextScalePipeline(tiny_text_model, liven(vqvae, 1), tokenizer=tokenizer, text_encoder=encoder).save_pretrained(path)
    return path


def test_the_command_measures_and_writes(folder, tmp_path, capsys):
    out = tmp_path / "editing.json"
    words = ["--model", folder, "--n", 4, "--best-of", 2, "--device", "cpu", "--out", out]
    assert main([*map(str, words)]) == 0
    result = json.loads(out.read_text())
    made = [(row["task"], row.get("mask_rule"), row["candidates"]) for row in result["rows"]]
    assert made == [
        ("afresh", None, 1),
        *((task, rule, 1) for task in ("replace", "add") for rule in RULES),
        ("afresh", None, 2),
        ("replace", "corrected", 2),
        ("add", "corrected", 2),
    ]
    for row in (row for row in result["rows"] if row["task"] != "afresh"):
        assert row["unchanged_outside"] == 1.0 and row["right"] == 0.0 and row["n"] == 4
        assert all(name in row for name in FIGURES)
    assert "unchanged_outside" not in result["rows"][0]
    assert Image.open(out.with_suffix(".png")).size == (1532, 104 + 4 * 154 + 12)
    assert "unchanged_outside" in capsys.readouterr().out


def test_the_page_groups_columns_by_task_and_frames_them_by_verdict():
    cases = [case_at(i, 0, 1) for i in range(2)]
    pictures = [perfect(case) for case in cases]
    columns = [
        Column(None, "one image each", pictures, [False, False], 0.0),
        Column("replace", "rule: corrected", pictures, [True, False], 0.5),
    ]
    page = np.asarray(editing_sheet(cases, columns))
    frames = [[tuple(page[104 + 24 + i * 154, x]) for x in (12 + 130 + 26, 12 + 2 * 130 + 2 * 26)] for i in range(2)]
    assert frames == [[RIGHT, WRONG], [WRONG, WRONG]]  # edits come before what was drawn afresh
    assert (page == BOX).all(axis=-1).any()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--n", "0"], "--n must be 1 or more, got 0"),
        (["--rules", "half"], "--rules must be of corrected, official, whole, got 'half'"),
        (["--out", "x.txt"], "--out must be a .json file, got x.txt"),
        (["--objects", "3"], "argument --objects: invalid choice: 3"),
    ],
)
def test_mistakes_are_one_line(folder, argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--model", str(folder), "--device", "cpu", *argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_an_interruption_is_one_line(folder, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("evaluation.editing.measure", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main(["--model", str(folder), "--device", "cpu", "--n", "1"])
    assert capsys.readouterr().err.strip() == "python -m evaluation.editing: interrupted; nothing was written"


def test_other_models_are_refused(text_folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--model", str(text_folder), "--device", "cpu", "--n", "1"])
    assert "must be a text model of 64x64 pixels" in capsys.readouterr().err
