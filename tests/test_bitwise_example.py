"""The benchmark of bits against codes: its configurations build, rows are compared in pairs, steps are not mixed up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bitwise_example
from benchmarks.bitwise_example import (
    CONFIGS,
    MODELS,
    compared,
    main,
    parser_of,
    parts,
    prompts,
    renders,
    step,
    trained,
)
from evaluation.judge import detect, judge
from sample.load import load_tokenizer
from train import train_tokenizer, train_var
from train.train_tokenizer import begin_with
from var.transformer import NextScaleTransformer


def test_both_tokenizers_begin_with_the_same_convolutions() -> None:
    parser, made = train_tokenizer.parser(), {}
    for tokens in ("bits", "index"):
        config = parser.parse_args(["--config", str(CONFIGS / f"tokenizer/bitwise-example-{tokens}.yaml")])
        built = parser.instantiate(config)
        begin_with(built.tokenizer, built.start_from)
        made[tokens] = (built.tokenizer, {**vars(built.run), "run_dir": None}, built.data, built.optimizer)
    bits, index = made["bits"], made["index"]
    assert bits[1:] == index[1:]  # the same run, images and rates
    same = {name for name in bits[0].state_dict() if name.startswith(("encoder.", "decoder."))}
    assert all(torch.equal(bits[0].state_dict()[name], index[0].state_dict()[name]) for name in same)
    assert torch.equal(
        index[0].quantizer.codebook.weight, load_tokenizer("sample/bundled/vqvae").quantizer.codebook.weight
    )


def test_models_differ_in_their_tokens_alone() -> None:
    parser, sizes = train_var.parser(), {}
    for model in MODELS:
        built = parser.instantiate(
            parser.parse_args(["--config", str(CONFIGS / "var/bitwise-example.yaml"), *model.flags])
        )
        assert (built.tokens.flips > 0, built.tokens.noise > 0) == (
            model.corrected and model.tokens == "bits",
            model.corrected and model.tokens == "index",
        )
        words = {"bitwise": True, "vocab_size": 2} if model.tokens == "bits" else {"vocab_size": 1024}
        sizes_of = {**vars(built.transformer), "text_width": built.text.d_model, "schedule": "scenes64", **words}
        with torch.device("meta"):
            transformer = NextScaleTransformer(**sizes_of, latent_channels=16)
        sizes[model.tokens] = {k: v.shape for k, v in transformer.state_dict().items() if not k.startswith("head.")}
    assert sizes["bits"] == sizes["index"]


def test_prompts_and_renders_are_of_one_object() -> None:
    metadatas = prompts(30, 0)
    assert len(metadatas) == 60 and {m["tag"] for m in metadatas} == set(bitwise_example.TAGS)
    assert all(len(m["include"]) == 1 for m in metadatas) and any(m.get("unseen") for m in metadatas)
    assert all(judge(image, metadata).correct for image, metadata in renders(6, 0))


def test_parts_of_a_caption() -> None:
    images, metadatas = zip(*renders(8, 0))
    found = [detect(image) for image in images]
    assert (parts(found, metadatas)["shape_right"], parts(found, metadatas)["colour_right"]) == (1.0, 1.0)
    assert parts([[]] * 8, metadatas)["colour_right"] == 0.0


def test_rows_are_compared_in_pairs() -> None:
    right = {("index", False): "0" * 12, ("index", True): "01" * 6, ("bits", False): "01" * 6, ("bits", True): "1" * 12}
    rows = compared([{"tokens": t, "corrected": c, "correct": bits} for (t, c), bits in right.items()])
    assert [row.get("minus_uncorrected") for row in rows] == [None, 0.5, None, 0.5]
    assert [row.get("minus_index") for row in rows] == [None, None, 0.5, 0.5]
    assert rows[3]["minus_index_ci95"][0] > 0 and "correct" not in rows[0]


def test_seconds_are_those_of_the_steps_that_count(tmp_path: Path) -> None:
    lines = [{"kind": "train", "images": 20, "images_per_s": 10.0}, {"kind": "validation", "images": 20}]
    lines += [{"kind": "train", "images": 50, "images_per_s": 5.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert trained(tmp_path) == {"images": 50, "train_s": 8.0}


def test_a_finished_step_is_not_run_again_and_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "finished.json").write_text(json.dumps(["no.such.module", "--a"]))
    step(tmp_path, "no.such.module", "--a")
    with pytest.raises(ValueError, match="was made by another command"):
        step(tmp_path, "no.such.module", "--b")
    with pytest.raises(ValueError, match="failed with exit code 1"):
        step(tmp_path / "new", "no.such.module")


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture) -> None:
    for words in (["--per-tag", "5"], ["--images", "0"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
    assert "--images must be 1 or more, got 0" in capsys.readouterr().err
    assert parser_of().parse_args([]).out == Path("results/bitwise_example.json")
