"""Test how the records of a journal become evidence, and which training is handed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rightrank.api.runs import decide
from rightrank.decision.run_answers import (
    build_run_table,
    decide_if_possible,
    decide_run,
    describe_run_learning_rate,
    find_best_trial,
    list_comparable_outcomes,
)
from rightrank.decision.table import build_table
from rightrank.report.answer import Answers, build_run_status, find_last_decision
from rightrank.runs.folder import build_trials_frame
from rightrank.schema.errors import ResultsError, RunFolderError
from rightrank.schema.events import DecisionRecorded, JournalRecord, Records, read_records
from rightrank.schema.trials import (
    TrialDiverged,
    TrialEvaluated,
    TrialFailed,
    TrialFinished,
    TrialStarted,
)
from tests.report.runs import ITEMS, TOKENS, make_answered_run, make_run


def build_journal(records: Records) -> list[JournalRecord]:
    return [records.started, *records.outcomes, *records.tests]


def make_trial_start(trial: TrialFinished) -> TrialStarted:
    return TrialStarted(trial_id=trial.trial_id, **trial.arm.model_dump())


def change_trial(trial: TrialFinished, **changes: object) -> TrialFinished:
    return trial.model_copy(update=changes)


@pytest.mark.parametrize("headless", [[], [make_trial_start(make_run().list_finished()[0])]], ids=["empty", "no start"])
def test_a_journal_without_a_start_is_no_run(headless: list[JournalRecord]) -> None:
    with pytest.raises(RunFolderError, match=r"here: no run has started here; give the run folder"):
        read_records(headless, "here")


def test_the_last_record_of_a_trial_counts() -> None:
    first = make_run().list_finished()[1]
    again = change_trial(first, value=1.5)
    failed = TrialFailed(trial_id="other", **first.arm.model_dump(), error="error", reason="x")
    third = failed.model_copy(update={"trial_id": "third"})
    started = make_run().started
    assert Records.from_journal(started, [make_trial_start(first), first, failed, third, again]).outcomes == [
        again,
        failed,
        third,
    ]


def test_a_repeated_evaluation_replaces_all_later_ones_and_a_new_start_drops_them() -> None:
    first = make_trial_start(make_run().list_finished()[1])
    evaluations = [
        TrialEvaluated(trial_id=first.trial_id, step=step, value=value)
        for step, value in ((0, 1.0), (10, 2.0), (20, 3.0))
    ]
    again = TrialEvaluated(trial_id=first.trial_id, step=10, value=4.0)
    other_evaluation = TrialEvaluated(trial_id="other", step=5, value=5.0)
    started = make_run().started
    records = Records.from_journal(started, [first, *evaluations, other_evaluation, again])
    assert records.evaluations == {
        first.trial_id: [evaluations[0].point, again.point],
        "other": [other_evaluation.point],
    }
    records.add(first)
    assert records.evaluations == {"other": [other_evaluation.point]}


def test_a_rate_counts_as_tried_where_a_training_of_its_own_start_stopped_or_diverged() -> None:
    trial, base = make_run().list_finished()[1], make_run().list_finished()[0]
    fields = trial.arm.model_dump()
    outcomes = [
        base,
        change_trial(trial, trial_id="stopped", learning_rate=0.1, stop_at=5),
        change_trial(trial, trial_id="truncated", learning_rate=0.2, truncate_from=trial.trial_id),
        TrialDiverged(trial_id="diverged", **(fields | {"learning_rate": 0.3}), step=1, reason="x"),
        TrialFailed(trial_id="failed", **(fields | {"learning_rate": 0.4}), error="error", reason="x"),
        change_trial(trial, trial_id="higher", rank=2 * trial.rank, learning_rate=0.5),
    ]
    table = build_table([trial], "loss", False, partial_outcomes=outcomes)
    assert base.rank == 0
    assert table.tried_rates == {trial.rank: {trial.learning_rate, 0.1, 0.3}, 2 * trial.rank: {0.5}}


def test_the_trial_that_began_last_and_has_not_ended_is_running() -> None:
    first, second, third = make_run().list_finished()[:3]

    def find_running_arm(*journal: JournalRecord) -> str | None:
        return build_run_status("run", journal, make_run(), Answers(None), is_locked=True, progress=None).running

    assert find_running_arm() is None
    assert find_running_arm(make_trial_start(first), first) is None
    assert find_running_arm(make_trial_start(first), make_trial_start(second), first) == second.arm.format_label()
    assert (
        find_running_arm(make_trial_start(first), make_trial_start(second), make_trial_start(third), second)
        == third.arm.format_label()
    )
    for ended in (
        TrialDiverged(trial_id=first.trial_id, **first.arm.model_dump(), step=1, reason="x"),
        TrialFailed(trial_id=first.trial_id, **first.arm.model_dump(), error="error", reason="x"),
    ):
        assert find_running_arm(make_trial_start(first), ended) is None


def test_the_last_decision_is_found() -> None:
    records = make_run()
    decision = decide_run(records)
    decided = [DecisionRecorded(decision=decision, adapter_trial_id=name) for name in ("a", "b")]
    assert find_last_decision(build_journal(records)) is None
    assert find_last_decision([records.started, *decided, *records.tests]) == decided[1]


def test_a_run_is_decided_at_its_own_margin() -> None:
    records = make_run()
    assert decide_run(records).margin == 0.02
    records.started.settings["margin"] = None
    best, base = (pick(trial.value for trial in records.list_finished()) for pick in (min, max))
    assert decide_run(records).margin == pytest.approx(0.01 * (base - best), rel=0.05)
    records.started.settings["margin"] = 1
    assert decide_run(records).margin == 1.0
    assert decide_run(records, confidence=0.9).requested_confidence == 0.9


def test_the_learning_rates_of_a_run_are_those_of_the_training_behind_its_adapter() -> None:
    records, recorded = make_run(), make_answered_run().adapters[0]
    top, low = (min(records.list_finished(), key=lambda t: (t.rank != rank, t.value)) for rank in (64, 16))
    for adapters, trained in (([], top), ([low], low)):
        records.adapters[:] = [
            recorded.model_copy(update={"answer": recorded.answer.model_copy(update={"trained_id": trial.trial_id})})
            for trial in adapters
        ]
        answer = describe_run_learning_rate(records)
        assert (answer.rank, answer.learning_rate) == (trained.rank, trained.learning_rate)


def test_a_decision_so_far_needs_two_ranks() -> None:
    records = make_run((1, 4, 16))
    records.outcomes[:] = [outcome for outcome in records.outcomes if outcome.rank < 16]
    assert [evidence.rank for evidence in decide_run(records).ranks] == [0, 1, 4]
    assert decide_if_possible(records) == decide_run(records)
    records.outcomes[:] = [outcome for outcome in records.outcomes if outcome.rank < 4]
    assert decide_if_possible(records) is None


def test_accuracy_is_read_from_the_correct_examples() -> None:
    records = make_run((1, 4), (1e-3,))
    right = {1: [1, 0] * (ITEMS // 2), 4: [1] * ITEMS, 0: [0] * ITEMS}
    outcomes = [
        change_trial(
            trial, example_correct=right[trial.rank], metrics={"accuracy": sum(right[trial.rank]) / ITEMS, "loss": 1}
        )
        for trial in records.list_finished()
    ]
    started = records.started.model_copy(update={"metric": "accuracy", "higher_is_better": True})
    table = build_run_table(Records.from_journal(started, outcomes))
    assert (table.metric, table.higher_is_better, table.kind) == ("accuracy", True, "accuracy")
    assert {rank: table.cells[rank, 1e-3, 0].loss for rank in (1, 4)} == {1: -0.5, 4: -1.0}


def test_a_cell_holds_what_its_trial_measured() -> None:
    records = make_run((1, 4), (1e-3,), diverged=[(4, 1e-3)])
    trial = records.list_finished()[1]
    cell = build_run_table(records).cells[1, 1e-3, 0]
    assert cell.trial_id == trial.trial_id
    assert cell.value == trial.value
    assert cell.loss == pytest.approx(trial.value)
    assert (cell.examples, float(cell.weights[0])) == (ITEMS, TOKENS)
    assert (cell.steps, cell.train_value) == (trial.steps, trial.train_value)
    assert cell.points == tuple(trial.points)
    assert build_run_table(records).missing == {4: 1}


def test_a_cell_has_the_groups_of_its_examples() -> None:
    trial = make_run().list_finished()[1]
    grouped = change_trial(trial, example_groups=[number // 2 for number in range(ITEMS)])
    (cell,) = build_table([grouped], "loss", False).cells.values()
    assert (cell.num_groups, cell.examples) == (ITEMS // 2, ITEMS)
    (alone,) = build_table([trial], "loss", False).cells.values()
    assert (alone.groups, alone.num_groups) == (None, ITEMS)


def test_only_complete_trainings_are_compared() -> None:
    records = make_run((1, 4, 16), (1e-3,))
    base, rank_1, rank_4, rank_16 = records.list_finished()
    records.outcomes[:] = [base, rank_1, rank_4, change_trial(rank_16, stop_at=10)]
    assert list_comparable_outcomes(records) == [base, rank_1, rank_4]
    zero = change_trial(base, trial_id="zero", truncate_from=rank_4.trial_id)
    records.outcomes.append(zero)
    assert list_comparable_outcomes(records) == [zero, rank_1, rank_4]


def test_trainings_of_a_custom_trainer_have_any_metric() -> None:
    records = make_run((1, 4), (1e-3,))
    rank_1, rank_4 = records.list_finished()[1:]
    started = records.started.model_copy(
        update={
            "metric": "score",
            "higher_is_better": True,
            "data": records.started.data.model_copy(update={"form": "custom"}),
        }
    )
    failed = TrialFailed(trial_id="gone", **rank_4.arm.model_dump(), error="error", reason="x")
    custom_records = Records.from_journal(
        started,
        [
            change_trial(
                rank_1, metrics={"score": 3.0, "loss": 1.0}, example_scores=[2.0, 5.0], example_weights=[2.0, 1.0]
            ),
            change_trial(rank_4, metrics={"score": 4.0}, example_scores=[4.0, 4.0], example_weights=[2.0, 1.0]),
            failed,
        ],
    )
    table = build_run_table(custom_records)
    cell = table.cells[1, 1e-3, 0]
    assert (table.metric, table.higher_is_better, table.missing) == ("score", True, {4: 1})
    assert (cell.value, cell.loss, cell.examples) == (3.0, -3.0, 2)
    assert cell.steps == rank_1.steps
    assert cell.points == tuple(rank_1.points)
    assert cell.train_value == rank_1.train_value
    assert table.cells[4, 1e-3, 0].value == 4.0


def test_the_best_seed_of_the_best_learning_rate_is_handed_over() -> None:
    records = make_run((1, 4), (1e-3, 3e-3), (0, 1, 2))
    decision = decide_run(records)
    of_four = [trial for trial in records.list_finished() if trial.rank == 4]
    learning_rate = next(evidence.learning_rate for evidence in decision.ranks if evidence.rank == 4)
    at_rate = [trial for trial in of_four if trial.learning_rate == learning_rate]
    assert find_best_trial(records, decision, 4) == min(at_rate, key=lambda trial: trial.value)
    mirrored = decision.model_copy(update={"higher_is_better": True})
    assert find_best_trial(records, mirrored, 4) == max(at_rate, key=lambda trial: trial.value)
    tied = Records.from_journal(
        records.started, [change_trial(trial, value=2.0) for trial in records.list_finished()[::-1]]
    )
    assert find_best_trial(tied, decision, 4).seed == 0


def test_a_perplexity_of_weighted_examples_is_the_weighted_mean_of_logarithms() -> None:
    records = make_run((1, 4), (1e-3,))
    trials = [
        change_trial(trial, metrics={"perplexity": 4.0}, example_scores=[2.0, 8.0], example_weights=[3.0, 1.0])
        for trial in records.list_finished()[1:]
    ]
    cell = build_table(trials, "perplexity", False).cells[4, 1e-3, 0]
    assert cell.loss == pytest.approx((3 * np.log(2.0) + np.log(8.0)) / 4)


def test_the_cost_of_a_run_is_counted_in_whole_trainings() -> None:
    records = make_run((1, 4), (1e-3,))
    assert records.count_trainings() == 2.0  # the base is evaluated, not trained
    rank_1, rank_4 = records.list_finished()[1:]
    stopped = change_trial(rank_1, trial_id="stopped", stop_at=10)
    resumed = change_trial(rank_1, trial_id="resumed", stop_at=30, continue_from="stopped")
    truncated = change_trial(rank_4, trial_id="truncated", truncate_from=rank_4.trial_id, steps=0)
    records.outcomes += [stopped, resumed, truncated]
    assert records.count_trainings() == pytest.approx(2 + 0.25 + 0.5)
    third = change_trial(rank_1, trial_id="third", stop_at=None, steps=13)
    assert Records.from_journal(records.started, [change_trial(rank_4, steps=30), third]).count_trainings() == 1.433
    # If a custom trainer does not report its steps, each training counts as one.
    custom_records = Records.from_journal(records.started, [change_trial(trial, steps=0) for trial in (rank_1, rank_4)])
    assert custom_records.count_trainings() == 2.0
    assert Records.from_journal(records.started, []).count_trainings() == 0.0


def test_the_kept_step_is_in_the_table() -> None:
    rank_1 = make_run((1,), (1e-3,)).list_finished()[1]
    table = build_table([change_trial(rank_1, checkpoint_step=20)], "loss", False)
    assert table.cells[1, 1e-3, 0].checkpoint_step == 20


def test_trainings_scored_on_other_examples_are_compared_by_their_values() -> None:
    rank_1, rank_4 = make_run((1, 4), (1e-3,)).list_finished()[1:]
    fewer = change_trial(rank_4, example_losses=rank_4.example_losses[:20], example_tokens=rank_4.example_tokens[:20])
    assert [cell.examples for cell in build_table([rank_1, fewer], "loss", False).cells.values()] == [0, 0]
    table = build_table([rank_1, rank_4], "loss", False)
    assert [(cell.examples, cell.score_range) for cell in table.cells.values()] == [(ITEMS, 0.0)] * 2


@pytest.mark.parametrize("kind", ["trials", "examples", "csv", "csv of examples", "csv with the index"])
def test_an_exported_run_decides_without_its_truncated_and_stopped_trainings(tmp_path: Path, kind: str) -> None:
    records = make_answered_run(direct=(1, 4, 16))
    complete_trial = next(trial for trial in records.list_finished() if trial.rank == 16 and trial.is_direct)
    for number, changes in enumerate(({"stop_at": 10}, {"stop_at": 20})):
        records.outcomes.append(
            change_trial(complete_trial, trial_id=f"stage-{number}", metrics={"loss": 2.0 + number}, **changes)
        )
    run_decision = decide_run(records)
    table: Any = build_trials_frame(records, examples="examples" in kind)
    if "csv" in kind:
        path = tmp_path / "run.csv"
        table.to_csv(path, index="index" in kind)
        table = path
    with pytest.raises(ResultsError, match="differ in stage"):
        decide(table, metric="loss")
    read = decide(table, metric="loss", margin=run_decision.margin, where={"stage": "whole"})
    assert [evidence.rank for evidence in read.decision.ranks] == [0, 1, 4, 16, 64]
    assert {evidence.rank: evidence.value for evidence in read.decision.ranks} == {
        evidence.rank: pytest.approx(evidence.value) for evidence in run_decision.ranks
    }


def test_the_table_of_examples_decides_as_the_run() -> None:
    records = make_run(seeds=(0, 1))
    table = build_trials_frame(records, examples=True)
    run_decision = decide_run(records)
    assert len(table) == sum(len(t.example_losses) for t in records.outcomes if isinstance(t, TrialFinished))
    read = decide(table, metric="loss", higher_is_better=False, margin=run_decision.margin).decision
    assert (read.rank, read.verdict) == (run_decision.rank, run_decision.verdict)
    for ours, theirs in zip(read.ranks, run_decision.ranks, strict=True):
        assert (ours.rank, ours.value) == (theirs.rank, pytest.approx(theirs.value))
        assert (ours.low, ours.high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))
