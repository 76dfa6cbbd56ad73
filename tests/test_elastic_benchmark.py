"""The elastic benchmark on tiny random models: every row, resumed, with its table and picture."""

import json

import pytest
import torch

from benchmarks import elastic, elastic_speed
from benchmarks.elastic_rows import against_full, all_rows, once


@pytest.fixture(scope="module")
def calibrated(text_folder, tmp_path_factory):
    """The tiny text model as if calibrated."""
    from sample.load import load_pipeline

    folder = tmp_path_factory.mktemp("calibrated")
    pipeline = load_pipeline(text_folder, dtype=torch.float32, device="cpu")
    pipeline.transformer.register_to_config(selectivity=[[0.0, 0.1, 0.2], [0.0, 0.3, 0.1]])
    pipeline.save_pretrained(folder)
    return folder


def test_rows_are_those_that_the_models_allow():
    rows = all_rows(8, 7, 4, elastic.MODELS)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert [row.depth for row in rows if row.group == "subnet" and row.label == "plain"] == [4, 2, 1]
    assert sum(row.group == "code" for row in rows) == 3 * 6 and sum(row.group == "cache" for row in rows) == 20
    assert [row.name for row in rows if row.group == "prune"][:2] == ["var prune 25%", "var prune 50%"]
    assert not any(row.prune and "," in row.prune for row in all_rows(8, 2, 1, ["full"]))
    assert {row.model for row in all_rows(8, 7, 4, ["full"])} == {"full"}
    assert not any(row.refiner for row in all_rows(8, 7, 4, ["full", "supernet"]))


def test_rows_are_compared_with_the_first():
    full = {"tokens_images_per_s": 2.0, "gflop": 3.0, "peak_cache_mib": 4.0, "fd_scenes": 2.0, "correct": "1100"}
    half = {"tokens_images_per_s": 4.0, "gflop": 1.0, "peak_cache_mib": 1.0, "fd_scenes": 3.0, "correct": "1000"}
    one, other = against_full([full, half])
    assert (one["speed"], one["fd"], one["correct_minus_full"]) == (1, 1, 0)
    assert (other["speed"], other["ceiling"], other["cache_of_full"], other["fd"]) == (2, 3, 0.25, 1.5)
    assert other["correct_minus_full"] == -0.25 and "correct" not in other


def test_what_is_measured_is_not_measured_again(tmp_path):
    calls = []
    for _ in range(2):
        assert once(tmp_path, ["a", 1], lambda: calls.append(1) or {"x": 0.1}) == {"x": 0.1}
    assert len(calls) == 1


def test_the_command(calibrated, tmp_path):
    argv = ["--full", str(calibrated), "--supernet", str(calibrated), "--per-tag", "1", "--batch-size", "3"]
    argv += ["--shares", "60%,40%", "--groups", "subnet,cache,prune,guidance"]
    argv += ["--repeats", "2", "--device", "cpu", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "e.json")]
    assert elastic.main(argv) == 0
    content = json.loads((tmp_path / "e.json").read_text())
    rows = {row["row"]: row for row in content["rows"]}
    assert rows["var (plain)"]["speed"] == 1 and content["n"] == 6
    assert rows["var (plain)"]["correct_minus_full_ci95"] == [0, 0] == rows["var (supernet)"]["correct_minus_full_ci95"]
    assert rows["var window:40%"]["peak_cache_mib"] < rows["var (plain)"]["peak_cache_mib"]
    assert rows["var guided until 0"]["speed"] > 0 and rows["var guided until 0"]["fd"] != 1
    assert rows["var prune 50%"]["speed"] > 0 and rows["var prune 100%"]["fd"] != 1
    assert (tmp_path / "e.md").read_text().count("\n") == len(rows) + 2 and (tmp_path / "e.png").stat().st_size > 10_000
    assert elastic.main([*argv, "--groups", "cache"]) == 0  # resumed: nothing is measured twice
    assert elastic.main([*argv, "--groups", "full", "--dtype", "bfloat16"]) == 0  # another dtype: measured anew
    half = json.loads((tmp_path / "e.json").read_text())["rows"][0]
    assert half["peak_cache_mib"] == rows["var (plain)"]["peak_cache_mib"] / 2
    with pytest.raises(SystemExit):
        elastic.main(["--supernet", str(calibrated)])


def test_speed_beside_its_ceiling(tmp_path):
    argv = ["--size", "d8", "--refiner", "d6", "--schedule", "1,2,3", "--bridge", "1", "--depths", "2", "--rounds", "1"]
    assert elastic_speed.main([*argv, "--dtype", "float32", "--device", "cpu", "--out", str(tmp_path / "s.json")]) == 0
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [row["row"].split()[0] for row in rows] == ["var", "supernet:1", "code:1", "code:2"]
    assert rows[0]["ceiling"] == rows[0]["speed"] == rows[0]["share_of_ceiling"] == 1
    assert 1 < rows[1]["ceiling"] < 4 and rows[1]["share_of_ceiling"] == rows[1]["speed"] / rows[1]["ceiling"]
    assert rows[1]["cache_of_full"] < 1 and (tmp_path / "s.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        elastic_speed.main([*argv, "--rounds", "0"])
