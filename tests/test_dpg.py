"""DPG-Bench: prompts in, grids out, results in."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

import nextscale
from evaluation.dpg import read_prompts, read_results, write_grids
from evaluation.sources import open_images, tree_prompts

PROMPTS = {"2": "two green rings", "10": "a red star", "COCOval2014000000000192": "a purple square"}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A folder of three prompts, and a tree of four flat pictures of each, of another order."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").mkdir()
    for key, prompt in PROMPTS.items():
        (tmp_path / "prompts" / f"{key}.txt").write_text(f"{prompt}\n")
    for place, prompt in enumerate(sorted(PROMPTS.values())):
        folder = tmp_path / "tree" / f"{place:05d}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(json.dumps({"prompt": f"{prompt} "}) + "\n")  # as some write it
        for copy in range(5):
            Image.new("RGB", (8, 8), (50 * place, 10 * copy, 0)).save(folder / "samples" / f"{copy:04d}.png")
    return tmp_path


def test_prompts_are_read_by_their_numbers(bench):
    assert list(read_prompts(bench / "prompts").items()) == list(PROMPTS.items())


def test_grids_are_cut_into_the_pictures_of_their_prompt(bench):
    images = open_images(bench / "tree")
    assert write_grids(images, tree_prompts(images), bench / "prompts", bench / "grids") == 8
    assert {path.name for path in (bench / "grids").iterdir()} == {f"{key}.png" for key in PROMPTS}
    for key, prompt in PROMPTS.items():
        grid = np.asarray(Image.open(bench / "grids" / f"{key}.png"))
        place = sorted(PROMPTS.values()).index(prompt)
        for copy, (y, x) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):  # as the scorer cuts them
            assert (grid[y : y + 8, x : x + 8] == (50 * place, 10 * copy, 0)).all()


def test_grids_follow_their_pictures(bench, monkeypatch):
    images = open_images(bench / "tree")
    given = (images, tree_prompts(images), bench / "prompts", bench / "grids")
    write_grids(*given)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(bench / "tree/00000/samples/0003.png")
    made = []
    monkeypatch.setattr("evaluation.dpg.write_png", lambda place, *_: made.append(place.stem))
    write_grids(*given)
    assert made == [next(key for key, prompt in PROMPTS.items() if prompt == "a purple square")]


def test_the_command_draws_and_makes_grids(bench, text_folder, capfd):
    words = ["evaluate", "--model", str(text_folder), "--suite", "prompts", "--work", "drawn", "--device", "cpu"]
    assert nextscale.main(words) == 0
    assert "drawn-grids: a grid of 4 a prompt, for DPG-Bench's scorer with --resolution 8" in capfd.readouterr().out
    assert len(list((bench / "drawn").glob("*/samples/*.png"))) == 12
    assert len(list((bench / "drawn-grids").iterdir())) == 3
    assert nextscale.main(["evaluate", "--images", "tree", "--suite", "prompts", "--device", "cpu"]) == 0
    assert len(list((bench / "tree-grids").iterdir())) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: (b / "prompts/10.txt").unlink(), "its prompt is none of prompts: a red star"),
        (lambda b: (b / "prompts/10.txt").write_text(" \n"), "10.txt is empty"),
        (lambda b: (b / "prompts/10.txt").write_text("two  green rings"), "10.txt and 2.txt hold the same prompt"),
        (lambda b: [f.unlink() for f in (b / "prompts").iterdir()], "prompts holds no KEY.txt"),
        (lambda b: [(b / f"tree/00001/samples/{i:04d}.png").unlink() for i in (1, 2)], "got 3 of a red star"),
        (lambda b: Image.new("RGB", (8, 9)).save(b / "tree/00001/samples/0001.png"), "0001.png has 8x9 pixels"),
        (lambda b: Image.new("RGB", (9, 9)).save(b / "tree/00001/samples/0001.png"), "0001.png has 9x9 pixels"),
    ],
)
def test_mistakes_are_one_line(bench, capfd, change, said):
    change(bench)
    assert nextscale.main(["evaluate", "--images", "tree", "--suite", "prompts", "--device", "cpu"]) == 2
    told = capfd.readouterr().err
    assert said in told and told.count("\n") == 1


def test_too_few_pictures_are_said_before_any_is_drawn(bench, text_folder, capfd):
    words = ["evaluate", "--model", str(text_folder), "--suite", "prompts", "--work", "drawn", "--n", "3"]
    assert nextscale.main([*words, "--device", "cpu"]) == 2
    assert "--n must be 4 or more" in capfd.readouterr().err and not (bench / "drawn").exists()


RESULTS = """grids/2.png, 0.5, 1.0, 1.0, 0.5, 0.75
grids/10.png, 1.0, 1.0, 1.0, 1.0, 1.0
grids/with, comma.png, 0.0, 0.25, 0.25, 0.5, 0.25
Model: grids
L1 category scores:
\tentity: 91.5
\tother things: 80.25
L2 category scores:
\tentity - whole: 90.0
Image path: grids
Save results to: grids/dpg-bench_results.txt
DPG-Bench score: 66.6
"""


def test_results_are_read(tmp_path):
    (tmp_path / "r.txt").write_text(RESULTS)
    found = read_results(tmp_path / "r.txt")
    assert found["n"] == 3 and found["dpg"] == pytest.approx(200 / 3)
    assert found["dpg_entity"] == 91.5 and found["dpg_other_things"] == 80.25 and len(found) == 5
    half = 1.959964 * np.std([75, 100, 25], ddof=1) / math.sqrt(3)
    assert found["dpg_ci95"] == pytest.approx([200 / 3 - half, 100])  # no score is above 100


def test_the_command_reports_results(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.txt").write_text(RESULTS)
    assert nextscale.main(["evaluate", "--dpg-results", "r.txt", "--out", "dpg.json"]) == 0
    assert "3 prompts are scored, and DPG-Bench has 1065" in capfd.readouterr().err
    assert json.loads((tmp_path / "dpg.json").read_text())["rows"][0]["dpg_entity"] == 91.5
    (tmp_path / "r.txt").write_text("nothing\n")
    assert nextscale.main(["evaluate", "--dpg-results", "r.txt"]) == 2
    assert "holds no line of DPG-Bench's scorer" in capfd.readouterr().err
    assert nextscale.main(["evaluate", "--dpg-results", "gone.txt"]) == 2
