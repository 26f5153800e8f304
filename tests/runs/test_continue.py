"""Test runs that continue with more seeds, ranks or learning rates or with another margin."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from rightrank.api.runs import decide
from rightrank.api.selecting import select_rank
from rightrank.cli import main
from rightrank.runs.folder import Journal
from rightrank.schema.errors import RunFolderError
from rightrank.schema.events import RunContinued
from rightrank.schema.results import AdapterAnswer, AdapterCandidate
from rightrank.schema.trials import TrialFinished, TrialStarted
from tests.tiny import build_small_settings


def read_journal(run: Path) -> list[object]:
    return list(Journal(run / "journal.jsonl").read())


def collect_values(run: Path) -> dict[tuple[int, float, int], float]:
    """Return the value of each full training by rank, learning rate and seed."""
    return {
        (record.rank, record.learning_rate, record.seed): record.value
        for record in read_journal(run)
        if isinstance(record, TrialFinished) and record.rank > 0 and record.arm.is_direct
    }


@pytest.fixture(scope="module")
def begun(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("begun") / "run"
    select_rank(str(model_folder), completion_file, run, settings=build_small_settings(max_steps=4))
    return run


def test_a_continued_run_equals_a_single_run(
    begun: Path, model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    earlier_trials = [record for record in read_journal(run) if isinstance(record, TrialStarted)]
    final_settings = build_small_settings(max_steps=4, ranks=(1, 2, 4), seeds=(0, 1), margin=0.5)
    continued = select_rank(str(model_folder), completion_file, run, settings=final_settings)
    again = [record for record in read_journal(run) if isinstance(record, TrialStarted)][len(earlier_trials) :]
    assert {record.trial_id for record in earlier_trials}.isdisjoint(
        record.trial_id for record in again
    )  # nothing is trained twice
    assert [record.settings.keys() for record in read_journal(run) if isinstance(record, RunContinued)] == [
        {"margin", "ranks", "seeds"}
    ]
    single_run = select_rank(str(model_folder), completion_file, tmp_path / "whole", settings=final_settings)
    assert collect_values(run) == collect_values(tmp_path / "whole")
    assert continued.decision.margin == 0.5
    same = {"next_runs", "ranks"}  # these contain trial identifiers, which differ between runs
    assert continued.decision.model_dump(exclude=same) == single_run.decision.model_dump(exclude=same)


def test_settings_that_change_trials_are_refused(begun: Path, model_folder: Path, completion_file: Path) -> None:
    for name, value in (("max_steps", 5), ("max_eval_examples", 14)):
        settings = build_small_settings(**{"max_steps": 4, "margin": 0.1, name: value})
        with pytest.raises(RunFolderError, match=name):
            select_rank(str(model_folder), completion_file, begun, settings=settings)


def test_the_next_run_is_a_command_that_continues_the_run(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    select_rank(str(model_folder), completion_file, run, settings=build_small_settings(max_steps=20, margin=0.02))
    command = next(command for command in decide(run).next_commands if command is not None and "--seeds" in command)
    words = shlex.split(command)
    assert words[:4] == ["rightrank", "select", "--out", str(run)]
    assert len(words) == 6
    earlier_trials = collect_values(run)
    with pytest.raises(SystemExit) as stop:
        main([*words[1:], "--quiet"])
    assert stop.value.code == 0
    assert earlier_trials.items() < collect_values(run).items()


def build_adapter_answer(rank: int, difference: float) -> AdapterAnswer:
    """Build the answer for a top rank of 16 whose truncation to 8 differs from it by `difference`."""
    candidate = AdapterCandidate.model_construct(rank=8, method="truncated", difference=difference)
    return AdapterAnswer.model_construct(rank=rank, trained_rank=16, margin=0.01, candidates=[candidate])


@pytest.mark.parametrize(("rank", "difference", "keeps"), [(16, 0.02, True), (16, 0.005, False), (8, 0.005, False)])
def test_a_top_is_too_small_if_its_largest_truncation_is_worse(rank: int, difference: float, keeps: bool) -> None:
    """Check that a truncation within the margin without statistical support asks for examples, not for a larger rank."""
    assert build_adapter_answer(rank, difference).is_top_rank_required is keeps


def test_select_without_a_model_continues_with_that_of_the_run(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "small"
    shutil.copytree(small_run, folder)
    monkeypatch.chdir(folder)
    run, journal = Path("run"), Path("run", "journal.jsonl")
    values, lines = collect_values(run), journal.read_bytes().splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if b"trial_finished" in line)
    journal.write_bytes(b"".join(lines[: first + 1]))
    assert collect_values(run).keys() < values.keys()
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["select", "--out", "run"])
    assert collect_values(run) == values
