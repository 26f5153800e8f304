"""The batch order is fair, seeded, and independent of length."""

from __future__ import annotations

from collections import Counter

import numpy as np

from rightrank.train.batches import plan_batches

LENGTHS = np.random.default_rng(0).integers(1, 200, 500)
SIGMAS = 4.5  # of a standard error, about one chance in 150,000


def test_every_example_is_seen_once_per_pass() -> None:
    plan = plan_batches(500, 10, 100, seed=1)  # two passes
    for begin in (0, 50):
        indices = [index for batch in plan[begin : begin + 50] for index in batch]
        assert sorted(indices) == list(range(500))


def test_a_pass_that_fills_no_batch_goes_on_in_the_next() -> None:
    plan = plan_batches(5, 4, 5, seed=0)
    counts = Counter(index for batch in plan for index in batch)
    assert set(map(len, plan)) == {4}
    assert counts == dict.fromkeys(range(5), 4)


def test_the_seed_fixes_the_order() -> None:
    assert plan_batches(500, 8, 50, 3) == plan_batches(500, 8, 50, 3)
    assert plan_batches(500, 8, 50, 3) != plan_batches(500, 8, 50, 4)


def test_a_shorter_training_is_a_prefix_of_a_longer_one() -> None:
    assert plan_batches(500, 8, 120, 5)[:40] == plan_batches(500, 8, 40, 5)


def collect_lengths(seeds: int, steps: int) -> np.ndarray:
    """Return the lengths of the examples as [seeds, steps, 8]."""
    return np.array([LENGTHS[plan_batches(500, 8, steps, seed)] for seed in range(seeds)])


def test_length_does_not_decide_when_an_example_is_seen() -> None:
    """Check that over many seeds the mean length at each step is that of the data: there is no curriculum by length."""
    by_step = collect_lengths(300, 32).mean(axis=2)
    standard_error = by_step.std(axis=0) / np.sqrt(len(by_step))
    assert np.all(np.abs(by_step.mean(axis=0) - LENGTHS.mean()) < SIGMAS * standard_error)


def test_length_does_not_decide_the_other_examples_of_a_batch() -> None:
    """Check that batches do not group examples by length.

    A step's loss is a mean over its labels. With batches of similar length, a label of a short example would weigh more
    than with batches drawn at random.
    """
    means = collect_lengths(60, 62).mean(axis=2).reshape(-1)
    expected = LENGTHS.var(ddof=1) / 8 * (1 - 8 / 500)  # of a sample without replacement
    assert abs(means.var() / expected - 1) < SIGMAS * np.sqrt(2 / len(means))
