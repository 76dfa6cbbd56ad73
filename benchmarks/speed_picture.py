"""The pictures of the speed benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from sample.images import atomically

COLOURS = matplotlib.colormaps["tab10"].colors


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    atomically(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))


def draw_sampling(rows: Sequence[dict], path: Path) -> None:
    """Seconds an image by variant and batch, split into stages."""
    names = dict.fromkeys(name for row in rows for name in row if name.endswith("_s") and name != "images_per_s")
    stages = [name for name in names if name != "gflop_per_s"]
    batches = sorted({row["batch"] for row in rows})
    figure = Figure(figsize=(6.5 * len(batches), 4), layout="constrained")
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches):
        chosen = [row for row in rows if row["batch"] == batch][::-1]
        lefts = [0.0] * len(chosen)
        for stage, colour in zip(stages, COLOURS):
            widths = [row.get(stage, 0.0) / batch for row in chosen]
            axes.barh([row["variant"] for row in chosen], widths, left=lefts, color=colour, label=stage[:-2])
            lefts = [left + width for left, width in zip(lefts, widths)]
        for row, left in zip(chosen, lefts):
            note = ", disturbed" if row["disturbed"] else ""
            axes.text(left, row["variant"], f" {row['images_per_s']:.2f} images/s{note}", va="center", fontsize=8)
        axes.set(title=f"batch {batch}", xlabel="seconds an image", xlim=(0, 1.5 * max(lefts)))
    axes.legend(fontsize=8, loc="lower right")
    save(figure, path)


def draw_growth(rows: Sequence[dict], path: Path) -> None:
    """Seconds and operations over side, batch and depth, with the fitted exponents in the legend."""
    curves = dict.fromkeys(row["curve"] for row in rows)
    figure = Figure(figsize=(5 * len(curves), 4.2), layout="constrained")
    for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves):
        for cache, colour in zip(dict.fromkeys(row["cache"] for row in rows if row["curve"] == curve), COLOURS):
            mine = [row for row in rows if (row["curve"], row["cache"]) == (curve, cache)]
            points, fit = [row for row in mine if "x" in row], next(row for row in mine if "fit_over" in row)
            x = [point["x"] for point in points]
            for name, scale, style in (
                ("seconds", 1, "o-"),
                ("linear_gflop", 100, "--"),
                ("attention_gflop", 100, ":"),
            ):
                label = f"{name}{'' if scale == 1 else ' / 100'}, {cache}: x^{fit[f'{name}_exponent']:.2f}"
                axes.plot(x, [point[name] / scale for point in points], style, color=colour, label=label)
        axes.set(xscale="log", yscale="log", xlabel=curve, title=f"cost over {curve}")
        axes.set_xticks(x, [str(value) for value in x])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    save(figure, path)
