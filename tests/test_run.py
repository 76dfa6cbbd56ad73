"""`evaluation.run`: one pass over a class model, in shards, the same for any number of processes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training_toys import in_processes

import nextscale
from evaluation import run
from evaluation.compare import _left_out, compare_works
from evaluation.shards import has_column, networks_in, read_column, read_described, shard_paths

ROOT = Path(__file__).parent.parent


def words(folder: Path, work: Path, *more: str) -> list[str]:
    """10 images of 5 classes in shards of 3."""
    chosen = ["--model", str(folder), "--suite", "classes", "--per-class", "2", "--shard", "3", "--batch-size", "2"]
    return [*chosen, "--device", "cpu", "--bootstrap", "3", "--work", str(work), "--out", f"{work}.json", *more]


def ended(arguments: list[str]) -> int:
    """The exit code of a command that does not come to its end."""
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    return stop.value.code


def measured(work: Path) -> dict:
    return json.loads(Path(f"{work}.json").read_text())


def in_one_of_many(arguments: list[str]) -> None:
    from accelerate import PartialState

    PartialState._reset_state()
    assert run.main(arguments) == 0


@pytest.fixture(scope="module")
def alone(class_folder, tmp_path_factory) -> Path:
    """The work folder of one process."""
    work = tmp_path_factory.mktemp("run") / "one"
    assert run.main(words(class_folder, work, "--npz", f"{work}.npz")) == 0
    return work


def test_the_result_says_what_was_measured_and_what_may_mislead(alone):
    content = measured(alone)
    assert content["n"] == 10 and content["rows"][0]["is_scenes"] > 1
    assert {"extractors", "sampling", "model_digest", "per_class"} <= content["settings"].keys()
    assert content["settings"]["per_class"] == 2 and not content["settings"]["cautions"]  # as many of every class
    assert "accelerate launch -m evaluation.run --model" in content["command"]
    paths = shard_paths(alone)
    assert len(paths) == 4 and networks_in(paths) == ["scenes"]
    labels, seeds = read_column(paths, "labels"), read_column(paths, "seeds")
    assert sorted(seeds) == list(range(10)) and (labels == seeds // 2).all() and (np.diff(labels) < 0).any()
    assert read_described(paths, "scenes").features.shape == (10, 128)


def test_images_are_kept_in_the_order_of_their_features(alone):
    with np.load(f"{alone}.npz") as archive:
        images = archive["arr_0"]
    assert images.shape == (10, 8, 8, 3)
    from hashlib import blake2b

    digests = [blake2b(image.tobytes(), digest_size=12).hexdigest() for image in images]
    assert digests == read_column(shard_paths(alone), "digests").tolist()


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_processes_gives_the_same(alone, class_folder, tmp_path, count):
    work = tmp_path / "many"
    assert in_processes(count, in_one_of_many, words(class_folder, work)) == [0] * count
    assert measured(work)["rows"] == measured(alone)["rows"] and measured(work)["settings"]["processes"] == count
    for one, other in zip(shard_paths(alone), shard_paths(work), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_finished_shards_are_kept(alone, class_folder, tmp_path, capsys, monkeypatch):
    work, drawn = tmp_path / "work", []
    make_shard = run.Generation.make_shard

    def dying(self, number):
        drawn.append(number)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        make_shard(self, number)

    monkeypatch.setattr(run.Generation, "make_shard", dying)
    assert ended(words(class_folder, work)) == 130
    assert "goes on with the finished shards" in capsys.readouterr().err and len(shard_paths(work)) == 2
    assert run.main(words(class_folder, work)) == 0
    assert drawn == [0, 1, 2, 2, 3]
    assert measured(work)["rows"] == measured(alone)["rows"]
    assert ended(words(class_folder, work, "--temperature", "0.5")) == 2
    assert "sampling" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--suite", "cifar10"], "--suite cifar10 has 10 classes"),
        (["--per-class", "0"], "--per-class must be 1 or more, got 0"),
        (["--bootstrap", "1"], "--bootstrap must be 0 (no intervals) or 2 and more, got 1"),
        (["--metrics", "fid"], "fid needs --reference"),
        (["--npz", "a.png"], "--npz must be a .npz file"),
        (["--metrics", "is-scenes,clip-score"], "clip-score needs prompts, and --suite classes draws classes"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(class_folder, tmp_path, more, said, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ended(words(class_folder, tmp_path / "w", *more)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and said in error[0]


def test_text_models_and_other_sizes_are_refused(text_folder, class_folder, tmp_path, capsys, monkeypatch):
    assert ended(words(text_folder, tmp_path / "w")) == 2
    assert "needs a class model" in capsys.readouterr().err
    monkeypatch.setitem(run.SUITES, "classes", run.Suite(5, 2, 16))
    assert ended(words(class_folder, tmp_path / "w")) == 2
    assert "is of 16x16 images" in capsys.readouterr().err


def test_features_of_who_knows_what_are_not_taken(alone, class_folder, tmp_path, capsys):
    shutil.copytree(alone, tmp_path / "work")
    (tmp_path / "work/settings.json").unlink()
    assert ended(words(class_folder, tmp_path / "work")) == 2
    assert "says what made it: choose another --work" in capsys.readouterr().err


def test_damaged_shards_are_named(alone, tmp_path):
    path = tmp_path / "features" / "000000.npz"
    path.parent.mkdir()
    path.write_bytes(shard_paths(alone)[0].read_bytes())
    with pytest.raises(ValueError, match=r"000000\.npz has no readable inception\.features"):
        read_column([path], "inception.features")
    path.write_bytes(path.read_bytes()[:-40])
    for read in (lambda: read_column([path], "seeds"), lambda: networks_in([path]), lambda: has_column([path], "x")):
        with pytest.raises(ValueError, match=r"000000\.npz .*remove it and run again"):
            read()
    with pytest.raises(FileNotFoundError, match="holds no features"):
        shard_paths(tmp_path / "nothing")


def test_two_models_are_compared_under_common_seeds(alone, class_folder, tmp_path, capsys):
    other = tmp_path / "sharp"
    assert run.main(words(class_folder, other, "--temperature", "0.3")) == 0
    assert nextscale.main(["compare", str(alone), str(other), "--out", str(tmp_path / "c.json")]) == 0
    row = json.loads((tmp_path / "c.json").read_text())["rows"][0]
    low, high = row["fd_scenes_difference_ci95"]
    assert row["n"] == 10 and low < row["fd_scenes_a"] - row["fd_scenes_b"] < high
    assert "fd_scenes differs by" in capsys.readouterr().out
    assert nextscale.main(["compare", str(alone), str(alone)]) == 0
    assert "no difference is shown" in capsys.readouterr().out
    assert nextscale.main(["compare", str(alone), "nowhere"]) == 2
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["settings"]["a"]["suite"] == "classes" and content["seeds"] == [0]
    assert any("pairs are few" in line for line in content["settings"]["cautions"])


def test_unfinished_runs_are_compared_with_a_caution(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "part")
    shards = shard_paths(tmp_path / "part")
    assert not _left_out(alone, shard_paths(alone), 10, 10)
    shards.pop().unlink()  # of one image
    assert _left_out(tmp_path / "part", shards, 9, 9) == [
        f"caution: {tmp_path / 'part'} has 9 of 10 images: its run is not finished"
    ]
    assert _left_out(alone, shard_paths(alone), 10, 9) == [
        f"caution: 1 of 10 images of {alone} have no partner in the other, and are left out"
    ]
    settings = json.loads((tmp_path / "part/settings.json").read_text())
    del settings["count"]  # as before it was kept
    (tmp_path / "part/settings.json").write_text(json.dumps(settings))
    shards.pop(1)
    assert "has no shard 000001: its run is not finished" in _left_out(tmp_path / "part", shards, 6, 6)[0]


def test_a_text_model_is_judged_and_compared_by_its_score(text_folder, tmp_path, capsys):
    for name, more in (("a", []), ("b", ["--temperature", "0.4"])):
        chosen = words(text_folder, tmp_path / name, "--suite", "scenes", "--metrics", "is-scenes", *more)
        assert run.main(chosen) == 0
    content = measured(tmp_path / "a")
    assert content["n"] == 12 and 0 <= content["rows"][0]["overall"] <= 1
    assert read_column(shard_paths(tmp_path / "a"), "correct").shape == (12,)
    capsys.readouterr()
    assert nextscale.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "score differs by" in capsys.readouterr().out


def without_prompts(work: Path) -> None:
    """Shards as they were before digests of prompts were kept."""
    for path in shard_paths(work):
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files if name != "prompts"}
        np.savez(path, **arrays)


def test_only_images_of_one_prompt_are_paired(text_folder, tmp_path, capsys):
    for name, per_tag in (("a", "2"), ("more", "3")):
        chosen = words(text_folder, tmp_path / name, "--suite", "scenes", "--per-class", per_tag)
        assert run.main([*chosen, "--metrics", "is-scenes"]) == 0
    a, more = tmp_path / "a", tmp_path / "more"
    prompts = [dict(zip(*(read_column(shard_paths(w), n) for n in ("seeds", "prompts")))) for w in (a, more)]
    alike = [seed for seed, prompt in prompts[0].items() if prompts[1].get(seed) == prompt]
    assert 0 < len(alike) < 12
    with pytest.raises(ValueError, match=f"got {len(alike)} and {len(alike)}"):
        compare_works(a, more, None)
    without_prompts(a)
    with pytest.raises(ValueError, match=r"is of per_class 2 and .* of 3: they cannot be paired; no digests"):
        compare_works(a, more, None)
    copy = shutil.copytree(a, tmp_path / "copy")
    assert compare_works(a, copy, None)[0]["n"] == 12  # the same requests: paired by seed
    (copy / "settings.json").unlink()
    assert nextscale.main(["compare", str(a), str(copy)]) == 2
    assert "do not say which prompts" in capsys.readouterr().err


def test_runs_without_a_common_image_are_not_compared(alone, class_folder, tmp_path):
    assert run.main(words(class_folder, tmp_path / "other", "--seed", "1000")) == 0
    with pytest.raises(ValueError, match="got 0 and 0"):
        compare_works(alone, tmp_path / "other", None)


def test_settings_that_cannot_be_leave_nothing_behind(class_folder, tmp_path, capsys):
    work, npz = tmp_path / "work", tmp_path / "images.npz"
    assert ended(words(class_folder, work, "--npz", str(npz), "--top-p", "7")) == 2
    assert "top_p" in capsys.readouterr().err and not work.exists() and not list(tmp_path.glob("images*"))


def test_runs_of_other_suites_and_extractors_are_not_compared(alone, tmp_path):
    for name, other in (("suite", "cifar10"), ("extractors", {"scenes": "0", "clip": "1"})):
        work = shutil.copytree(alone, tmp_path / name)
        settings = json.loads((work / "settings.json").read_text())
        (work / "settings.json").write_text(json.dumps({**settings, name: other}))
        with pytest.raises(ValueError, match=f"is of {name} .*cannot be paired"):
            compare_works(alone, work, None)


def stored(folder, shift, **columns):
    """A work folder of twelve images with features of two networks; its path."""
    rng = np.random.default_rng(shift)
    arrays = {"labels": np.zeros(12, int), "seeds": np.arange(12), **columns}
    for network, width in (("inception", 3), ("dinov2", 5)):
        arrays[f"{network}.features"] = rng.normal(shift, size=(12, width)).astype(np.float32)
        arrays[f"{network}.log_posterior"] = np.zeros((12, 0), np.float32)
    (folder / "features").mkdir(parents=True)
    np.savez(folder / "features" / "000000.npz", **arrays)
    return folder


def test_a_reference_serves_the_network_it_is_of(tmp_path):
    works = stored(tmp_path / "x" / "work", 0), stored(tmp_path / "y" / "work", 1)
    np.savez(tmp_path / "reference.npz", mu=np.zeros(3), sigma=np.eye(3))
    row, said = compare_works(*works, tmp_path / "reference.npz")
    assert "fid_difference" in row and "fd_dinov2_difference" not in row
    assert "dinov2 is left out" in said[0] and (row["a"], row["b"]) == ("x/work", "y/work")
    np.savez(tmp_path / "reference.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_works(*works, tmp_path / "reference.npz")


def test_distances_are_better_when_lower_and_scores_when_higher(tmp_path):
    right = np.arange(12) < 10
    works = stored(tmp_path / "x", 0, correct=right), stored(tmp_path / "y", 5, correct=~right)
    np.savez(tmp_path / "reference.npz", mu=np.zeros(3), sigma=np.eye(3))
    said = [line for line in compare_works(*works, tmp_path / "reference.npz")[1] if "differs" in line]
    assert [line.split(" differs")[0] for line in said] == ["x is better: fid", "x is better: score"]


def test_images_kept_by_another_job_are_not_taken_for_these(alone, class_folder, tmp_path, capsys):
    npz = tmp_path / "x.npz"
    npz.write_bytes(Path(f"{alone}.npz").read_bytes())
    assert ended(words(class_folder, tmp_path / "w", "--npz", str(npz))) == 2  # nobody knows whose it is
    assert f"{npz} is there, and no {npz}.json says what made it: choose another --npz" in capsys.readouterr().err
    npz.unlink()
    (tmp_path / "x.npz.parts").mkdir()
    assert ended(words(class_folder, tmp_path / "w", "--npz", str(npz))) == 2
    (tmp_path / "x.npz.parts").rmdir()
    assert run.main(words(class_folder, tmp_path / "w", "--npz", str(npz))) == 0
    assert run.main(words(class_folder, tmp_path / "w", "--npz", str(npz))) == 0  # the same: goes on
    capsys.readouterr()
    made = npz.read_bytes()
    other = words(class_folder, tmp_path / "other", "--npz", str(npz), "--temperature", "0.3")
    assert ended(other) == 2 and npz.read_bytes() == made
    assert f"{npz}.json is of images with sampling" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_launches_it_on_cpus(alone, class_folder, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3", "-m", "evaluation.run"]
    subprocess.run([*launch, *words(class_folder, tmp_path / "w")], cwd=ROOT, check=True, timeout=300)
    assert measured(tmp_path / "w")["rows"] == measured(alone)["rows"]
    assert measured(tmp_path / "w")["settings"]["processes"] == 3


def test_departures_from_a_published_suite_are_named():
    from evaluation.run import departures
    from var.presets import VAR_SAMPLING

    own = {"temperature": [1.1, 1.0], "guidance_ramp": "linear", "plan": None, "cache": "20%", "depth": None}
    assert departures(VAR_SAMPLING, {**own, **VAR_SAMPLING, "top_k": 600}) == [
        "temperature is [1.1, 1.0], which the suite leaves alone",
        "cache is 20%, which the suite leaves alone",
        "top_k is 600, and the suite's 900",
    ]
    neutral = {"temperature": [1.0, 1.0], "temperature_last": False, "plan": "var", "cache": "100%", "prune": "off"}
    assert departures(VAR_SAMPLING, {**neutral, **VAR_SAMPLING}) == []
    assert departures({}, {"guidance_scale": 0.5}) == []  # a suite that takes a model as it is


def test_figures_that_are_no_numbers_are_null(tmp_path):
    from evaluation.report import result, write_result

    row = {"psnr_db": float("nan"), "psnr_db_ci95": [float("-inf"), 3.0], "n": 1}
    write_result(tmp_path / "r.json", result([row], command="x", n=1, seeds=0))
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["rows"] == [
        {"psnr_db": None, "psnr_db_ci95": [None, 3.0], "n": 1}
    ]


def test_layers_that_were_not_trained_alone_are_a_caution(class_folder, text_folder, tmp_path, monkeypatch, capsys):
    """Of both commands that make figures."""
    monkeypatch.chdir(tmp_path)
    plan = ["--plan", "supernet:1", "--depth", "1", "--device", "cpu", "--out", "r.json"]
    measures = ["--model", str(class_folder), "--suite", "classes", "--per-class", "1", "--metrics", "is-scenes"]
    assert run.main([*measures, *plan]) == 0
    suite = ["evaluate", "--model", str(text_folder), "--suite", "scenes", "--per-tag", "1", "--bootstrap", "0"]
    for command in (None, [*suite, *plan]):
        assert command is None or nextscale.main(command) == 0
        assert "trained to run 1 of its 2 layers" in capsys.readouterr().err
        said = json.loads(Path("r.json").read_text())["settings"]["cautions"]
        assert any("trained to run 1 of its 2 layers" in line for line in said)
