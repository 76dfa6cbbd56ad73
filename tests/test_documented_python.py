"""Python on the pages runs as it stands, with the bundled model; the quick start has a file of its own."""

import re
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
