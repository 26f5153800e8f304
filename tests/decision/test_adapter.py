"""The first criterion: which truncation of one training is enough."""

from __future__ import annotations

import numpy as np
import pytest

from rightrank.decision.adapter import (
    Criterion,
    adapter_answer,
    files_of,
    probable_ranks,
    smallest_holding_truncation,
    trained_answer,
    with_adapter,
)
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.trials import EvalPoint, TrialDiverged, TrialFinished
from tests.tiny import UNMEASURED

EXAMPLES, TOKENS = 400, 10
LOSS = Criterion(metric="loss", higher_is_better=False, margin=0.005)
LEVELS = np.random.default_rng(7).normal(2.0, 0.5, EXAMPLES)  # of each example, shared by all adapters


def trial(
    name: str, rank: int, shift: float, *, parent: str | None = None, steps: int = 0, noise: float = 0.01
) -> TrialFinished:
    """A trial whose examples lose `shift` nats a token more than the level, with paired noise."""
    drawn = np.random.default_rng(rank * 7 + steps).normal(0.0, noise, EXAMPLES)
    losses = (LEVELS + shift + drawn - drawn.mean()) * TOKENS
    return TrialFinished(
        trial_id=name,
        rank=rank,
        learning_rate=1e-3,
        lora_alpha=32.0,
        seed=0,
        steps=steps if parent else 100,
        truncate_from=parent,
        value=float(losses.sum() / (EXAMPLES * TOKENS)),
        metrics={"loss": float(losses.sum() / (EXAMPLES * TOKENS))},
        **(UNMEASURED | {"item_losses": losses.tolist(), "item_tokens": [TOKENS] * EXAMPLES}),
    )


def answer(*trials: TrialFinished, criterion: Criterion = LOSS) -> AdapterAnswer:
    found = adapter_answer(trials, criterion)
    assert found is not None
    return found


TOP = trial("top", 64, 0.0, noise=0.0)


def test_the_smallest_truncation_whose_bound_is_within_the_margin() -> None:
    found = answer(
        TOP,
        trial("a", 32, 0.0005, parent="top"),
        trial("b", 16, 0.002, parent="top"),
        trial("c", 8, 0.02, parent="top"),
    )
    assert (found.rank, found.how, found.trial_id, found.reference_id) == (16, "truncated", "b", "top")
    assert found.difference == pytest.approx(0.002)
    assert found.difference_high is not None
    assert 0.002 < found.difference_high < 0.005
    assert [one.holds for one in found.candidates] == [True, True, True, False]
    assert "rank 16" in found.sentence
    top, *lower = found.candidates
    assert (top.difference, top.difference_low, top.difference_high) == (0.0, 0.0, 0.0)
    for one in lower:
        assert one.difference_low is not None
        assert one.difference_high is not None
        assert one.difference_low < one.difference < one.difference_high


@pytest.mark.parametrize(
    ("shifts", "holding", "probable"),
    [
        ({32: 0.001, 16: 0.002, 8: 0.02, 4: 0.001}, 16, (16, 32)),  # nothing is tested below a failure
        ({32: 0.001, 4: 0.002, 2: 0.02}, 4, (2, 8)),
        ({32: 0.001, 8: 0.002, 1: 0.003}, 1, (1, 2)),
        ({32: 0.02, 16: 0.001}, 64, (64, 64)),
    ],
)
def test_where_the_training_rank_probably_lies(
    shifts: dict[int, float], holding: int, probable: tuple[int, int]
) -> None:
    found = answer(TOP, *(trial(str(rank), rank, shift, parent="top") for rank, shift in shifts.items()))
    assert smallest_holding_truncation(found) == holding
    assert probable_ranks(found) == probable


def test_the_first_failure_ends_the_sequence() -> None:
    found = answer(TOP, trial("a", 32, 0.02, parent="top"), trial("b", 16, 0.001, parent="top"))
    assert (found.rank, found.how) == (64, "trained")


def test_a_wide_interval_is_a_failure() -> None:
    assert answer(TOP, trial("a", 32, 0.001, parent="top", noise=0.2)).rank == 64


def test_the_reference_is_the_top_with_extra_steps_where_they_help() -> None:
    extra = trial("extra", 64, -0.02, parent="top", steps=20, noise=0.0)
    plain = trial("plain", 16, 0.001, parent="top")
    recovered = trial("recovered", 8, -0.018, parent="top", steps=20)
    found = answer(TOP, extra, plain, recovered)
    assert (found.rank, found.how, found.reference_id, found.reference_how) == (8, "recovered", "extra", "recovered")
    assert found.extra_steps_difference == pytest.approx(-0.02)
    # A truncation that only matches the top as trained loses against the better reference.
    assert answer(TOP, extra, plain).rank == 64


def test_extra_steps_that_harm_leave_the_top_as_the_reference() -> None:
    harmed = trial("extra", 64, 0.03, parent="top", steps=20, noise=0.0)
    found = answer(TOP, harmed, trial("a", 16, 0.028, parent="top", steps=20))
    assert (found.reference_id, found.rank) == ("top", 64)  # no false pass against a reference that got worse


def test_without_scores_by_example_the_top_is_kept() -> None:
    bare = [
        one.model_copy(update={"item_losses": [], "item_tokens": []})
        for one in (TOP, trial("a", 32, 0.0, parent="top"))
    ]
    found = answer(*bare)
    assert found.rank == 64
    assert found.candidates[1].difference_high is None
    assert "without scores by example" in found.sentence


def test_files_are_whole_trainings_and_truncations_with_the_metric() -> None:
    changed = {
        "base": {"rank": 0},
        "look": {"stop_at": 10},
        "scored by another metric": {"metrics": {"accuracy": 0.5}},
    }
    others = [TOP.model_copy(update={"trial_id": name} | update) for name, update in changed.items()]
    diverged = TrialDiverged(trial_id="diverged", **TOP.arm.model_dump(), step=3, reason="NaN")
    truncated = trial("a", 32, 0.0, parent="top")
    assert list(files_of([*others, diverged, TOP, truncated], LOSS)) == ["top", "a"]


def test_adapters_scored_on_unequal_numbers_of_examples_are_compared_by_their_values() -> None:
    few = trial("a", 32, 0.002, parent="top")
    few = few.model_copy(update={"item_losses": few.item_losses[:50], "item_tokens": few.item_tokens[:50]})
    assert [file.cell.examples for file in files_of([TOP, few], LOSS).values()] == [0, 0]
    found = answer(TOP, few).candidates[1]
    assert found.difference == pytest.approx(0.002)
    assert (found.difference_high, found.holds) == (None, False)
    exact = Criterion("loss", False, 0.005, trusts_values=True)
    assert answer(TOP, few, criterion=exact).candidates[1].holds


@pytest.mark.parametrize(
    ("metric", "higher", "token_loss", "values", "margin", "difference"),
    [
        ("loss", False, True, (2.0, 2.1), 0.005, 0.1),
        ("loss", False, False, (2.0, 2.1), 0.02, 0.1),
        ("accuracy", True, True, (0.9, 0.8), 0.005, 0.1),
        ("accuracy", True, True, (0.9, 80.0), 0.5, -79.1),  # the scale of all of them
        ("perplexity", False, True, (8.0, 8.4), 0.04, 0.4),
    ],
)
def test_the_margin_and_the_unit_are_those_of_the_metric(
    metric: str, higher: bool, token_loss: bool, values: tuple[float, float], margin: float, difference: float
) -> None:
    nothing = {"item_losses": [], "item_tokens": []}
    top, other = (
        one.model_copy(update=nothing | {"value": value, "metrics": {metric: value}})
        for one, value in zip((TOP, trial("a", 32, 0.0, parent="top")), values, strict=True)
    )
    found = answer(top, other, criterion=Criterion(metric, higher, None, token_loss))
    assert (found.reference_id, found.margin) == ("top", pytest.approx(margin))
    assert found.candidates[1].difference == pytest.approx(difference)


def test_another_adapter_is_handed_over_and_listed_once() -> None:
    before = trained_answer(TOP, LOSS)
    other = answer(TOP, trial("a", 32, 0.001, parent="top")).candidates[1]
    after = with_adapter(before, other, "Another one.")
    assert (after.trial_id, after.rank, after.how, after.sentence) == ("a", 32, "truncated", "Another one.")
    assert (after.difference, after.difference_high) == (other.difference, other.difference_high)
    assert [one.trial_id for one in after.candidates] == ["top", "a"]
    assert with_adapter(after, other, "Again.").candidates == after.candidates


def test_plain_truncations_are_measured_from_the_top_as_trained() -> None:
    extra = trial("extra", 64, -0.004, parent="top", steps=10)
    found = answer(TOP, extra, trial("a", 32, 0.002, parent="top"), trial("b", 16, 0.004, parent="top"))
    assert found.reference_id == "extra"
    assert smallest_holding_truncation(found) == 16


def test_no_answer_before_a_training_is_truncated() -> None:
    assert adapter_answer([TOP], LOSS) is None


def test_notes_offer_a_direct_training_and_name_a_top_that_overfits() -> None:
    low = answer(TOP, trial("a", 8, 0.001, parent="top"), trial("b", 4, 0.05, parent="top"))
    search = "the search for the training rank (--goal training-rank, the default) tries it."
    assert low.notes == [f"At rank 4 a direct training can beat a truncation; {search}"]
    better = answer(TOP, trial("a", 32, -0.001, parent="top"), trial("b", 16, -0.03, parent="top"))
    assert better.notes == [
        "Rank 16 is better than rank 64 by 0.03: the top rank overfits; train again with --ranks up to 16, or fewer steps."
    ]


@pytest.mark.parametrize("metric_points", [True, False])
def test_the_best_step_is_named_from_points_of_the_metric_alone(metric_points: bool) -> None:
    """With f1 the points during training are losses: a falling loss is no sign that fewer steps are better."""
    points = [EvalPoint(step=step, value=value, train_value=None) for step, value in ((10, 2.0), (20, 1.5), (40, 1.0))]
    criterion = Criterion("f1", True, 0.01, points_are_of_the_metric=metric_points)
    top, small = (
        one.model_copy(update={"metrics": {"f1": 0.5}, "value": 0.5, "item_metrics": {"f1": [0.5] * 400}})
        for one in (TOP.model_copy(update={"points": points}), trial("a", 16, 0.0, parent="top"))
    )
    notes = answer(top, small, criterion=criterion).notes
    told = "The held-out value of rank 64 was best at step 10 of 100: train again with --max-steps 10, or with --checkpoint best."
    assert (told in notes) is metric_points
    steady = [*points[:2], EvalPoint(step=40, value=1.995, train_value=None)]
    assert answer(top.model_copy(update={"points": steady}), small, criterion=criterion).notes == []
    kept = answer(top.model_copy(update={"kept_step": 10}), small, criterion=criterion).notes
    assert kept == ["The best checkpoint of rank 64 is used: step 10 of 100."]
