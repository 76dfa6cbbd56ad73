"""What a command is to draw: texts, a file of them, classes. Nothing heavy is imported until it is needed."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sample.pipeline import NextScalePipeline


def check_text(name: str, text: str) -> None:
    """Raise ValueError if a text of the command line is of bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be text in UTF-8, got {text!r}") from None


def read_prompts(args: argparse.Namespace) -> tuple[list[str] | None, list[dict[str, Any]] | None]:
    """The texts to draw (None when classes are asked for), and their GenEval metadata if they have any.

    Raises:
        ValueError: if not exactly one of texts, file and classes is given, or a line cannot be read.
        FileNotFoundError: if there is no such file.
    """
    given = [bool(args.prompt), args.prompts is not None, args.classes is not None]
    if sum(given) != 1:
        raise ValueError(
            'give what to draw: a text ("a red star"), or --prompts FILE, or --class 3, and only one of them'
        )
    if args.prompts is None:
        for text in args.prompt:
            check_text("prompt", text)
        return args.prompt or None, None
    piped = str(args.prompts) == "-" or args.prompts.is_fifo()
    if piped and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(f"--prompts {args.prompts} can be read by one process only: give a file to several")
    if str(args.prompts) != "-" and (not args.prompts.exists() or args.prompts.is_dir()):  # a pipe will do
        raise FileNotFoundError(f"--prompts {args.prompts} is not a file")
    from sample.files import read_text

    text = read_text("--prompts", args.prompts)
    numbered = enumerate(re.split(r"\r\n|\r|\n", text), 1)  # not at what else Unicode takes for the end of a line
    lines = {number: line.strip() for number, line in numbered if line.strip()}
    if not lines:
        raise ValueError(f"--prompts {args.prompts} holds no line")
    if _is(list, text):
        raise ValueError(f"--prompts {args.prompts} is a list in JSON: give one text, or one JSON object, a line")
    if next(iter(lines.values())).startswith("{"):
        metadata = [_metadata(args.prompts, number, line) for number, line in lines.items()]
        return [entry["prompt"] for entry in metadata], metadata
    for number, line in lines.items():
        if _is(dict, line):
            raise ValueError(f"--prompts {args.prompts} line {number} is a JSON object, and the first line is a text")
    return list(lines.values()), None


def _is(kind: type, text: str) -> bool:
    """Whether a text is a list, or an object (dict), in JSON."""
    try:
        return isinstance(json.loads(text), kind)
    except json.JSONDecodeError:
        return False


def _metadata(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        if isinstance(entry["prompt"], str):
            return entry
    except (json.JSONDecodeError, KeyError, TypeError):
        pass
    raise ValueError(f"--prompts {path} line {number} is not a JSON object with a prompt, as the first line is")


def texts_or_classes(
    texts: list[str] | None, classes: str | None, pipeline: NextScalePipeline
) -> list[str] | list[int]:
    """What to draw: the texts, or if there are none the classes of `--class`.

    Raises:
        ValueError: if the model reads the other of the two, or knows no such classes.
    """
    if texts is None:
        return read_classes(classes, pipeline)
    if pipeline.by_class:
        raise ValueError("texts are for text models, and this model draws classes: give --class, e.g. --class 3")
    return texts


def read_classes(text: str, pipeline: NextScalePipeline) -> list[int]:
    """The classes of "3", "0,3,7", "0-9", "all", "null" or, where classes have names, "golden retriever".

    Raises:
        ValueError: if `text` is none of these, or the model knows no such classes.
    """
    from sample.classes import parse_classes
    from sample.pipeline import check_classes

    if not pipeline.by_class:
        raise ValueError('--class is for class models, and this model reads texts: give one, e.g. "a red star"')
    known = pipeline.transformer.config.num_classes
    labels = parse_classes(text, known, pipeline.config.class_names)
    try:
        return check_classes(labels, known)
    except ValueError as error:
        raise ValueError(f"--class {text}: {error}") from None


def unread(prompts: Sequence[str]) -> str | None:
    """What is wrong with captions of a kind that the bundled model was not trained on; None if there are none."""
    from sample.scene_reward import Caption

    strange = []
    for prompt in prompts:
        try:
            Caption.of(prompt)
        except ValueError:
            strange.append(prompt)
    if not strange:
        return None
    more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
    return (
        "the bundled model draws one to four plain shapes from captions like 'a red star left of a ring' or "
        f"'three circles'; {strange[0]!r}{more} it does not understand"
    )
