"""`nextscale report`: one self-contained page, the same in Markdown, and the model card."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nextscale
from evaluation.html import Section, Table, sections_of, to_html, to_markdown
from evaluation.report import metric_rows, result, write_result

pytest.importorskip("matplotlib")


@pytest.fixture
def sources(tmp_path, monkeypatch) -> list[str]:
    """A training run with an evaluation in it, and a results file with its picture."""
    monkeypatch.chdir(tmp_path)
    run = Path("runs/a")
    (run / "images").mkdir(parents=True)
    for images in (16, 32):
        pixels = np.full((4, 4, 3), images, np.uint8)
        Image.fromarray(pixels).save(run / "images" / f"samples_{images:09d}.png")
    lines = [{"kind": "train", "step": s, "images": 16 * s, "loss": 5.0 - s, "images_per_s": 9.0} for s in (1, 2)]
    lines.append({"kind": "validation", "step": 2, "images": 32, "loss": 3.5, "loss_1x1": 1.0, "loss_4x4": 2.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.yaml").write_text("transformer:\n  conditioning: text\ndata:\n  path: /home/me/secret/photos\n")
    content = result([{"n": 3, "score": 0.5, "score_ci95": [0.4, 0.6]}], command="c --x <y>", n=3, seeds=0)
    write_result(run / "evaluation.json", content)
    content["settings"] = {"cautions": ["fid of 3 images is biased"], "sampling": {"top_k": 9}}
    write_result("r/speed_cpu.json", content)
    Image.new("RGB", (3, 3)).save("r/speed_cpu.png")
    return ["runs/a", "r/speed_cpu.json"]


class Tags(HTMLParser):
    """Collects what a page opens, closes and loads."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_holds_everything_and_loads_nothing(sources, capsys):
    assert nextscale.main(["report", *sources, "--out", "out/report.html"]) == 0
    text = Path("out/report.html").read_text()
    tags = Tags(text)
    assert tags.open == [] and len(tags.sources) == 3 and all(s.startswith("data:image/") for s in tags.sources)
    assert "http" not in re.sub(r"data:[^']*", "", text) and "<script" not in text
    for said in (
        "Training: runs/a",
        "0.5 [0.4, 0.6]",
        "speed cpu",
        "sampling.top_k",
        "hardware.cpu",
        "c --x &lt;y&gt;",
    ):
        assert said in text
    assert "class='caution'" in text and "fid of 3 images is biased" in text
    assert "/home/me" not in text and "secret/photos" in text


def test_markdown_says_the_same_and_finds_its_pictures(sources):
    assert nextscale.main(["report", *sources, "--out", "report.html"]) == 0
    text = Path("report.md").read_text()
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(shown) == 3 and all(Path(path).is_file() for path in shown)
    assert sorted(Path(path).name for path in shown) == sorted(path.name for path in Path("report_files").iterdir())
    assert "| score | 0.5 [0.4, 0.6] |" in text and "samples_000000032.png" in text and "000000016" not in text
    before = {path: path.read_bytes() for path in Path().glob("report*") if path.is_file()}
    assert nextscale.main(["report", *sources, "--out", "report.html"]) == 0
    assert {path: path.read_bytes() for path in before} == before


def test_the_card_has_what_the_hub_reads(sources, monkeypatch):
    from huggingface_hub import HfApi

    assert nextscale.main(["report", *sources, "--card", "README.md", "--title", "My model"]) == 0
    text = Path("README.md").read_text()
    assert text.startswith("---\nlibrary_name: diffusers\npipeline_tag: text-to-image\n") and "# My model" in text
    sent = {}
    monkeypatch.setattr(HfApi, "create_commit", lambda self, **settings: sent.update(settings))
    assert nextscale.main(["report", *sources, "--push", "me/model", "--title", "My model"]) == 0
    assert sent["repo_id"] == "me/model"
    names = [operation.path_in_repo for operation in sent["operations"]]
    assert names[0] == "README.md" and len(names) == 4 and names[1].startswith("card_files/")


@pytest.mark.parametrize(
    ("more", "kept"), [([], "nothing was written, --card FILE"), (["--card", "C.md"], "C.md is kept")]
)
def test_a_push_that_fails_is_one_line_and_keeps_the_card(sources, more, kept, capsys, monkeypatch):
    from huggingface_hub import HfApi

    class Unreachable(Exception):
        """Of the HTTP library, and so none of Python's own."""

    def create_commit(self, **_):
        raise Unreachable("[Errno -2] Name or service not known")

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    assert nextscale.main(["report", *sources, "--push", "me/model", *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--push me/model failed at {HfApi().endpoint}: [Errno -2]" in error
    assert kept in error and Path("C.md").exists() == bool(more)


def test_a_line_that_a_killed_run_did_not_finish_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert metric_rows(path) == [{"step": 1}]
    path.write_text('{"st\n{"step": 2}')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 1 is no JSON object"):
        metric_rows(path)


def test_many_rows_are_lines(sources):
    rows = [{"row": f"plan {i}", "score": 0.5, "score_ci95": [0.4, 0.6]} for i in range(9)]
    write_result("r/many.json", result(rows, command="c", n=3, seeds=0))
    assert nextscale.main(["report", "r/many.json", "--out", "out/many.html"]) == 0
    text = Path("out/many.md").read_text()
    assert "| row | score |\n" in text and "| plan 8 | 0.5 [0.4, 0.6] |\n" in text


def test_text_is_escaped():
    section = Section("a < b", ["x & y", Table(["<i>"], [["1 | 2"]])])
    assert "a &lt; b" in to_html("t", [section]) and "<i>" not in to_html("t", [section])
    assert "1 \\| 2" in to_markdown("t", [section], "files")[0]


def test_sources_that_are_none_are_named(sources, capsys):
    Path("empty").mkdir()
    Path("x.json").write_text("[1]")
    for source, said in (("nowhere", "nowhere does not exist"), ("empty", "no training run"), ("x.json", "no results")):
        assert nextscale.main(["report", source]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and said in error[0]
    Path("runs/a/metrics.jsonl").write_text("")
    assert nextscale.main(["report", "runs/a"]) == 2
    assert "runs/a/metrics.jsonl holds no line yet" in capsys.readouterr().err
    assert nextscale.main(["report", "runs/a", "--out", "x.pdf"]) == 2


def test_the_table_of_a_results_file_is_not_overwritten(sources, capsys):
    before = Path("r/speed_cpu.md").read_bytes()
    for words in (["--out", "r/speed_cpu.html"], ["--card", "r/speed_cpu.md"]):
        assert nextscale.main(["report", "r/speed_cpu.json", *words]) == 2
        assert f"{words[0]} {words[1]} would overwrite r/speed_cpu.md" in capsys.readouterr().err
    assert Path("r/speed_cpu.md").read_bytes() == before and not Path("r/speed_cpu.html").exists()
    assert len(sections_of("runs/a")) == 2
