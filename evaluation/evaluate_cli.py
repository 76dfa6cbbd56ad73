"""`nextscale evaluate`. Torch is imported when the work starts, not to parse."""

import argparse

from evaluation.evaluate_options import check, configure

__all__ = ["configure", "run"]


def run(args: argparse.Namespace) -> int:
    """Do what the options say.

    Returns:
        0.

    Raises:
        ValueError, FileNotFoundError: on options that make no sense, naming them.
        KeyboardInterrupt: when interrupted; what is finished is kept.
    """
    check(args)
    from evaluation.evaluate import evaluate

    return evaluate(args)
