"""The tour as a notebook with its outputs: `python -m docs.notebook` runs docs/tour.py and writes docs/tour.ipynb.

It needs `pip install nbclient ipykernel`. What Python warns of is left out: it names folders of this machine.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from sample.files import write_text

TOUR = Path(__file__).parent / "tour.py"


def cells(source: str) -> list[tuple[str, str]]:
    """("markdown" or "code", text) of every cell of a script in the percent format."""
    found = []
    for part in re.split(r"^# %%", source, flags=re.MULTILINE)[1:]:
        head, _, text = part.partition("\n")
        kind = "markdown" if "[markdown]" in head else "code"
        if kind == "markdown":
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        found.append((kind, text.strip("\n")))
    return found


def main() -> None:
    """Run the tour and write the notebook."""
    import nbformat
    from nbclient import NotebookClient

    parser = argparse.ArgumentParser(prog="python -m docs.notebook", description=__doc__)
    parser.add_argument("--out", type=Path, default=TOUR.with_suffix(".ipynb"), help="the notebook (docs/tour.ipynb)")
    out = parser.parse_args().out
    new = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    parts = enumerate(cells(TOUR.read_text("utf-8")))
    notebook = nbformat.v4.new_notebook(cells=[new[kind](text, id=f"cell-{number}") for number, (kind, text) in parts])
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": TOUR.parent.parent}}).execute()
    for cell in notebook.cells:
        cell.metadata.clear()  # when it ran
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data.pop("text/plain", None)  # an address in memory
                output.data.pop("image/jpeg", None)
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    write_text(out, nbformat.writes(notebook) + "\n")


if __name__ == "__main__":
    main()
