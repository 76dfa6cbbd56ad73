"""The pictures of the elastic benchmarks: quality against speed and cache; speed against its ceiling and cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, ScalarFormatter

from sample.files import atomically

MARKS = {"full": "*", "subnet": "s", "code": "o", "cache": "^", "prune": "v", "guidance": "P", "composition": "D"}
SERIES = {  # the colour of each in tab20, the same in every picture
    ("full", "plain"): 0,
    ("full", "supernet"): 1,
    ("subnet", "plain"): 2,
    ("subnet", "supernet"): 3,
    ("code", "plain"): 4,
    ("code", "specialised"): 5,
    ("code", "self"): 6,
    ("cache", "scalekv"): 7,
    ("cache", "window"): 8,
    ("cache", "streaming"): 9,
    ("cache", "snapkv"): 10,
    ("cache", "pyramidkv"): 14,
    ("composition", "supernet"): 11,
    ("composition", "self"): 12,
    ("composition", "specialised"): 13,
    ("prune", "FastVAR"): 16,
    ("guidance", "fewer scales"): 18,
}
AXES = (
    ("tokens_images_per_s", "images a second, without the decoder"),
    ("peak_cache_mib", "peak key/value cache, MiB"),
)


def draw(rows: Sequence[dict], path: Path) -> None:
    """FD-scenes and score against speed and cache."""
    qualities = (("fd_scenes", "FD-scenes (lower is better)"), ("score", "scene score (higher is better)"))
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(14, 4.6 * len(qualities)), layout="constrained")
        grid = figure.subplots(len(qualities), 2)
        for line, (quality, name) in zip(grid, qualities):
            for axes, (cost, label) in zip(line, AXES):
                _scatter(axes, rows, cost, quality)
                axes.set(xlabel=label, ylabel=name, xscale="log")
                axes.xaxis.set_major_formatter(ScalarFormatter())
                axes.xaxis.set_minor_formatter(ScalarFormatter())
                if quality == "fd_scenes":  # from 7 to 300
                    axes.set_yscale("log")
                    axes.yaxis.set_major_formatter(LogFormatter())
                    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        figure.legend(*grid[0][1].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    atomically(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))


def draw_speed(rows: Sequence[dict], path: Path) -> None:
    """Times the full model's speed, against the ceiling by operations and against the peak cache."""
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(12, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        most = max(row["ceiling"] for row in rows) * 1.1
        left.plot([1, most], [1, most], color="grey", lw=1, label="ceiling: every operation takes the same time")
        left.plot([1, most], [0.9, 0.9 * most], color="grey", lw=1, ls="--", label="90 % of it")
        for group in dict.fromkeys(row["group"] for row in rows):
            members = [row for row in rows if row["group"] == group]
            for axes, cost in ((left, "ceiling"), (right, "peak_cache_mib")):
                x, y = [row[cost] for row in members], [row["speed"] for row in members]
                name = f"{group}: {members[0]['label']}"
                axes.plot(x, y, MARKS[group], ms=14 if group == "full" else 7, label=name)
        for row in rows[1:]:
            word = (
                f"{row['row'].split(' depth ')[1].split()[0]} layers"
                if "depth" in row["row"]
                else row["row"].split()[0]
            )
            right.annotate(word, (row["peak_cache_mib"], row["speed"]), (7, 4), textcoords="offset points", fontsize=9)
        left.set(xlabel="operations of the full model over the plan's", ylabel="times the full model's speed")
        right.set(xlabel="peak key/value cache, MiB", ylabel="times the full model's speed")
        left.legend(fontsize=9)
        for axes in (left, right):
            axes.grid(alpha=0.3)
    atomically(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))


def _scatter(axes: Axes, rows: Sequence[dict], cost: str, quality: str) -> None:
    series: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        series.setdefault((row["group"], row.get("label", "")), []).append(row)
    colours = matplotlib.colormaps["tab20"].colors
    for (group, label), members in series.items():
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
            x,
            y,
            reach,
            marker=MARKS[group],
            ms=size,
            lw=1,
            elinewidth=0.5,
            color=colours[SERIES[group, label]],
            label=name,
        )
    axes.grid(alpha=0.3)
