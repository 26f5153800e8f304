"""The pool on many devices in simulated time: it stays near the bound on the makespan and loses nothing."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from rightrank.plugins.cluster.pool import Pool
from rightrank.schema.trials import Arm, Trial
from tests.plugins.cluster.simulated import VERSIONS, Pace, SimulatedCrew

TRIALS, WORKERS = 400, 40
START_SECONDS, HAND_OVER_SECONDS = 60.0, 0.05


def lower_bound(seconds: Sequence[float], workers: int) -> float:
    """Return the largest of three bounds on the makespan on identical machines."""
    ordered = sorted(seconds, reverse=True)
    paired = ordered[workers - 1] + ordered[workers] if len(ordered) > workers else 0.0
    return max(sum(ordered) / workers, ordered[0], paired)


def seconds_of(_worker: str, trial: Trial) -> float:
    """Half a second a step, with a spread of a fifth that the scheduler does not know."""
    return trial.arm.steps * 0.5 * random.Random(trial.trial_id).lognormvariate(0, 0.2)


def test_the_bound_is_the_largest_of_three() -> None:
    assert lower_bound([4.0, 4.0, 4.0, 4.0], 2) == 8.0  # the work
    assert lower_bound([9.0, 1.0, 1.0], 2) == 9.0  # the longest
    assert lower_bound([6.0, 5.0, 5.0], 2) == 10.0  # two that must share


@pytest.mark.parametrize("hours_to_loss", [None, 2.0])
def test_a_grid_on_many_devices(hours_to_loss: float | None) -> None:
    """Trainings of 100 to 2,000 steps; with a mean time until a worker is lost, what it trained begins again."""
    generator = random.Random(0)
    arms = [
        Arm(rank=8, learning_rate=1e-3, lora_alpha=32.0, seed=number, steps=round(100 * 20 ** generator.random()))
        for number in range(TRIALS)
    ]
    trials = [Trial(trial_id=f"grid-{number}", arm=arm) for number, arm in enumerate(arms)]

    def lost_at(worker: str) -> float | None:
        return None if hours_to_loss is None else random.Random(worker).expovariate(1 / (3600 * hours_to_loss))

    crew = SimulatedCrew(Pace(seconds_of, START_SECONDS, HAND_OVER_SECONDS, step=300.0), ends_at=lost_at)
    ended = Counter(outcome.trial_id for outcome in Pool(crew, WORKERS, VERSIONS, clock=crew.clock).run(trials, 1.0))
    assert ended == Counter(trial.trial_id for trial in trials)
    bound = START_SECONDS + lower_bound([seconds_of("", trial) for trial in trials], WORKERS)
    assert 1.0 <= crew.now / bound < (1.1 if hours_to_loss is None else 1.5)
    assert (len(crew.trained) > TRIALS) == (hours_to_loss is not None)
