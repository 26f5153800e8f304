"""Test the printed bounds of differences from the rank with the best value after a search."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.decide.printed import SHAPES, Design, judge_design

from rightrank.decision.evidence import MAX_EQUAL_ERRORS, Evidence, compute_covariance_to_best
from rightrank.decision.seeds import estimate_selection_bias
from tests.decision.tables import build_example_table, build_value_table

TABLES = 24


def test_printed_bounds_hold_after_a_search_at_every_noise_of_seeds() -> None:
    """Run benchmarks/decide/printed.py in a short form: three learning rates for each rank, seed noise of up to four margins."""
    results = [
        judge_design(Design(shape, 3, noise, 3, rare=noise == 1.0), TABLES, 100 * number + int(4 * noise))
        for noise in (0.25, 1.0, 4.0)
        for number, shape in enumerate(SHAPES)
    ]
    lower, upper, decided = (
        {
            method: float(np.mean([getattr(shares[method], name) for shares in results]))
            for method in ("before", "after")
        }
        for name in ("lower", "upper", "decided")
    )
    assert lower["after"] >= 0.94
    assert lower["before"] <= lower["after"] - 0.005
    assert upper["after"] >= 0.96
    assert decided["before"] - 0.03 <= decided["after"] <= decided["before"]


def test_ranks_that_cannot_be_told_from_the_best_are_taken_to_be_as_good() -> None:
    """Check that the selection bias is at least the bias at the observed means, and zero if the best rank is clear."""
    three = Evidence(build_value_table({4: 2.1, 16: 2.05, 64: 2.0}, std=0.05))
    means = np.array([three.contenders[rank].adjusted_loss for rank in sorted(three.contenders)])
    covariance = compute_covariance_to_best([0.0, 2 * 0.05**2, 2 * 0.05**2])
    assert three.reference_bias > 1.3 * estimate_selection_bias(means[::-1], covariance)
    assert three.reference_bias == pytest.approx(estimate_selection_bias(np.zeros(3), covariance))
    clear = Evidence(build_example_table({1: 2.3, 4: 2.2, 16: 2.1, 64: 2.0}))
    assert clear.reference_bias < 1e-4
    distinct, indistinguishable = (
        Evidence(build_value_table({4: 2.1, 16: 2.0}, std=0.1 / (MAX_EQUAL_ERRORS * far * 2**0.5)))
        for far in (1.01, 0.99)
    )
    assert indistinguishable.reference_bias > 2 * distinct.reference_bias


def test_the_noise_of_few_seeds_is_a_t_and_its_gap_larger() -> None:
    means, covariance = np.zeros(3), np.eye(3)
    assert estimate_selection_bias(means, covariance, 2.0) > 1.2 * estimate_selection_bias(means, covariance, 200.0)
    assert estimate_selection_bias(means, covariance) < 1.05 * estimate_selection_bias(means, covariance, 200.0)
