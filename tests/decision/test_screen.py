"""What one screen says of a table: one rule for "enough", and no two lines that contradict each other."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pytest

from rightrank.decision.comparison import is_within
from rightrank.decision.records import Answers
from rightrank.decision.rule import decision_of
from rightrank.decision.table import ScoreTable
from rightrank.report.answer import build_answer_view
from rightrank.report.evidence_tables import build_evidence_table
from rightrank.report.figures import build_margin_steps
from rightrank.schema.decision import Decision, RankEvidence
from tests.decision.tables import build_value_table, build_example_table
from tests.decision.worlds import World, drawn, table_in, worlds

RANDOM = 150


def random_worlds() -> dict[str, World]:
    generator = np.random.default_rng(19)
    return worlds() | {f"random {number}": drawn(generator, 1000 + number) for number in range(RANDOM)}


def require_one_story(found: Decision) -> None:
    """Each sentence and figure of the screen agrees with the column `enough` and with the differences."""
    enough = {int(row[0]): row[5] for row in build_evidence_table(found)[1:] if row[0] != "base"}
    by_rank = {one.rank: one for one in found.ranks if one.rank > 0}
    _require_bounds_to_say_the_same(found, enough, by_rank)
    _require_the_sentence_to_say_the_same(found, enough, by_rank)
    _require_the_safe_choice_to_say_the_same(found, enough)
    if found.verdict not in ("no_gain", "undecided", "no_difference"):
        enough_from = build_margin_steps(found)
        assert [rank for needed, rank in enough_from if needed <= found.margin * (1 + 1e-8)][-1] == found.rank


def _require_bounds_to_say_the_same(
    found: Decision, enough: Mapping[int, str], by_rank: Mapping[int, RankEvidence]
) -> None:
    for rank, word in enough.items():
        one = by_rank[rank]
        if rank == found.reference_rank:
            assert word in ("yes", "best so far")
        elif found.basis not in ("std", "values"):
            assert one.difference_low is not None
            assert one.difference_high is not None
            assert (word == "no") == (not is_within(one.difference_low, found.margin * (1 + 1e-7)))
            assert word != "yes" or is_within(one.difference_high, found.margin * (1 + 1e-7))
        else:
            assert (word == "perhaps") == is_within(one.difference or 0.0, found.margin * (1 + 1e-7))


def _require_the_sentence_to_say_the_same(
    found: Decision, enough: Mapping[int, str], by_rank: Mapping[int, RankEvidence]
) -> None:
    sentence = found.sentence
    if named := re.match(r"Rank (\d+) (is|looks) enough", sentence):
        assert int(named[1]) == found.rank
        assert enough[int(named[1])] in ("yes", "perhaps", "best so far")
    if lower := re.search(r"the next lower rank \((\d+)\) is (inconclusive at )?\S+ (worse|better)", sentence):
        assert (enough[int(lower[1])] in ("no", "unlikely")) == (lower[2] is None)
        assert lower[2] or lower[3] == "worse"
    if "hardly matters" in sentence:
        assert all(abs(one.difference or 0.0) <= found.margin * (1 + 1e-7) for one in by_rank.values())
    if sentence.startswith("Still rising"):
        assert {word for rank, word in enough.items() if rank != found.rank} <= {"no", "unlikely"}
    if within := re.match(r"Undecided: rank (\d+) is within", sentence):
        assert enough[int(within[1])] == "yes"


def _require_the_safe_choice_to_say_the_same(found: Decision, enough: Mapping[int, str]) -> None:
    text = build_answer_view(Answers(found)).safe_choice
    if text.startswith("No rank is shown"):
        assert "yes" not in enough.values()
    elif text:
        (named,) = map(int, re.findall(r"[Rr]ank (\d+) is the", text))
        assert all(enough[rank] == "yes" for rank in enough if named <= rank <= found.reference_rank)


@pytest.mark.parametrize("part", range(4))
def test_no_two_lines_of_a_screen_contradict_each_other(part: int) -> None:
    for name, world in list(random_worlds().items())[part::4]:
        found = decision_of(table_in(world), world.margin)
        try:
            require_one_story(found)
        except AssertionError as error:
            raise AssertionError(f"{name}: {found.sentence}") from error


TABLES: dict[str, ScoreTable] = {
    "a curve that smooths over a rank": build_value_table({1: 2.3, 4: 2.15, 16: 2.0, 64: 2.001}),
    "a rank beyond one that failed": build_example_table({1: 2.0, 4: 2.1, 16: 2.0}),
    "a higher rank that may be better": build_example_table(
        {1: 2.3, 8: 2.001, 16: 2.0, 64: 2.0}, num_examples=50, noise=0.02, seeds=(0, 1)
    ),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("margin", [0.002, 0.01, 0.05])
def test_a_table_made_to_contradict_itself_does_not(name: str, margin: float) -> None:
    require_one_story(decision_of(TABLES[name], margin))


def test_a_lower_bound_above_the_margin_refutes_with_its_skewness() -> None:
    """Few examples that are much better pull the bound down: it is the printed one that decides, not one without skewness."""
    generator = np.random.default_rng(4)
    for shift in np.linspace(0.02, 0.08, 7):
        table = build_example_table({4: 2.0, 16: 2.0}, num_examples=60, noise=0.001, seeds=(0, 1))
        cells = dict(table.cells)
        worse = shift + 0.05 * (1 - generator.exponential(1.0, 60))
        for seed in (0, 1):
            cell = cells[4, 1e-3, seed]
            cells[4, 1e-3, seed] = type(cell)(cell.trial_id, cell.value, cell.sums + worse, cell.weights)
        found = decision_of(ScoreTable("eval_loss", False, cells), 0.02)
        one = next(one for one in found.ranks if one.rank != found.reference_rank)
        assert one.difference_low is not None
        assert (one.non_inferior is False) == (one.difference_low > 0.02)
