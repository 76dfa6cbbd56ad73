"""The picture of a search benchmark: score against compute, the reward's foresight by scale, weaker rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sample.files import atomically

NAMES = {
    "best": "best of N",
    "importance": "importance sampling",
    "tts": "TTS-VAR",
    "halving": "successive halving",
    "resample": "resampling only",
    "cluster": "clustering only",
    "random": "random selection",
}


def draw_search(content: Mapping, path: Path) -> None:
    """Draw a result of `evaluation.search_benchmark` to a PNG; the last panel only if there are rows for it."""
    from matplotlib.figure import Figure

    count = 3 if any("+noise=" in row["row"] for row in content["rows"]) else 2
    figure = Figure(figsize=(5 * count, 5.6), layout="constrained")
    panels = figure.subplots(1, count)
    _draw_curves(panels[0], content["rows"])
    _draw_foresight(panels[1], content["reward_by_scale"])
    if count > 2:
        _draw_weaker(panels[2], content["rows"], content["reward_by_scale"])
    for axes in panels:
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
    atomically(Path(path), lambda partial: figure.savefig(partial, dpi=130, format="png"))


def _draw_curves(axes: object, rows: Sequence[Mapping]) -> None:
    plain = next((row for row in rows if row["method"] == "plain"), None)
    for method, name in NAMES.items():
        own = [row for row in rows if row["row"].startswith(f"{method}@") and "+" not in row["row"]]
        own = sorted(([plain] if plain else []) + own, key=lambda row: row["compute"])
        if len(own) > bool(plain):
            scores = np.array([row["score"] for row in own])
            bars = np.abs(np.array([row["score_ci95"] for row in own]).T - scores)
            axes.errorbar([row["compute"] for row in own], scores, bars, marker="o", ms=4, capsize=2, label=name)
    guided = [row for row in rows if "+guidance=" not in row["row"]]
    for mark, of, style, label in (
        ("/", rows, {"marker": "*", "ms": 9, "ls": "none"}, "steps written out"),
        ("rounds=", guided, {"marker": "s", "ms": 4, "ls": "--"}, "rounds until it is enough"),
        ("rounds=", [r for r in rows if r not in guided], {"marker": "s", "ms": 4, "ls": ":"}, "... without guidance"),
        ("+oracle", rows, {"marker": "x", "ms": 6, "ls": "none"}, "the judge itself as reward"),
    ):
        own = sorted((row["compute"], row["score"]) for row in of if mark in row["row"])
        if own:
            axes.plot(*zip(*own), color="black", label=label, **style)
    axes.set(xscale="log", xlabel="FLOPs of an image, in plain images", ylabel="score (mean of six tags)")
    axes.set_title("Score against compute, 95 % intervals over prompts", fontsize=10)
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_xticks([], minor=True)


def _draw_foresight(axes: object, rows: Sequence[Mapping]) -> None:
    first = rows[0]["reward"] if rows else ""
    own = [row for row in rows if row["reward"] == first]
    scales = [row["scale"] for row in own]
    for name, label in (
        ("auc", "AUC against the judge"),
        ("auc_within_prompts", "the same, within prompts"),
        ("correlation", "correlation with the final reward"),
    ):
        values = [np.nan if row[name] is None else row[name] for row in own]
        if not np.isnan(values).all():
            axes.plot(scales, values, marker="o", ms=4, label=label)
    axes.set(xlabel="after scale", xticks=scales, ylim=(None, 1.02))
    axes.set_title(f"What the reward ({first}) foretells", fontsize=10)


def _draw_weaker(axes: object, rows: Sequence[Mapping], accuracy: Sequence[Mapping]) -> None:
    last = max((row["scale"] for row in accuracy), default=0)
    final = {row["reward"]: row["auc"] for row in accuracy if row["scale"] == last}
    for method in ("best", "tts"):
        own = [row for row in rows if row["row"] == f"{method}@4" or row["row"].startswith(f"{method}@4+noise=")]
        points = sorted((final[row["reward"]], row["score"]) for row in own if final.get(row["reward"]) is not None)
        if points:
            axes.plot(*zip(*points), marker="o", ms=4, label=f"{NAMES[method]} at 4 plain images")
    plain = next((row["score"] for row in rows if row["method"] == "plain"), None)
    if plain is not None:
        axes.axhline(plain, color="grey", ls=":", label="no search")
    axes.set(xlabel="AUC of the reward on finished pictures", ylabel="score")
    axes.set_title("As the reward gets worse", fontsize=10)
