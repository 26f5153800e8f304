"""The `upward` strategy: from the smallest rank, with full trainings, and with the seed noise first."""

from __future__ import annotations

from rightrank.schema.trials import TrialOutcome
from rightrank.search.protocol import Space
from rightrank.search.strategies import Upward
from tests.search.worlds import World, make_space, run_all

LOW, MIDDLE, HIGH = 1e-4, 3e-4, 1e-3


def make_upward_space(**changes: object) -> Space:
    return make_space(learning_rates=(LOW, MIDDLE, HIGH), seeds=tuple(range(8)), **changes)


def list_ranks(outcomes: list[TrialOutcome]) -> list[int]:
    return [outcome.rank for outcome in outcomes if outcome.rank > 0]


def test_it_climbs_while_a_rank_gains_more_than_the_margin() -> None:
    for gain, ranks in [(0.0, {1, 4}), (0.012, {1, 4}), (0.04, {1, 4, 16}), (1.0, {1, 4, 16, 64})]:
        strategy = Upward(make_upward_space())
        outcomes = run_all(strategy, World(gain=gain))
        assert set(list_ranks(outcomes)) == ranks
        assert list_ranks(outcomes) == sorted(list_ranks(outcomes))
        assert all(outcome.stop_at is None and outcome.truncate_from is None for outcome in outcomes)


def test_the_noise_decides_how_many_seeds_are_trained() -> None:
    quiet, loud = Upward(make_upward_space()), Upward(make_upward_space())
    quiet_outcomes, loud_outcomes = (
        run_all(quiet, World(gain=0.0, noise=0.001)),
        run_all(loud, World(gain=0.0, noise=0.05)),
    )
    assert {outcome.seed for outcome in quiet_outcomes if outcome.rank == 4} == {0, 1}
    assert {outcome.seed for outcome in loud_outcomes if outcome.rank == 4} == set(range(8))
    (note,) = quiet.replay_trials(quiet_outcomes).notes
    assert note.startswith("Seed noise at rank 1: a standard deviation of ")
    assert "takes about 2 seeds per rank; 2 of the 8 are used, which detect differences from about 0.00" in note
    (note,) = loud.replay_trials(loud_outcomes).notes
    assert "; 8 of the 8 are used, which detect differences from about 0.0" in note
