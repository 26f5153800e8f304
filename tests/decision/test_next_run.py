"""The power calculation does what it says: checked by simulation."""

from __future__ import annotations

import numpy as np

from rightrank.decision.comparison import CONFIDENCE, estimate, examples_needed, seeds_needed, settles


def test_the_examples_needed_settle_it_in_four_of_five_runs() -> None:
    generator = np.random.default_rng(3)
    margin, true = 0.02, 0.012
    pilot = estimate(generator.normal(true, 0.09, size=(1, 96)), np.ones(96))
    pilot = type(pilot)(true, 0.09**2 / 96, 0.0, 0.0, 96, 1, 0.0, 0.0)
    items = examples_needed(pilot, margin)
    assert items is not None
    settled = 0
    for _ in range(400):
        run = estimate(generator.normal(true, 0.09, size=(1, items)), np.ones(items))
        settled += run.bound(CONFIDENCE) < margin
    assert 0.74 <= settled / 400 <= 0.92


def test_so_many_seeds_settle_it_four_times_in_five() -> None:
    generator = np.random.default_rng(4)
    margin, true, noise = 0.005, 0.0015, 0.002
    pilot = estimate(np.zeros((2, 1)), np.ones(1)).with_seeds(noise**2 / 2, 1.0)
    pilot = type(pilot)(true, 0.0, noise**2 / 2, 0.0, 0, 2, 1.0, 0.0)
    seeds = seeds_needed(pilot, margin)
    assert seeds is not None
    settled = 0
    for _ in range(600):
        run = estimate(generator.normal(true, noise, size=(seeds, 1)), np.ones(1))
        settled += run.bound(CONFIDENCE) < margin
    assert settled / 600 >= 0.74


def test_a_difference_at_the_margin_is_never_settled() -> None:
    pilot = estimate(np.random.default_rng(0).normal(0.005, 0.1, size=(1, 100)), np.ones(100))
    pilot = type(pilot)(0.005, 1e-4, 0.0, 0.0, 100, 1, 0.0, 0.0)
    assert not settles(pilot.at(6400, 1), 0.005)
    assert examples_needed(pilot, 0.005) is None
