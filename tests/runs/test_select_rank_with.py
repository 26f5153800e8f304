"""Test selections with a custom trainer: the same decision, and one clear line for each mistake."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rightrank import TrialResult, TrialTask, decide, select_rank_with
from rightrank.schema.errors import AllTrialsFailedError, InterruptedRun, SettingsError
from tests.adapters.adapters import make_adapter, make_base
from tests.watch import Watch

EXAMPLE_SCORES = [random.Random(0).gauss(0, 1) for _ in range(40)]


def score_pair(task: TrialTask) -> TrialResult:
    """Return scores that rise up to rank 4; examples vary 100 times as much as ranks."""
    gain = min(task.rank, 4) * 0.01 - (0.02 if task.learning_rate > 2e-3 else 0)
    noise = random.Random(task.rank)
    scores = [ease + gain + noise.gauss(0, 1e-4) for ease in EXAMPLE_SCORES]
    return TrialResult(metrics={"reward": sum(scores) / len(scores)}, example_scores=scores)


def compute_loss(task: TrialTask) -> Mapping[str, float]:
    return {"loss": 1 + 1 / task.rank + (0.2 if task.learning_rate > 2e-3 else 0)}


RANKS, RATES = (1, 4, 16), (1e-3, 3e-3)


@pytest.mark.trains
def test_example_scores_are_compared_in_pairs(tmp_path: Path) -> None:
    selected = select_rank_with(
        score_pair, tmp_path / "run", ranks=RANKS, learning_rates=RATES, metric="reward", margin=0.005
    )
    assert selected.decision.rank == 4
    assert selected.decision.higher_is_better
    assert selected.decision.learning_rate == 1e-3
    assert selected.adapter is None
    assert "Rank 4" in selected.report.read_text(encoding="utf-8")
    assert (selected.run / "figures" / "rank_curve.csv").exists()


@pytest.mark.trains
@pytest.mark.parametrize(("metric", "higher"), [("accuracy", True), ("error", False)])
def test_the_name_of_a_metric_says_whether_higher_is_better(tmp_path: Path, metric: str, higher: bool) -> None:
    def train(task: TrialTask) -> Mapping[str, float]:
        return {metric: 0.5 + 0.1 * task.rank / 16}

    arguments = {"ranks": RANKS, "learning_rates": (1e-3,), "metric": metric, "margin": 0.005}
    decision = select_rank_with(train, tmp_path / "run", **arguments).decision
    assert decision.higher_is_better is higher
    assert decision.reference_rank == (16 if higher else 1)


@pytest.mark.trains
def test_the_saved_adapter_is_handed_over(tmp_path: Path) -> None:
    def train(task: TrialTask) -> Mapping[str, float]:
        (task.folder / "weights.bin").write_text(str(task.rank))
        return compute_loss(task)

    selected = select_rank_with(train, tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,), margin=0.1)
    assert (selected.adapter.path / "weights.bin").read_text() == str(selected.decision.recommended_rank)
    assert "Made with rightrank" in (selected.adapter.path / "README.md").read_text()


@pytest.mark.trains
def test_resuming_repeats_only_failed_trials(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []
    broken = True

    def train(task: TrialTask) -> Mapping[str, float]:
        calls.append(task.rank)
        if broken and task.rank == 4:
            raise ZeroDivisionError("no\nluck")
        return compute_loss(task)

    with caplog.at_level(logging.DEBUG, "rightrank"):
        first = select_rank_with(train, tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,), margin=0.1)
    assert "in train\n" in caplog.text  # the traceback of the function
    assert "train raised ZeroDivisionError: no luck" in first.report.read_text(encoding="utf-8")
    assert "unstable" in first.decision.flags
    broken = False
    calls.clear()
    second = select_rank_with(train, tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,), margin=0.1)
    assert calls == [4]
    assert "unstable" not in second.decision.flags
    calls.clear()
    select_rank_with(train, tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,), margin=0.1)
    assert calls == []


@pytest.mark.trains
def test_a_stopped_run_keeps_finished_trials(tmp_path: Path) -> None:
    stops = iter([False, True])
    with pytest.raises(InterruptedRun, match="stopped after 2 trials"):
        select_rank_with(
            compute_loss,
            tmp_path / "run",
            ranks=RANKS,
            learning_rates=(1e-3,),
            callbacks=[Watch(should_stop=lambda: next(stops))],
        )
    lines = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["type"] for line in lines].count("trial_finished") == 2


def make_trainer(value: Any) -> Any:
    return lambda task: value


@pytest.mark.trains
@pytest.mark.trains
@pytest.mark.parametrize(
    ("train", "reason"),
    [
        (make_trainer(None), "train returned NoneType None; return a number, a mapping such as {'loss': 1.23}"),
        (make_trainer([1.0]), "train returned list"),
        (make_trainer({}), "train returned no 'loss' (it returned nothing)"),
        (make_trainer({"eval_loss": 1.0}), "train returned no 'loss' (it returned 'eval_loss')"),
        (make_trainer(math.nan), "train gave metrics.loss = nan: Input should be a finite number"),
        (make_trainer({"loss": math.nan}), "train gave metrics.loss = nan: Input should be a finite number"),
        (
            lambda _: TrialResult(metrics={"loss": 1.0}, example_scores=[1.0, math.inf]),
            "train gave example_scores.1 = inf",
        ),
        (make_trainer(TrialResult(metrics={"loss": 1.0}, example_scores=[])), "train returned 0 example_scores"),
        (
            make_trainer(TrialResult(metrics={"loss": 1.0}, example_weights=[1.0])),
            "example_weights or example_groups that do not match",
        ),
        (
            make_trainer(TrialResult(metrics={"loss": 1.0}, example_scores=[1.0], example_groups=[0, 1])),
            "example_groups that do not match",
        ),
    ],
)
def test_invalid_results_are_refused_in_one_line(tmp_path: Path, train: Any, reason: str) -> None:
    with pytest.raises(AllTrialsFailedError) as caught:
        select_rank_with(train, tmp_path / "run", ranks=(1, 2, 4, 8, 16), learning_rates=(1e-3,))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.trains
@pytest.mark.trains
@pytest.mark.parametrize(
    ("train", "reason"),
    [
        (
            make_trainer("0.5"),
            "train returned str '0.5'; return a number, a mapping such as {'loss': 1.23}, or a TrialResult",
        ),
        (lambda task: TrialResult(metrics={"loss": "low"}), "train gave metrics.loss = 'low': Input"),  # type: ignore[dict-item]
        (lambda task: TrialResult(metrics={"loss": 1.0}, scores=[1.0]), "the fields: metrics, example_scores,"),  # type: ignore[call-arg]
        (
            lambda task: task.report(1, {"loss": 1.0}),
            "train gave value = {'loss': 1.0}: Input should be a valid number",
        ),
        (
            lambda task: task.report(1, 0.5, {"a": 0.5}),
            "train gave example_scores = {'a': 0.5}: Input should be a valid list",
        ),
    ],
)
def test_a_wrong_result_ends_the_selection_after_the_first_training(tmp_path: Path, train: Any, reason: str) -> None:
    calls: list[int] = []

    def count_calls(task: TrialTask) -> Any:
        calls.append(task.rank)
        return train(task)

    with pytest.raises(AllTrialsFailedError, match="finished trials are kept: correct the function") as caught:
        select_rank_with(count_calls, tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,))
    assert reason in str(caught.value)
    assert len(calls) == 1
    calls.clear()
    train = compute_loss
    assert select_rank_with(count_calls, tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,)).decision.ranks


@pytest.mark.trains
def test_scores_of_other_examples_are_refused(tmp_path: Path) -> None:
    def train(task: TrialTask) -> TrialResult:
        return TrialResult(
            metrics={"loss": 1 / task.rank}, example_scores=[1 / task.rank] * (3 if task.rank == 4 else 2)
        )

    report = select_rank_with(train, tmp_path / "run", ranks=RANKS, learning_rates=(1e-3,)).report
    assert "but earlier trials returned 2; score the same examples" in report.read_text(encoding="utf-8")


@pytest.mark.trains
@pytest.mark.trains
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": (0,)}, "rank 0 is not allowed"),
        ({"strategy": "gird"}, "did you mean 'grid'"),
        ({"evaluate": 3}, "evaluate: got int"),
        ({"train": 3}, "train: got int"),
        ({"max_steps": -1}, "max_steps: got -1"),
        ({"goal": "adapter"}, "needs evaluate="),
        ({"ranks": 4}, "ranks: got 4 only"),
        ({"ranks": (1, 4), "metric": "reward"}, "add rank 0, or give a margin in the metric's unit"),
        ({"ranks": (1, 4), "margin": "2%"}, "add rank 0, or give a margin in the metric's unit"),
    ],
)
def test_bad_arguments_start_nothing(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"train": lambda task: {"loss": 1.0}, "out": tmp_path / "run"} | changes
    with pytest.raises(SettingsError) as caught:
        select_rank_with(**arguments)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.trains
@pytest.mark.parametrize("margin", ["2%", None])
def test_a_failing_base_that_the_margin_needs_ends_the_selection_before_the_first_training(
    tmp_path: Path, margin: str | None
) -> None:
    calls: list[int] = []

    def train(task: TrialTask) -> float:
        calls.append(task.rank)
        return 1 - 1 / task.rank

    with pytest.raises(
        SettingsError, match=r"rank 0: train raised ZeroDivisionError: .*; without a result of the base"
    ):
        select_rank_with(train, tmp_path / "run", learning_rates=(1e-3,), metric="reward", margin=margin)
    assert calls == [0]
    assert select_rank_with(train, tmp_path / "run", learning_rates=(1e-3,), metric="reward", margin=0.1).decision.rank


def make_adapter_result(rank: int) -> TrialResult:
    scores = [2.0 + ease + {1: 0.1, 2: 0.05}.get(rank, 0.001 / rank) for ease in EXAMPLE_SCORES]
    return TrialResult(metrics={"loss": sum(scores) / len(scores)}, example_scores=scores)


def make_adapter_trainer(base_folder: Path) -> Callable[[TrialTask], TrialResult]:
    base = make_base(base_folder)

    def train(task: TrialTask) -> TrialResult:
        make_adapter(base, task.folder, rank=task.rank)
        return make_adapter_result(task.rank)

    return train


@pytest.mark.trains
def test_with_evaluate_the_adapter_is_truncated_and_handed_over(tmp_path: Path) -> None:
    train = make_adapter_trainer(tmp_path / "base")

    def evaluate(folder: Path, task: TrialTask) -> TrialResult:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["r"] == task.rank
        return make_adapter_result(task.rank)

    selected = select_rank_with(
        train, tmp_path / "run", evaluate=evaluate, goal="adapter", ranks=(1, 8), learning_rates=(1e-3,), margin=0.01,
        strategy="bracket",
    )  # fmt: skip
    handed_over = selected.answers.adapter.handed_over
    assert (handed_over.rank, handed_over.method, handed_over.trained_rank) == (4, "truncated", 8)
    assert selected.answers.decision is None
    assert json.loads((selected.adapter.path / "adapter_config.json").read_text())["r"] == 4
    assert (selected.run / handed_over.reference_adapter / "adapter_config.json").is_file()
    assert (selected.adapter.rank, selected.training) == (4, None)
    decision = select_rank_with(
        train,
        tmp_path / "run",
        evaluate=evaluate,
        ranks=(1, 8),
        learning_rates=(1e-3,),
        margin=0.01,
        strategy="bracket",
    ).decision
    assert decision.adapter_sentence == decide(tmp_path / "run").decision.adapter_sentence
    assert decision.adapter_sentence.startswith("Rank 4")


@pytest.mark.trains
@pytest.mark.parametrize(("metric", "sign"), [("perplexity", 1.0), ("accuracy", -1.0)])
def test_the_best_adapter_by_any_metric_is_that_of_twice_the_steps(tmp_path: Path, metric: str, sign: float) -> None:
    base = make_base(tmp_path / "base")

    def measure(task: TrialTask, steps: int) -> TrialResult:
        score = 0.5 + sign * 0.01 * (2 * (task.rank < 8) - (steps == 20))
        return TrialResult(metrics={metric: score}, example_scores=[score] * 100)

    def train(task: TrialTask) -> TrialResult:
        make_adapter(base, task.folder, rank=task.rank)
        (task.folder / "steps.txt").write_text(str(task.steps))
        return measure(task, task.steps)

    selected = select_rank_with(
        train, tmp_path / "run", evaluate=lambda _folder, task: measure(task, 0), goal="best-adapter", metric=metric, ranks=(1, 8),
        learning_rates=(1e-3,), max_steps=10, strategy="bracket",
    )  # fmt: skip
    assert (selected.adapter.rank, (selected.adapter.path / "steps.txt").read_text()) == (8, "20")


@pytest.mark.trains
def test_an_adapter_that_can_not_be_truncated_leaves_the_trained_one(tmp_path: Path) -> None:
    selected = select_rank_with(
        compute_loss,
        tmp_path / "run",
        evaluate=lambda _folder, _task: {"loss": 1.0},
        ranks=(1, 4),
        learning_rates=(1e-3,),
    )
    assert selected.adapter is None
    assert selected.answers.adapter is None
    assert selected.decision.reference_rank == 4
