"""Python on the pages runs as it stands, with the bundled model; the quick start has a file of its own."""

import re
import shlex
from pathlib import Path

import pytest

import nextscale

ROOT = Path(nextscale.__file__).parent
PAGES = ("README.md", "docs/architecture.md", "docs/editing.md", "docs/performance.md", "docs/search.md")
PAGES += ("docs/training.md",)
SMALLER = {"total_images=640": "total_images=32"}  # what an example trains on


def examples() -> list:
    """Every example that imports what it needs, by page and number."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)):
            if "import" in code:
                found.append(pytest.param(code, id=f"{page}-{number}"))
    return found


@pytest.mark.parametrize("code", examples())
def test_an_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for long, short in SMALLER.items():
        code = code.replace(long, short)
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_a_plugin_is_sampled_with_and_measured_as_shown(tmp_path, monkeypatch):
    from evaluation import run

    section = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition("### In the commands")[2]
    code, shell = (re.search(rf"```{kind}\n(.*?)```", section, flags=re.DOTALL)[1] for kind in ("python", "sh"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(code)
    for line in shell.replace("--per-class 100", "--per-class 2").splitlines():
        words = shlex.split(line)
        if words[0] == "nextscale":
            assert nextscale.main(words[1:]) == 0
        else:
            assert words[:3] == ["python", "-m", "evaluation.run"] and run.main(words[3:]) == 0
    assert len(list((tmp_path / "pictures").glob("*_seed?.png"))) == 4
