"""Power laws through measured points: with and without an offset, with bootstrap intervals, tested on a held-out point.

The form is VAR's (section 4.2): y = (scale x)^exponent, plus a floor where asked for. Fits are least squares in log y.

Shapes: P points.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import t as student_t
from tqdm import trange

from evaluation.intervals import Z95


@dataclass(frozen=True)
class PowerLaw:
    """y = (scale x)^exponent + floor; pearson: of log x and log (y - floor) over the points it was fitted to.

    The logarithm of the scale is kept: exponents near 0 have scales no float holds.
    """

    log_scale: float
    exponent: float
    floor: float
    pearson: float

    def __call__(self, x: float | np.ndarray) -> float | np.ndarray:
        """y at x."""
        return np.exp(self.exponent * (self.log_scale + np.log(np.asarray(x, float)))) + self.floor

    @property
    def scale(self) -> float:
        """The factor of x; 0 or infinite where a float cannot hold it."""
        with np.errstate(over="ignore", under="ignore"):
            return float(np.exp(self.log_scale))

    @property
    def text(self) -> str:
        """As the paper prints it: (2.0 x)^-0.23 + 0.4."""
        floor = f" + {self.floor:.3g}" if self.floor else ""
        return f"({self.scale:.3g} x)^{self.exponent:.3g}{floor}"


def check_points(x: Sequence[float], y: Sequence[float], least: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Both as float arrays. Raises ValueError unless they are as many, positive, finite, with `least` different x."""
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    if xs.shape != ys.shape or xs.ndim != 1:
        raise ValueError(f"a power law needs one y for each x, got {xs.shape} and {ys.shape}")
    if not (np.isfinite(xs).all() and np.isfinite(ys).all() and (xs > 0).all() and (ys > 0).all()):
        raise ValueError("a power law needs points that are positive and finite")
    if len(np.unique(xs)) < least:
        raise ValueError(f"a power law needs {least} different x or more, got {len(np.unique(xs))}")
    return xs, ys


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """y = (scale x)^exponent: the straight line in log-log. Raises ValueError as `check_points`."""
    xs, ys = check_points(x, y)
    exponent, intercept = np.polyfit(np.log(xs), np.log(ys), 1)
    log_scale = float(intercept / exponent) if exponent else 0.0
    return PowerLaw(log_scale, float(exponent), 0.0, float(np.corrcoef(np.log(xs), np.log(ys))[0, 1]))


def fit_with_floor(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """y = (scale x)^exponent + floor with 0 <= floor < min(y), falling in x.

    Least squares in log y from several floors. Raises ValueError as `check_points` with 4 different x.
    """
    xs, ys = check_points(x, y, 4)
    log_x, log_y, least = np.log(xs), np.log(ys), ys.min()
    centre = log_x.mean()

    def unpack(parameters: np.ndarray) -> tuple[float, float, float]:
        height, slope, share = parameters
        return height, -np.exp(slope), least * share

    def residuals(parameters: np.ndarray) -> np.ndarray:
        height, exponent, floor = unpack(parameters)
        return np.log(np.exp(height + exponent * (log_x - centre)) + floor) - log_y

    starts = []
    for share in (0.001, 0.3, 0.6, 0.9):
        slope, height = np.polyfit(log_x - centre, np.log(ys - share * least), 1)
        starts.append((height, np.log(max(-slope, 1e-4)), share))
    bounds = ([-np.inf, np.log(1e-6), 0.0], [np.inf, np.log(10), 1 - 1e-9])
    fits = [least_squares(residuals, np.clip(s, *bounds), bounds=bounds, x_scale=(1, 1, 0.1)) for s in starts]
    height, exponent, floor = unpack(min(fits, key=lambda fit: fit.cost).x)
    above = ys - floor
    pearson = float(np.corrcoef(log_x, np.log(np.maximum(above, 1e-300)))[0, 1])
    return PowerLaw(float(height / exponent - centre), float(exponent), float(floor), pearson)


Fit = Callable[[Sequence[float], Sequence[float]], PowerLaw]
FITS: dict[str, Fit] = {"power": fit_power_law, "floor": fit_with_floor}
PARAMETERS = {"power": 2, "floor": 3}


def bootstrap_law(
    x: Sequence[float], y: Sequence[float], form: str, *, resamples: int = 1000, seed: int = 0
) -> dict[str, list[float]]:
    """95 % intervals of `scale`, `exponent` and `floor` by resampling residuals in log y.

    Residuals are widened by sqrt(P / (P - parameters)), which a fit of few points makes too small, and the intervals
    by Student's t over the normal's 1.96, as the width of few residuals is itself uncertain.
    """
    xs, ys = check_points(x, y)
    law = FITS[form](xs, ys)
    residuals = np.log(ys) - np.log(law(xs))
    residuals = (residuals - residuals.mean()) * np.sqrt(len(xs) / max(len(xs) - PARAMETERS[form], 1))
    rng, drawn = np.random.default_rng(seed), []
    for _ in trange(resamples, desc=f"resampling the {form} law", leave=False, disable=None):
        made = FITS[form](xs, law(xs) * np.exp(rng.choice(residuals, len(xs))))
        drawn.append((made.scale, made.exponent, made.floor))  # an infinite scale is still in its order
    low, high = np.quantile(np.array(drawn), (0.025, 0.975), axis=0, method="nearest")
    wider = float(student_t.ppf(0.975, max(len(xs) - PARAMETERS[form], 1))) / Z95
    found = {"scale": [law.scale * float(end / law.scale) ** wider for end in (low[0], high[0])]}
    found["exponent"] = [law.exponent + wider * float(end - law.exponent) for end in (low[1], high[1])]
    found["floor"] = [max(law.floor + wider * float(end - law.floor), 0.0) for end in (low[2], high[2])]
    return found


def held_out(x: Sequence[float], y: Sequence[float], form: str) -> dict[str, float]:
    """Fit on all but the largest x and predict it: `x`, `measured` (mean over its points), `predicted`, `error`.

    error: predicted / measured - 1. Raises ValueError if too few points are left for the fit.
    """
    xs, ys = check_points(x, y)
    largest = xs == xs.max()
    law = FITS[form](xs[~largest], ys[~largest])
    measured, predicted = float(ys[largest].mean()), float(law(xs.max()))
    return {"x": float(xs.max()), "measured": measured, "predicted": predicted, "error": predicted / measured - 1}


def frontier(cost: Sequence[float], y: Sequence[float]) -> list[int]:
    """Indices, by rising cost, of the points better (smaller y) than everything at most as costly."""
    best, kept = np.inf, []
    for i in np.lexsort((y, cost)):
        if y[i] < best:
            best = y[i]
            kept.append(int(i))
    return kept
