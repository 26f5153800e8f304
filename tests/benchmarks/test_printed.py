"""The bounds that are printed are of differences from the rank that came out best, after a search."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.decide.printed import SHAPES, Design, study

from rightrank.decision.evidence import ALIKE, Evidence, about_the_best
from rightrank.decision.seeds import winners_gap
from tests.decision.tables import bare, scored

TABLES = 24


def test_printed_bounds_hold_after_a_search_at_every_noise_of_seeds() -> None:
    """The short form of benchmarks/decide/printed.py: three learning rates a rank, seed noise of up to four margins."""
    found = [
        study(Design(shape, 3, noise, 3, rare=noise == 1.0), TABLES, 100 * place + int(4 * noise))
        for noise in (0.25, 1.0, 4.0)
        for place, shape in enumerate(SHAPES)
    ]
    lower, upper, decided = (
        {method: float(np.mean([getattr(one[method], name) for one in found])) for method in ("before", "after")}
        for name in ("lower", "upper", "decided")
    )
    assert lower["after"] >= 0.94
    assert lower["before"] <= lower["after"] - 0.005
    assert upper["after"] >= 0.96
    assert decided["before"] - 0.03 <= decided["after"] <= decided["before"]


def test_ranks_that_cannot_be_told_from_the_best_are_taken_to_be_as_good() -> None:
    """The gap is at least that of the means as shown, and nothing where the best is clear."""
    three = Evidence(bare({4: 2.1, 16: 2.05, 64: 2.0}, std=0.05))
    means = np.array([three.contenders[rank].fair_loss for rank in sorted(three.contenders)])
    covariance = about_the_best([0.0, 2 * 0.05**2, 2 * 0.05**2])
    assert three.reference_gap > 1.3 * winners_gap(means[::-1], covariance)
    assert three.reference_gap == pytest.approx(winners_gap(np.zeros(3), covariance))
    clear = Evidence(scored({1: 2.3, 4: 2.2, 16: 2.1, 64: 2.0}))
    assert clear.reference_gap < 1e-4
    apart, alike = (Evidence(bare({4: 2.1, 16: 2.0}, std=0.1 / (ALIKE * far * 2**0.5))) for far in (1.01, 0.99))
    assert alike.reference_gap > 2 * apart.reference_gap


def test_the_noise_of_few_seeds_is_a_t_and_its_gap_larger() -> None:
    means, covariance = np.zeros(3), np.eye(3)
    assert winners_gap(means, covariance, 2.0) > 1.2 * winners_gap(means, covariance, 200.0)
    assert winners_gap(means, covariance) < 1.05 * winners_gap(means, covariance, 200.0)
