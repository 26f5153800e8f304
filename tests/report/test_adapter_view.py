"""Test the deployment rank in every view: table, report, status, notebook and terminal, separate from the training rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard

from rightrank import Selected
from rightrank.api.folders import status, write_report
from rightrank.cli import cli
from rightrank.decision.run_answers import decide_run
from rightrank.report.adapter_page import build_candidate_table
from rightrank.report.answer import build_answers
from rightrank.report.html import render_model_card, render_report
from rightrank.runs.folder import Journal
from rightrank.schema.events import Records, RunContinued
from tests.report.elements import Elements
from tests.report.runs import make_adapter_without_gain, make_answered_run, write_answered_run, write_records


def test_the_table_has_each_candidate_with_its_bound() -> None:
    answer = make_answered_run().adapters[-1].answer
    table = build_candidate_table(answer, "loss")
    assert table[0] == ["rank", "keeps", "at least", "loss", "worse by", "95% bound", "enough"]
    assert [row[0] for row in table[1:]] == [str(candidate.rank) for candidate in answer.candidates]
    assert [row[6] for row in table[1:]] == [
        "yes" if candidate.is_within_margin else "no" for candidate in answer.candidates
    ]
    assert [row[4] for row in table[1:]].count("reference") == 1


def test_with_goal_adapter_the_training_rank_is_one_line() -> None:
    records = make_answered_run()
    answers = build_answers(records, None, "adapter")
    assert [answers.build_document()[name] for name in ("rank", "verdict", "confidence", "sentence")] == [None] * 4
    text = Elements(render_report(records, answers)).text
    assert "Training rank: not measured: it needs two ranks with a result, and --goal training-rank." in text


def add_learning_rates(records: Records, rates: tuple[float, ...]) -> Records:
    """Return the run with trainings of the top rank at further learning rates that stopped early."""
    top = next(trial for trial in records.list_finished() if trial.rank == 64)
    records.outcomes += [
        top.model_copy(update={"trial_id": f"{rate}", "learning_rate": rate, "stop_at": 5}) for rate in rates
    ]
    learning_rates = sorted({top.learning_rate, *rates})
    settings = records.started.settings | {"learning_rates": learning_rates, "goal": "adapter"}
    records.started = records.started.model_copy(update={"settings": settings})
    return records


@pytest.mark.parametrize(("rates", "is_flagged"), [((3e-4, 1e-3), True), ((1e-3, 1e-2), False), ((), False)])
def test_an_adapter_at_the_highest_learning_rate_is_flagged_in_every_view(
    tmp_path: Path, rates: tuple[float, ...], is_flagged: bool
) -> None:
    records = add_learning_rates(make_answered_run(), rates)
    answers = build_answers(records, None, "adapter")
    assert answers.build_document()["adapter_flags"] == (["lr_edge"] if is_flagged else [])
    run = write_records(tmp_path / "run", [records.started, *records.outcomes, *records.adapters])
    command = f"rightrank select --out {run} --learning-rates 0.0003,0.001,0.003,0.009"
    state = status(run)
    assert state.answers.next_commands == ([command] if is_flagged else [])
    shown = CliRunner().invoke(cli, ["status", str(run)]).output
    assert (f"         {command}\n" in shown) if is_flagged else ("next:" not in shown)
    selected = Selected(run, None, None, run, build_answers(records, None, "adapter", str(run)))
    assert (command in str(selected)) == is_flagged
    page = Elements(render_report(records, answers)).text
    assert ("train rank 64 at 0.009 too (1 training)" in page) == is_flagged


def test_an_adapter_that_gains_nothing_is_flagged_in_every_view(tmp_path: Path) -> None:
    records, goal = make_adapter_without_gain()
    answers = build_answers(records, None, goal)
    document = answers.build_document()
    assert (document["adapter_flags"], document["share_kept"]) == (["no_gain"], None)
    run = write_records(tmp_path / "run", [records.started, *records.outcomes, *records.adapters])
    sentence = "No gain shown: rank 64 gained +0 over the base"
    assert status(run).answers.adapter_sentence.startswith(sentence)
    assert sentence in Elements(render_report(records, answers)).text


def test_the_learning_rate_that_the_decision_asks_for_is_asked_for_once() -> None:
    records = add_learning_rates(make_answered_run(direct=(4, 16)), (3e-4, 1e-3))
    runs = build_answers(records, decide_run(records), "training-rank").next_runs
    assert [run.learning_rates for run in runs if run.action == "rates"] == [[pytest.approx(9e-3)]]


def test_the_report_of_the_folder_alone_knows_the_goal(tmp_path: Path) -> None:
    run = write_answered_run(tmp_path / "run", "adapter")
    assert "Training rank: not measured:" in write_report(run).read_text(encoding="utf-8")
    assert (run / "figures" / "adapters.svg").exists()
    Journal(run / "journal.jsonl").append(RunContinued(settings={"goal": "training-rank"}))
    assert "not asked" not in write_report(run).read_text(encoding="utf-8")


def test_the_card_names_a_base_of_the_hub_and_no_folder() -> None:
    """The hub rejects a card whose base is a folder."""
    records = make_answered_run()
    for model, base in (("someone/a-model", "someone/a-model"), (str(Path.cwd()), None)):
        records.started = records.started.model_copy(update={"settings": records.started.settings | {"model": model}})
        card = ModelCard(render_model_card(records, None)).data.to_dict()  # by the hub's own reader
        assert (card["library_name"], card.get("base_model")) == ("peft", base)
