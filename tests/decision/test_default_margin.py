"""Test that every command takes the default margin from the kind of metric."""

from __future__ import annotations

from typing import Any

import pytest

from rightrank.decision.adapter import build_trained_answer
from rightrank.decision.records import Records, build_criterion, decide_run
from rightrank.runs.compare import compare_trials
from rightrank.schema.metrics import compute_default_margin, infer_metric_kind
from rightrank.schema.settings import SelectSettings
from rightrank.search.history import build_space
from tests.report.runs import make_answered_run

FORMS = {"text": 0.005, "preference": 0.02, "classification": None}  # None: 1% of the reference


@pytest.mark.parametrize(("form", "margin"), FORMS.items())
def test_every_command_has_the_margin_of_the_kind_of_loss(form: str, margin: float | None) -> None:
    run = make_answered_run(direct=[1, 4, 16])
    started = run.started
    started = started.model_copy(
        update={
            "data": started.data.model_copy(update={"form": form}),
            "settings": started.settings | {"margin": None},
        }
    )
    records = Records.from_journal(started, run.outcomes)
    loss, settings = started.data.loss_kind, SelectSettings()
    top = max(records.list_finished(), key=lambda trial: trial.rank)
    decided, space = decide_run(records), build_space(settings, 40, loss)
    reference = next(evidence.value for evidence in decided.ranks if evidence.rank == decided.reference_rank)
    expected_margin = compute_default_margin(infer_metric_kind("loss", False, loss), reference, [reference])
    assert expected_margin == (0.01 * reference if margin is None else margin)
    assert decided.margin == pytest.approx(expected_margin, rel=0.01)
    assert space.get_margin(reference) == expected_margin  # select
    assert (space.criterion.loss, space.criterion.margin) == (loss, None)
    file_answer = build_trained_answer(top, build_criterion(records))  # resize, and what select hands over
    assert file_answer.margin == compute_default_margin(infer_metric_kind("loss", False, loss), top.value, [top.value])
    extra_fields: dict[str, Any] = {
        "preference": {"example_metrics": {"reward_accuracy": [1.0] * len(top.example_losses)}}
    }
    extra_fields["classification"] = {"example_correct": [1] * len(top.example_losses)}
    file = top.model_copy(update=extra_fields.get(form, {}))
    compared = compare_trials(file, file, "loss", "rows.jsonl", settings)
    assert compared.margin == file_answer.margin
