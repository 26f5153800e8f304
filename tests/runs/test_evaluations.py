"""Test values that a custom trainer reports during a training: the same on every executor, and journalled at once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rightrank import EvalPoint, TrialResult, TrialTask, select_rank_with
from rightrank.api.folders import status
from rightrank.runs.folder import Journal
from rightrank.schema.events import Records, RunStarted
from rightrank.schema.trials import TrialDiverged, TrialFailed, TrialFinished

pytestmark = pytest.mark.trains


def build_result(task: TrialTask) -> TrialResult:
    scores = [0.5 + task.rank / 100, 0.7, 0.6]
    return TrialResult(metrics={"reward": sum(scores) / 3}, example_scores=scores)


def run(train: Callable[[TrialTask], Any], out: Path, **settings: Any) -> Records:
    select_rank_with(train, out, ranks=(1, 4), learning_rates=(1e-3,), metric="reward", margin=0.1, **settings)
    return read_run_records(out)


def read_run_records(out: Path) -> Records:
    journal = Journal(out / "journal.jsonl").read()
    assert isinstance(journal[0], RunStarted)
    return Records.from_journal(journal[0], journal)


def test_an_evaluation_is_in_the_journal_and_the_status_before_the_trial_ends(tmp_path: Path) -> None:
    journal_types: list[list[str]] = []
    status_lines: list[str | None] = []

    def train(task: TrialTask) -> TrialResult:
        task.report(5, 0.5)
        journal = (tmp_path / "run" / "journal.jsonl").read_text()
        journal_types.append([json.loads(line)["type"] for line in journal.splitlines()])
        status_lines.append(status(tmp_path / "run").running)
        return build_result(task)

    run(train, tmp_path / "run")
    assert journal_types[0] == ["run_started", "trial_started", "trial_evaluated"]
    assert status_lines[0] == "r=4 lr=0.001 seed=0, step 5: held-out 0.5"


def report_bad_values(task: TrialTask) -> TrialResult:
    task.report(1, 0.5, [0.5] * 2)
    match task.rank:
        case 2:
            task.report(2, math.nan)
        case 4:
            points = [EvalPoint(step=1, value=0.5, example_scores=[math.nan, 0.5])]
            return build_result(task).model_copy(update={"points": points})
        case 8:
            raise ZeroDivisionError("a reward of 1 / 0")
    return build_result(task)


def test_an_invalid_evaluation_fails_only_its_trial(tmp_path: Path) -> None:
    ranks = (1, 2, 4, 8, 16)
    select_rank_with(
        report_bad_values, tmp_path / "run", ranks=ranks, learning_rates=(1e-3,), metric="reward", margin=0.1
    )
    outcomes = {outcome.rank: outcome for outcome in read_run_records(tmp_path / "run").outcomes}
    expected = {
        2: (TrialDiverged, "train gave value = nan"),
        4: (TrialDiverged, "train gave example_scores.0 = nan"),
        8: (TrialFailed, "train raised ZeroDivisionError: a reward of 1 / 0"),
    }
    assert {rank for rank in ranks if isinstance(outcomes[rank], TrialFinished)} == {1, 16}
    for rank, (kind, reason) in expected.items():
        assert type(outcomes[rank]) is kind
        assert reason in outcomes[rank].reason  # type: ignore[union-attr]
