"""Scaling laws from measured points: the table of points, the laws through them, the frontier, the picture.

A point is one checkpoint of one run, a row of a CSV: `run`, `parameters` (of the transformer), `images` (seen in
training), `final` (1: the end of its run, 0: on the way), and some figures: `loss`, `loss_last` (nats a token, over all
scales and over the last one), `error`, `error_last` (share of wrong tokens), `fd_scenes`, `is_scenes`, `score_error`
(1 - scenes score); maybe `compute` (FLOPs of training) and `seed`.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from math import inf, prod
from pathlib import Path

import numpy as np

from evaluation.powerlaws import FITS, bootstrap_law, fit_power_law, frontier, held_out
from evaluation.report import metric_rows

FIGURES = ("loss", "loss_last", "error", "error_last", "fd_scenes", "score_error")  # all fall with size
NEEDED = ("run", "parameters", "images", "final")
RESAMPLES = 400
LEAST = 4  # sizes that a law needs, one of which tests it
Point = dict[str, float | str]


# --- points -----------------------------------------------------------------------------------------------------------


def read_points(path: str | Path) -> list[Point]:
    """The rows of a CSV (see above); an empty cell is a figure that was not taken.

    Raises FileNotFoundError without the file, ValueError if a column is missing or a cell is no number.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"csv {path} does not exist")
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in NEEDED if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"csv {path} must have columns {', '.join(NEEDED)}, and lacks {', '.join(missing)}")
        return [_point(row, f"{path} line {reader.line_num}") for row in reader]


def _point(row: Mapping[str, str], place: str) -> Point:
    point: Point = {}
    if None in row:
        raise ValueError(f"csv {place} has more cells than there are columns")
    for name, cell in row.items():
        if name == "run":
            point[name] = cell
        elif cell not in ("", None):
            try:
                point[name] = float(cell)
            except ValueError:
                raise ValueError(f"csv {place}: {name} must be a number, got {cell!r}") from None
            if not 0 <= point[name] < inf:
                raise ValueError(f"csv {place}: {name} must be a finite number, 0 or more, got {cell}")
    missing = [name for name in NEEDED if name not in point]
    if missing:
        raise ValueError(f"csv {place} has no {', '.join(missing)}")
    if not point["parameters"]:
        raise ValueError(f"csv {place}: parameters must be above 0, got 0")
    return point


def write_points(path: str | Path, points: Sequence[Point]) -> None:
    """The rows as a CSV that `read_points` reads, atomically."""
    from sample.files import atomically

    names = list(dict.fromkeys(name for point in points for name in point))

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(points)

    atomically(Path(path), write)


def points_of_run(folder: str | Path, *, tokens_per_image: int, parameters: int, seed: int = 0) -> list[Point]:
    """A point for every validation of a training run (`metrics.jsonl`), the last one final.

    The loss is nats a token, however the training weighed the scales.

    Raises FileNotFoundError if there is no validation, ValueError if it has no loss by scale.
    """
    folder = Path(folder)
    path, rows = folder / "metrics.jsonl", {}
    if path.is_file():
        for row in metric_rows(path):
            if row["kind"] == "validation":
                rows[row["step"]] = row  # a resumed run writes some steps again
    if not rows:
        raise FileNotFoundError(f"run {folder} has no validation in metrics.jsonl: train it first")
    points = []
    for step in sorted(rows):
        row = rows[step]
        scales = [name.removeprefix("loss_") for name in row if re.fullmatch(r"loss_\d+x\d+(-\d+)?", name)]
        if not scales:
            raise ValueError(f"run {folder} has no loss by scale, as a refiner's has none: it is no point of a law")
        last = scales[-1]
        lengths = {name: prod(map(int, name.partition("-")[0].split("x"))) for name in scales}
        points.append(
            {
                "run": folder.name,
                "parameters": parameters,
                "images": row["images"],
                "final": int(step == max(rows)),
                "seed": seed,
                "compute": 6 * parameters * row["images"] * tokens_per_image,
                "loss": sum(row[f"loss_{name}"] * tokens for name, tokens in lengths.items()) / sum(lengths.values()),
                "loss_last": row[f"loss_{last}"],
                "error": 1 - row["accuracy"],
                "error_last": 1 - row[f"accuracy_{last}"],
            }
        )
    return points


def weights_of(folder: str | Path) -> int:
    """Numbers in all safetensors files of a folder, from their headers."""
    from safetensors import safe_open

    count = 0
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            count += sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    return count


# --- laws -------------------------------------------------------------------------------------------------------------


def averaged(points: Sequence[Point], figure: str) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and the figure of the final points, the mean over runs of one size."""
    found: dict[float, list[float]] = {}
    for point in points:
        if point["final"] and figure in point:
            found.setdefault(point["parameters"], []).append(point[figure])
    sizes = sorted(found)
    return np.array(sizes), np.array([np.mean(found[size]) for size in sizes])


def lawful(y: Sequence[float]) -> bool:
    """Whether a power law may go through a figure: it is above 0 everywhere, and not the same everywhere."""
    values = np.asarray(y, float)
    return len(values) > 0 and bool((values > 0).all()) and float(np.ptp(np.log(values))) > 1e-12


def law_row(x: Sequence[float], y: Sequence[float], form: str, resamples: int) -> dict:
    """One law as an object of a results file."""
    law = FITS[form](x, y)
    row = {"law": law.text, "scale": law.scale, "exponent": law.exponent, "floor": law.floor, "pearson": law.pearson}
    if resamples:
        row |= {f"{name}_ci95": interval for name, interval in bootstrap_law(x, y, form, resamples=resamples).items()}
    return {name: value for name, value in row.items() if name == "law" or np.isfinite(value).all()}


def laws_in_size(points: Sequence[Point], *, resamples: int = RESAMPLES) -> list[dict]:
    """Every figure's laws in the number of parameters (in billions, as VAR's), each tested on the largest size."""
    rows = []
    for figure in FIGURES:
        sizes, values = averaged(points, figure)
        for form in FITS:
            if len(sizes) < (LEAST if form == "power" else LEAST + 1) or not lawful(values):  # the largest is held out
                continue
            x = sizes / 1e9
            row = {"figure": figure, "against": "parameters (billions)", "form": form, "points": len(x)}
            row |= law_row(x, values, form, resamples)
            test = held_out(x, values, form)
            row |= {f"largest_{name}": test[name] for name in ("measured", "predicted")}
            rows.append(row | {"largest_error": test["error"]})
    return rows


def compute_frontier(points: Sequence[Point], figure: str) -> list[Point]:
    """The checkpoints nothing cheaper beats, by rising compute; what cost none is no checkpoint of a law."""
    known = [point for point in points if figure in point and point.get("compute")]
    return [known[i] for i in frontier([p["compute"] for p in known], [p[figure] for p in known])]


def laws_in_compute(points: Sequence[Point], *, resamples: int = RESAMPLES) -> list[dict]:
    """Laws along the compute-optimal frontier (in PFLOPs), and of the size that is optimal there."""
    rows = []
    for figure in FIGURES[:4]:
        best = compute_frontier(points, figure)
        x, y = [point["compute"] / 1e15 for point in best], [point[figure] for point in best]
        for form in FITS:
            if len(set(x)) >= 5 and lawful(y):
                row = {"figure": figure, "against": "compute (PFLOPs)", "form": form, "points": len(x)}
                rows.append(row | law_row(x, y, form, resamples))
        sizes = [point["parameters"] for point in best]
        if len(set(sizes)) >= 3:
            law = fit_power_law(x, sizes)
            row = {"figure": f"optimal parameters for {figure}", "against": "compute (PFLOPs)", "form": "power"}
            row |= {"points": len(x), "exponent": law.exponent, "pearson": law.pearson}
            if resamples:
                row["exponent_ci95"] = bootstrap_law(x, sizes, "power", resamples=resamples)["exponent"]
            rows.append(row)
    return rows


def check(points: Sequence[Point]) -> list[str]:
    """Cautions about a ladder. Raises ValueError if there are too few sizes to fit anything."""
    measured = [figure for figure in FIGURES if any(figure in point for point in points)]
    if not measured:
        raise ValueError(f"points must have one of {', '.join(FIGURES)}, and have none")
    if not any(point["final"] for point in points):
        raise ValueError("points must be final (final 1) at the end of each run, and none is")
    sizes, losses = averaged(points, max(measured, key=lambda figure: len(averaged(points, figure)[0])))
    if len(sizes) < LEAST:
        raise ValueError(f"laws need {LEAST} sizes or more, and the final points have {len(sizes)}")
    lines = []
    for figure in measured:
        if not lawful(averaged(points, figure)[1]):
            lines.append(f"no law of {figure}: no final points, the same in all of them, or 0 in one")
    if not all("compute" in point for point in points):
        lines.append("points without compute are not on the frontier: the laws in compute leave them out")
    if len(sizes) < 6 or sizes.max() / sizes.min() < 30:
        lines.append(
            f"{len(sizes)} sizes over a factor of {sizes.max() / sizes.min():.0f}: exponents need 6 over 30 or more"
        )
    if (np.diff(losses) > 0).any():
        worse = sizes[1:][np.diff(losses) > 0][0]
        lines.append(f"the model of {worse:.3g} parameters is worse than a smaller one: not trained long enough?")
    if any(not point["final"] for point in points):
        lines.append("checkpoints on the way were not annealed: the frontier lies above that of runs that end there")
    return lines


# --- picture ----------------------------------------------------------------------------------------------------------

NO_FLOOR = 1e-3  # a fitted floor below this share of the smallest value is none
LABELS = {
    "loss": "loss, nats a token (or bit), all scales",
    "loss_last": "loss, nats a token (or bit), last scale",
    "error": "share of wrong tokens, all scales",
    "error_last": "share of wrong tokens, last scale",
    "fd_scenes": "FD-scenes",
    "score_error": "1 - scenes score",
}


def picture(points: Sequence[Point], path: str | Path) -> None:
    """Laws in size (dashed: with a floor), and loss against compute with its frontier, as in VAR's figures 5 and 6.

    Raises ValueError if matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the picture needs matplotlib: pip install 'nextscale[plots]'") from None
    from sample.files import atomically

    figures = [figure for figure in FIGURES if len(averaged(points, figure)[0]) >= 4]
    panels = [(_draw_size, figure) for figure in figures]
    panels += [(_draw_compute, figure) for figure in ("loss", "loss_last") if compute_frontier(points, figure)]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    sheet = Figure(figsize=(4.6 * columns, 3.7 * rows), layout="constrained")
    FigureCanvasAgg(sheet)
    axes = sheet.subplots(rows, columns, squeeze=False).ravel()
    for axis, (draw, figure) in zip(axes, panels):
        draw(axis, points, figure)
        axis.set_title(LABELS[figure], fontsize=10)
        axis.grid(alpha=0.25, which="both", linewidth=0.5)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, frameon=False, loc="lower left" if draw is _draw_compute else "upper right")
        _plain_numbers(axis)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    atomically(Path(path), lambda partial: sheet.savefig(partial, dpi=140))


def _draw_size(axis, points: Sequence[Point], figure: str) -> None:
    finals = [point for point in points if point["final"] and figure in point]
    axis.scatter([p["parameters"] / 1e6 for p in finals], [p[figure] for p in finals], s=16, color="#1f4e9c", zorder=3)
    sizes, values = averaged(points, figure)
    x = sizes / 1e9
    line = np.geomspace(x.min(), x.max() * 1.5, 60)
    for form, style in (("power", "-"), ("floor", "--")):
        if lawful(values) and (len(x) >= 5 or form == "power"):
            law = FITS[form](x, values)
            if law.floor > NO_FLOOR * values.min() or form == "power":
                label = f"{law.text.replace('x', 'N')}, r = {law.pearson:.4f}"
                axis.plot(line * 1e3, law(line), style, color="#c0504d", linewidth=1.2, label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("parameters, millions (N: billions)")


def _draw_compute(axis, points: Sequence[Point], figure: str) -> None:
    from matplotlib import colormaps

    runs: dict[str, list[Point]] = {}
    for point in points:
        if figure in point and "compute" in point:
            runs.setdefault(str(point["run"]), []).append(point)
    sizes, named = sorted({run[0]["parameters"] for run in runs.values()}), set()
    for run in runs.values():
        size = run[0]["parameters"]
        colour = colormaps["viridis"](sizes.index(size) / max(len(sizes) - 1, 1))
        run = sorted(run, key=lambda p: p["compute"])
        x, y = [p["compute"] / 1e15 for p in run], [p[figure] for p in run]
        millions = f"{size / 1e6:.2g}" if size < 1e8 else f"{size / 1e6:,.0f}"
        label = None if size in named else f"{millions} M parameters"
        axis.plot(x, y, "-", color=colour, linewidth=1, label=label)
        named.add(size)
    best = compute_frontier(points, figure)
    x, y = [p["compute"] / 1e15 for p in best], [p[figure] for p in best]
    if len(set(x)) >= 3 and lawful(y):
        law = fit_power_law(x, y)
        label = f"frontier {law.text.replace('x', 'C')}, r = {law.pearson:.4f}"
        axis.plot(x, law(np.array(x)), "--", color="#c0504d", linewidth=1.4, label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("training compute C, PFLOP")


NUMBERS = ((300, (1,)), (8, (1, 2, 5)), (1.5, (1, 1.5, 2, 3, 4, 5, 7)))  # in a decade, where an axis spans so much


def _plain_numbers(axis) -> None:
    """Numbers as they are written, and as many as fit: 0.2, 0.3, 0.5."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for one in (axis.xaxis, axis.yaxis):
        low, high = one.get_view_interval()
        subs = next((own for span, own in NUMBERS if high > span * low), range(1, 10))
        one.set_major_locator(LogLocator(subs=subs))
        one.set_major_formatter(StrMethodFormatter("{x:g}"))
        one.set_minor_formatter(NullFormatter())
