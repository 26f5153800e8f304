"""Ranks and learning rates of a strategy's trials are compared on shared seeds."""

from __future__ import annotations

import pytest

from rightrank.schema.trials import Arm, TrialFinished
from rightrank.search.protocol import Trials
from tests.search.worlds import make_space

THREE = {0: 6.0598, 1: 6.0617, 2: 6.0624}


def make_trials(losses: dict[tuple[int, float], dict[int, float]]) -> Trials:
    space = make_space(seeds=(0, 1, 2))
    trials = Trials(space)
    for (rank, learning_rate), by_seed in losses.items():
        for seed, loss in by_seed.items():
            arm = space.make_arm(rank, learning_rate, seed)
            trials.outcomes[arm] = finished(arm, loss)
    return trials


def finished(arm: Arm, loss: float) -> TrialFinished:
    return TrialFinished(
        trial_id=f"{arm.rank}-{arm.learning_rate:g}-{arm.seed}",
        **arm.model_dump(),
        value=loss,
        metrics={"loss": loss},
    )


@pytest.mark.parametrize(("other_losses", "best"), [({0: 6.0608}, 1e-3), ({1: 6.0608}, 3e-3), ({}, 1e-3)])
def test_a_learning_rate_of_one_seed_is_compared_on_that_seed(other_losses: dict[int, float], best: float) -> None:
    """Check 6.0608, which is below the mean of three seeds and above the value of the first."""
    trials = make_trials({(16, 1e-3): THREE, (16, 3e-3): other_losses})
    assert trials.find_best_learning_rate(16) == best
    assert trials.find_best_learning_rate(4) is None


def test_the_reference_is_the_best_on_shared_seeds() -> None:
    """Check that rank 4 is not the reference: its mean is lower because it lacks the seed that is worse for all ranks."""
    trials = make_trials({(4, 1e-3): {0: 2.0}, (16, 1e-3): {0: 1.99, 1: 2.19}})
    assert trials.find_reference() == 16
    assert trials.compute_best_loss(4) - trials.compute_best_loss(16) == pytest.approx(0.01)
