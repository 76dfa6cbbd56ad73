"""Scaling laws: the fits recover what is known, VAR's published laws among it."""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from threading import Barrier, Thread
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import nextscale
from evaluation.powerlaws import bootstrap_law, fit_power_law, fit_with_floor, frontier, held_out
from evaluation.scaling import (
    averaged,
    check,
    compute_frontier,
    law_row,
    laws_in_compute,
    laws_in_size,
    picture,
    points_of_run,
    read_points,
    weights_of,
    write_points,
)
from tokenizer.schedule import ScaleSchedule
from train.ladder import Ladder, Rung
from train.scaling import AT_WORK, climb, climb_all, tokens_of_a_step

# VAR, section 4.2: (scale, exponent) in billions of parameters, and in PFlops of training compute.
VAR_IN_N = {"L_last": (2.0, -0.23), "L_avg": (2.5, -0.20), "Err_last": (4.9e2, -0.016), "Err_avg": (6.5e2, -0.010)}
VAR_IN_C = {"L_last": (2.2e-5, -0.13), "L_avg": (1.5e-5, -0.16), "Err_last": (8.1e-2, -0.0067)}
VAR_SIZES = np.geomspace(0.0185, 2.0, 12)  # twelve models of 18.5 M to 2.0 B parameters


@pytest.mark.parametrize("name", VAR_IN_N)
def test_vars_published_laws_come_back_from_its_points(name):
    scale, exponent = VAR_IN_N[name]
    law = fit_power_law(VAR_SIZES, (scale * VAR_SIZES) ** exponent)
    assert law.exponent == pytest.approx(exponent, rel=1e-9) and law.scale == pytest.approx(scale, rel=1e-6)
    assert law.pearson == pytest.approx(-1)


@pytest.mark.parametrize("name", VAR_IN_C)
def test_vars_laws_in_compute_come_back_too(name):
    scale, exponent = VAR_IN_C[name]
    compute = np.geomspace(1e4, 1e10, 30)
    law = fit_power_law(compute, (scale * compute) ** exponent)
    assert (law.scale, law.exponent) == pytest.approx((scale, exponent), rel=1e-6)


def test_vars_exponent_comes_back_at_its_published_correlation():
    noise = np.random.default_rng(0).normal(size=12)
    log_y = -0.23 * np.log(2.0 * VAR_SIZES)
    points = np.exp(log_y + noise * log_y.std() * (1 / 0.998**2 - 1) ** 0.5)
    law = fit_power_law(VAR_SIZES, points)
    assert law.pearson == pytest.approx(-0.998, abs=0.002) and law.exponent == pytest.approx(-0.23, abs=0.01)
    low, high = bootstrap_law(VAR_SIZES, points, "power", resamples=300)["exponent"]
    assert low < -0.23 < high and high - low < 0.03
    assert abs(held_out(VAR_SIZES, points, "power")["error"]) < 0.05


@settings(max_examples=30)
@given(st.floats(0.1, 3), st.floats(-1.2, -0.1), st.floats(0, 3))
def test_a_floor_is_found(scale, exponent, floor):
    x = np.geomspace(0.1, 100, 9)
    y = (scale * x) ** exponent + floor
    law = fit_with_floor(x, y)
    assert law(x) == pytest.approx(y, rel=2e-3)
    assert law(1000.0) == pytest.approx((scale * 1000) ** exponent + floor, rel=0.05)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, inside, x = np.random.default_rng(1), 0, np.geomspace(1, 50, 8)
    for i in range(100):
        y = (2 * x) ** -0.3 * np.exp(rng.normal(0, 0.01, 8))
        low, high = bootstrap_law(x, y, "power", resamples=200, seed=i)["exponent"]
        inside += low <= -0.3 <= high
    assert inside / 100 == pytest.approx(0.93, abs=0.07)


@pytest.mark.parametrize("sizes, least", [(4, 0.9), (6, 0.9)])
def test_intervals_of_few_sizes_are_wide_enough(sizes, least):
    x, covered = np.geomspace(1, 100, sizes), 0
    for seed in range(60):
        y = x**-0.2 * np.exp(0.01 * np.random.default_rng(seed).normal(size=sizes))
        low, high = bootstrap_law(x, y, "power", resamples=200, seed=seed)["exponent"]
        covered += low <= -0.2 <= high
    assert covered / 60 >= least


def test_laws_need_no_loss():
    points = [{**p, "fd_scenes": 100 * p["parameters"] ** -0.2} for p in ladder_points()]
    for point in points:
        for name in ("loss", "loss_last", "error", "error_last", "compute"):
            point.pop(name, None)
    assert any("points without compute" in line for line in check(points))
    assert {row["figure"] for row in laws_in_size(points, resamples=0)} == {"fd_scenes"}


def test_the_held_out_point_is_not_looked_at():
    x = [1.0, 2, 4, 8, 16, 16]
    y = [(2 * v) ** -0.5 for v in x[:4]] + [0.5, 0.7]
    found = held_out(x, y, "power")
    assert found["measured"] == pytest.approx(0.6) and found["predicted"] == pytest.approx(32**-0.5)
    assert found["error"] == pytest.approx(32**-0.5 / 0.6 - 1)


def test_the_frontier_is_what_nothing_cheaper_beats():
    assert frontier([1, 2, 3, 4, 4], [5, 6, 4, 3, 2]) == [0, 2, 4]


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        ([1, 2], [1, 2], "3 different x"),
        ([1, 2, 3], [1, 2], "one y for each x"),
        ([1, 2, 3], [1, 0, 2], "positive"),
        ([1, 2, 3], [1, float("nan"), 2], "positive and finite"),
    ],
)
def test_mistakes_are_named(x, y, said):
    with pytest.raises(ValueError, match=said):
        fit_power_law(x, y)


# ------------------------------------------------------------------------------------------------------------- ladders


def ladder_points(noise: float = 0.0) -> list[dict]:
    """Seven sizes on a known law in size, each on a known curve in compute; two seeds of the smallest."""
    rng, points = np.random.default_rng(0), []
    for size, seed in [(1e5 * 3**i, 0) for i in range(7)] + [(1e5, 1)]:
        for images in (2000, 8000, 32000):
            loss = (2.0 * size / 1e9) ** -0.2 * (1 + 500 / images) * np.exp(noise * rng.normal())
            point = {"run": f"n{size:.0f}-{seed}", "parameters": size, "images": images, "final": int(images == 32000)}
            point |= {"seed": seed, "compute": 6 * size * images * 155, "loss": loss, "loss_last": loss * 0.8}
            points.append(point)
    return points


def test_the_laws_of_a_ladder_come_back():
    rows = laws_in_size(ladder_points(), resamples=0)
    assert [(row["figure"], row["form"]) for row in rows[:2]] == [("loss", "power"), ("loss", "floor")]
    assert rows[0]["exponent"] == pytest.approx(-0.2) and rows[0]["points"] == 7
    assert rows[0]["pearson"] == pytest.approx(-1) and abs(rows[0]["largest_error"]) < 1e-6
    assert abs(rows[1]["largest_error"]) < 0.01
    assert rows[0]["largest_measured"] == averaged(ladder_points(), "loss")[1][-1]
    assert rows[0]["scale"] == pytest.approx(2.0 * (1 + 500 / 32000) ** -5)  # sizes are in billions
    optimal = laws_in_compute(ladder_points(), resamples=0)
    assert {row["figure"] for row in optimal} >= {"loss", "loss_last", "optimal parameters for loss"}
    assert all(-0.3 < row["exponent"] < 0 for row in optimal if row["form"] == "power" and row["figure"] == "loss")


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_laws_are_of_what_can_be_fitted():
    """A floor is a third number, and needs a size more; what is 0 somewhere has no logarithm."""
    points = [point for point in ladder_points() if point["parameters"] <= 3e6]
    assert {(row["figure"], row["form"]) for row in laws_in_size(points, resamples=0)} == {
        ("loss", "power"),
        ("loss_last", "power"),
    }
    points = [{**point, "loss_last": 0.0} if point["parameters"] < 2e5 else point for point in ladder_points()]
    assert {row["figure"] for row in laws_in_size(points, resamples=0)} == {"loss"}
    flat = law_row([1.0, 2.0, 4.0, 8.0], [3.0] * 4, "power", 0)  # without a correlation
    assert all(np.isfinite(value) for name, value in flat.items() if name != "law") and "pearson" not in flat


def test_laws_in_compute_are_those_of_the_frontier():
    """In PFLOPs, of all four figures, with the size that is optimal; few checkpoints on the frontier give none."""
    points = [{**p, "error": p["loss"] / 9, "error_last": p["loss"] / 8, "fd_scenes": 1.0} for p in ladder_points()]
    found = {(row["figure"], row.get("form")): row for row in laws_in_compute(points, resamples=0)}
    for figure in ("loss", "loss_last", "error", "error_last"):
        best = compute_frontier(points, figure)
        compute, sizes = ([point[name] for point in best] for name in ("compute", "parameters"))
        law = fit_power_law(np.array(compute) / 1e15, [point[figure] for point in best])
        row = found[figure, "power"]
        assert (row["exponent"], row["scale"]) == pytest.approx((law.exponent, law.scale))
        optimal = found[f"optimal parameters for {figure}", "power"]
        slope = np.polyfit(np.log(compute), np.log(sizes), 1)[0]
        assert optimal["exponent"] == pytest.approx(slope, rel=1e-6)
    assert not any("fd_scenes" in figure for figure, _ in found)
    assert laws_in_compute(points[:3], resamples=0) == []  # of one size


def test_runs_of_one_size_are_averaged():
    points = ladder_points()
    twice = [*points, *({**point, "run": "other", "loss": 3 * point["loss"]} for point in points)]
    assert averaged(twice, "loss")[1] == pytest.approx(2 * averaged(points, "loss")[1])


def test_points_go_out_and_come_in(tmp_path):
    points = ladder_points()
    write_points(tmp_path / "p.csv", points)
    assert read_points(tmp_path / "p.csv") == points
    sizes, values = averaged(points, "loss")
    assert len(sizes) == 7 and values[0] == pytest.approx(points[2]["loss"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run,images,final\na,1,1\n", "lacks parameters"),
        ("run,parameters,images,final\na,many,1,1\n", "line 2: parameters must be a number, got 'many'"),
        ("run,parameters,images,final\na,,1,1\n", "line 2 has no parameters"),
        ("run,parameters,images,final\na,0,1,1\n", "line 2: parameters must be above 0"),
        ("run,parameters,images,final\na,1,1,1,7\n", "line 2 has more cells than there are columns"),
        ("run,parameters,images,final,loss\na,9,1,1,-2\n", "line 2: loss must be a finite number, 0 or more, got -2"),
        ("run,parameters,images,final,loss\na,9,1,1,nan\n", "line 2: loss must be a finite number"),
    ],
)
def test_bad_tables_are_named(tmp_path, text, said):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_points(tmp_path / "p.csv")


def test_short_and_unconverged_ladders_are_noticed():
    points = ladder_points()
    assert [line for line in check(points) if "not annealed" not in line] == []
    few = [point for point in points if point["parameters"] <= 3e6]
    assert "4 sizes over a factor of 27" in " ".join(check(few))
    near = [point | {"parameters": point["parameters"] ** 0.5} for point in points]
    assert "7 sizes over a factor of 27: exponents need 6 over 30 or more" in " ".join(check(near))
    points[-4]["loss"] = 99.0
    largest = points[-4]["parameters"]
    assert f"the model of {largest:.3g} parameters is worse than a smaller one" in " ".join(check(points))
    with pytest.raises(ValueError, match="laws need 4 sizes or more, and the final points have 2"):
        check([point for point in points if point["parameters"] < 5e5])


def test_points_are_read_from_a_run(tmp_path):
    rows = [{"kind": "train", "step": 1, "images": 8, "loss": 9}]
    for step, loss in ((1, 4.0), (2, 3.5), (2, 3.0)):  # of all scales by a mean over tokens, whatever was trained on
        figures = {"loss": 99.0, "accuracy": 0.25, "loss_1x1": loss, "loss_4x4": loss / 2, "accuracy_1x1": 0.5}
        figures |= {"loss_depth2": 7.0, "accuracy_depth2": 0.0}  # a supernet's, after those of the scales
        rows.append({"kind": "validation", "step": step, "images": 8 * step, **figures, "accuracy_4x4": 0.125})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    points = points_of_run(tmp_path, tokens_per_image=21, parameters=100, seed=3)
    assert [(p["images"], p["loss"], p["final"]) for p in points] == [(8, 36 / 17, 0), (16, 27 / 17, 1)]
    assert points[1] | {"run": ""} == {
        **{"run": "", "parameters": 100, "images": 16, "final": 1, "seed": 3, "compute": 6 * 100 * 16 * 21},
        **{"loss": 27 / 17, "loss_last": 1.5, "error": 0.75, "error_last": 0.875},
    }
    with pytest.raises(FileNotFoundError, match="no validation"):
        points_of_run(tmp_path / "none", tokens_per_image=1, parameters=1)
    row = {"kind": "validation", "step": 1, "images": 8, "loss": 1.0, "accuracy": 0.5, "kl_1x1": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="has no loss by scale"):
        points_of_run(tmp_path, tokens_per_image=1, parameters=1)


def test_a_step_of_coarse_scales_costs_less(tmp_path):
    schedule = ScaleSchedule.of("1,2,4")
    for progressive, tokens in (({}, 21), ({"coarse": 2, "coarse_share": 0.75}, 0.75 * 5 + 0.25 * 21)):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"progressive": progressive}))
        assert tokens_of_a_step(tmp_path, schedule) == tokens
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"progressive": {"until": 0.5}}))
    with pytest.raises(ValueError, match=r"progressive\.until"):
        tokens_of_a_step(tmp_path, schedule)


def test_weights_are_counted_from_headers(tiny_class_model, tmp_path):
    tiny_class_model.save_pretrained(tmp_path)
    assert weights_of(tmp_path) == sum(p.numel() for p in tiny_class_model.parameters())


def test_the_shipped_ladder_is_long_enough():
    ladder = Ladder.read(Path(nextscale.__file__).parent / "configs/scaling/scenes.yaml")
    sizes = {(r.flags["transformer.depth"], r.flags["transformer.width"]) for r in ladder.rungs}
    weights = [depth * width**2 for depth, width in sizes]
    assert len(sizes) >= 6 and max(weights) / min(weights) >= 30
    assert len({r.name for r in ladder.rungs}) == len(ladder.rungs) > len(sizes)
    first = ladder.training(ladder.rungs[1])
    assert "--run.seed=1" in first and "--transformer.width=64" in first and "train.train_var" in first


def test_a_dry_run_needs_no_tokenizer(monkeypatch, tmp_path, capsys):
    root = Path(nextscale.__file__).parent
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(root / "configs")
    assert nextscale.main(["scaling", "--config", "configs/scaling/scenes.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "d2-w64-s0: size unknown, tokens.tokenizer" in said and "train.train_var" in said


def test_points_made_elsewhere_are_fitted(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write_points("p.csv", ladder_points(0.01))
    assert nextscale.main(["scaling", "--csv", "p.csv", "--bootstrap", "20", "--out", "r/s.json"]) == 0
    content = json.loads(Path("r/s.json").read_text())
    row = content["rows"][0]
    assert row["exponent_ci95"][0] < row["exponent"] < row["exponent_ci95"][1] and content["n"] == 8
    assert "not annealed" in capsys.readouterr().err and Path("r/s.png").is_file() and Path("r/s.csv").is_file()
    picture(ladder_points(), "again.png")


@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
@pytest.mark.parametrize("values", [[0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.0], [0.25] * 7])
def test_a_figure_no_law_goes_through_spoils_no_other(tmp_path, monkeypatch, capsys, values):
    """One that falls to 0, as an error may, or that does not change; and the file that was read stays as it is."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    points = ladder_points(0.01)
    sizes = sorted({point["parameters"] for point in points})
    write_points("p.csv", [{**p, "error_last": values[sizes.index(p["parameters"])]} for p in points])
    before = Path("p.csv").read_bytes()
    assert nextscale.main(["scaling", "--csv", "p.csv", "--bootstrap", "0", "--out", "p.json"]) == 0
    figures = {row["figure"] for row in json.loads(Path("p.json").read_text())["rows"] if row["form"] == "floor"}
    assert figures == {"loss", "loss_last"} and "no law of error_last" in capsys.readouterr().err
    assert Path("p.png").is_file() and Path("p.csv").read_bytes() == before


def test_points_without_an_end_are_named():
    with pytest.raises(ValueError, match="points must be final"):
        check([{**point, "final": 0} for point in ladder_points()])


def test_several_runs_at_once_and_the_first_failure_ends_it(tmp_path, monkeypatch):
    ladder = Ladder(Path("base.yaml"), tmp_path, [], {}, [Rung(f"r{i}", 0, {}) for i in range(5)])
    barrier, climbed = Barrier(2, timeout=20), []

    def climb(_, rung):
        climbed.append(rung.name)
        if rung.name in ("r4", "r3"):
            barrier.wait()  # both are there at once
        return 3 if rung.name == "r2" else 0

    monkeypatch.setattr("train.scaling.climb", climb)
    assert climb_all(ladder, 2) == 3
    assert climbed[:2] in (["r4", "r3"], ["r3", "r4"]) and "r2" in climbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_ladder_begins_no_other_run(tmp_path, number):
    """SIGTERM is passed on to the runs at work, which Ctrl-C reaches from the terminal."""
    begun, before = tmp_path / "begun", signal.signal(signal.SIGINT, signal.default_int_handler)  # else of `pytest &`
    program = "import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); print('x', file=open(sys.argv[1], 'a'))\n"
    program += "signal.pause() if sys.argv[2] == '15' else __import__('time').sleep(2)"
    ladder = SimpleNamespace(
        rungs=[Rung(f"r{i}", 0, {}) for i in range(3)],
        training=lambda rung: [sys.executable, "-c", program, str(begun), str(int(number))],
        training_words=lambda rung: [],
        run_folder=lambda rung: tmp_path / rung.name,
        per_tag=0,
    )

    def stop() -> None:
        end = time.monotonic() + 60
        while not begun.exists() and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    Thread(target=stop).start()
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        climb_all(ladder, 1)
    signal.signal(signal.SIGINT, before)
    assert begun.read_text() == "x\n" and not AT_WORK


def toy_ladder(folder: Path, *, heads: int = 2, per_tag: int = 0, **evaluate) -> Path:
    """A ladder of one rung."""
    model = {"depth": 4, "width": 64, "heads": heads}
    content = {"base": "base.yaml", "folder": str(folder / "runs"), "models": [model], "launch": "true"}
    path = folder / "ladder.yaml"
    path.write_text(yaml.dump({**content, "per_tag": per_tag, "evaluate": evaluate}))
    return path


def test_a_flag_of_nothing_is_written_as_yaml_has_it(tmp_path):
    ladder = Ladder(Path("base.yaml"), tmp_path, [], {"run.micro_batch": None}, [Rung("r", 0, {"tokens.cache": None})])
    assert {"--run.micro_batch=null", "--tokens.cache=null"} <= {*ladder.training_words(ladder.rungs[0])}


def test_finished_rungs_of_other_settings_are_not_mixed_in(tmp_path, monkeypatch, capsys):
    done = []
    monkeypatch.setattr("train.scaling.launch", lambda words: done.append(words) or 0)
    ladder = Ladder.read(toy_ladder(tmp_path, per_tag=1, seed=3))
    run = ladder.run_folder(ladder.rungs[0])
    assert climb(ladder, ladder.rungs[0]) == 0 and len(done) == 2
    (run / "evaluation.json").write_text("{}")
    ladder.check_finished()
    assert climb(ladder, ladder.rungs[0]) == 0 and len(done) == 2
    for more in ([], ["--fit-only"]):
        words = ["scaling", "--config", str(toy_ladder(tmp_path, heads=4, per_tag=1, seed=3)), *more]
        assert nextscale.main(words) == 2 and len(done) == 2
        error = capsys.readouterr().err
        assert (
            "d4-w64-s0/done is of a run with --transformer.heads=2, and the ladder says --transformer.heads=4" in error
        )
    with pytest.raises(ValueError, match=r"evaluated is of a run with --seed=3, and the ladder says --seed=4"):
        Ladder.read(toy_ladder(tmp_path, per_tag=1, seed=4)).check_finished()
    words = (run / "done").read_text().split()
    (run / "done").write_text(" ".join(reversed(words)))  # the order decides nothing
    ladder.check_finished()
    (run / "done").write_text("")  # as before commands were kept
    (run / "evaluated").unlink()
    Ladder.read(toy_ladder(tmp_path, heads=4, per_tag=1, seed=4)).check_finished()


def test_two_rungs_of_one_name_are_named(tmp_path):
    path = toy_ladder(tmp_path)
    content = yaml.safe_load(path.read_text())
    content["models"].append({"depth": 4, "width": 64, "heads": 4})
    path.write_text(yaml.dump(content))
    with pytest.raises(ValueError, match=r"heads': 2.* and .*heads': 4.* are both called d4-w64-s0"):
        Ladder.read(path)


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_ladder_of_too_few_sizes_is_refused_before_it_trains(tmp_path, monkeypatch, capsys, more):
    monkeypatch.setattr("train.scaling.climb_all", lambda *_: pytest.fail("trained"))
    path = toy_ladder(tmp_path)
    content = yaml.safe_load(path.read_text())
    content["models"] += [{"depth": depth, "width": 64, "heads": 2, "seeds": [0, 1]} for depth in (5, 6)]
    path.write_text(yaml.dump(content))
    assert nextscale.main(["scaling", "--config", str(path), *more]) == 2
    assert "models must be of 4 sizes or more to fit a law, got 3" in capsys.readouterr().err
    content["models"].append({"depth": 7, "width": 64})
    path.write_text(yaml.dump(content))
    assert nextscale.main(["scaling", "--config", str(path), *more]) == 2
    assert "base.yaml does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"models": [3]}, "models must be like {depth: 4, width: 128}, got 3"),
        ({"models": {"depth": 4}}, "models must be a list of sizes, got {'depth': 4}"),
        ({"models": [{"depth": 4, "width": 64, "seeds": 2}]}, "seeds of a model must be a list of numbers, got 2"),
        ({"launch": 3}, "launch must be a command, got 3"),
        ({"flags": ["run.keep"]}, "flags must be options, got ['run.keep']"),
    ],
)
def test_entries_of_another_kind_are_named(tmp_path, capsys, change, said):
    path = toy_ladder(tmp_path)
    path.write_text(yaml.dump({**yaml.safe_load(path.read_text()), **change}))
    assert nextscale.main(["scaling", "--config", str(path), "--dry-run"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "give one of --config"),
        ("--csv nowhere.csv", "nowhere.csv does not exist"),
        ("--config nowhere.yaml", "nowhere.yaml does not exist"),
        ("--csv x --out x.png", "--out must be a .json file"),
    ],
)
def test_mistakes_of_the_command_are_one_line(words, said, capsys):
    assert nextscale.main(["scaling", *words.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and said in error[0]


@pytest.mark.slow
def test_a_toy_ladder_is_trained_and_fitted(tmp_path, monkeypatch):
    from tokenizer.model import MultiScaleVQ

    shape = {"channels": [8, 8], "layers_per_block": 1, "attention": False, "norm_groups": 4}
    MultiScaleVQ(**shape, latent_channels=4, vocab_size=16, schedule="1,2,4").save_pretrained(tmp_path / "vqvae")
    run = {"total_images": 64, "batch_size": 16, "validate_every": 2, "validation_images": 16, "previews": 0}
    base = {
        "run": {**run, "workers": 0, "cpu": True},
        "data": {"source": "scenes", "size": 8, "num_scenes": 400},
        "tokens": {"tokenizer": str(tmp_path / "vqvae")},
        "transformer": {"heads": 1},
    }
    (tmp_path / "base.yaml").write_text(yaml.dump(base))
    models = [{"depth": 1, "width": 8 * 2**i} for i in range(4)]
    ladder = {"base": str(tmp_path / "base.yaml"), "folder": str(tmp_path / "runs"), "models": models}
    (tmp_path / "ladder.yaml").write_text(yaml.dump(ladder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [
        "scaling",
        "--config",
        str(tmp_path / "ladder.yaml"),
        "--bootstrap",
        "5",
        "--out",
        str(tmp_path / "s.json"),
    ]
    assert nextscale.main(words) == 0
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["n"] == 4 and content["settings"]["points"] == 8
    assert nextscale.main([*words, "--fit-only"]) == 0


def test_the_size_of_a_class_model_is_that_of_its_data(tmp_path):
    """Of the cache's classes; the tokenizer may be named by its run."""
    from tokenizer.model import MultiScaleVQ
    from train.scaling import rung_size
    from var.transformer import NextScaleTransformer

    shape = {"channels": [8, 8], "layers_per_block": 1, "attention": False, "norm_groups": 4}
    tokens = {"latent_channels": 4, "vocab_size": 16, "schedule": "1,2,4"}
    MultiScaleVQ(**shape, **tokens).save_pretrained(tmp_path / "run" / "latest" / "vqvae")
    (tmp_path / "cache" / "train").mkdir(parents=True)
    (tmp_path / "cache" / "train" / "manifest.json").write_text('{"num_classes": 5}')
    ladder = Ladder.read(toy_ladder(tmp_path))
    base = {
        "tokens": {"tokenizer": str(tmp_path / "run"), "cache": str(tmp_path / "cache")},
        "transformer": {"heads": 1},
    }
    (tmp_path / "base.yaml").write_text(yaml.dump(base))
    ladder = dataclasses.replace(ladder, base=tmp_path / "base.yaml")
    made = NextScaleTransformer(depth=4, width=64, heads=2, num_classes=5, **tokens)
    assert rung_size(ladder, ladder.rungs[0]) == sum(p.numel() for p in made.parameters())


def test_the_size_of_a_bitwise_model_is_that_of_its_patches(tmp_path):
    from tokenizer.model import MultiScaleVQ
    from train.scaling import rung_size
    from var.transformer import NextScaleTransformer

    shape = {"channels": [8, 8], "layers_per_block": 1, "attention": False, "norm_groups": 4}
    tokens = {"latent_channels": 6, "bitwise": True, "token_patch": 2, "schedule": "1,2,4"}
    vqvae = MultiScaleVQ(**shape, **tokens)
    vqvae.save_pretrained(tmp_path / "run" / "vqvae")
    ladder = Ladder.read(toy_ladder(tmp_path))
    base = {"tokens": {"tokenizer": str(tmp_path / "run")}, "data": {"num_classes": 5}, "transformer": {"heads": 1}}
    (tmp_path / "base.yaml").write_text(yaml.dump(base))
    ladder = dataclasses.replace(ladder, base=tmp_path / "base.yaml")
    own = {"latent_channels": vqvae.quantizer.channels, "vocab_size": 2, "bitwise": True, "schedule": "1,2,4"}
    made = NextScaleTransformer(depth=4, width=64, heads=2, num_classes=5, **own)
    assert rung_size(ladder, ladder.rungs[0]) == sum(p.numel() for p in made.parameters())
