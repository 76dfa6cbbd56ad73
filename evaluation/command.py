"""What the commands `python -m evaluation.*` and `python -m benchmarks.*` share: they tell mistakes in one line.

Nothing heavy is imported here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from sample.processes import line_about, process_name, speaks


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Tell it and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help shows what is allowed)\n")


@contextmanager
def in_one_line(parser: argparse.ArgumentParser, kept: str = "nothing was written") -> Iterator[None]:
    """Tell what ends the work inside and exit: with code 2 after a mistake, with 130 when interrupted.

    Args:
        kept: what is left after Ctrl-C, in a few words.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        line = line_about(error)
        if line is None:
            raise
        parser.exit(2, f"{parser.prog}: error{process_name()}: {line}\n" if speaks() else None)
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted; {kept}\n")


def add_out(parser: argparse.ArgumentParser, published: str, what: str) -> None:
    """Declare --out of a command that makes a `published` result again; `what` it writes."""
    parser.add_argument(
        "--out", type=Path, default=Path(published), help=f"{what} (without it, {published} is overwritten)"
    )


def check_least(options: argparse.Namespace, **least: int) -> None:
    """Raise ValueError unless options are at least so large: `check_least(options, n=2, seed=0)`. None passes."""
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')} must be {low} or more, got {value}")
