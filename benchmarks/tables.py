"""Tables of the speed benchmarks: a line a configuration, ranges in brackets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sample.images import write_text


def cell(row: Mapping, name: str) -> str:
    """One figure as text, with its range where there is one: `1.31 [1.28, 1.40]`."""
    value, reach = row.get(name, ""), row.get(f"{name}_range")
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if reach is None else f"{text} [{reach[0]:.4g}, {reach[1]:.4g}]"


def lines(rows: Sequence[Mapping], names: Sequence[str]) -> str:
    """A Markdown table of the named figures that are there."""
    present = [name for name in names if any(name in row for row in rows)]
    made = ["| " + " | ".join(present) + " |", "|" + "---|" * len(present)]
    made += ["| " + " | ".join(cell(row, name) for name in present) + " |" for row in rows]
    return "\n".join(made)


def write_lines(path: Path, rows: Sequence[Mapping], names: Sequence[str]) -> None:
    """Write the table to a file and to the terminal."""
    text = lines(rows, names)
    write_text(path, text + "\n")
    print(text)
