"""The first question in every view: figure, table, report, status, notebook, terminal; beside the second, never mixed up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from rightrank import Selected
from rightrank.api.runs import status, write_report
from rightrank.cli import cli
from rightrank.decision.adapter import making_of
from rightrank.decision.records import Records, compared, decide_run, decision_so_far
from rightrank.report.evidence_tables import candidate_table
from rightrank.report.figure import Figure
from rightrank.report.figures import MAX_MARGINS, adapter_figure, figures_of
from rightrank.report.html import render_report
from rightrank.report.status import cost_sentence
from rightrank.report.svg import write_figures
from rightrank.runs.journal import Journal
from rightrank.runs.values import answers
from rightrank.schema.events import RunContinued
from tests.report.elements import Elements
from tests.report.runs import answered_folder, answered_run, journal_with


def figure(records: Records) -> Figure:
    found = adapter_figure(records)
    assert found is not None
    return found


def test_the_figure_has_trained_and_truncated_adapters_by_rank() -> None:
    found = figure(answered_run(direct=(4, 16)))
    assert {series.label: series.x for series in found.series} == {
        "trained at that rank": (4, 16, 64),
        "truncated from the top rank": (4, 8, 16, 32),
    }
    assert [(row[0], row[1]) for row in found.rows[:2]] == [(64, "trained"), (32, "truncated")]
    (mark,) = found.marks
    assert (mark.x, mark.label) == (8, "handed over: rank 8, truncated")


def test_an_adapter_holds_where_its_whisker_ends_inside_the_band() -> None:
    records = answered_run(direct=(1, 4))
    found = figure(records)
    high = found.bands[0].high
    inside = {
        (rank, series.label.split()[0]): end < high
        for series in found.series
        for rank, end in zip(series.x, series.high, strict=True)
    }
    holds = {(one.rank, one.how): one.holds for one in compared(records)}
    assert inside == holds
    assert set(inside.values()) == {True, False}


def test_whiskers_are_the_paired_bounds_of_the_difference() -> None:
    records = answered_run()
    values = {(one.rank, one.how): one for one in compared(records)}
    one, reference = values[16, "truncated"], values[64, "trained"]
    assert one.difference_low is not None
    assert one.difference_high is not None
    assert one.difference_low < one.difference < one.difference_high
    assert one.difference == pytest.approx(one.value - reference.value)
    series = next(series for series in figure(records).series if series.label.startswith("truncated from"))
    place = series.x.index(16)
    assert series.high[place] == pytest.approx(reference.value + one.difference_high)
    assert series.low[place] == pytest.approx(reference.value + one.difference_low)


def test_an_adapter_far_behind_is_off_the_scale_and_named() -> None:
    records = answered_run()
    far = next(trial for trial in records.finished() if trial.rank == 4)
    items = [loss + 20 * MAX_MARGINS * 0.02 for loss in far.item_losses]
    worse = far.model_copy(update={"item_losses": items, "metrics": {"loss": far.value + MAX_MARGINS * 0.02}})
    records.outcomes = [worse if outcome is far else outcome for outcome in records.outcomes]
    found = figure(records)
    assert "off the scale: rank 4" in found.title
    assert found.y.limits is not None
    assert found.y.limits[1] < worse.metrics["loss"]


def test_the_table_has_each_candidate_with_its_bound() -> None:
    answer = answered_run().adapters[-1].answer
    table = candidate_table(answer, "loss")
    assert table[0] == ["rank", "how", "loss", "worse by", "95% bound", "holds"]
    assert [row[:2] for row in table[1:]] == [[str(one.rank), one.how] for one in answer.candidates]
    assert [row[5] for row in table[1:]] == ["yes" if one.holds else "no" for one in answer.candidates]
    assert [row[3] for row in table[1:]].count("reference") == 1


def test_how_the_adapter_was_made() -> None:
    records = answered_run()
    trial = next(t for t in records.finished() if t.trial_id == records.adapters[-1].answer.trial_id)
    assert making_of(trial, records.finished()).sentence() == (
        "trained at rank 64 (learning rate 0.003, 40 steps), truncated to rank 8 by K-FAC"
    )
    top = next(t for t in records.finished() if t.rank == 64)
    assert making_of(top, records.finished()).sentence() == "trained at rank 64 (learning rate 0.003, 40 steps)"


def test_a_truncation_costs_no_training() -> None:
    assert cost_sentence(answered_run()).startswith("1 training, 4 truncations, ")


def test_between_the_answers_the_report_has_the_first() -> None:
    records = answered_run()
    text = Elements(render_report(records, answers(records, None, "training-rank"))).text
    assert "Adapter: rank 8 · Training rank: not known yet" in text
    assert f"Adapter: {records.adapters[-1].answer.sentence}" in text
    assert "Training rank: 1 training so far. A comparison needs two ranks with a result." in text
    assert "It was trained at rank 64" in text
    assert "On the test split, read once, it differs from the reference by +0.0012 (95% upper bound +0.0031)." in text


def test_both_answers_have_a_sentence_each() -> None:
    records = answered_run(direct=(4, 16))
    made = decide_run(records)
    text = Elements(render_report(records, answers(records, made, "training-rank"))).text
    assert f"Adapter: {records.adapters[-1].answer.sentence}" in text
    assert f"Training rank: {made.sentence}" in text
    assert f"Adapter: rank 8 · Training rank: {made.rank}" in text


def test_with_goal_adapter_the_training_rank_is_an_estimate_and_no_evidence() -> None:
    records = answered_run()
    found = answers(records, None, "adapter")
    estimate = found.estimate
    assert estimate is not None
    assert (estimate.low, estimate.high) == (8, 16)
    assert estimate.trainings == 2.0  # two lower ranks, one seed
    assert [found.document()[name] for name in ("rank", "verdict", "confidence", "sentence")] == [None] * 4
    assert estimate.sentence.startswith("An estimate, not evidence: ")
    text = Elements(render_report(records, found)).text
    assert "Training rank: not asked (--goal adapter)." in text
    assert estimate.sentence in text
    assert answers(records, None, "training-rank").estimate is None


def at_rates(records: Records, rates: tuple[float, ...]) -> Records:
    """Return the run with trainings of the top rank at further learning rates that stopped early."""
    top = next(trial for trial in records.finished() if trial.rank == 64)
    records.outcomes += [
        top.model_copy(update={"trial_id": f"{rate}", "learning_rate": rate, "stop_at": 5}) for rate in rates
    ]
    tried = sorted({top.learning_rate, *rates})
    settings = records.started.settings | {"learning_rates": tried, "goal": "adapter"}
    records.started = records.started.model_copy(update={"settings": settings})
    return records


@pytest.mark.parametrize(("rates", "is_flagged"), [((3e-4, 1e-3), True), ((1e-3, 1e-2), False), ((), False)])
def test_an_adapter_at_the_highest_learning_rate_is_flagged_in_every_view(
    tmp_path: Path, rates: tuple[float, ...], is_flagged: bool
) -> None:
    records = at_rates(answered_run(), rates)
    found = answers(records, None, "adapter")
    assert found.document()["adapter_flags"] == (["lr_edge"] if is_flagged else [])
    run = journal_with(tmp_path / "run", [records.started, *records.outcomes, *records.adapters])
    command = f"rightrank select --out {run} --learning-rates 0.0003,0.001,0.003,0.009"
    state = status(run)
    assert state.next_commands == ([command] if is_flagged else [])
    shown = CliRunner().invoke(cli, ["status", str(run)]).output
    assert (f"next:   {state.next_runs[0]}\n        {command}\n" in shown) if is_flagged else ("next:" not in shown)
    selected = Selected(run, None, None, run, found, next_commands=state.next_commands)
    for text in (str(selected), "\n".join(text for _, text in selected.view.rows())):
        assert (command in text) == is_flagged
    page = Elements(render_report(records, found)).text
    assert ("train rank 64 at 0.009 too (1 training)" in page) == is_flagged
    assert ("lr_edge" in page) == is_flagged


def test_the_learning_rate_that_the_decision_asks_for_is_asked_for_once() -> None:
    records = at_rates(answered_run(direct=(4, 16)), (3e-4, 1e-3))
    runs = answers(records, decide_run(records), "training-rank").next_runs
    assert [run.learning_rates for run in runs if run.action == "rates"] == [[pytest.approx(9e-3)]]


def test_the_report_of_the_folder_alone_knows_the_goal(tmp_path: Path) -> None:
    run = answered_folder(tmp_path / "run", "adapter")
    assert "not asked (--goal adapter)" in write_report(run).read_text(encoding="utf-8")
    assert (run / "figures" / "adapters.svg").exists()
    Journal(run / "journal.jsonl").append(RunContinued(settings={"goal": "training-rank"}))
    assert "not asked" not in write_report(run).read_text(encoding="utf-8")


def test_status_has_both_answers(tmp_path: Path) -> None:
    found = status(answered_folder(tmp_path / "first"))
    assert (found.state, found.rank, found.trainings) == ("stopped", None, 1.0)
    assert found.answer == "Adapter: rank 8 · Training rank: not known yet"
    assert found.truncated_curve == sorted(found.truncated_curve)
    assert [rank for rank, _ in found.curve] == [64]
    assert status(answered_folder(tmp_path / "adapter", "adapter")).state == "done"
    shown = CliRunner().invoke(cli, ["status", str(tmp_path / "adapter")])
    assert "done, 1 training\n" in shown.output
    assert "answer: Adapter: rank 8\n" in shown.output
    assert "● trained, ○ truncated" in shown.output


def test_decide_adds_the_adapter_of_a_run(tmp_path: Path) -> None:
    run = answered_folder(tmp_path / "run", direct=(4, 16))
    sentence = answered_run(direct=(4, 16)).adapters[-1].answer.sentence
    shown = CliRunner().invoke(cli, ["decide", str(run)])
    assert f"adapter: {sentence}" in shown.output
    assert json.loads(CliRunner().invoke(cli, ["decide", str(run), "--json"]).stdout)["adapter_sentence"] == sentence
    alone = CliRunner().invoke(cli, ["decide", str(answered_folder(tmp_path / "one", "adapter"))])
    assert alone.exit_code == 2 or "one rank was trained" in str(alone.exception)


def test_a_notebook_shows_both(tmp_path: Path) -> None:
    records = answered_run(direct=(4, 16))
    made = decision_so_far(records)
    both = answers(records, made, "training-rank")
    selected = Selected(tmp_path, None, None, tmp_path, both, adapters=compared(records))
    write_figures(tmp_path / "figures", figures_of(records, made))
    html = selected._repr_html_()
    assert "<strong>Adapter: rank 8</strong>" in html
    assert "<strong>Training rank: " in html
    assert html.count("<svg") == 2
    alone = replace(selected, answers=replace(both, decision=None))._repr_html_()
    assert "Training rank" not in alone
    assert alone.count("<svg") == 1
