"""Test runs that extend themselves: by a rank while the answer is rising, and by a learning rate at an edge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rightrank.api.selecting import select_rank
from rightrank.cli import main
from rightrank.decision.records import Answers, read_records
from rightrank.runs.journal import Journal
from rightrank.runs.run import extend_settings
from rightrank.runs.values import Selected
from rightrank.schema.decision import AdapterAnswer, AdapterCandidate, Decision, NextRun
from rightrank.schema.settings import SelectSettings
from tests.tiny import build_small_settings, generate_sentences, write_jsonl
from tests.watch import Watch


def build_decision(verdict: str, flags: list[str], runs: list[NextRun]) -> Selected:
    decision = Decision.model_construct(verdict=verdict, flags=flags, next_runs=runs)
    return Selected(Path("run"), None, None, Path("report.html"), Answers(decision))


UP = NextRun(action="rank", ranks=[32], learning_rates=[1e-3, 3e-4], sentence="Train rank 32.")
OUT = NextRun(action="rates", ranks=[16], learning_rates=[1e-2], sentence="Train at 0.01 too.")
SEEDS = NextRun(action="seeds", ranks=[4, 16], seeds=3, sentence="Train with 3 seeds.")


@pytest.mark.parametrize(
    ("verdict", "flags", "runs", "changed"),
    [
        ("rising", [], [UP, SEEDS], {"ranks": (1, 4, 16, 32)}),
        ("saturated", ["lr_edge"], [OUT, SEEDS], {"learning_rates": (3e-4, 1e-3, 1e-2)}),
        ("saturated", [], [SEEDS], {}),
        ("undecided", ["one_seed"], [SEEDS], {}),
    ],
)
def test_extension_adds_ranks_or_rates(
    verdict: str, flags: list[str], runs: list[NextRun], changed: dict[str, Any]
) -> None:
    settings = SelectSettings(ranks=(1, 4, 16), learning_rates=(3e-4, 1e-3), extend=True)
    extended = extend_settings(settings, build_decision(verdict, flags, runs))
    assert extended == (settings.model_copy(update=changed) if changed else None)


def build_adapter_answer(rank: int, difference: float) -> AdapterAnswer:
    """Build the answer for a top rank of 16 whose truncation to 8 differs from it by `difference`."""
    candidate = AdapterCandidate.model_construct(rank=8, method="truncated", difference=difference)
    return AdapterAnswer.model_construct(rank=rank, trained_rank=16, margin=0.01, candidates=[candidate])


@pytest.mark.parametrize(("rank", "difference", "keeps"), [(16, 0.02, True), (16, 0.005, False), (8, 0.005, False)])
def test_a_top_is_too_small_if_its_largest_truncation_is_worse(rank: int, difference: float, keeps: bool) -> None:
    """Check that a truncation within the margin without statistical support asks for examples, not for a larger top rank."""
    assert build_adapter_answer(rank, difference).is_top_rank_required is keeps


def test_a_larger_top_is_trained_if_the_adapter_keeps_the_top_rank(model_folder: Path, tmp_path: Path) -> None:
    """Use a margin of nearly 0, which no truncation meets. The run ends at the largest rank that every matrix supports."""
    data = write_jsonl(
        tmp_path / "d.jsonl", [{"prompt": text, "completion": text[::-1]} for text in generate_sentences(150)]
    )
    settings = build_small_settings(
        max_steps=3, test_fraction=0.0, extend=True, goal="adapter", margin=1e-9, ranks=(1, 8)
    )
    notices: list[str] = []
    watch = Watch(notice=notices.append)
    selected = select_rank(str(model_folder), data, tmp_path / "run", settings=settings, callbacks=[watch])
    assert selected.answers.adapter is not None
    answer = selected.answers.adapter.answer
    assert answer.trained_rank == 16
    assert answer.is_top_rank_required
    assert any(notice.startswith("not extended: rank 32 is above the 16 that") for notice in notices)
    assert any("--extend also trains rank 32" in note for note in selected.view.adapter_notes)


def test_it_extends_with_a_time_budget_unless_told_otherwise() -> None:
    rising = build_decision("rising", [], [UP])
    assert extend_settings(SelectSettings(), rising) is None
    assert extend_settings(SelectSettings(budget_hours=1.0), rising) is not None
    assert extend_settings(SelectSettings(budget_hours=1.0, extend=False), rising) is None
    assert extend_settings(SelectSettings(extend=True), rising) is not None


def test_a_rising_answer_adds_the_rank_above(model_folder: Path, tmp_path: Path) -> None:
    """Check that the folder equals that of a run that had the higher ranks from the start."""
    data = write_jsonl(
        tmp_path / "d.jsonl", [{"prompt": text, "completion": text[::-1]} for text in generate_sentences(150)]
    )
    settings = build_small_settings(max_steps=3, test_fraction=0.0, extend=True)  # ranks 1 and 4
    notices: list[str] = []
    selected = select_rank(
        str(model_folder), data, tmp_path / "run", settings=settings, callbacks=[Watch(notice=notices.append)]
    )
    added = [notice for notice in notices if notice.startswith("extending: ")]
    assert 1 <= len(added) <= 3
    assert added[0].endswith("Adding rank 8.")
    records = read_records(Journal(tmp_path / "run" / "journal.jsonl").read(), "run")
    ranks = {trial.rank for trial in records.list_finished() if trial.arm.is_direct and trial.rank > 0}
    assert {1, 4, 8} <= ranks
    assert {row.rank for row in selected.decision.ranks} == {0, *ranks}
    assert tuple(records.started.settings["ranks"]) == tuple(sorted(ranks))  # type: ignore[arg-type]


def test_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["select", "nowhere", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "run"), "--no-extend"])
    assert stop.value.code == 2
    assert "no such file" in capsys.readouterr().err
