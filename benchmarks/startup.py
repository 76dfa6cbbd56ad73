"""Start-up: `python -m benchmarks.startup`. The command's help, the first picture from a cold shell, loading a model.

Seconds of the wall clock and of the processors; a machine that does something else shows in the first only.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.tables import write_lines
from evaluation.command import Parser, add_out, check_least, in_one_line
from evaluation.report import command_of, portable, result, write_result

COLUMNS = ("what", "wall_s", "cpu_s", "peak_rss_mib", "weights_mib", "peak_of_weights", "runs")
BARE = "import torch; torch.set_num_threads(1); from sample.load import load_pipeline"
LOAD = BARE + "; load_pipeline({model!r}, device='cpu')"


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(prog="python -m benchmarks.startup", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="of each (3)")
    parser.add_argument("--load", type=Path, metavar="MODEL", help="a large model folder: peak memory of loading it")
    add_out(parser, "results/startup_cpu.json", "result and table")
    return parser


def run(command: Sequence[str]) -> dict[str, float]:
    """Seconds and peak memory of a process and what it started.

    Raises:
        RuntimeError: if it fails.
    """
    code = (
        "import resource, subprocess, sys, json; r = subprocess.run(sys.argv[1:], capture_output=True, text=True);"
        "u = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(json.dumps([r.returncode, u.ru_utime + u.ru_stime, u.ru_maxrss, r.stderr[-500:]]))"
    )
    began = time.perf_counter()
    made = subprocess.run([sys.executable, "-S", "-c", code, *command], capture_output=True, text=True, check=True)
    status, cpu, peak_kib, message = json.loads(made.stdout)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed: {message}")
    return {"wall_s": time.perf_counter() - began, "cpu_s": cpu, "peak_rss_mib": peak_kib / 1024}


def row_of(what: str, command: Sequence[str], runs: int) -> dict[str, Any]:
    """Medians of some runs."""
    found = [run(command) for _ in range(runs)]
    return {"what": what, **{name: median(one[name] for one in found) for name in found[0]}, "runs": runs}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each thing that starts."""
    door = [sys.executable, "-m", "nextscale"]
    rows = [row_of("nextscale --help", [*door, "--help"], options.runs)]
    rows.append(row_of("nextscale sample --help", [*door, "sample", "--help"], options.runs))
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.runs):
            one = run([*door, "sample", "a red star", "--out", f"{folder}/{number}"])
            rows.append({"what": "first picture of the bundled model", **one, "runs": 1})
    rows[2:] = [rows[2] | {n: median(r[n] for r in rows[2:]) for n in ("wall_s", "cpu_s")} | {"runs": options.runs}]
    if options.load is not None:
        size = sum(path.stat().st_size for path in options.load.rglob("*.safetensors")) / 2**20
        bare = run([sys.executable, "-c", BARE])
        loaded = row_of(
            f"load {portable(options.load)}", [sys.executable, "-c", LOAD.format(model=str(options.load))], 1
        )
        loaded |= {"weights_mib": size, "peak_of_weights": (loaded["peak_rss_mib"] - bare["peak_rss_mib"]) / size}
        rows.append(loaded)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result and its table."""
    parser = parser_of()
    options = parser.parse_args(argv)
    with in_one_line(parser):
        check_least(options, runs=1)
        if options.load is not None and not options.load.is_dir():
            raise ValueError(f"--load must be a model folder, got {options.load}")
        rows = measure(options)
        command = command_of(parser_of(), options)
        settings = {"page_size": resource.getpagesize()}
        write_result(options.out, result(rows, command=command, n=options.runs, seeds=0, settings=settings))
        write_lines(options.out.with_suffix(".md"), rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
