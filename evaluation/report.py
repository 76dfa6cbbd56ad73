"""Result files: every measured claim as one JSON object, with what is needed to measure it again.

A result file holds `command`, `commit`, `hardware`, `date`, `versions`, `seeds`, `n`, `settings` and `rows`, one object
per configuration with plain field names; the 95 % interval of field NAME is `[low, high]` under `NAME_ci95`. What is
no finite number is null.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VERSIONS = ("torch", "diffusers", "transformers", "torchmetrics", "numpy", "scipy")
WIDE = 8  # rows of a result that a table shows side by side
_ROOT = Path(__file__).resolve().parent.parent


def portable(path: str | os.PathLike) -> str:
    """A path as it may be published: relative to the working directory if below it, else its last two parts."""
    absolute = Path(os.path.abspath(path))
    here = Path.cwd()
    if absolute.is_relative_to(here):
        return absolute.relative_to(here).as_posix()
    return Path(*absolute.parts[1:][-2:]).as_posix() if Path(path).is_absolute() else absolute.name


def command_line(program: str, options: Mapping, defaults: Mapping) -> str:
    """The command that gives these options: those that differ from their defaults, paths made `portable`."""
    words = [program]
    for name, value in options.items():
        if value == defaults.get(name):
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, list) and all(isinstance(text, str) for text in value):  # given several times
            words += [word for text in value for word in (flag, shlex.quote(text))]
            continue
        is_path = isinstance(value, Path) or str(value).startswith(("/", "~", ".."))
        text = portable(value) if is_path else _word(value)
        if value is True:
            words.append(flag)
        else:  # a value like -5,-1 would be taken for an option
            words += [f"{flag}={shlex.quote(text)}"] if text.startswith("-") else [flag, shlex.quote(text)]
    return " ".join(words)


def command_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """The command that gives a parser these options, by the parser's own name and defaults."""
    return command_line(parser.prog, vars(options), {name: parser.get_default(name) for name in vars(options)})


def _word(value: object) -> str:
    """A value as its option reads it: those by scale after commas."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def is_result(path: Path) -> bool:
    """Whether a file is a results file, as `write_result` writes it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    said = {"command", "versions"}
    return isinstance(content, dict) and isinstance(content.get("rows"), list) and said <= {*content}


def flat(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """A nested object as one with dotted names, as the command line has them: transformer.depth."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def short_digest(settings: Mapping) -> str:
    """Eight hexadecimal digits that change with the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def file_digest(path: str | os.PathLike) -> str:
    """The first twelve hexadecimal digits of a file's SHA-256."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def commit() -> str:
    """The commit of the source tree, `+changes` appended if tracked files differ; `unknown` outside a clone."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(_ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        found, dirty = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{found}+changes" if dirty else found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def hardware() -> dict:
    """Processor, cores, threads torch may use and, where there is one, the GPU."""
    import torch

    found: dict = {"cpu": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def result(
    rows: Sequence[Mapping],
    *,
    command: str,
    n: int,
    seeds: Mapping | Sequence | int | None,
    settings: Mapping | None = None,
) -> dict:
    """A result as it is written to `results/NAME.json`.

    command: the one command that makes it, see `command_line`.  n: images (or runs) behind each row.
    seeds: every seed that matters.  settings: what else decides the figures.
    """
    return {
        "command": command,
        "commit": commit(),
        "hardware": hardware(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
        "seeds": seeds,
        "n": n,
        "settings": dict(settings or {}),
        "rows": [dict(row) for row in rows],
    }


def write_result(path: str | os.PathLike, content: Mapping) -> None:
    """Write `content` (see `result`) to PATH.json and its rows as a Markdown table to PATH.md, atomically."""
    from sample.files import write_text

    path = Path(path)
    write_text(path.with_suffix(".md"), markdown(content["rows"]) + "\n")
    write_text(path, json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """A JSON-able value with null for the numbers that JSON does not know: infinite ones, and none at all."""
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def figure(row: Mapping, name: str) -> str:
    """One figure of a row as text, with its interval where there is one: `0.912 [0.890, 0.931]`."""
    value, interval = row[name], row.get(f"{name}_ci95")
    if interval is None:
        return _cell(value)
    return f"{_cell(value)} [{_cell(interval[0])}, {_cell(interval[1])}]"


def cells_of(rows: Sequence[Mapping]) -> tuple[list[str], list[Sequence[str]]]:
    """Head and lines of a table of the rows: one line per figure, or one per row where there are more than `WIDE`;
    intervals in brackets.
    """
    names = list(dict.fromkeys(name for row in rows for name in row if not name.endswith("_ci95")))
    cells = [[figure(row, name) if name in row else "" for name in names] for row in rows]
    if len(rows) > WIDE:
        return names, cells
    return ["figure", *["value"] * len(rows)], list(zip(names, *cells))


def markdown(rows: Sequence[Mapping]) -> str:
    """The rows as a Markdown table, see `cells_of`."""
    head, lines = cells_of(rows)
    rule = f"|{'---|' * len(head)}"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def table(rows: Sequence[Mapping], names: Sequence[str]) -> str:
    """The named figures of the rows for a terminal: one aligned line per figure that is there, or one per row where
    there are more than `WIDE`.
    """
    present = [name for name in names if any(name in row for row in rows)]
    lines = [[name, *(figure(row, name) if name in row else "-" for row in rows)] for name in present]
    if len(rows) > WIDE:
        lines = list(zip(*lines))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)) for line in lines)


def metric_rows(path: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, without a last one that a killed run did not finish.

    Raises:
        ValueError: naming a line before it that is no JSON object.
    """
    lines, rows = path.read_text(encoding="utf-8").splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path} line {number} is no JSON object") from None
    return rows
