"""Fine-tuning as docs/fine-tuning.md shows it: its pictures, and that its commands go on from the bundled model."""

import re
import shlex
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nextscale
from docs import moons
from evaluation.scenes import render
from sample.load import load_pipeline
from train import cache_tokens, export, train_var

ROOT = Path(nextscale.__file__).parent
CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("fine-tuning") / "moons"
    moons.main(["--out", str(out), "--n", "60"])
    return out


def test_a_third_are_scenes_and_the_others_have_one_moon(folder):
    captions = [path.read_text(encoding="utf-8").split() for path in sorted(folder.glob("*.txt"))]
    assert [words.count("moon") for words in captions] == [0, 1, 1] * 20
    assert {"three", "left", "and", "a"} <= {word for words in captions[::3] for word in words}


def test_a_moon_lies_in_the_place_of_the_object_it_replaces(folder):
    for number, scene in enumerate(islice(moons.scenes(), 12)):
        if number % 3 == 0:
            continue
        picture = np.asarray(Image.open(folder / f"{number:05}.png")).astype(int)
        changed = np.argwhere(np.abs(picture - render(scene)).max(axis=2) > 0)
        x0, y0, x1, y1 = scene.objects[number // 3 % len(scene.objects)].box
        assert len(changed) > 20
        assert (changed.min(axis=0) >= np.floor([y0, x0])).all() and (changed.max(axis=0) <= np.ceil([y1, x1])).all()


def test_the_commands_go_on_from_the_bundled_model(folder, monkeypatch):
    page = (ROOT / "docs/fine-tuning.md").read_text(encoding="utf-8")
    lines = [
        shlex.split(line, comments=True)
        for line in re.search(r"```sh\n(.*?)```", page, flags=re.DOTALL)[1].splitlines()
    ]
    assert [words[2] for words in lines[:4]] == ["docs.moons", "train.cache_tokens", "train.train_var", "train.export"]
    monkeypatch.chdir(folder.parent)
    for name in ("configs", "sample"):
        (folder.parent / name).symlink_to(ROOT / name)
    cache_tokens.main(lines[1][3:])
    fewer = ["--run.total_images=32", "--run.batch_size=8", "--run.validation_images=1", "--run.log_every=1"]
    fewer += [] if hasattr(torch.optim, "Muon") else ["--optimizer.name=adamw"]  # which torch has from 2.9 on
    train_var.main([*lines[2][3:], *fewer])
    export.main(lines[3][3:])
    tuned, bundled = (load_pipeline(name, device="cpu").config.sampling for name in ("moons-model", "scenes"))
    assert tuned and tuned.items() <= bundled.items()  # drawn as before, what is not named being neutral
    assert nextscale.main([*lines[4][1:], "--n", "1", "--out", "drawn"]) == 0
