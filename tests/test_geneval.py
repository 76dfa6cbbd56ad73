"""GenEval's formats: its 553 prompts, its grammar both ways, images for its detector, its results."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nextscale
from evaluation.geneval import (
    CLASSES,
    COUNTS,
    metadata_of,
    parse_prompt,
    read_results,
    read_suite,
    result_cautions,
    suite,
    summarize,
    write_suite,
)  # fmt: skip
from evaluation.scenes import COLOURS, RELATIONS, TAGS


def test_the_official_seed_gives_the_official_suite():
    prompts = suite()
    tags = Counter(metadata["tag"] for metadata in prompts)
    assert [tags[tag] for tag in TAGS] == [80, 99, 80, 94, 100, 100] and len(prompts) == 553
    counts = Counter(m["include"][0]["count"] for m in prompts if m["tag"] == "counting")
    assert [counts[n] for n in (2, 3, 4)] == [26, 28, 26]
    relations = Counter(m["include"][1]["position"][0] for m in prompts if m["tag"] == "position")
    assert [relations[name] for name in ("left of", "right of", "above", "below")] == [19, 27, 26, 28]
    assert len({m["prompt"] for m in prompts}) == 553
    assert {m["prompt"] for m in suite(1)} != {m["prompt"] for m in prompts}


def test_metadata_lines_are_geneval_s_own():
    assert metadata_of("position", ["dog", "tie"], relation="right of") == {
        "tag": "position",
        "include": [{"class": "tie", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
        "prompt": "a photo of a dog right of a tie",
    }
    assert metadata_of("counting", ["bus"], count=3) == {
        "tag": "counting",
        "include": [{"class": "bus", "count": 3}],
        "exclude": [{"class": "bus", "count": 4}],
        "prompt": "a photo of three buses",
    }
    assert metadata_of("color_attr", ["orange", "cup"], ["orange", "red"]) == {
        "tag": "color_attr",
        "include": [{"class": "orange", "count": 1, "color": "orange"}, {"class": "cup", "count": 1, "color": "red"}],
        "prompt": "a photo of an orange orange and a red cup",
    }


@given(st.data())
def test_every_prompt_of_the_grammar_parses_back(data):
    tag = data.draw(st.sampled_from(TAGS))
    pair = data.draw(st.permutations(CLASSES))[:2]
    colours = data.draw(st.permutations(list(COLOURS)))[:2]
    made = {
        "single_object": lambda: metadata_of(tag, pair[:1]),
        "two_object": lambda: metadata_of(tag, pair),
        "counting": lambda: metadata_of(tag, pair[:1], count=data.draw(st.sampled_from(sorted(COUNTS.values())))),
        "colors": lambda: metadata_of(tag, pair[:1], colours[:1]),
        "position": lambda: metadata_of(tag, pair, relation=data.draw(st.sampled_from(list(RELATIONS)))),
        "color_attr": lambda: metadata_of(tag, pair, colours),
    }[tag]()
    assert parse_prompt(made["prompt"]) == made


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "a photo of cat",
        "a photo of a unicorn",
        "a photo of five cats",
        "a photo of two unicorns",
        "a photo of a mauve cat",
        "a photo of a cat and a dog and a cow",
        "a photo of a red cat and a dog",
        "a photo of a red cat left of a dog",
    ],
)
def test_prompts_outside_the_grammar_are_refused(prompt):
    with pytest.raises(ValueError, match="GenEval"):
        parse_prompt(prompt)


def test_suites_are_written_and_read(tmp_path):
    prompts = suite()
    write_suite(tmp_path, prompts)
    assert read_suite(tmp_path / "evaluation_metadata.jsonl") == prompts
    assert read_suite(tmp_path / "generation_prompts.txt") == prompts
    bad = tmp_path / "bad.txt"
    for text, named in (
        ("", "holds no prompt"),
        ("a photo of a cat\nhello", "line 2"),
        ('{"prompt": "x"}', "line 1 needs"),
        ("{", "line 1"),
        ('{"prompt": "x", "tag": "colors", "include": "star"}', "line 1: include must be a list"),
        (
            '{"prompt": "x", "tag": "colors", "include": [{"class": "star"}]}',
            "line 1: an object needs a class, a count",
        ),
        (
            '{"prompt": "x", "tag": "position", "include": [{"class": "a", "count": 1, "position": ["left of", 0]}]}',
            "line 1: position must be one of left of",
        ),
    ):
        bad.write_text(text)
        with pytest.raises(ValueError, match=named):
            read_suite(bad)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_suite(tmp_path / "nowhere")


def results_file(path, rights):
    """One row an image as GenEval's detector writes them: rights maps tags to lists of prompts' verdict lists."""
    rows = []
    for tag, prompts in rights.items():
        for number, verdicts in enumerate(prompts):
            metadata = {"tag": tag, "include": [{"class": "cat", "count": 1}], "prompt": f"{tag} {number}"}
            rows += [
                {
                    "filename": f"images/{len(rows):05d}/samples/{i:04d}.png",
                    "tag": tag,
                    "prompt": metadata["prompt"],
                    "correct": correct,
                    "reason": "",
                    "metadata": json.dumps(metadata),
                    "details": "{}",
                }
                for i, correct in enumerate(verdicts)
            ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_results_are_summarised_as_geneval_does(tmp_path):
    rights = {tag: [[True, True], [False, False]] for tag in TAGS}
    rights["position"] = [[True, False], [False, False], [False, False], [False, False]]
    rows = read_results(results_file(tmp_path / "results.jsonl", rights))
    found = summarize(rows)
    assert found["n"] == 28 and found["prompts"] == 14
    assert found["position"] == pytest.approx(1 / 8) and found["counting"] == pytest.approx(0.5)
    assert found["overall"] == pytest.approx((5 * 0.5 + 1 / 8) / 6)  # the mean of tags, not of images
    assert found["prompts_correct"] == pytest.approx(6 / 14)
    low, high = found["overall_ci95"]
    assert low < found["overall"] < high
    (tmp_path / "bad.jsonl").write_text('{"filename": "a"}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_results(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"correct": "False"}, "line 2: correct must be true or false"),
        ({"metadata": "[1]"}, "line 2: correct must be true or false, and metadata an object"),
        ({"filename": "same.png"}, "2 rows of the image same.png"),
    ],
)
def test_results_that_mislead_are_refused(tmp_path, change, said):
    path = tmp_path / "results.jsonl"
    row = {"filename": "same.png", "tag": "counting", "prompt": "", "correct": True, "reason": "", "metadata": "{}"}
    path.write_text("\n".join(json.dumps(r) for r in (row, {**row, "filename": "other.png", **change})))
    with pytest.raises(ValueError, match=re.escape(said)):
        read_results(path)


def test_incomplete_results_are_noticed():
    rows = [{"tag": tag, "metadata": {"prompt": tag}} for tag in (*TAGS[:2], TAGS[0])]
    missing, uneven = result_cautions(rows)
    assert "no images of counting, colors, position, color_attr" in missing and "1 to 2 images" in uneven


def test_the_command_takes_results_in(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    results_file(tmp_path / "results.jsonl", {tag: [[True, False]] for tag in TAGS})
    assert nextscale.main(["evaluate", "--geneval-results", "results.jsonl", "--out", "out.json"]) == 0
    assert "overall" in capsys.readouterr().out
    row = json.loads((tmp_path / "out.json").read_text())["rows"][0]
    assert row["overall"] == 0.5 and row["prompts_correct"] == 1.0


def test_the_command_makes_a_tree_for_the_detector(tmp_path, monkeypatch, capsys, text_folder):
    monkeypatch.chdir(tmp_path)
    write_suite(tmp_path, [suite()[0], suite()[200]])
    words = ["evaluate", "--model", str(text_folder), "--suite", "evaluation_metadata.jsonl", "--n", "2"]
    assert nextscale.main([*words, "--work", "tree"]) == 0
    assert "GenEval's detector" in capsys.readouterr().out
    tree = tmp_path / "tree"
    assert [json.loads((tree / f"{i:05d}/metadata.jsonl").read_text()) for i in range(2)] == [suite()[0], suite()[200]]
    assert sorted(p.name for p in (tree / "00001/samples").iterdir()) == ["0000.png", "0001.png"]
    assert nextscale.main(["evaluate", "--images", "tree", "--suite", "geneval"]) == 2
    assert "--geneval-results" in capsys.readouterr().err
