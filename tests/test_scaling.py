"""Scaling laws: the fits recover what is known, VAR's published laws among it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.powerlaws import bootstrap_law, fit_power_law, fit_with_floor, frontier, held_out

# VAR, section 4.2: (scale, exponent) in billions of parameters, and in PFlops of training compute.
VAR_IN_N = {"L_last": (2.0, -0.23), "L_avg": (2.5, -0.20), "Err_last": (4.9e2, -0.016), "Err_avg": (6.5e2, -0.010)}
VAR_IN_C = {"L_last": (2.2e-5, -0.13), "L_avg": (1.5e-5, -0.16), "Err_last": (8.1e-2, -0.0067)}
VAR_SIZES = np.geomspace(0.0185, 2.0, 12)  # twelve models of 18.5 M to 2.0 B parameters


@pytest.mark.parametrize("name", VAR_IN_N)
def test_vars_published_laws_come_back_from_its_points(name):
    scale, exponent = VAR_IN_N[name]
    law = fit_power_law(VAR_SIZES, (scale * VAR_SIZES) ** exponent)
    assert law.exponent == pytest.approx(exponent, rel=1e-9) and law.scale == pytest.approx(scale, rel=1e-6)
    assert law.pearson == pytest.approx(-1)


@pytest.mark.parametrize("name", VAR_IN_C)
def test_vars_laws_in_compute_come_back_too(name):
    scale, exponent = VAR_IN_C[name]
    compute = np.geomspace(1e4, 1e10, 30)
    law = fit_power_law(compute, (scale * compute) ** exponent)
    assert (law.scale, law.exponent) == pytest.approx((scale, exponent), rel=1e-6)


def test_vars_exponent_comes_back_at_its_published_correlation():
    noise = np.random.default_rng(0).normal(size=12)
    log_y = -0.23 * np.log(2.0 * VAR_SIZES)
    points = np.exp(log_y + noise * log_y.std() * (1 / 0.998**2 - 1) ** 0.5)
    law = fit_power_law(VAR_SIZES, points)
    assert law.pearson == pytest.approx(-0.998, abs=0.002) and law.exponent == pytest.approx(-0.23, abs=0.01)
    low, high = bootstrap_law(VAR_SIZES, points, "power", resamples=300)["exponent"]
    assert low < -0.23 < high and high - low < 0.03
    assert abs(held_out(VAR_SIZES, points, "power")["error"]) < 0.05


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 3), st.floats(-1.2, -0.1), st.floats(0, 3))
def test_a_floor_is_found(scale, exponent, floor):
    x = np.geomspace(0.1, 100, 9)
    y = (scale * x) ** exponent + floor
    law = fit_with_floor(x, y)
    assert law(x) == pytest.approx(y, rel=2e-3)
    assert law(1000.0) == pytest.approx((scale * 1000) ** exponent + floor, rel=0.05)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, inside, x = np.random.default_rng(1), 0, np.geomspace(1, 50, 8)
    for i in range(100):
        y = (2 * x) ** -0.3 * np.exp(rng.normal(0, 0.01, 8))
        low, high = bootstrap_law(x, y, "power", resamples=200, seed=i)["exponent"]
        inside += low <= -0.3 <= high
    assert inside / 100 == pytest.approx(0.93, abs=0.07)


def test_the_held_out_point_is_not_looked_at():
    x = [1.0, 2, 4, 8, 16, 16]
    y = [(2 * v) ** -0.5 for v in x[:4]] + [0.5, 0.7]
    found = held_out(x, y, "power")
    assert found["measured"] == pytest.approx(0.6) and found["predicted"] == pytest.approx(32**-0.5)
    assert found["error"] == pytest.approx(32**-0.5 / 0.6 - 1)


def test_the_frontier_is_what_nothing_cheaper_beats():
    assert frontier([1, 2, 3, 4, 4], [5, 6, 4, 3, 2]) == [0, 2, 4]


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        ([1, 2], [1, 2], "3 different x"),
        ([1, 2, 3], [1, 2], "one y for each x"),
        ([1, 2, 3], [1, 0, 2], "positive"),
        ([1, 2, 3], [1, float("nan"), 2], "positive and finite"),
    ],
)
def test_mistakes_are_named(x, y, said):
    with pytest.raises(ValueError, match=said):
        fit_power_law(x, y)
