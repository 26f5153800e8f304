"""Test that the lines of a screen follow one rule and do not contradict each other."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pytest

from rightrank.decision.comparison import is_within
from rightrank.decision.rule import decide_table
from rightrank.decision.table import ScoreTable
from rightrank.report.answer import build_evidence_table
from rightrank.schema.results import Decision, RankEvidence
from tests.decision.tables import build_example_table, build_value_table
from tests.decision.worlds import World, build_worlds, decide_world, draw_world

RANDOM = 150


def draw_random_worlds() -> dict[str, World]:
    generator = np.random.default_rng(19)
    return build_worlds() | {f"random {number}": draw_world(generator, 1000 + number) for number in range(RANDOM)}


def require_consistent_screen(decision: Decision) -> None:
    """Require each sentence and figure of the screen to agree with the column `enough` and with the differences."""
    enough_column = {int(row[0]): row[4] for row in build_evidence_table(decision)[1:] if row[0] != "base"}
    by_rank = {evidence.rank: evidence for evidence in decision.ranks if evidence.rank > 0}
    _require_consistent_bounds(decision, enough_column, by_rank)
    _require_consistent_sentence(decision, enough_column, by_rank)
    if decision.verdict not in ("no_gain", "undecided"):
        enough_ranks = [step.rank for step in decision.staircase if step.margin <= decision.margin * (1 + 1e-8)]
        assert enough_ranks[-1] == decision.rank


def _require_consistent_bounds(
    decision: Decision, enough_column: Mapping[int, str], by_rank: Mapping[int, RankEvidence]
) -> None:
    for rank, word in enough_column.items():
        evidence = by_rank[rank]
        if rank == decision.reference_rank:
            assert word == "yes"
        elif decision.basis != "values":
            assert evidence.difference_low is not None
            assert evidence.difference_high is not None
            assert (word == "no") == (not is_within(evidence.difference_low, decision.margin * (1 + 1e-7)))
            assert word != "yes" or is_within(evidence.difference_high, decision.margin * (1 + 1e-7))
        else:
            assert word == "undecided"


def _require_consistent_sentence(
    decision: Decision, enough_column: Mapping[int, str], by_rank: Mapping[int, RankEvidence]
) -> None:
    sentence = decision.sentence
    if match := re.match(r"Rank (\d+) (is|looks) enough", sentence):
        assert int(match[1]) == decision.rank
        likely = {"undecided"} if match[2] == "looks" else set()  # by the bounds, which are beside the probability
        assert enough_column[int(match[1])] in {"yes"} | likely
    doubtful = {"no"} if decision.basis not in ("std", "values") else {"no", "undecided"}
    if lower := re.search(r"; rank (\d+) is \S+ worse", sentence):
        assert enough_column[int(lower[1])] in doubtful
    if sentence.startswith("Still rising"):
        likely = {"undecided"} if "is probably better" in sentence else set()
        assert {word for rank, word in enough_column.items() if rank != decision.rank} <= doubtful | likely


@pytest.mark.parametrize("shard", range(4))
def test_no_two_lines_of_a_screen_contradict_each_other(shard: int) -> None:
    for name, world in list(draw_random_worlds().items())[shard::4]:
        decision = decide_world(world)
        try:
            require_consistent_screen(decision)
        except AssertionError as error:
            raise AssertionError(f"{name}: {decision.sentence}") from error


TABLES: dict[str, ScoreTable] = {
    "a curve that smooths over a rank": build_value_table({1: 2.3, 4: 2.15, 16: 2.0, 64: 2.001}),
    "a rank beyond one that failed": build_example_table({1: 2.0, 4: 2.1, 16: 2.0}),
    "a higher rank that may be better": build_example_table(
        {1: 2.3, 8: 2.001, 16: 2.0, 64: 2.0}, num_examples=50, noise=0.02, seeds=(0, 1)
    ),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("margin", [0.002, 0.01, 0.05])
def test_a_difficult_table_does_not_contradict_itself(name: str, margin: float) -> None:
    require_consistent_screen(decide_table(TABLES[name], margin))


def test_a_lower_bound_above_the_margin_refutes_with_its_skewness() -> None:
    """Decide by the printed bound, which includes skewness: a few examples that are much better lower it."""
    generator = np.random.default_rng(4)
    for shift in np.linspace(0.02, 0.08, 7):
        table = build_example_table({4: 2.0, 16: 2.0}, num_examples=60, noise=0.001, seeds=(0, 1))
        cells = dict(table.cells)
        worse = shift + 0.05 * (1 - generator.exponential(1.0, 60))
        for seed in (0, 1):
            cell = cells[4, 1e-3, seed]
            cells[4, 1e-3, seed] = type(cell)(cell.trial_id, cell.value, cell.sums + worse, cell.weights)
        decision = decide_table(ScoreTable("eval_loss", False, cells), 0.02)
        evidence = next(evidence for evidence in decision.ranks if evidence.rank != decision.reference_rank)
        assert evidence.difference_low is not None
        assert (evidence.non_inferior is False) == (evidence.difference_low > 0.02)
