"""Test what a selection says if no training ended with a result: what happened first, and what to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rightrank.runs.run import require_result
from rightrank.schema.errors import AllTrialsFailedError
from rightrank.schema.trials import TrialDiverged, TrialOutcome
from tests.report.runs import make_run


def build_run(outcomes: list[TrialOutcome]) -> Any:
    records = make_run()
    records.outcomes[:] = outcomes
    return SimpleNamespace(records=records, selection=SimpleNamespace(advice="give lower learning rates"))


def test_each_end_without_a_result_is_explained() -> None:
    base, *trained = make_run().list_finished()
    top = trained[-1].model_copy(update={"continue_from": None})
    stopped = top.model_copy(update={"trial_id": "stopped", "stop_at": 2})
    diverged = TrialDiverged(trial_id="diverged", step=7, reason="training loss is nan", **top.arm.model_dump())
    for outcomes, message in (
        ([base], "the budget ended before the first training did; the same command with a larger one continues"),
        (
            [base, stopped],
            "the budget ended before the first training did; the same command with a larger one continues",
        ),
        ([base, stopped, diverged], "no training reached its last step .the first: training loss is nan.; give lower"),
        ([base, diverged], "none of 1 trials .*training loss is nan.; give lower learning rates"),
    ):
        with pytest.raises(AllTrialsFailedError, match=message):
            require_result(build_run(outcomes))
    assert require_result(build_run([base, stopped, diverged, top])) == " (the first: training loss is nan)"
