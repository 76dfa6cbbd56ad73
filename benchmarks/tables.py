"""Tables of the speed benchmarks: a line a configuration, ranges in brackets."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from evaluation.report import write_result
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


def measured(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace], dict],
    names: Sequence[str],
) -> dict:
    """Measure, write the result and its table to `options.out`, and give it back; a mistake is one line and exit 2."""
    try:
        content = measure(options)
    except (ValueError, FileNotFoundError) as error:
        parser.error(" ".join(str(error).split()))
    write_result(options.out, content)
    write_lines(options.out.with_suffix(".md"), content["rows"], names)
    return content
