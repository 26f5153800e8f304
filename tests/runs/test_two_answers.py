"""Test the two answers of a run folder: in either order, interrupted between them, and the notices before the start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import AutoPeftModelForCausalLM

from rightrank.api.folders import export, status, write_report
from rightrank.api.selecting import select_rank
from rightrank.runs.folder import Journal
from rightrank.schema.errors import InterruptedRun
from rightrank.schema.events import AdapterRecorded
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import TrialFinished
from tests.commands import read_journal_records
from tests.report.elements import Elements
from tests.tiny import build_small_settings
from tests.watch import Watch

WIDE = 0.3  # a margin that a truncation of the tiny model holds


def build_settings(goal: str, **changes: Any) -> SelectSettings:
    values = {"ranks": (1, 2, 4), "max_steps": 20, "margin": WIDE, "learning_rates": (1e-2,)}
    return build_small_settings(strategy="bracket", goal=goal, **(values | changes))


def read_trial_ids(run: Path) -> list[str]:
    return [record.trial_id for record in Journal(run / "journal.jsonl").read() if isinstance(record, TrialFinished)]


@pytest.fixture(scope="module")
def answered(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a selection with the goal adapter."""
    run = tmp_path_factory.mktemp("answered") / "run"
    selected = select_rank(str(model_folder), completion_file, run, settings=build_settings("adapter"))
    assert selected.answers.decision is None
    return run


def require_first_answer(run: Path, answer: AdapterRecorded) -> None:
    """Require that decision.json and `adapter/` contain the answer, and that PEFT loads it."""
    document = json.loads((run / "decision.json").read_text())
    assert document["handed_over"] == answer.handed_over.model_dump(mode="json")
    assert document["adapter_sentence"] == answer.answer.sentence
    model = AutoPeftModelForCausalLM.from_pretrained(str(run / "adapter"))
    assert model.peft_config["default"].r == answer.handed_over.rank
    reference = AutoPeftModelForCausalLM.from_pretrained(str(run / answer.handed_over.reference_adapter))
    assert reference.peft_config["default"].r == 4


def test_goal_adapter_ends_with_the_deployment_rank(answered: Path) -> None:
    (answer,) = read_journal_records(answered, AdapterRecorded)
    assert answer.handed_over.rank < 4
    assert {candidate.method for candidate in answer.answer.candidates} == {"trained", "truncated"}
    require_first_answer(answered, answer)
    document = json.loads((answered / "decision.json").read_text())
    assert (document["goal"], document["rank"], document["confidence"]) == ("adapter", None, None)
    assert document["cost"]["trainings"] == document["cost"]["trainings_to_adapter"] < 2
    text = Elements((answered / "report.html").read_text(encoding="utf-8")).text
    assert "Training rank: not measured:" in text
    assert write_report(answered).read_text(encoding="utf-8") == (answered / "report.html").read_text(encoding="utf-8")
    assert status(answered).state == "done"
    assert export(answered, "vllm").files == ["vllm.sh"]


def test_the_best_adapter_continues_the_folder_with_twice_the_steps(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    run, rates = tmp_path / "run", {"learning_rates": (3e-3, 1e-2), "max_steps": 8}
    first = select_rank(str(model_folder), completion_file, run, settings=build_settings("adapter", **rates))
    rate = first.answers.learning_rate
    assert rate is not None
    document = json.loads((run / "decision.json").read_text())
    assert document["learning_rate"] == rate.learning_rate
    assert [row["learning_rate"] for row in document["learning_rates"]][:2] == [3e-3, 1e-2]
    assert rate.sentence in Elements((run / "report.html").read_text(encoding="utf-8")).text
    assert rate.sentence in str(status(run))
    earlier_ids = read_trial_ids(run)
    best = select_rank(str(model_folder), completion_file, run, settings=build_settings("best-adapter", **rates))
    assert read_trial_ids(run)[: len(earlier_ids)] == earlier_ids
    records = [record for record in Journal(run / "journal.jsonl").read() if isinstance(record, TrialFinished)]
    trained = [trial for trial in records if trial.arm.is_direct and trial.rank]
    assert [(trial.rank, trial.steps) for trial in trained] == [(4, 8), (4, 16)]
    winner = min(trained, key=lambda trial: trial.value)
    assert best.answers.adapter is not None
    assert best.answers.adapter.answer.trained_id == winner.trial_id
    assert best.cost["trainings"] == pytest.approx(first.cost["trainings"] + 2)
    decided = select_rank(str(model_folder), completion_file, run, settings=build_settings("training-rank", **rates))
    assert "unequal_length" not in decided.decision.flags
    assert best.answers.decision is None
    assert winner.steps == 16
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    again = select_rank(str(model_folder), completion_file, run, settings=build_settings("adapter", **rates))
    for selected in (decided, again):  # no goal replaces the better adapter by that of the shorter training
        assert selected.answers.adapter is not None
        assert selected.answers.adapter.answer.trained_id == winner.trial_id
    if again.answers.adapter == best.answers.adapter:
        assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    stricter = build_settings("adapter", **rates, margin=0.1)
    other_margin = select_rank(str(model_folder), completion_file, run, settings=stricter).answers.adapter
    assert other_margin is not None
    assert (other_margin.answer.trained_id, other_margin.answer.margin) == (winner.trial_id, 0.1)


def test_a_run_interrupted_between_the_answers_keeps_the_deployment_rank(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    notices: list[str] = []
    observer = Watch(
        notice=notices.append, should_stop=lambda: any(notice.startswith("adapter: ") for notice in notices)
    )
    run, settings = tmp_path / "run", build_settings("training-rank")
    with pytest.raises(InterruptedRun):
        select_rank(str(model_folder), completion_file, run, settings=settings, callbacks=[observer])
    (answer,) = read_journal_records(run, AdapterRecorded)
    require_first_answer(run, answer)
    assert json.loads((run / "decision.json").read_text())["rank"] is None
    assert status(run).state == "stopped"
    summary_line = f"Adapter: rank {answer.handed_over.rank} · Training rank: not available yet"
    assert summary_line in Elements((run / "report.html").read_text(encoding="utf-8")).text
    assert summary_line in Elements(write_report(run).read_text(encoding="utf-8")).text
    assert export(run, "vllm").folder.is_dir()

    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    earlier_ids = read_trial_ids(run)
    select_rank(str(model_folder), completion_file, run, settings=settings)
    assert read_trial_ids(run)[: len(earlier_ids)] == earlier_ids
    assert read_journal_records(run, AdapterRecorded)[0] == answer
    last = read_journal_records(run, AdapterRecorded)[-1]
    if last.answer.trial_id == answer.answer.trial_id:  # no training for the training rank was better
        assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    require_first_answer(run, last)
