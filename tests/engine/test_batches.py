"""The batch order: fair, seeded, and without favour for any length."""

from __future__ import annotations

from collections import Counter

import numpy as np

from rightrank.engine.batches import WINDOW_BATCHES, batch_plan

LENGTHS = np.random.default_rng(0).integers(1, 200, 500).tolist()


def test_every_item_is_seen_once_a_pass() -> None:
    plan = batch_plan(LENGTHS, 10, 100, seed=1)  # two passes of 500 items
    counts = Counter(index for indices in plan for index in indices)
    assert sum(counts.values()) == 1000
    assert all(1 <= counts[index] <= 3 for index in range(500))
    assert sum(counts.values()) / 500 == 2


def test_the_seed_fixes_the_order() -> None:
    assert batch_plan(LENGTHS, 8, 50, 3) == batch_plan(LENGTHS, 8, 50, 3)
    assert batch_plan(LENGTHS, 8, 50, 3) != batch_plan(LENGTHS, 8, 50, 4)


def test_a_shorter_training_is_a_prefix_of_a_longer_one() -> None:
    assert batch_plan(LENGTHS, 8, 120, 5)[:40] == batch_plan(LENGTHS, 8, 40, 5)


def test_batches_pad_little() -> None:
    def padded_share(plan: list[list[int]]) -> float:
        padded = sum(len(batch) * max(LENGTHS[i] for i in batch) for batch in plan)
        return 1 - sum(LENGTHS[i] for batch in plan for i in batch) / padded

    random_plan = [list(batch) for batch in np.random.default_rng(0).permutation(500)[:480].reshape(-1, 8)]
    assert padded_share(batch_plan(LENGTHS, 8, 60, 0)) < 0.5 * padded_share(random_plan)


def test_length_does_not_decide_when_an_item_is_seen() -> None:
    """Over many seeds the mean length at each step is that of the data: no curriculum by length."""
    steps = 2 * WINDOW_BATCHES
    by_step = np.array(
        [[np.mean([LENGTHS[i] for i in batch]) for batch in batch_plan(LENGTHS, 8, steps, seed)] for seed in range(300)]
    )
    standard_error = by_step.std(axis=0) / np.sqrt(len(by_step))
    assert np.all(np.abs(by_step.mean(axis=0) - np.mean(LENGTHS)) < 4.5 * standard_error)


def test_few_items_are_each_seen_once_a_pass() -> None:
    """Fewer items than a window of batches: no batch holds an item twice, and a pass sees them all."""
    plan = batch_plan([5 + index % 7 for index in range(32)], 8, 8, seed=0)
    for begin in (0, 4):
        seen = [index for batch in plan[begin : begin + 4] for index in batch]
        assert sorted(seen) == list(range(32))
