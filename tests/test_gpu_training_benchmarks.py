"""The GPU benchmarks of training, tokenizing and the input pipeline, tried on a CPU at tiny sizes.

Each runs in a child: accelerate keeps one precision for a process, and the official code changes torch's own classes.
"""

from __future__ import annotations

import json
import os

import pytest
import torch
from training_toys import in_child

from benchmarks import few_rows, gpu, input_pipeline, sampling_gpu, tokenizer_gpu, training_gpu
from benchmarks.training import random_batch
from benchmarks.training_gpu import Way

CHECKOUT = os.environ.get("VAR_CHECKOUT")
needs_checkout = pytest.mark.skipif(not CHECKOUT, reason="VAR_CHECKOUT names no clone of FoundationVision/VAR")
TRAINING = ["--device", "cpu", "--size", "d6", "--schedule", "1,2", "--batch", "2", "--rounds", "2"]
SAMPLING = [
    "--device",
    "cpu",
    "--size",
    "d6",
    "--schedule",
    "1,2",
    "--width",
    "32",
    "--batches",
    "1,2",
    "--rounds",
    "1,1",
]
TOKENIZER = ["--device", "cpu", "--schedule", "1,2", "--width", "32", "--batch", "2", "--rounds", "2"]
PIPELINE = ["--device", "cpu", "--size", "tiny", "--schedule", "1,2", "--batch", "4", "--steps", "8", "--images", "32"]


def measured(module, words, tmp_path) -> dict:
    """The result that a command writes."""
    out = tmp_path / "result.json"
    assert in_child(module.main, [*words, "--out", str(out)]) == 0
    assert out.with_suffix(".md").read_text()
    return json.loads(out.read_text())


def tiny_transformer():
    """A transformer of four classes."""
    from var.transformer import NextScaleTransformer

    sizes = {"vocab_size": 16, "latent_channels": 4, "schedule": "1,2", "num_classes": 4}
    return NextScaleTransformer(depth=2, width=32, heads=2, **sizes)


def test_training(tmp_path):
    found = measured(training_gpu, TRAINING, tmp_path)
    row, grouped = found["rows"]
    assert (row["variant"], grouped["variant"]) == ("sdpa", "grouped") and found["settings"]["failed"] == {}
    assert 0 < row["seconds_range"][0] <= row["seconds"] and row["share_of_ceiling"] > 0
    assert row["loss"] == pytest.approx(grouped["loss"], rel=1e-3) and 5 < row["loss"] < 20


def test_a_turn_is_several_steps_and_seconds_are_of_one(monkeypatch):
    def check() -> None:
        def turns_of_eight_seconds(turns, rounds, device):
            return {name: [turn() or 8.0 for _ in range(rounds)] for name, turn in turns.items()}, {}

        monkeypatch.setattr(training_gpu, "in_turns", turns_of_eight_seconds)
        made = training_gpu.measure(training_gpu.parser_of().parse_args([*TRAINING, "--steps", "4"]))
        assert made["settings"]["steps"] == 4
        assert [(row["seconds"], row["images_per_s"]) for row in made["rows"]] == [(2.0, 1.0)] * 2

    assert in_child(check) == 0
    calls = []
    training_gpu.repeated(lambda: calls.append(1), 3)
    assert len(calls) == 3


@needs_checkout
def test_training_beside_the_official_code(tmp_path):
    rows = measured(training_gpu, [*TRAINING, "--reference", CHECKOUT], tmp_path)["rows"]
    assert [row["variant"] for row in rows] == ["official_bfloat16", "sdpa", "grouped"]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=2e-3)
    assert rows[1]["times_official_bfloat16"] > 0


def test_compiled_blocks_share_the_weights(monkeypatch):
    def check() -> None:
        monkeypatch.setattr(training_gpu, "OURS", {"a": Way(), "b": Way("sdpa", compiled=True, checkpointed=True)})
        monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **settings: None)
        monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
        model = tiny_transformer()
        given = random_batch(model.config, 2)
        steps = training_gpu.our_steps(["a", "b"], model, given, "cpu")
        before = [p.clone() for p in model.parameters()]
        losses = [float(step()) for step, _ in [*steps.values()] * 2]
        assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters()))

    assert in_child(check) == 0


def test_tokenizer(tmp_path):
    rows = measured(tokenizer_gpu, TOKENIZER, tmp_path)["rows"]
    assert [row["work"] for row in rows] == ["encode"] * 5 + ["decode"] * 5
    assert all(row["images_per_s"] > 0 for row in rows)
    equal = {row["variant"]: row["tokens_equal"] for row in rows[1:5]}
    assert min(equal.values()) > 0.5 and equal["fast_float32"] > 0.9


@needs_checkout
def test_tokenizer_beside_the_official_one(tmp_path):
    rows = measured(tokenizer_gpu, [*TOKENIZER, "--reference", CHECKOUT], tmp_path)["rows"]
    plain = next(row for row in rows if row["variant"] == "float32")
    assert plain["tokens_equal"] == 1 and plain["times_official_float32"] > 0


def test_sampling(tmp_path):
    """A row a batch of what a CPU knows."""
    found = measured(sampling_gpu, SAMPLING, tmp_path)
    assert [(row["variant"], row["batch"]) for row in found["rows"]] == [("plain", 1), ("plain", 2)]
    assert all(row["images_per_s"] > 0 for row in found["rows"]) and found["settings"]["failed"] == {}
    assert (tmp_path / "result.png").is_file()


@needs_checkout
def test_sampling_beside_the_official_code(tmp_path):
    rows = measured(sampling_gpu, [*SAMPLING, "--reference", CHECKOUT], tmp_path)["rows"]
    assert [row["variant"] for row in rows] == ["official", "plain"] * 2 and rows[1]["times_official"] > 0


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_input_pipeline(tmp_path, precision):
    found = measured(input_pipeline, [*PIPELINE, "--passes", "2", "--precision", precision], tmp_path)
    cached, tokens, images = found["rows"]
    assert cached["images_per_s"] > 0
    for row in (tokens, images):
        assert row["images_per_s"] > 0 and 0 <= row["data_wait"] < 1
    assert found["settings"]["side"] == 32


def test_what_fails_is_left_out():
    def lacking():
        raise torch.OutOfMemoryError("no memory\nat all")

    runs, first, failed = gpu.settled({"a": lambda: 7, "b": lacking})
    assert list(runs) == ["a"] and first == {"a": 7} and failed == {"b": "no memory"}
    left = [2]

    def lacking_later():
        left[0] -= 1
        return left[0] or lacking()

    found, failed = gpu.in_turns({**runs, "c": lacking_later}, 3, "cpu")
    assert len(found.pop("a")) == 3 and not found and failed == {"c": "no memory"}


def test_a_device_without_a_number_is_the_current_one(monkeypatch):
    monkeypatch.setattr(gpu, "resolve_device", torch.device)
    assert gpu.current_device("cuda") == torch.device("cuda") and gpu.current_device("cpu") == torch.device("cpu")


def test_figures_compare_round_by_round():
    row = gpu.figures({"official_float32": [2.0, 6.0, 2.0], "ours": [1.0, 2.0, 4.0]}, "ours", 8)
    assert row["images_per_s"] == 4 and row["times_official_float32"] == 2
    assert row["times_official_float32_range"] == [0.5, 3.0]


@pytest.mark.parametrize("D", [1920, 1024, 512])
def test_products_of_few_rows_are_cut_without_a_rest(D):
    shapes = list(few_rows.shapes_of(D, [1, 4, 9, 16, 25, 36, 64, 100]))
    assert {M for _, M, _, _ in shapes} == {8, 32, 50, 128} and len(shapes) == 16  # the longest of each power of two
    for _, M, N, K in shapes:
        tiles = few_rows.candidates(M, N, K, 132)
        assert len(tiles) == len(set(tiles)) and 1 <= len(tiles) <= 40
        for tile in tiles:
            assert K % (tile.inputs * tile.parts) == 0 and tile.rows >= min(M, 64)
            assert (tile.rows + tile.outputs) * tile.inputs * 2 * tile.stages <= 227 * 1024  # shared memory of an SM


@pytest.mark.parametrize(
    "module, words, message",
    [
        (training_gpu, ["--batch", "0"], "--batch must be 1 or more, got 0"),
        (training_gpu, ["--variants", "fast"], "--variants must be some of official_float16"),
        (training_gpu, ["--variants", "flex", "--device", "cpu"], "need --device cuda or --reference"),
        (training_gpu, ["--device", "cpu", "--reference", "nowhere"], "must be a checkout"),
        (tokenizer_gpu, ["--rounds", "0", "--device", "cpu"], "--rounds must be 1 or more, got 0"),
        (tokenizer_gpu, ["--device", "cpu", "--reference", "nowhere"], "must be a checkout"),
        (few_rows, ["--device", "cpu"], "--device must be a Hopper GPU with Triton, got cpu"),
        (few_rows, ["--device", "cpu", "--rounds", "0"], "--rounds must be 1 or more, got 0"),
        (input_pipeline, ["--device", "cpu", "--size", "d7"], "--size must be one of tiny"),
        (input_pipeline, ["--device", "cpu", "--steps", "7"], "--steps must be 8 or more"),
    ],
)
def test_mistakes_are_one_line(module, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
