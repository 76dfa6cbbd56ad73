"""The main jobs as they would run on Windows; see windows.py."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training_toys import curve
from windows import passes_on_windows

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what is open is read from Linux's /proc")
ROOT = Path(__file__).parent.parent
CPU = ["--device", "cpu"]


def nextscale(*words):
    """One `nextscale` command."""
    return "nextscale:main", [*words, *CPU]


def test_pictures_are_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), (240, 200, 20)).save("given.png")
    Path("prompts.txt").write_text("a red star: left of a blue heart?\ncon\n", encoding="utf-8")
    draw = nextscale("sample", "a red star: left of a blue heart?", "--n", "2", "--show-scales")
    suite = nextscale("sample", "--prompts", "prompts.txt", "--n", "2", "--out", "all.npz")
    search = nextscale("sample", "a red star", "--search", "tts", "--show-search", "--out", "search")
    edit = nextscale("edit", "given.png", "a blue square", "--box", "8,8,40,40")
    assert passes_on_windows(draw, draw, suite, suite, search, edit)
    assert len(list(Path("pictures").glob("*_seed[01].png"))) == 2 and Path("all.npz").is_file()


def test_models_are_measured_converted_and_planned(class_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measure = nextscale("evaluate", "--model", "scenes", "--suite", "scenes", "--per-tag", "1", "--out", "s.json")
    report = ("nextscale:main", ["report", "s.json", "--out", "report.html"])
    export = ("train.export:main", ["--model", str(class_folder), "--out", "exported"])
    again = ("train.export:main", ["--model", "exported", "--out", "exported", "--overwrite=true"])
    calibrate = nextscale("calibrate", "--class", "0,1", "--model", "exported")
    plan = nextscale("plan", "--class", "0,1", "--model", "exported", "--repeats", "1", "--out", "plan.png")
    assert passes_on_windows(measure, report, export, again, calibrate, plan)
    assert Path("plan.png").is_file()


def train(name, folder, images, *more):
    """A training of configs/NAME/tiny.yaml up to so many images, a checkpoint a step."""
    settings = ["--run.workers=0", "--run.batch_size=8", "--run.checkpoint_every=1", "--run.keep=1", *more]
    given = [f"--config={ROOT}/configs/{name}/tiny.yaml", f"--run.run_dir={folder}", f"--run.total_images={images}"]
    return f"train.train_{name}:main", [*given, *settings]


def test_models_train_and_resume(tmp_path, monkeypatch):
    """Data workers are spawned; and where no link can be made, `latest` is a folder, which follows the training."""
    monkeypatch.chdir(tmp_path)
    tokenizer, tokens = (
        train("tokenizer", "tokenizer", 24, "--run.workers=1"),
        "--tokens.tokenizer=tokenizer/latest/vqvae",
    )
    data = ["--data.source=scenes", "--data.num_scenes=12", "--data.size=32", "--cache.workers=1"]
    cache = ("train.cache_tokens:main", [*data, "--cache.folder=cache", "--cache.tokenizer=tokenizer/latest/vqvae"])
    assert passes_on_windows(tokenizer, train("var", "var", 16, tokens), train("var", "var", 32, tokens))
    latest = Path("var/latest/transformer")
    newest = Path("var/checkpoints/step_00000004/weights/transformer")
    assert not Path("var/latest").is_symlink()
    for file in newest.iterdir():
        assert os.path.samefile(file, latest / file.name)
    assert passes_on_windows(cache, nextscale("sample", "--class", "3", "--model", "var"))
    assert [line["step"] for line in curve("var", "train")][-1] == 4
    assert {path.name for path in Path("var").iterdir() if path.name.startswith(".")} == set()


FORBIDDEN = {
    "held = np.load('a.npy', mmap_mode='r'); os.remove('a.npy')": "is in use",
    "held = open('a', 'w'); os.replace('a', 'b')": "is in use",
    "held = open('d/a', 'w'); os.rename('d', 'g')": "is in use",
    "os.replace('d', 'e')": "access is denied",
    "open('a:b', 'w')": "no name",
    "os.mkdir('aux.d')": "no name",
    "os.symlink('a', 'c')": "privilege",
    "held = open('a'); os.fsync(held.fileno())": "not open for writing",
}


def what_is_forbidden(arguments):
    """Lines of Python that must fail, and some that must not."""
    np.save("a.npy", [1])
    os.mkdir("d")
    os.mkdir("e")
    for line, said in FORBIDDEN.items():
        with pytest.raises(OSError, match=said):
            exec(line, {"os": os, "np": np})
    np.save("b.npy", [1])
    os.replace("a.npy", "b.npy")
    os.rename("e", "f")
    os.remove("b.npy")


def test_the_emulation_forbids_what_windows_forbids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert passes_on_windows(("test_windows:what_is_forbidden", []))
