"""The speed benchmarks' arithmetic and their mistakes; nothing is timed here."""

from __future__ import annotations

import argparse
import json
import os
import time
from copy import deepcopy
from pathlib import Path
from signal import SIG_IGN, SIGINT, getsignal
from threading import Barrier

import pytest
import torch

from benchmarks import growth, growth_runs, markov, memory, sampling, startup, tokenizer, training
from benchmarks.models import image_flops, random_pipeline
from benchmarks.reference import check_checkout
from benchmarks.speed_picture import draw_growth, draw_sampling
from benchmarks.tables import lines, measured
from benchmarks.timing import (
    Stages,
    Worker,
    interleave,
    matmul_ceilings,
    median_stages,
    possible,
    ratios,
    spread,
    summary,
    undisturbed,
    without_gpus,
)
from evaluation.report import result
from var.presets import VAR_SAMPLING


def runs(*seconds, disturbed=()):
    return [
        {
            "seconds": s,
            "disturbed": i in disturbed,
            "foreign_share": 0.5 if i in disturbed else 0.0,
            "peak_mib": 10.0 * s,
        }
        for i, s in enumerate(seconds)
    ]


def test_disturbed_rounds_do_not_count():
    ours, theirs = runs(1.0, 2.0, 9.0, disturbed=[2]), runs(2.0, 6.0, 2.0)
    assert ratios("times", theirs, ours) == {"times": 2.5, "times_range": [2.0, 3.0]}
    assert [run["seconds"] for run in undisturbed(ours)] == [1.0, 2.0]
    assert summary(ours) == {"peak_rss_mib": 20.0, "foreign_share": 0.0, "rounds": 2, "disturbed": False}
    assert summary(runs(3.0, disturbed=[0]))["disturbed"]
    assert ratios("times", theirs[:1], runs(3.0, disturbed=[0])) == {}
    assert spread("x", [3.0, 1.0, 2.0]) == {"x": 2.0, "x_range": [1.0, 3.0]}


def test_stages_count_nested_calls_once():
    class Model:
        def outer(self):
            return self.inner() + 1

        def inner(self):
            return 1

    model, stages = Model(), Stages()
    stages.wrap(model, "outer", "outer")
    stages.wrap(model, "inner", "inner")
    assert model.outer() == 2
    taken = stages.take()
    assert list(taken) == ["outer"] and stages.take() == {}
    timed = [{"seconds": whole, "stages": {"a": part}} for whole, part in ((1.5, 1.0), (3.1, 3.0), (4.0, 2.0))]
    assert median_stages(timed) == {"a_s": 2.0, "rest_s": 0.5}


def doubling():
    def fail():
        raise ValueError("no such thing")

    def gpus():
        return {"visible": os.environ["CUDA_VISIBLE_DEVICES"]}

    return {"double": lambda x: {"made": 2 * x}, "fail": fail, "gpus": gpus}


def test_workers_answer_in_turns():
    with Worker(doubling, threads=1) as worker:
        worker.built()
        worker.begin()
        found = interleave({"one": (worker, "double", (1,)), "two": (worker, "double", (2,))}, 2, patience=0)
        assert [run["made"] for run in found["one"]] == [2, 2] and found["two"][0]["made"] == 4
        assert found["one"][0]["seconds"] == found["one"][0]["cpu_s"]  # one thread goes by its own clock
        with pytest.raises(ValueError, match="no such thing"):
            worker.call("fail")


def test_workers_see_no_gpu_and_the_process_itself_goes_on_seeing_them(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with Worker(doubling, threads=1) as worker:
        worker.built()
        assert worker.call("gpus")["visible"] == "" and os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with without_gpus():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize("native", [True, False])
def test_half_precision_is_left_out_where_it_is_emulated(native, monkeypatch, capsys):
    monkeypatch.setattr("tokenizer.precision.native_bfloat16", lambda: native)
    kept, left_out = possible(sampling.THEIRS | sampling.OURS)
    if native:
        assert list(kept) == [*sampling.THEIRS, *sampling.OURS] and not left_out
        return
    assert list(kept) == ["official_float32", "plain_float32", "fast_float32"] and "bfloat16" in left_out
    assert "left out: fast_bfloat16, official_autocast" in capsys.readouterr().out
    assert list(matmul_ceilings(size=16)["gflops"]) == ["float32"]


def test_table_shows_ranges():
    assert lines([{"a": 1.5, "a_range": [1.0, 2.0]}, {"b": "x"}], ["a", "b", "c"]).splitlines()[2:] == [
        "| 1.5 [1, 2] |  |",
        "|  | x |",
    ]


def test_flops_are_those_of_the_published_size():
    """VAR-d16: 585 GFLOP in linear layers and attention, 5.7 in the head once, 394 in the decoder."""
    with torch.device("meta"):
        flops = image_flops(random_pipeline("d16", "var256"))
    assert flops["blocks"] / 1e9 == pytest.approx(547.6 + 37.5 + 0.4, rel=0.01)
    assert flops["head"] / 1e9 == pytest.approx(11.4 / 2, rel=0.01)
    assert flops["decoder"] / 1e9 == pytest.approx(393.7, rel=0.01)


def test_exponents_of_a_power_law():
    names = ("seconds", "gflop", "linear_gflop", "attention_gflop", "peak_cache_mib")
    points = [{"x": x, **dict.fromkeys(names, 3 * x**2), "attention_gflop": x**4 / 12} for x in (2, 4, 8)]
    found = growth.exponents([{**points[0], "seconds": 100.0}, *points[1:]], growth.THEORY["side"])
    assert found["seconds_exponent"] < 0.5 and found["seconds_local_exponent"] == pytest.approx(2)
    assert found["attention_gflop_exponent"] == pytest.approx(4) == found["attention_gflop_theory"]
    assert "seconds_theory" not in found
    pair = "linear_gflop", "attention_gflop"
    assert growth.crossover(points, *pair) == growth.crossover(points[1:], *pair) == pytest.approx(6)
    assert growth.crossover(points[:2], *pair) == pytest.approx(6)  # beyond the points
    assert growth.crossover(points, "linear_gflop", "seconds") is None
    far = [{**point, "attention_gflop": point["attention_gflop"] / 1e3} for point in points]
    assert growth.crossover(far, *pair) is None  # at 190, where nothing is known


def test_attention_is_as_dear_as_linear_layers_at_a_thousand_pixels():
    """VAR-d16: 24 D^2 of linear layers a token, 4 D of attention a key: equal where a token reads 6 D = 6144 keys."""
    row = growth.published_crossover("d16", "all")
    assert row["attention_equals_linear_at_side"] == pytest.approx(1024, rel=0.03)
    assert growth.published_crossover("d16", "window 20%")["attention_equals_linear_at_side"] > 1200


def test_growth_runs(tmp_path, monkeypatch):
    def together(shape, processes, repeats):  # in this process: one alone
        run = growth_runs.drawing_jobs(shape, Barrier(1))["draw"](2)
        return {"wall_s": run["ended"] - run["began"], "images_per_s": processes**0.5}

    monkeypatch.setattr(growth, "together", together)
    out = tmp_path / "growth.json"
    words = ["--sides", "64,128", "--batches", "1,2", "--depths", "1,2", "--width", "64", "--depth", "1"]
    assert growth.main([*words, "--processes", "1,4", "--repeats", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    fits = {(row["curve"], row["cache"]): row for row in rows if "fit_over" in row}
    assert fits["batch", "all"]["gflop_exponent"] == pytest.approx(1)
    for cache in growth.CACHES:
        of_cache = fits["side", cache]
        assert 0 < of_cache["attention_share_of_seconds"] < 1
        assert (cache == "all") == (of_cache["peak_cache_mib_at_largest"] == max(r["peak_cache_mib"] for r in rows[:2]))
    assert [row["of_ideal"] for row in rows if row["curve"] == "processes" and "x" in row] == [1, 0.5]
    assert rows[-1]["images_per_s_exponent"] == pytest.approx(0.5) and rows[-1]["images_per_s_theory"] == 1
    assert out.with_suffix(".png").stat().st_size and out.with_suffix(".md").stat().st_size
    draw_growth(rows[:-3], tmp_path / "again.png")  # as on a GPU


def test_rows_of_attention_within_scales(tmp_path, monkeypatch, tiny_class_model):
    """The same weights under both masks; what is not stored is not counted, masked passes are."""
    monkeypatch.setattr(markov, "random_transformer", lambda size, schedule: deepcopy(tiny_class_model))
    assert markov.main(["--rounds", "1", "--device", "cpu", "--out", str(tmp_path / "markov.json")]) == 0
    rows = {row["row"]: row for row in json.loads((tmp_path / "markov.json").read_text())["rows"]}
    assert list(rows) == ["VAR", "HMAR, one pass a scale", "HMAR", "training step, VAR", "training step, HMAR"]
    assert rows["VAR"]["speed"] == 1 == rows["training step, VAR"]["speed"]
    assert rows["VAR"]["peak_cache_mib"] > 0 == rows["HMAR"]["peak_cache_mib"]
    assert rows["HMAR, one pass a scale"]["flops_ceiling"] > 1 > rows["HMAR"]["flops_ceiling"]
    assert (tmp_path / "markov.md").read_text().startswith("| row | seconds |")


def test_published_sizes_in_the_memory_benchmark():
    row = memory.published("d30", "var256", 64, 1)
    assert row["stored_of_official"] <= 0.42
    assert row["peak_mib"] == row["drawing_mib"]


@pytest.mark.parametrize("variant, decoded", [("plain", [1, 8]), ("layers", [8])])
def test_memory_of_a_device(variant, decoded):
    """On a CPU it is that of the whole process; what counts here is that every row is filled in."""
    rows = memory.on_device("d6", "1,2,3", 2, variant, torch.device("cpu"), width=32)
    assert [row["decode_batch"] for row in rows] == decoded
    plain = memory.row_of(*plan_and_tokenizer("d6", "1,2,3"), 2, torch.bfloat16, 8)
    assert (rows[-1]["weights_mib"] == plain["weights_mib"]) == (variant == "plain")
    gpu_only = {"reserved_drawing_mib", "reserved_decoding_mib", "kept_reserved_mib", "kept_allocated_mib"}
    assert set(memory.ON_GPU) - gpu_only <= set(rows[-1])


def plan_and_tokenizer(size, schedule):
    pipeline = random_pipeline(size, schedule, width=32)
    return pipeline.make_plan(**VAR_SAMPLING), pipeline.vqvae


def test_rows_of_sampling(tmp_path):
    timed = {name: [run | {"stages": {"blocks": 0.5}} for run in runs(2.0, 2.0)] for name in ("official_float32",)}
    timed["fast_bfloat16"] = [run | {"stages": {"blocks": 0.2}} for run in runs(1.0, 1.0)]
    rows = sampling.rows_of(timed, 2, 1e9, {"float32": 10.0, "bfloat16": 20.0})
    assert rows[1]["times_official_float32"] == 2 and rows[1]["images_per_s"] == 2
    assert rows[1]["share_of_ceiling"] == pytest.approx(2 / 20) and rows[1]["rest_s"] == pytest.approx(0.8)
    draw_sampling(rows, tmp_path / "speed.png", "d16")
    assert (tmp_path / "speed.png").stat().st_size


@pytest.mark.parametrize(
    "module, words, message",
    [
        (sampling, ["--size", "d7"], "--size must be one of d6, d8"),
        (sampling, ["--rounds", "1,2,3"], "--rounds must be one number a batch"),
        (sampling, ["--batches", "0"], "--batches must be whole numbers above 0"),
        (sampling, ["--reference", "nowhere"], "must be a checkout of FoundationVision/VAR: it has no dist.py"),
        (training, ["--batch", "0"], "--batch must be 1 or more, got 0"),
        (training, ["--reference", "nowhere"], "must be a checkout"),
        (tokenizer, ["--rounds", "0"], "--rounds must be 1 or more, got 0"),
        (training, ["--batch", "many"], "argument --batch: invalid int value: 'many'"),
        (startup, ["--load", "nowhere"], "--load must be a model folder, got nowhere"),
        (growth, ["--sides", "64,100"], "--sides must be two or more of 64, 128"),
        (growth, ["--repeats", "0"], "--repeats must be 1 or more, got 0"),
        (growth, ["--device", "abacus"], "device 'abacus' cannot be used"),
        (memory, ["--device", "abacus"], "device 'abacus' cannot be used"),
        (memory, ["--batches", "x"], "--batches must be whole numbers above 0"),
    ],
)
def test_mistakes_are_one_line(module, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error
    assert error.startswith(f"{module.parser_of().prog}: error: ") and error.count("\n") == 1


def test_an_interrupted_benchmark_writes_nothing_and_says_so(tmp_path, capsys):
    def interrupted(_: argparse.Namespace) -> dict:
        raise KeyboardInterrupt

    options = argparse.Namespace(out=tmp_path / "r.json")
    with pytest.raises(SystemExit) as stop:
        measured(argparse.ArgumentParser(prog="speed"), options, interrupted, ("x",))
    assert stop.value.code == 130 and not options.out.exists()
    assert capsys.readouterr().err.strip() == "speed: interrupted; nothing was written"


def naps():
    """Jobs of a worker that would be busy for long; what Ctrl-C does to it."""
    return {"nap": lambda: time.sleep(600) or {}, "ctrl_c": lambda: {"ignored": getsignal(SIGINT) is SIG_IGN}}


def test_workers_leave_ctrl_c_to_whoever_started_them_and_are_not_waited_for():
    before = getsignal(SIGINT)
    with pytest.raises(KeyboardInterrupt), Worker(naps, threads=1) as worker:
        assert getsignal(SIGINT) is before
        worker.built()
        assert worker.call("ctrl_c")["ignored"]
        worker.connection.send(("nap", ()))
        raise KeyboardInterrupt
    assert not worker.process.is_alive()


def test_help_says_what_is_overwritten(capsys):
    with pytest.raises(SystemExit):
        training.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "result and table (without it, results/training_cpu.json is overwritten)" in text


def test_a_checkout_is_told_by_its_files(tmp_path):
    for name in ("dist.py", "models/__init__.py", "models/var.py", "models/vqvae.py"):
        with pytest.raises(ValueError, match=f"it has no {name}"):
            check_checkout(tmp_path)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert check_checkout(tmp_path) == tmp_path


def test_without_matplotlib_the_result_stays(tmp_path, capsys):
    def lacking(content: dict, path: Path) -> None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    parser = argparse.ArgumentParser()
    options = argparse.Namespace(out=tmp_path / "r.json")
    made = lambda _: result([{"x": 1.0}], command="c", n=1, seeds=0)  # noqa: E731
    assert measured(parser, options, made, ("x",), lacking) == 0
    assert options.out.exists() and "needs matplotlib: pip install" in capsys.readouterr().err
