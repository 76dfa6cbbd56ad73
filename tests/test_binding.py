"""Captions changed in one thing, and how much likelier a model finds the right ones."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from evaluation.binding import CHANGES, changed, main, nats
from evaluation.scenes import render, sample_scene


@pytest.mark.parametrize("change", CHANGES)
def test_one_thing_changes(change):
    rng = np.random.default_rng(3)
    for _ in range(40):
        scene = sample_scene(rng, tag=CHANGES[change])
        caption, other = scene.caption, changed(rng, scene.metadata, change)
        words, others = (re.sub(r"\ban\b", "a", text).split() for text in (caption, other))
        assert len(words) == len(others)
        different = [(a, b) for a, b in zip(words, others) if a != b]
        if change == "colours exchanged":
            (a, b), (c, d) = different
            assert (a, b) == (d, c)
        else:
            plural = change == "number"
            assert len(different) == 1 and (not plural or {*different[0]} <= {"two", "three", "four"}), other


def test_examples_of_changes():
    rng = np.random.default_rng(0)
    pair = {"class": "star", "count": 1, "color": "red"}, {"class": "ring", "count": 1, "color": "orange"}
    metadata = {"tag": "color_attr", "include": [*pair], "prompt": "a red star and an orange ring"}
    assert changed(rng, metadata, "colours exchanged") == "an orange star and a red ring"
    first = {**pair[0], "position": ["left of", 0]}
    metadata = {"tag": "position", "include": [pair[1], first], "prompt": "a red star left of an orange ring"}
    assert changed(rng, metadata, "relation turned round") == "a red star right of an orange ring"


def test_nats_are_those_of_the_tokens(text_pipeline):
    """One token at a time, from the plain softmax of uncached logits; a batch is its rows."""
    rng = np.random.default_rng(1)
    scenes = [sample_scene(rng) for _ in range(3)]
    captions = [scene.caption for scene in scenes]
    found_BK = nats(text_pipeline, scenes, captions)
    vqvae, transformer = text_pipeline.vqvae, text_pipeline.transformer
    for i, scene in enumerate(scenes):
        picture = torch.from_numpy(render(scene, vqvae.image_hw[0])).permute(2, 0, 1)[None] / 127.5 - 1
        ids = vqvae.image_to_tokens(picture)
        cond = transformer.condition(text_pipeline.encode_prompt([captions[i]]))
        with torch.no_grad():
            inputs = vqvae.quantizer.teacher_inputs(ids, vqvae.schedule)
            logs = transformer.logits(transformer(inputs, cond), cond).log_softmax(dim=-1)[0]
        begin = 0
        for k, ids_1l in enumerate(ids):
            told = sum(-float(logs[begin + j, token]) for j, token in enumerate(ids_1l[0].tolist()))
            assert found_BK[i, k] == pytest.approx(told, rel=1e-4)
            begin += ids_1l.shape[1]


def test_the_command_writes_a_result(text_folder, tmp_path, capsys):
    out = tmp_path / "binding.json"
    assert main(["--models", f"mine={text_folder}", "--n", "4", "--device", "cpu", "--out", str(out)]) == 0
    assert "relation turned round" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [row["change"] for row in rows] == list(CHANGES)
    for row in rows:
        parts = [value for name, value in row.items() if re.fullmatch(r"nats_\d+x\d+(-\d+)?", name)]
        assert sum(parts) == pytest.approx(row["nats"], abs=1e-5)
        assert 0 <= row["right"] <= 1 and row["nats_ci95"][0] <= row["nats"] <= row["nats_ci95"][1]
    assert out.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize(("arguments", "words"), [(["--n", "1"], "--n must be 2"), (["--models", "none"], "none")])
def test_mistakes_are_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and words in capsys.readouterr().err
