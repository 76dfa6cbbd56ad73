"""The picture of the elastic benchmark: quality against speed, and against the cache's memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from sample.images import atomically

MARKS = {"full": "*", "subnet": "s", "code": "o", "cache": "^", "composition": "D"}
AXES = (
    ("tokens_images_per_s", "images a second, without the decoder"),
    ("peak_cache_mib", "peak key/value cache, MiB"),
)


def draw(rows: Sequence[dict], path: Path) -> None:
    """FD-scenes and score against speed and cache; speed against cache where no quality was measured."""
    measured = "fd_scenes" in rows[0]
    qualities = (
        (("fd_scenes", "FD-scenes (lower is better)"), ("score", "scene score")) if measured else (("speed", "x full"),)
    )
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(14, 4.6 * len(qualities)), layout="constrained")
        grid = figure.subplots(len(qualities), 2, squeeze=False)
        for line, (quality, name) in zip(grid, qualities):
            for axes, (cost, label) in zip(line, AXES):
                _scatter(axes, rows, cost, quality)
                axes.set(xlabel=label, ylabel=name, xscale="log")
                axes.xaxis.set_major_formatter(ScalarFormatter())
                axes.xaxis.set_minor_formatter(ScalarFormatter())
        figure.legend(*grid[0][1].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    atomically(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))


def _scatter(axes: Axes, rows: Sequence[dict], cost: str, quality: str) -> None:
    series: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        series.setdefault((row["group"], row.get("label", "")), []).append(row)
    colours = matplotlib.colormaps["tab20"].colors
    for place, ((group, label), members) in enumerate(series.items()):
        if group == "cache" and cost != "peak_cache_mib":
            continue  # a smaller cache is about memory
        ordered = sorted(members, key=lambda row: row[cost])
        x, y = ([row[name] for row in ordered] for name in (cost, quality))
        intervals = [row.get(f"{quality}_ci95", [value, value]) for row, value in zip(ordered, y)]
        reach = [
            [value - low for value, (low, _) in zip(y, intervals)],
            [high - value for value, (_, high) in zip(y, intervals)],
        ]
        size = 14 if group == "full" else 6
        name = f"{group}: {label}" if label else group
        axes.errorbar(
            x, y, reach, marker=MARKS[group], ms=size, lw=1, elinewidth=0.5, color=colours[place % 20], label=name
        )
    axes.grid(alpha=0.3)
