"""The parser of the `nextscale` command. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are ValueErrors, so that every mistake is reported in the same one line."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError(message)."""
        raise ValueError(f"{message} ({self.prog} --help shows what is allowed)")
