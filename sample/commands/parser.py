"""The parser of the `nextscale` command. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are ValueErrors, so that every mistake is reported in the same one line."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError(message)."""
        raise ValueError(f"{message} ({self.prog} --help shows what is allowed)")

    def parse_words(self, words: Sequence[str]) -> argparse.Namespace:
        """`parse_intermixed_args`, where nothing behind `--` is an option: Python's own forgets where that stood."""
        place = list(words).index("--") if "--" in words else len(words)
        marks = {f"\0{number}": word for number, word in enumerate(words[place + 1 :])}
        try:
            args = self.parse_intermixed_args([*words[:place], *marks])
        except ValueError as error:
            raise ValueError(_unmarked(str(error), marks)) from None
        for name, value in vars(args).items():
            setattr(args, name, _unmarked(value, marks))
        return args


def _unmarked(value: Any, marks: Mapping[str, str]) -> Any:
    """A value with the words in the place of their marks."""
    if isinstance(value, list):
        return [_unmarked(each, marks) for each in value]
    if isinstance(value, Path):
        return Path(_unmarked(str(value), marks))
    if isinstance(value, str):
        for mark, word in reversed(marks.items()):
            value = value.replace(mark, word)
    return value
