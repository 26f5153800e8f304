"""Test the margin as a share of what the training gained over the base, with hypothesis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rightrank.decision.adapter import (
    Criterion,
    ReferenceComparison,
    ScoredAdapter,
    build_share_steps,
    build_truncation_answer,
    find_wider_margin,
)
from rightrank.schema.errors import ResultsError, SettingsError
from rightrank.schema.metrics import Margin, compute_margin, parse_margin
from rightrank.schema.results import AdapterCandidate
from rightrank.schema.settings import SelectSettings
from tests.examples import limit_examples

EXAMPLES = 80


def compare(
    losses: dict[int, np.ndarray],
    margin: Margin | None = None,
    *,
    metric: str = "loss",
    has_base: bool = True,
    copies: int = 1,
) -> ReferenceComparison:
    """Compare adapters by rank; rank 0 is the base and the highest rank the reference. Copies of an example form a group."""
    groups = [number // copies for number in range(copies * EXAMPLES)] if copies > 1 else None
    criterion = Criterion(metric, metric == "accuracy", margin)
    scored = {
        rank: ScoredAdapter.from_scores(
            str(rank),
            rank,
            float(values.mean()),
            (np.repeat(values, copies).tolist(), [1.0] * copies * len(values)),
            criterion,
            groups=groups,
        )
        for rank, values in losses.items()
    }
    base = scored.pop(0)
    by_name = {adapter.name: adapter for adapter in scored.values()}
    return ReferenceComparison(scored[max(scored)], by_name, criterion, base if has_base else None)


def draw_losses(
    seed: int, gain: float, differences: Sequence[float] = (), noise: float = 0.05
) -> dict[int, np.ndarray]:
    draw = np.random.default_rng(seed)
    top = draw.normal(2, 0.5, EXAMPLES)
    lower = {2**power: top + mean + draw.normal(0, noise, EXAMPLES) for power, mean in enumerate(differences)}
    return {0: top + gain + draw.normal(0, noise, EXAMPLES), 64: top} | lower


def build(comparison: ReferenceComparison, rank: int) -> AdapterCandidate:
    return comparison.build_candidate(comparison.adapters[str(rank)])


@limit_examples(60)
@given(
    st.integers(0, 10**6), st.floats(0.2, 3), st.floats(-0.1, 0.3), st.sampled_from(["0.5%", "1%", "2%", "5%", "20%"])
)
def test_the_bound_of_the_share_and_the_contrast_agree(seed: int, gain: float, difference: float, margin: str) -> None:
    """An adapter is enough exactly if the lower bound of its share is. The order and the scale of the losses do not matter."""
    losses = draw_losses(seed, gain, [difference])
    comparison = compare(losses, margin)
    candidate, needed = build(comparison, 1), 1 - float(margin.removesuffix("%")) / 100
    low, high, share = candidate.share_kept_low, candidate.share_kept_high, candidate.share_kept
    assert low is not None
    assert high is not None
    assert share is not None
    assert low < share < high
    assume(abs(low - needed) > 1e-5)
    assert candidate.is_within_margin is (low >= needed)
    order = np.random.default_rng(seed).permutation(EXAMPLES)
    changed = build(compare({rank: 7 * values[order] for rank, values in losses.items()}, margin), 1)
    assert (changed.share_kept, changed.share_kept_low, changed.share_kept_high) == pytest.approx(
        (share, low, high), abs=1e-4
    )


@limit_examples(30)
@given(st.integers(0, 10**6), st.sampled_from(["loss", "accuracy"]))
def test_the_contrast_at_a_share_of_zero_is_the_difference(seed: int, metric: str) -> None:
    losses = draw_losses(seed, 0.5, [0.05], noise=0.3)
    if metric == "accuracy":
        losses = {rank: (values > 2).astype(float) for rank, values in losses.items()}
    comparison = compare(losses, "2%", metric=metric)
    cell = comparison.adapters["1"].cell
    contrast, difference = comparison.compute_contrast(cell, 0.0), comparison.compute_bounds(cell)
    for name in ("mean", "low", "high"):
        assert getattr(contrast, name) == pytest.approx(getattr(difference, name))


@limit_examples(30)
@given(st.integers(0, 10**6), st.floats(0, 2))
def test_the_squared_reaches_of_both_differences_add_up_for_bounded_scores(seed: int, share: float) -> None:
    """Zou and Donner: the squared reach of (s - t) - share·(b - t) is that of s - t plus share² times that of b - t."""
    losses = {rank: (values > 2).astype(float) for rank, values in draw_losses(seed, 0.5, [0.05], noise=0.3).items()}
    comparison = compare(losses, "2%", metric="accuracy")
    gain, loss, contrast = (
        comparison.compute_contrast(comparison.adapters["1"].cell, value) for value in (1.0, 0.0, share)
    )
    for name in ("low", "high"):
        squares = [(getattr(bounds, name) - bounds.mean) ** 2 for bounds in (gain, loss, contrast)]
        assert squares[2] == pytest.approx(squares[1] + share**2 * (squares[0] - squares[1]))


@limit_examples(30)
@given(st.integers(0, 10**6), st.floats(0.2, 3), st.integers(2, 4))
def test_copies_in_a_group_add_nothing(seed: int, gain: float, copies: int) -> None:
    """The bounds of the share are over groups, so that they are those of one example of each group."""
    losses = draw_losses(seed, gain, [0.01])
    alone, grouped = (build(compare(losses, "2%", copies=number), 1) for number in (1, copies))
    for name in ("share_kept", "share_kept_low", "share_kept_high", "difference_high"):
        assert getattr(grouped, name) == pytest.approx(getattr(alone, name), abs=1e-4)
    assert grouped.is_within_margin == alone.is_within_margin


@limit_examples(40)
@given(st.integers(0, 10**6), st.floats(0.05, 2), st.lists(st.floats(0, 0.1), min_size=3, max_size=3))
def test_a_wider_margin_is_met_by_the_same_ranks_or_more(seed: int, gain: float, differences: list[float]) -> None:
    losses, passed = draw_losses(seed, gain, differences), set[int]()
    for margin in ("1%", "2%", "5%", "20%", "60%"):
        comparison = compare(losses, margin)
        present = {rank for rank in (1, 2, 4) if build(comparison, rank).is_within_margin}
        assert passed <= present
        passed = present
    steps = build_share_steps(build(comparison, rank) for rank in (4, 2, 1))
    assert [step.share for step in steps] == sorted({step.share for step in steps}, reverse=True)
    assert [step.rank for step in steps] == sorted({step.rank for step in steps}, reverse=True)


def test_shares_are_not_cut_at_their_limits() -> None:
    comparison = compare(draw_losses(1, 1.0, [-0.2, 1.5]))
    better, harmful = build(comparison, 1), build(comparison, 2)
    assert better.share_kept == pytest.approx(1.2, abs=0.05)
    assert harmful.share_kept == pytest.approx(-0.5, abs=0.05)


@pytest.mark.parametrize("margin", [None, "5%", 0.5])
def test_without_a_gain_nothing_is_enough(margin: Margin | None) -> None:
    comparison = compare(draw_losses(3, 0.0, [0.0]), margin)
    reference, lower = comparison.reference, comparison.adapters["1"]
    answer = build_truncation_answer(reference, [lower], comparison)
    assert (answer.has_no_gain, answer.share_kept, answer.staircase) == (True, None, [])
    assert [candidate.is_within_margin for candidate in answer.candidates] == [True, False]
    assert answer.sentence.startswith("No gain shown: ")


def test_accuracy_is_compared_by_the_bounds_of_shares() -> None:
    """If no prediction changes, the bound still allows for examples that were not drawn."""
    draw = np.random.default_rng(5)
    top, base = (draw.random((2, 400)) < [[0.9], [0.25]]).astype(float)
    comparison = compare({0: base, 64: top, 1: top}, "2%", metric="accuracy")
    candidate = build(comparison, 1)
    assert candidate.share_kept == 1
    assert candidate.share_kept_low is not None
    assert candidate.share_kept_low == pytest.approx(1 - 3 / 400 / 0.65, abs=0.002)
    assert candidate.is_within_margin


def test_the_examples_that_cannot_tell_are_named_with_what_settles_it() -> None:
    comparison = compare(draw_losses(2, 1.0, [0.0], noise=0.1))
    answer = build_truncation_answer(comparison.reference, [comparison.adapters["1"]], comparison)
    assert answer.sentence.startswith(
        "Rank 64 is kept, since lower ranks are undecided: with these 80 held-out rows rank 1 "
    )
    assert "more held-out rows (about " in answer.sentence
    assert "%, which costs no training." in answer.sentence
    wider = f"{answer.sentence.partition('--margin ')[2].partition(',')[0]}"
    assert find_wider_margin(answer) == wider
    assert build(compare(draw_losses(2, 1.0, [0.0], noise=0.1), wider), 1).is_within_margin


def test_without_a_base_the_margin_is_one_in_the_metrics_unit() -> None:
    losses = draw_losses(4, 1.0, [0.0], noise=0.001)
    comparison = compare(losses, None, has_base=False)
    answer = build_truncation_answer(comparison.adapters["1"], [comparison.adapters["1"]], comparison)
    assert (answer.margin, answer.margin_share, answer.gain, answer.share_kept) == (0.005, None, None, None)
    assert answer.notes[0].startswith("The base was not measured")
    assert (compare(losses).share, compare(losses, 0.005).share) == (0.01, None)
    with pytest.raises(ResultsError, match="add rank 0"):
        compute_margin("2%", "token_loss", 2.0, [2.0], None)
    assert compute_margin(None, "accuracy", 0.8, [0.8], None) == 0.005
    assert compute_margin(None, "accuracy", 80, [80], None) == 0.5
    assert compute_margin("2%", "accuracy", 80, [80], 50) == 1


@pytest.mark.parametrize(
    ("text", "margin"), [("2%", "2%"), (" 0.50% ", "0.5%"), ("0.005", 0.005), (1, 1.0), (None, None)]
)
def test_margins_are_shares_or_numbers(text: object, margin: Margin | None) -> None:
    assert parse_margin(text) == margin
    assert SelectSettings(margin=text).margin == margin


@pytest.mark.parametrize("text", ["0%", "-1", "100%", "nan", "two", "1%%", True, float("inf")])
def test_other_margins_are_refused_in_one_line(text: object) -> None:
    with pytest.raises(SettingsError, match=r"give a share of the gain such as 1% \(below 100%\), or a number above 0"):
        SelectSettings(margin=text)
