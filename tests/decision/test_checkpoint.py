"""Test which evaluation of a training counts, the last or the best."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rightrank.decision.rule import decide_table
from rightrank.decision.table import Cell, ScoreTable, build_table, select_checkpoint
from rightrank.schema.trials import EvalPoint
from tests.decision.tables import make_trial

# The loss of DistilBERT on IMDB at the last and at the best evaluation, from a public table without the best step.
LAST = {4: 0.331, 8: 0.361, 16: 0.396, 64: 0.499, 128: 0.541}
BEST = {4: 0.309, 8: 0.307, 16: 0.304, 64: 0.297, 128: 0.295}


def build_imdb_table(higher: bool = False) -> ScoreTable:
    sign = -1.0 if higher else 1.0
    metric = "eval_loss" if not higher else "negated"
    results = [
        make_trial(
            trial_id=str(rank),
            rank=rank,
            metric=metric,
            value=sign * LAST[rank],
            steps=200,
            points=[(50, sign * 0.7), (100, sign * BEST[rank]), (200, sign * LAST[rank])],
        )
        for rank in LAST
    ]
    return build_table(results, metric, higher)


@pytest.mark.parametrize("higher", [False, True])
def test_the_answer_of_a_public_table_depends_on_the_checkpoint(higher: bool) -> None:
    last, best = (
        decide_table(build_imdb_table(higher), 0.005),
        decide_table(build_imdb_table(higher), 0.005, checkpoint="best"),
    )
    assert (last.rank, best.rank) == (4, 64)


def test_trainings_that_end_at_their_best_are_unchanged() -> None:
    best_table = ScoreTable("eval_loss", False, select_checkpoint(build_imdb_table(), "best").cells)
    assert select_checkpoint(best_table, "best") is best_table
    assert decide_table(best_table, 0.005).rank == 64


@pytest.mark.parametrize("higher", [False, True])
def test_a_run_with_the_best_checkpoint_has_only_values_at_its_last(higher: bool) -> None:
    sign = -1.0 if higher else 1.0
    table = build_imdb_table(higher)
    cells_at_best = {
        key: replace(
            cell, value=sign * BEST[key[0]], sums=np.full(20, BEST[key[0]]), weights=np.ones(20), checkpoint_step=100,
            train_value=1.0,
        )
        for key, cell in table.cells.items()
    }  # fmt: skip
    table = replace(table, cells=cells_at_best)
    assert select_checkpoint(table, "best") is table
    for (rank, _, _), cell in select_checkpoint(table, "last").cells.items():
        assert (cell.value, cell.loss, cell.examples) == (sign * LAST[rank], LAST[rank], 0)
        assert (cell.checkpoint_step, cell.train_value) == (None, None)
        assert cell.points == table.cells[rank, 0.0, 0].points
    assert decide_table(table, 0.005, checkpoint="last").rank == 4


def test_scores_of_the_last_evaluation_are_not_those_of_the_best() -> None:
    """Compare trainings by their values if the best evaluation is not the last, whose scores per example are stored."""
    results = [
        make_trial(
            trial_id=f"{rank}",
            rank=rank,
            value=2.0,
            example_scores=np.full(20, 2.0).tolist(),
            points=[(10, 1.9 if rank == 4 else 2.1), (20, 2.0)],
        )
        for rank in (1, 4)
    ]
    table = build_table(results, "eval_loss", False)
    assert decide_table(table).basis == "examples"
    best = decide_table(table, checkpoint="best")
    assert (best.basis, best.rank) == ("values", 4)
    assert {evidence.rank: evidence.value for evidence in best.ranks} == {1: 2.0, 4: 1.9}


def test_a_perplexity_at_its_best_evaluation_counts_by_its_logarithm() -> None:
    points = tuple(EvalPoint(step=step, value=value) for step, value in ((10, 8.0), (20, 4.0), (30, 5.0)))
    cell = Cell("one", 5.0, np.log([5.0]), np.ones(1), steps=30, points=points)
    (best,) = select_checkpoint(
        ScoreTable("perplexity", False, {(4, 1e-3, 0): cell}, {}, "perplexity"), "best"
    ).cells.values()
    assert (best.loss, [point.step for point in best.points]) == (pytest.approx(np.log(4.0)), [10, 20])
