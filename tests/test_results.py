"""Numbers quoted in README and docs are still in the results files they come from.

A quoted number is followed by a comment that names its place, as in `0.94<!-- results/NAME.json rows[0].score -->`; it
must be the number there, rounded to the decimals that are shown.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUOTE = re.compile(
    r"(?P<number>-?\d[\d,]*\.?\d*)(?P<percent> ?%)?[^\d<>]{0,16}<!-- (?P<file>results/\S+\.json) (?P<place>\S+) -->"
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "sample/bundled").glob("*.md"))]


def look_up(value, place):
    for key in re.findall(r"[^.\[\]]+", place):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def quotes(page):
    return list(QUOTE.finditer(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_numbers_are_in_their_results_file(page):
    text = page.read_text(encoding="utf-8")
    found = quotes(page)
    assert len(found) == text.count("<!-- results/"), "a comment names a results file but no number stands before it"
    for quote in found:
        shown = quote["number"].replace(",", "")
        value = look_up(json.loads((ROOT / quote["file"]).read_text(encoding="utf-8")), quote["place"])
        if quote["percent"]:
            value *= 100
        decimals = len(shown.partition(".")[2])
        assert f"{value:.{decimals}f}" == shown, f"{page.name}: {quote.group()}"


def test_a_wrong_number_would_be_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("score 0.62<!-- results/a.json rows[1].score --> and 1,024 images<!-- results/a.json n -->")
    numbers = [(q["number"], q["place"]) for q in quotes(page)]
    assert numbers == [("0.62", "rows[1].score"), ("1,024", "n")]
    assert look_up({"rows": [{}, {"score": 0.615}]}, "rows[1].score") == 0.615
