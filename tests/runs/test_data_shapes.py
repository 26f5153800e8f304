"""Test selections on other forms of data, from rows to the report."""

from __future__ import annotations

from pathlib import Path

from rightrank.api.selecting import select_rank
from rightrank.report.terminal import format_plan
from rightrank.runs.journal import Journal
from rightrank.schema.events import RunStarted, TestEvaluated
from tests.tiny import build_small_settings, generate_sentences, write_jsonl


def test_questions_and_answers_without_a_test_split(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"question": text, "answer": text.upper()} for text in generate_sentences(120)]
    data = write_jsonl(tmp_path / "data.jsonl", [*rows, rows[0]])
    settings = build_small_settings(max_steps=2, ranks=(1, 2), test_fraction=0.0, goal="adapter", max_eval_examples=4)
    selected = select_rank(str(model_folder), data, tmp_path / "run", settings=settings)
    assert selected.adapter.path.exists()
    records = Journal(tmp_path / "run" / "journal.jsonl").read()
    assert not [record for record in records if isinstance(record, TestEvaluated)]
    started = next(record for record in records if isinstance(record, RunStarted))
    line = format_plan(started, 2)
    assert line.startswith("121 rows; examples: ")
    assert "held-out rows not evaluated, beyond --max-eval-examples" in line
    assert "form: prompt_completion (from question → prompt, answer → completion)" in line
