"""Test the profile `rl`: collapses, seed noise, and the smallest rank without a significant difference."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rightrank import Selected, TrialResult, TrialTask, decide, select_rank_with
from rightrank.schema.errors import AllTrialsFailedError, SettingsError
from rightrank.schema.trials import TrialCollapsed, TrialFailed, TrialFinished
from tests.commands import read_journal_records
from tests.watch import Watch

pytestmark = pytest.mark.trains

PROMPT_EASE = [index / 200 for index in range(200)]  # the difficulty of each test prompt
LOW, HIGH = 1e-5, 1e-4


def train_by_reinforcement(task: TrialTask, gain: float = 0.0, noise: float = 0.01) -> TrialResult:
    """Return rewards that rise to a level; at the high learning rate they rise faster and then collapse."""
    generator = random.Random(f"{task.rank} {task.learning_rate} {task.seed}")
    level = 0.6 + gain * (task.rank > 1) + generator.gauss(0, noise)
    (task.folder / "adapter.bin").write_text(f"{task.rank} {task.learning_rate}")
    for step in range(0, 101, 20):
        reached = min(1.0, step / (20 if task.learning_rate == HIGH else 80))
        fallen = task.learning_rate == HIGH and step > 60
        task.report(step, 0.0 if fallen else 0.2 + (level - 0.2) * reached)
    scores = [float(ease < level) for ease in PROMPT_EASE]
    return TrialResult(metrics={"reward": sum(scores) / len(scores)}, example_scores=scores)


def run(
    out: Path, train: Callable[[TrialTask], Any] = train_by_reinforcement, **settings: Any
) -> tuple[Selected, list[str]]:
    notices: list[str] = []
    arguments: dict[str, Any] = {"ranks": (1, 4, 16), "learning_rates": (LOW, HIGH), "profile": "rl"} | settings
    return select_rank_with(train, out, callbacks=[Watch(notice=notices.append)], **arguments), notices


def read_outcomes(out: Path) -> list[Any]:
    kinds = (TrialFinished, TrialCollapsed, TrialFailed)
    return read_journal_records(out, kinds)


def test_a_run_that_collapsed_is_an_outcome_and_never_handed_over(tmp_path: Path) -> None:
    selected, notices = run(tmp_path / "run")
    collapsed = [outcome for outcome in read_outcomes(tmp_path / "run") if isinstance(outcome, TrialCollapsed)]
    assert {(outcome.rank, outcome.learning_rate, outcome.seed) for outcome in collapsed} == {
        (1, HIGH, 0),
        (4, HIGH, 0),
    }
    assert (collapsed[0].best_step, collapsed[0].step, collapsed[0].value) == (20, 100, 0.0)
    assert [point.step for point in collapsed[0].points] == [0, 20, 40, 60, 80, 100]
    assert selected.decision.learning_rate == LOW
    assert {"collapsed", "unstable"} <= set(selected.decision.flags)
    assert (selected.adapter.path / "adapter.bin").read_text() == f"1 {LOW}"
    report = selected.report.read_text(encoding="utf-8")
    assert report.count("collapsed: the held-out value fell from") == 2
    (noise,) = [line for line in notices if line.startswith("Seed noise at rank 1")]
    assert "seeds per rank" in noise


def test_the_smallest_rank_is_the_answer_without_a_significant_difference(tmp_path: Path) -> None:
    selected, notices = run(tmp_path / "run", lambda task: train_by_reinforcement(task, gain=0.04, noise=0.06))
    decision = selected.decision
    assert (decision.verdict, decision.rank, decision.fallback_rank) == ("no_difference", 1, None)
    assert decision.sentence.startswith(
        "No difference between ranks 1 and 4 can be shown at this noise (seed standard "
    )
    assert "take rank 1, the smallest" in decision.sentence
    assert any("the 3 given seeds detect differences from about" in line for line in notices)
    assert decide(selected.run).decision.verdict == "no_difference"
    assert selected.training.rank == 1


def test_a_larger_rank_that_is_better_is_the_answer(tmp_path: Path) -> None:
    selected, _ = run(tmp_path / "run", lambda task: train_by_reinforcement(task, gain=0.3))
    assert (selected.decision.rank, selected.decision.verdict) == (4, "saturated")
    assert (selected.adapter.path / "adapter.bin").read_text() == f"4 {LOW}"


def test_the_profile_is_a_set_of_defaults(tmp_path: Path) -> None:
    run(tmp_path / "run", seeds=(5, 6), margin=0.1, strategy="grid", learning_rates=(LOW,), ranks=(1, 4))
    first = json.loads((tmp_path / "run" / "journal.jsonl").read_text().splitlines()[0])
    stored = {name: first["settings"][name] for name in ("profile", "metric", "seeds", "margin", "strategy")}
    assert stored == {"profile": "rl", "metric": "reward", "seeds": [5, 6], "margin": 0.1, "strategy": "grid"}
    assert {outcome.seed for outcome in read_outcomes(tmp_path / "run")} == {5, 6}
    with pytest.raises(SettingsError, match="unknown profile 'lr'"):
        run(tmp_path / "other", profile="lr")
    with pytest.raises(SettingsError, match="'upward' starts at the smallest rank"):
        run(tmp_path / "other", goal="adapter", evaluate=lambda _folder, _task: {"reward": 1.0})
    assert not (tmp_path / "other").exists()


def test_an_end_below_the_base_is_a_collapse_too(tmp_path: Path) -> None:
    def train(task: TrialTask) -> TrialResult:
        level = 0.3 if task.rank == 0 else 0.05 if task.learning_rate == HIGH else 0.6
        return TrialResult(metrics={"reward": level}, example_scores=[float(ease < level) for ease in PROMPT_EASE])

    selected, _ = run(tmp_path / "run", train, ranks=(0, 1, 4, 16))
    collapsed = [outcome for outcome in read_outcomes(tmp_path / "run") if isinstance(outcome, TrialCollapsed)]
    assert {outcome.learning_rate for outcome in collapsed} == {HIGH}
    assert selected.decision.learning_rate == LOW


def test_if_all_collapse_the_advice_is_a_lower_learning_rate(tmp_path: Path) -> None:
    with pytest.raises(AllTrialsFailedError, match=r"fell from .* to 0 at step 100"):
        run(tmp_path / "run", learning_rates=(HIGH,))


def test_it_resumes_without_training_again(tmp_path: Path) -> None:
    first, _ = run(tmp_path / "run")

    def fail_on_call(task: TrialTask) -> TrialResult:
        raise AssertionError(task)

    fail_on_call.__module__, fail_on_call.__qualname__ = (
        train_by_reinforcement.__module__,
        train_by_reinforcement.__qualname__,
    )
    again, _ = run(tmp_path / "run", fail_on_call)
    assert again.decision == first.decision
