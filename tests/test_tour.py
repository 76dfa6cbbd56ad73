"""The tour: the notebook is of its script, shows what it should, and the script runs."""

import json
from pathlib import Path

import pytest

import nextscale
from docs.notebook import TOUR, cells

ROOT = Path(nextscale.__file__).parent
CELLS = cells(TOUR.read_text(encoding="utf-8"))
SMALLER = {"prompt_suite(20)": "prompt_suite(2)", "num_images_per_prompt=6": "num_images_per_prompt=2"}


@pytest.fixture(scope="module")
def notebook():
    return json.loads(TOUR.with_suffix(".ipynb").read_text(encoding="utf-8"))


def test_the_notebook_is_of_the_script(notebook):
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]] == CELLS


def test_every_cell_shows_something(notebook):
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            kinds = [output["output_type"] for output in cell["outputs"]]
            assert kinds and set(kinds) <= {"stream", "execute_result"}, cell["source"]
            assert all(output.get("name") != "stderr" for output in cell["outputs"])
            if "grid(" in cell["source"][-1] or "family_tree(" in cell["source"][-1]:
                assert "image/png" in cell["outputs"][-1]["data"]


def test_its_links_lead_somewhere():
    import re

    for kind, text in CELLS:
        for place in re.findall(r"\]\(([^)]+)\)" if kind == "markdown" else r"(?!)", text):
            assert (ROOT / "docs" / place).is_file(), place


def test_it_runs():
    names = {"__name__": "tour"}
    for kind, text in CELLS:
        if kind == "code":
            for long, short in SMALLER.items():
                text = text.replace(long, short)
            exec(compile(text.replace("images[5]", "images[1]").replace("seed=5", "seed=1"), "tour", "exec"), names)
    assert names["found"].search.choices and len(names["images"]) == 12
