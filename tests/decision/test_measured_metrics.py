"""Test runs with several metrics: which one decides, in which direction, and what is reported about the others."""

from __future__ import annotations

import numpy as np
import pytest

from rightrank.decision.run_answers import build_run_table, decide_run, list_comparable_outcomes
from rightrank.decision.table import build_table
from rightrank.schema.events import Records
from tests.report.runs import ITEMS, make_run

COLOURS = {0: 1.0, 1: 1.0, 4: 5.0, 16: 9.0}  # the name of this metric does not imply a direction


def make_measured_run(form: str = "prompt_completion", **started: object) -> Records:
    """Make a run of ranks 1, 4 and 16: the accuracy grows up to rank 16, but the loss of rank 4 is as good."""
    records = make_run((1, 4, 16), (1e-3,))
    right = {0: 0, 1: ITEMS // 3, 4: ITEMS // 2, 16: ITEMS - 1}
    outcomes = [
        trial.model_copy(
            update={
                "metrics": {
                    "loss": trial.value,
                    "exact_match": right[trial.rank] / ITEMS,
                    "colour": COLOURS[trial.rank],
                },
                "example_metrics": {"exact_match": [1.0] * right[trial.rank] + [0.0] * (ITEMS - right[trial.rank])},
            }
        )
        for trial in records.list_finished()
    ]
    data = records.started.data.model_copy(update={"form": form})
    settings = records.started.settings | {"metrics": ["max:colour=mine:colour"]}
    return Records.from_journal(
        records.started.model_copy(update={"data": data, "settings": settings, **started}), outcomes
    )


def change_settings(records: Records, **settings: object) -> Records:
    started = records.started.model_copy(update={"settings": records.started.settings | settings})
    return Records.from_journal(started, records.outcomes)


def test_the_metric_that_decides_comes_first() -> None:
    assert make_measured_run().list_metrics() == ["loss", "exact_match", "colour"]
    assert make_measured_run(metric="exact_match").list_metrics() == ["exact_match", "loss", "colour"]
    assert make_measured_run(metric="f1").list_metrics() == ["f1", "loss", "exact_match", "colour"]


def test_another_metric_may_decide_in_place_of_the_loss() -> None:
    records = make_measured_run()
    decision = decide_run(records, "exact_match", 0.1)
    assert (decision.metric, decision.higher_is_better, decision.margin) == ("exact_match", True, 0.1)
    assert (decision.reference_rank, decision.basis) == (16, "examples")


def test_the_direction_of_a_metric_can_be_given() -> None:
    higher = build_run_table(make_measured_run(), metric="colour")
    assert (higher.higher_is_better, higher.cells[16, 1e-3, 0].loss) == (True, -9.0)
    records_with_direction = change_settings(make_measured_run(), metrics=["min:colour=mine:colour"])
    lower = build_run_table(records_with_direction, metric="colour")
    assert (lower.higher_is_better, lower.cells[16, 1e-3, 0].loss) == (False, 9.0)
    assert decide_run(records_with_direction, "colour", 1.0).reference_rank == 1
    assert build_run_table(records_with_direction, metric="colour", higher=True).higher_is_better is True


def test_evaluations_along_a_training_belong_to_one_metric() -> None:
    by_loss = make_measured_run()
    assert len(build_run_table(by_loss).cells[4, 1e-3, 0].points) == 3
    assert build_run_table(by_loss, metric="exact_match").cells[4, 1e-3, 0].points == ()
    by_answers = make_measured_run(points_metric="exact_match")
    assert build_run_table(by_answers).cells[4, 1e-3, 0].points == ()
    table = build_run_table(by_answers, metric="exact_match")
    assert len(table.cells[4, 1e-3, 0].points) == 3


@pytest.mark.parametrize(
    ("values", "kind"), [((3.0, 2.0), "perplexity"), ((0.5, 0.25), "perplexity"), ((0.0, 2.0), "other"), ((-1.0, 2.0), "other")]
)  # fmt: skip
def test_an_impossible_perplexity_is_treated_as_an_ordinary_number(values: tuple[float, float], kind: str) -> None:
    trials = [
        trial.model_copy(update={"metrics": {"perplexity": value}})
        for trial, value in zip(make_run((1, 4), (1e-3,)).list_finished()[1:], values, strict=True)
    ]
    table = build_table(trials, "perplexity", False)
    assert table.kind == kind
    cell = table.cells[4, 1e-3, 0]
    assert cell.loss == pytest.approx(np.log(values[1]) if kind == "perplexity" else values[1])
    assert (cell.value, cell.weights.tolist(), cell.examples) == (values[1], [1.0], 0)
    assert build_table(trials, "perplexity", higher_is_better=True).cells[4, 1e-3, 0].loss == -values[1]


def test_truncations_are_not_compared_as_trainings() -> None:
    records = make_run((1, 4, 16), (1e-3,))
    base, rank_1, _, rank_16 = records.list_finished()
    truncated = rank_1.model_copy(update={"trial_id": "cut", "truncate_from": rank_16.trial_id, "steps": 1})
    records.outcomes[:] = [base, truncated, rank_16]
    assert list_comparable_outcomes(records) == [base, rank_16]
