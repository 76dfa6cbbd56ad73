"""The pictures of the speed benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from sample.files import atomically

COLOURS = matplotlib.colormaps["tab10"].colors


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    atomically(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))


CALLED = {  # on the pictures
    "official_float32": "official code, float32",
    "official_autocast": "official code, bfloat16 autocast",
    "plain_float32": "ours, float32 (--fast off)",
    "fast_float32": "ours, float32 (--fast auto)",
    "fast_bfloat16": "ours, bfloat16 (--fast on)",
    "official": "official code",
    "plain": "ours, plain",
    "graphs": "ours, as CUDA graphs",
    "kernels": "ours, with kernels (--fast auto)",
    "fast": "ours, kernels as graphs (--fast on)",
}


def together(batch: int) -> str:
    """A panel's title."""
    return f"{batch} images at once" if batch > 1 else "one image"


STAGES = ("condition_s", "blocks_s", "head_s", "draw_s", "quantiser_s", "decoder_s")


def draw_sampling(rows: Sequence[dict], path: Path, title: str) -> None:
    """Time an image by variant and batch, split into stages where they were timed; with the ratio to the official code.

    A stage is timed in calls of its own, so where stages add up to more than the whole they are drawn to its scale.
    """
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    figure = Figure(figsize=(8.5 * len(batches), 3.8), layout="constrained")
    figure.suptitle(title)
    unit, factor = ("s", 1.0) if max(row["seconds"] / row["batch"] for row in rows) > 1 else ("ms", 1e3)
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches):
        chosen = [row for row in rows if row["batch"] == batch][::-1]
        longest = factor * max(row["seconds"] for row in chosen) / batch
        for row in chosen:
            name, whole, left = CALLED[row["variant"]], factor * row["seconds"] / batch, 0.0
            axes.barh(name, whole, color="lightgrey", label="not split" if row is chosen[0] else None)
            parts = [max(0.0, row.get(stage, 0.0)) for stage in STAGES]
            scale = whole / max(sum(parts), row["seconds"])
            for stage, part, colour in zip(STAGES, parts, COLOURS):
                axes.barh(name, scale * part, left=left, color=colour, label=stage[:-2] if row is chosen[0] else None)
                left += scale * part
            ratio = row.get("times_official", row.get("times_official_float32"))
            times = f", {ratio:.2g} times official" if ratio and not row["variant"].startswith("official") else ""
            times += ", disturbed" if row.get("disturbed") else ""
            note = f" {whole:.3g} {unit}: {row['images_per_s']:.3g} images/s{times}"
            axes.text(whole, name, note, va="center", fontsize=8)
        axes.set(title=together(batch), xlabel=f"{unit} an image", xlim=(0, 1.9 * longest))
    axes.legend(fontsize=8, loc="lower right")
    save(figure, path)


UNITS = {"side": "side of the image, pixels", "batch": "images at once", "depth": "layers", "processes": "processes"}


def draw_growth(rows: Sequence[dict], path: Path, title: str = "") -> None:
    """Six panels: operations, seconds and peak cache over the side; seconds over batch and depth; processes.

    What was measured has dots; dashes are the powers that theory gives, through the last point; of
    processes, through the first.
    """
    curves = [name for name in UNITS if any(row["curve"] == name for row in rows)]
    figure = Figure(figsize=(16, 8.8), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 3).flat
    _operations(next(axes), rows)
    for curve in curves:
        seconds = curve != "processes"
        title = f"Measured seconds over {curve}" if seconds else "Images a second of all processes together"
        _measured(next(axes), rows, curve, "seconds" if seconds else "images_per_s", title)
    _caches(next(axes), rows)
    for unused in axes:
        unused.set_axis_off()
    save(figure, path)


def _curve(rows: Sequence[dict], curve: str, cache: str) -> tuple[list[dict], dict]:
    """The points and the fit of a curve."""
    mine = [row for row in rows if (row["curve"], row["cache"]) == (curve, cache)]
    return [row for row in mine if "x" in row], next(row for row in mine if "fit_over" in row)


def _caches_of(rows: Sequence[dict], curve: str) -> list[str]:
    return list(dict.fromkeys(row["cache"] for row in rows if row["curve"] == curve and "x" in row))


def _measured(axes: Axes, rows: Sequence[dict], curve: str, name: str, title: str) -> None:
    """One figure over a curve, a line a cache, with its exponents; theory dashed."""
    for cache, colour in zip(_caches_of(rows, curve), COLOURS):
        points, fit = _curve(rows, curve, cache)
        x, y = ([point[key] for point in points] for key in ("x", name))
        label = (
            f"{cache} of the cache" if cache == "all" and curve == "side" else cache if curve == "side" else "measured"
        )
        if f"{name}_exponent" in fit:
            label += f": power {fit[f'{name}_exponent']:.2f}, at the end {fit[f'{name}_local_exponent']:.2f}"
        axes.plot(x, y, "o-", color=colour, label=label)
        if cache == "all":
            at = 0 if curve == "processes" else -1
            for power, style in zip((2, 4) if curve == "side" else (1,), ("--", ":")):
                what = {2: " (linear layers)", 4: " (attention)"}.get(power, "")
                theory = [y[at] * (value / x[at]) ** power for value in x]
                axes.plot(x, theory, style, color="grey", zorder=0, label=f"theory: power {power}{what}")
            low, high = min(y), max(y)
    axes.set_ylim(low / 2, high * (60 if curve == "side" else 3))  # the legend stands above the lines
    axes.set_ylabel(name.replace("_per_s", " / s"))
    _log(axes, x, UNITS[curve], title)


def _operations(axes: Axes, rows: Sequence[dict]) -> None:
    """Operations of linear layers and attention over the side, and where they meet."""
    points, fit = _curve(rows, "side", "all")
    x = [point["x"] for point in points]
    for name, what, colour, power in (
        ("linear_gflop", "linear layers", "tab:blue", 2),
        ("attention_gflop", "attention", "tab:red", 4),
    ):
        y = [point[name] for point in points]
        label = f"{what}: power {fit[f'{name}_exponent']:.2f}, at the end {fit[f'{name}_local_exponent']:.2f}"
        axes.plot(x, y, "o-", color=colour, label=label)
        theory = [y[-1] * (value / x[-1]) ** power for value in x]
        axes.plot(x, theory, "--", color=colour, alpha=0.5, label=f"theory: power {power}")
    crossing = fit["attention_equals_linear_at_side"]
    if crossing is not None:
        axes.axvline(crossing, color="grey", linestyle=":", label=f"they cost the same at {crossing:.0f} pixels")
    low, high = axes.get_ylim()
    axes.set(ylabel="GFLOP", yscale="log", ylim=(max(low, min(y)) / 2, 60 * high))  # the legend stands above the lines
    _log(axes, x, UNITS["side"], "Operations of one image, counted from shapes")


def _caches(axes: Axes, rows: Sequence[dict]) -> None:
    """Peak bytes of keys and values at the largest side."""
    fits = [row for row in rows if row["curve"] == "side" and "fit_over" in row][::-1]
    names, peaks = [row["cache"] for row in fits], [row["peak_cache_mib_at_largest"] for row in fits]
    axes.barh(names, peaks, color=COLOURS[: len(fits)][::-1])
    for row, peak in zip(fits, peaks):
        axes.text(peak, row["cache"], f" {peak:.0f} MiB, {row['seconds_at_largest']:.3g} s", va="center", fontsize=9)
    axes.set(xlim=(0, 1.5 * max(peaks)), xlabel="MiB")
    axes.set_title(f"Peak of keys and values, and seconds, at {fits[-1]['fit_over'][-1]} pixels")


def _log(axes: Axes, x: Sequence[float], label: str, title: str) -> None:
    """Both axes logarithmic, with the points' own places below."""
    axes.set(xscale="log", yscale="log", xlabel=label, title=title)
    axes.set_xticks(x, [str(value) for value in x])
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=8, loc="upper left")
    axes.grid(alpha=0.3)
