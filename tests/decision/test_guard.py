"""The guard in the answer: which adapter is handed over, at which level, and what is proposed where none is both."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest

from rightrank.decision.adapter import Criterion, adapter_answer, compared_adapters
from rightrank.decision.comparison import estimate, examples_needed
from rightrank.decision.guard import guarded
from rightrank.report.figures import figure_of
from rightrank.report.svg import svg_file
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.events import GuardAnswer, GuardEvaluated
from rightrank.schema.trials import TrialFinished
from tests.tiny import UNMEASURED

EXAMPLES = 200
QUESTION = Criterion("loss", False, 0.02)
RNG = np.random.default_rng(0)
TASK_NOISE, GUARD_NOISE = RNG.normal(0, 0.01, (8, EXAMPLES)), RNG.normal(0, 0.03, (8, EXAMPLES))


@dataclass(frozen=True)
class Adapter:
    """An adapter by what it truly does: its loss on the task and on the guard."""

    name: str
    rank: int
    task: float
    guard: float
    parent: str | None = None
    learning_rate: float = 1e-3


def trial(one: Adapter, place: int) -> TrialFinished:
    losses = (one.task + TASK_NOISE[place]).tolist()
    return TrialFinished(
        trial_id=one.name,
        rank=one.rank,
        learning_rate=one.learning_rate,
        lora_alpha=32.0,
        seed=0,
        steps=0 if one.parent else 100,
        truncate_from=one.parent,
        value=float(np.mean(losses)),
        metrics={"loss": float(np.mean(losses))},
        **(UNMEASURED | {"item_losses": losses, "item_tokens": [1] * EXAMPLES}),
    )


def on_guard(name: str, rank: int, losses: np.ndarray, file: str = "guard.jsonl") -> GuardEvaluated:
    tokens = [1] * len(losses)
    return GuardEvaluated(
        file=file, fingerprint="f", trial_id=name, rank=rank, item_losses=losses.tolist(), item_tokens=tokens
    )


def judged(
    *adapters: Adapter, margin: float = 0.05, more: list[GuardEvaluated] | None = None
) -> tuple[AdapterAnswer, GuardAnswer]:
    trials = [trial(one, place) for place, one in enumerate(adapters)]
    answer = adapter_answer(trials, QUESTION)
    assert answer is not None
    base = np.linspace(1, 3, EXAMPLES)
    measured = [on_guard("base", 0, base)]
    measured += [
        on_guard(one.name, one.rank, base + one.guard + GUARD_NOISE[place]) for place, one in enumerate(adapters)
    ]
    return guarded(answer, trials, QUESTION, [*measured, *(more or [])], margin)


TOP = Adapter("top", 16, 1.0, 0.01)


def test_an_answer_that_keeps_the_guard_stays() -> None:
    answer, guard = judged(TOP, Adapter("four", 4, 1.0, 0.01, "top"), Adapter("one", 1, 1.5, 0.0, "top"))
    assert (answer.rank, guard.task_rank, guard.holds) == (4, 4, True)
    assert guard.difference == pytest.approx(0.01, abs=0.01)
    assert guard.confidence == 1 - 0.05 / 2  # two adapters are enough on the task
    (file,) = guard.files
    assert (file.file, file.examples, file.holds) == ("guard.jsonl", EXAMPLES, True)
    assert (file.difference, file.difference_high) == (guard.difference, guard.difference_high)
    assert (guard.margin, guard.task_trial_id) == (0.05, "four")
    assert guard.sentence.startswith("Guard: kept;")


def test_another_adapter_that_is_both_takes_its_place() -> None:
    answer, guard = judged(TOP, Adapter("four", 4, 1.0, 0.3, "top"))
    assert (answer.rank, answer.trial_id, guard.task_rank, guard.holds) == (16, "top", 4, True)
    assert re.fullmatch(
        r"Guard: kept by rank 16 at learning rate 0\.001; the loss on guard\.jsonl differs from the base's by \+0\.0\d+ nats "
        r"\(upper bound \+0\.0\d+\), guard margin 0\.05\. By the task alone the answer would be rank 4 at learning rate 0\.001, "
        r"which is not shown to keep it \(upper bound \+0\.3\d*\)\.",
        guard.sentence,
    )
    assert answer.sentence == (
        "The smallest adapter within the margin on the task that keeps the guard has rank 16 (trained, learning rate 0.001): "
        "it is the reference itself."
    )
    assert "By the task alone the answer would be rank 4" in guard.sentence
    assert "keeps the guard has rank 16" in answer.sentence


def test_a_lower_learning_rate_may_be_the_one_that_is_both() -> None:
    gentle = Adapter("gentle", 16, 1.005, 0.01, learning_rate=1e-4)
    answer, guard = judged(Adapter("top", 16, 1.0, 0.3), Adapter("four", 4, 1.0, 0.3, "top"), gentle)
    assert (answer.trial_id, guard.holds) == ("gentle", True)


def test_where_none_is_both_the_answer_stays() -> None:
    keeps = Adapter("keeps", 16, 1.4, 0.0, learning_rate=1e-4)
    answer, guard = judged(
        Adapter("top", 16, 1.0, 0.3, learning_rate=1e-2), Adapter("four", 4, 1.0, 0.3, "top", 1e-2), keeps
    )
    assert (answer.rank, guard.holds) == (4, False)
    assert guard.sentence.startswith("Guard: broken, and no adapter of the run")


def test_too_few_examples_are_said_with_the_number_needed() -> None:
    _, guard = judged(TOP, Adapter("four", 4, 1.0, 0.01, "top"), margin=0.009)
    assert not guard.holds
    assert "Guard: not shown to hold" in guard.sentence
    found = estimate((0.01 + GUARD_NOISE[1])[None, :], np.ones(EXAMPLES))
    needed = examples_needed(found, 0.009, guard.confidence)
    assert needed is not None
    assert f"; about {needed:,} guard examples in place of 200 would show" in guard.sentence
    _, at_the_margin = judged(TOP, Adapter("four", 4, 1.0, 0.01, "top"), margin=found.mean)
    assert "; more guard examples in place of 200 would show whether it is worse." in at_the_margin.sentence


def test_a_file_is_named_without_its_folders() -> None:
    more = [
        on_guard(name, rank, np.linspace(2, 4, EXAMPLES) + shift, file)
        for name, rank, shift in (("base", 0, 0.0), ("top", 16, 0.2), ("four", 4, 0.2))
        for file in ("/data/a/other.jsonl", "C:\\data\\third.jsonl")
    ]
    for file, name in (("/data/a/other.jsonl", "other.jsonl"), ("C:\\data\\third.jsonl", "third.jsonl")):
        of_file = [one for one in more if one.file == file]
        _, guard = judged(TOP, Adapter("four", 4, 1.0, 0.01, "top"), more=of_file)
        assert f"the loss on {name} differs" in guard.sentence


def test_the_answer_by_the_task_of_an_earlier_guard_is_kept_where_it_is_no_larger() -> None:
    trials = [trial(one, place) for place, one in enumerate((TOP, Adapter("four", 4, 1.0, 0.3, "top")))]
    base = np.linspace(1, 3, EXAMPLES)
    measured = [on_guard("base", 0, base), on_guard("top", 16, base + 0.01), on_guard("four", 4, base + 0.3)]
    found = adapter_answer(trials, QUESTION)
    assert found is not None
    moved, first = guarded(found, trials, QUESTION, measured, 0.05)
    assert (moved.trial_id, first.task_rank, first.task_trial_id) == ("top", 4, "four")
    again, second = guarded(moved, trials, QUESTION, measured, 0.05, first)
    assert (again, second) == (moved, first)
    # Without it the adapter that keeps the guard would be the answer by the task.
    assert guarded(moved, trials, QUESTION, measured, 0.05)[1].task_rank == 16
    larger = first.model_copy(update={"task_rank": 64, "task_trial_id": "gone"})
    assert guarded(found, trials, QUESTION, measured, 0.05, larger)[1].task_trial_id == "four"


def test_the_outer_figures_are_those_of_the_worst_file() -> None:
    base = np.linspace(2, 4, EXAMPLES)
    more = [on_guard("base", 0, base, "b")] + [
        on_guard(name, rank, base + 0.2, "b") for name, rank in (("top", 16), ("four", 4))
    ]
    _, guard = judged(TOP, Adapter("four", 4, 1.0, 0.01, "top"), more=more)
    assert [one.holds for one in guard.files] == [True, False]
    assert (guard.holds, guard.difference) == (False, pytest.approx(0.2))


def test_a_chosen_adapter_that_truly_breaks_the_guard_is_rare() -> None:
    """Five adapters at the margin exactly: at most 5% of the choices may claim that one keeps it."""
    generator, wrong, rounds = np.random.default_rng(1), 0, 600
    adapters = [Adapter("top", 16, 1.0, 0.05), *(Adapter(f"r{r}", r, 1.0, 0.05, "top") for r in (8, 4, 2, 1))]
    trials = [trial(one, place) for place, one in enumerate(adapters)]
    answer = adapter_answer(trials, QUESTION)
    assert answer is not None
    base = np.zeros(EXAMPLES)
    for _ in range(rounds):
        noise = generator.normal(0, 0.1, (5, EXAMPLES))
        measured = [on_guard("base", 0, base)]
        measured += [on_guard(one.name, one.rank, one.guard + noise[place]) for place, one in enumerate(adapters)]
        wrong += guarded(answer, trials, QUESTION, measured, 0.05)[1].holds
    assert wrong / rounds <= 0.07  # 5% and two standard errors


def test_the_bound_is_the_paired_one() -> None:
    answer, guard = judged(TOP, Adapter("four", 4, 1.0, 0.01, "top"))
    found = estimate((0.01 + GUARD_NOISE[1])[None, :], np.ones(EXAMPLES))
    assert answer.trial_id == "four"
    assert guard.difference_high == pytest.approx(found.bound(guard.confidence))


def test_another_learning_rate_of_the_reference_s_rank_is_compared_and_drawn() -> None:
    adapters = [TOP, Adapter("gentle", 16, 1.0, 0.0, learning_rate=1e-4), Adapter("four", 4, 1.5, 0.2, "top")]
    adapters[0] = replace(TOP, guard=0.5)
    answer, guard = judged(*adapters)
    assert (answer.trial_id, answer.reference_id, guard.holds) == ("gentle", "top", True)
    trials = [trial(one, place) for place, one in enumerate(adapters)]
    compared = compared_adapters(answer, trials, QUESTION)
    assert {one.trial_id for one in compared} == {"gentle", "top", "four"}
    figure = figure_of(answer, compared, "loss", higher_is_better=False)
    assert [(mark.x, mark.y) for mark in figure.marks] == [
        (16, next(t.value for t in trials if t.trial_id == "gentle"))
    ]
    assert svg_file(figure)
