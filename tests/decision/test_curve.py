from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rightrank.decision.curve import (
    choose_form,
    diminishing_rank,
    falling_steps,
    fit_power,
    margin_ranks,
    prediction_errors,
    robust_deviations,
)

RANKS = np.array([1.0, 2, 4, 8, 16, 32, 64])


def test_a_power_law_is_found_again() -> None:
    losses = 2.0 + 0.3 * RANKS**-0.6
    law = fit_power(RANKS, losses[None, :], np.full(7, 1e-4))
    assert law.a[0] == pytest.approx(2.0, abs=0.004)
    assert law.at(np.array([128.0]))[0, 0] == pytest.approx(2.0 + 0.3 * 128**-0.6, abs=0.001)


def test_three_ranks_predict_the_fourth() -> None:
    losses = 0.78 + 0.08 * RANKS**-0.57
    law = fit_power(RANKS[[2, 4, 6]], losses[None, [2, 4, 6]], np.full(3, 3e-4))
    assert law.at(np.array([128.0]))[0, 0] == pytest.approx(0.78 + 0.08 * 128**-0.57, abs=0.0009)


def test_one_outlier_does_not_bend_the_curve() -> None:
    losses = 2.0 + 0.3 * RANKS**-0.6
    spoilt = losses.copy()
    spoilt[3] += 0.05
    deviations = np.full(7, 0.001)
    robust = fit_power(RANKS, spoilt[None, :], robust_deviations(RANKS, spoilt, deviations)).at(RANKS)[0]
    plain = fit_power(RANKS, spoilt[None, :], deviations).at(RANKS)[0]
    keep = np.arange(7) != 3
    assert np.abs(robust - losses)[keep].max() < np.abs(plain - losses)[keep].max() / 2


@pytest.mark.parametrize(
    ("losses", "form"),
    [
        (2.0 + 0.3 * RANKS**-0.6, "power"),
        (2.0 + 0.02 * (np.log2(RANKS) - 3) ** 2, "u_shaped"),
    ],
)
def test_the_form_that_predicts_is_chosen(losses: np.ndarray, form: str) -> None:
    assert choose_form(prediction_errors(RANKS, losses, np.full(7, 0.001))) == form


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9))
@settings(max_examples=100, deadline=None)
def test_falling_steps_never_rise_and_keep_the_mean(losses: list[float]) -> None:
    steps = falling_steps(np.array(losses), np.ones(len(losses)))
    assert (np.diff(steps) <= 1e-9).all()
    assert steps.mean() == pytest.approx(np.mean(losses), abs=1e-9)


def test_where_a_curve_meets_the_margin() -> None:
    grid = np.geomspace(1, 64, 1000)
    curves = (2.0 + 0.3 * grid**-0.6)[None, :]
    wanted = (0.3 / (0.01 + 0.3 * 64**-0.6)) ** (1 / 0.6)
    assert margin_ranks(grid, curves, 0.01)[0] == pytest.approx(wanted, rel=0.01)
    bowl = ((np.log2(grid) - 3) ** 2)[None, :]
    assert margin_ranks(grid, bowl, 1.0)[0] == pytest.approx(4.0, rel=0.02)


def test_diminishing_returns_begin_where_a_doubling_gains_the_margin() -> None:
    law = fit_power(RANKS, (2.0 + 0.3 * RANKS**-0.6)[None, :], np.full(7, 1e-4))
    rank = diminishing_rank(law, 0.01)
    gain = law.at(rank)[0, 0] - law.at(2 * rank)[0, 0]
    assert gain == pytest.approx(0.01, rel=0.01)
