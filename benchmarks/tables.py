"""Tables of the speed benchmarks: a line a configuration, ranges in brackets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from evaluation.command import in_one_line
from evaluation.report import write_result
from sample.files import write_text


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
    picture: Callable[[dict, Path], None] | None = None,
    out_of: Callable[[argparse.Namespace], Path] | None = None,
) -> int:
    """Measure, write the result, its table and its picture to `options.out`; a mistake or Ctrl-C is told in one line.

    Args:
        picture: draws a result into a file.
        out_of: says where to, where `options.out` is None.
    """
    with in_one_line(parser):
        content = measure(options)
        out = options.out if out_of is None or options.out is not None else out_of(options)
        write_result(out, content)
        write_lines(out.with_suffix(".md"), content["rows"], names)
        if picture is not None:
            write_picture(picture, content, out)
        print(f"written: {out}")
    return 0


def write_picture(picture: Callable[[dict, Path], None], content: dict, out: Path) -> None:
    """Draw a result beside it; without matplotlib one line says what is missing, and the result stays."""
    try:
        picture(content, out.with_suffix(".png"))
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no picture, which needs matplotlib: pip install 'nextscale[plots]'", file=sys.stderr)
