"""The first criterion: which truncation of one training is enough."""

from __future__ import annotations

import numpy as np
import pytest

from rightrank.decision.adapter import (
    Criterion,
    adapter_answer,
    compared_adapters,
    files_of,
    improved_by_training,
    making_of,
    probable_ranks,
    smallest_holding_truncation,
    trained_answer,
)
from rightrank.decision.adapter import (
    test_difference as difference_on_test,
)
from rightrank.decision.comparison import INDEPENDENT, bounds_of, estimate
from rightrank.decision.table import spread_sentence
from rightrank.schema.decision import AdapterAnswer, DifferenceSpread
from rightrank.schema.events import TestEvaluated
from rightrank.schema.metrics import LossKind
from rightrank.schema.trials import EvalPoint, TrialDiverged, TrialFinished
from tests.tiny import UNMEASURED

EXAMPLES, TOKENS = 400, 10
LOSS = Criterion(metric="loss", higher_is_better=False, margin=0.005)
LEVELS = np.random.default_rng(7).normal(2.0, 0.5, EXAMPLES)  # of each example, shared by all adapters


def trial(name: str, rank: int, shift: float, *, parent: str | None = None, noise: float = 0.01) -> TrialFinished:
    """A trial whose examples lose `shift` nats a token more than the level, with paired noise."""
    drawn = np.random.default_rng(rank * 7).normal(0.0, noise, EXAMPLES)
    losses = (LEVELS + shift + drawn - drawn.mean()) * TOKENS
    return TrialFinished(
        trial_id=name,
        rank=rank,
        learning_rate=1e-3,
        lora_alpha=32.0,
        seed=0,
        steps=0 if parent else 100,
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


def test_what_a_mean_hides_is_said() -> None:
    hidden = trial("a", 16, 0.0, parent="top", noise=0.0)
    rare = np.array(hidden.item_losses)
    rare[::40] += 0.1 * TOKENS  # one example of forty gets worse by .1 a token, the mean by .0025
    rare[1::40] -= 0.1 * TOKENS
    found = answer(TOP, hidden.model_copy(update={"item_losses": rare.tolist()}))
    assert (found.rank, found.difference) == (16, pytest.approx(0.0))
    assert found.spread is not None
    assert (found.spread.amount, found.spread.worse) == (0.05, 0.025)
    assert found.spread.worst_tenth == pytest.approx(0.025)
    assert found.spread == found.candidates[-1].spread
    assert found.candidates[0].spread is None  # the reference
    assert found.sentence == (
        "The smallest adapter of this training within the margin has rank 16: it is no worse than the rank 64 adapter by more than the "
        "margin of 0.005, with 95% confidence, on average over held-out tokens (difference "
        f"{found.difference:+.2g}, upper bound {found.difference_high:+.2g}). 2.5% of the examples get worse by more than 0.05, and the "
        "worst tenth by 0.025 on average."
    )


def test_where_no_example_gets_much_worse_one_plain_sentence_says_so() -> None:
    found = answer(TOP, trial("a", 16, 0.001, parent="top"))
    assert found.spread is not None
    assert (found.spread.worse, found.spread.worst_tenth > 0) == (0, True)
    assert found.sentence.endswith("). No held-out example gets worse by more than 0.05.")


def test_a_few_of_many_examples_are_not_rounded_to_none() -> None:
    spread = DifferenceSpread(amount=0.05, worse=0.0004, worst_tenth=0.02)
    assert spread_sentence(spread).startswith("Fewer than 0.1% of the examples get worse by more than 0.05, ")
    assert spread_sentence(spread.model_copy(update={"worse": 0.02})).startswith("2% of the examples get worse ")


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
    assert all(isinstance(rank, int) for rank in probable_ranks(found))
    top, *truncated = found.candidates
    alone = found.model_copy(update={"candidates": truncated})  # the top's difference is then 0, as it is here
    assert top.difference == 0
    assert smallest_holding_truncation(alone) == holding


def test_the_first_failure_ends_the_sequence() -> None:
    found = answer(TOP, trial("a", 32, 0.02, parent="top"), trial("b", 16, 0.001, parent="top"))
    assert (found.rank, found.how) == (64, "trained")


def test_why_the_top_is_kept() -> None:
    failed = answer(TOP, trial("a", 32, 0.02, parent="top"), trial("b", 16, 0.02, parent="top"))
    assert failed.sentence == "The adapter keeps rank 64: rank 32 is not shown to be within the margin of 0.005."


def test_candidates_are_those_of_the_highest_rank_and_of_the_best_training_there() -> None:
    low = trial("low", 32, -0.5)
    worse = trial("a worse top", 64, 0.3)
    cuts = [trial(f"of {parent}", 16, shift, parent=parent) for parent, shift in (("low", -0.5), ("top", 0.0))]
    cuts.append(trial("of a worse top", 16, 0.3, parent="a worse top"))
    found = answer(low, worse, TOP, *cuts)
    assert (found.trained_id, found.trial_id) == ("top", "of top")
    asked = adapter_answer([low, worse, TOP, *cuts], LOSS, "low")
    assert asked is not None
    assert (asked.trained_id, asked.trial_id) == ("low", "of low")
    assert adapter_answer([low, worse, TOP, *cuts], LOSS, "of low") is None


def test_a_wide_interval_is_a_failure() -> None:
    assert answer(TOP, trial("a", 32, 0.001, parent="top", noise=0.2)).rank == 64


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
    trusted = answer(TOP, few, criterion=exact)
    assert trusted.candidates[1].holds
    assert trusted.sentence == (
        "The smallest adapter of this training within the margin has rank 32: its held-out difference from the "
        "rank 64 adapter is +0.002, within the margin of 0.005."
    )


@pytest.mark.parametrize(
    ("metric", "higher", "loss", "values", "margin", "difference"),
    [
        ("loss", False, "token_loss", (2.0, 2.1), 0.005, 0.1),
        ("loss", False, "loss", (1.0, 1.1), 0.01, 0.1),
        ("loss", False, "pair_loss", (1.0, 1.1), 0.02, 0.1),
        ("accuracy", True, "token_loss", (0.9, 0.8), 0.005, 0.1),
        ("accuracy", True, "token_loss", (0.9, 80.0), 0.5, -79.1),  # the scale of all of them
        ("perplexity", False, "token_loss", (8.0, 8.4), 0.04, 0.4),
    ],
)
def test_the_margin_and_the_unit_are_those_of_the_metric(
    metric: str, higher: bool, loss: LossKind, values: tuple[float, float], margin: float, difference: float
) -> None:
    nothing = {"item_losses": [], "item_tokens": []}
    top, other = (
        one.model_copy(update=nothing | {"value": value, "metrics": {metric: value}})
        for one, value in zip((TOP, trial("a", 32, 0.0, parent="top")), values, strict=True)
    )
    found = answer(top, other, criterion=Criterion(metric, higher, None, loss))
    assert (found.reference_id, found.margin) == ("top", pytest.approx(margin))
    assert found.candidates[1].difference == pytest.approx(difference)


def test_every_adapter_is_compared_with_the_reference_the_best_of_a_rank_and_all_that_the_answer_names() -> None:
    cut, small = trial("cut", 16, 0.002, parent="top"), trial("small", 4, 0.1, parent="top")
    better, worse = trial("better", 16, -0.001), trial("worse", 16, 0.3)
    of_another = trial("of another", 32, 0.0, parent="worse")
    found = answer(TOP, cut, small)
    assert found.trial_id == "cut"
    shown = compared_adapters(found, [worse, better, small, cut, TOP, of_another], LOSS)
    assert [(one.rank, one.trial_id) for one in shown] == [(64, "top"), (16, "better"), (16, "cut"), (4, "small")]
    assert [one.difference for one in shown[:1]] == [0.0]
    assert [one.holds for one in shown] == [True, True, True, False]
    named = found.model_copy(update={"trial_id": "worse"})  # a better training of a rank may be handed over
    assert {one.trial_id for one in compared_adapters(named, [worse, better, TOP, cut], LOSS)} >= {"worse", "top"}
    wider = Criterion("loss", False, 0.5)  # the margin is the answer's
    assert [one.holds for one in compared_adapters(found, [cut, small, TOP], wider)] == [True, True, False]
    unset = Criterion("loss", False, None)
    assert [one.holds for one in compared_adapters(found, [cut, small, TOP], unset)] == [True, True, False]
    other = trial("a second top", 64, 0.01)
    both = compared_adapters(found.model_copy(update={"trial_id": "a second top"}), [other, cut, TOP], LOSS)
    assert [one.trial_id for one in both] == ["top", "a second top", "cut"]  # the better one first
    assert compared_adapters(found, [cut, small], LOSS) == found.candidates  # the reference is not in the journal
    assert len(compared_adapters(found, [cut, TOP], LOSS)) == 2


def test_no_answer_before_a_training_is_truncated() -> None:
    assert adapter_answer([TOP], LOSS) is None


def test_notes_offer_a_direct_training_and_name_a_top_that_overfits() -> None:
    low = answer(TOP, trial("a", 8, 0.001, parent="top"), trial("b", 4, 0.05, parent="top"))
    search = "the search for the training rank (--goal training-rank, the default) tries it."
    assert low.notes == [f"At rank 4 a direct training can beat a truncation; {search}", INDEPENDENT]
    better = answer(TOP, trial("a", 32, -0.001, parent="top"), trial("b", 16, -0.03, parent="top"))
    assert better.notes == [
        "Rank 16 is better than rank 64 by 0.03: the top rank overfits; train again with --ranks up to 16, or fewer steps.",
        INDEPENDENT,
    ]
    half = answer(TOP, trial("a", 32, -0.03, parent="top"))  # within a factor of two of the top
    assert half.notes == [INDEPENDENT]
    alike = answer(TOP, trial("a", 16, -1e-5, parent="top"))
    assert alike.notes == [INDEPENDENT]


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
    assert answer(top.model_copy(update={"points": steady}), small, criterion=criterion).notes == [INDEPENDENT]
    kept = answer(top.model_copy(update={"kept_step": 10}), small, criterion=criterion).notes
    assert kept == ["The best checkpoint of rank 64 is used: step 10 of 100.", INDEPENDENT]


TRUNCATED = trial("cut", 16, 0.002, parent="top")


@pytest.mark.parametrize(
    ("rank", "shift", "taken"),
    [
        (8, 0.003, True),  # within the margin of the reference
        (8, 0.008, False),
        (16, -0.01, True),  # of the same rank it must be better than the truncation
        (16, 0.0, True),  # which the reference is too
        (16, 0.002, False),
        (32, -0.01, False),  # a larger adapter is no improvement
    ],
)
def test_a_direct_training_takes_the_place_of_the_truncation_where_it_is_better(
    rank: int, shift: float, taken: bool
) -> None:
    before = answer(TOP, TRUNCATED)
    assert before.rank == 16
    direct = trial("direct", rank, shift)
    after = improved_by_training(before, [TOP, TRUNCATED, direct], LOSS)
    if not taken:
        assert after is None
        return
    assert after is not None
    assert (after.trial_id, after.rank, after.how) == ("direct", rank, "trained")
    assert (after.reference_id, after.margin) == (before.reference_id, before.margin)
    assert [one.trial_id for one in after.candidates] == [*(one.trial_id for one in before.candidates), "direct"]
    assert AdapterAnswer.model_validate(after.model_dump()) == after
    assert after.difference_high is not None
    assert after.spread is not None
    assert after.sentence == (
        f"The smallest adapter within the margin has rank {rank}, trained at that rank: it is no worse than the reference by more than "
        "the margin of 0.005, with 95% confidence, on average over held-out tokens (difference "
        f"{after.difference:+.2g}, upper bound {after.difference_high:+.2g}). {spread_sentence(after.spread)}"
    )


def test_of_several_direct_trainings_the_lowest_rank_and_then_the_best_is_taken() -> None:
    before = answer(TOP, TRUNCATED)
    found = improved_by_training(
        before, [TOP, TRUNCATED, trial("worse", 4, 0.003), trial("better", 4, 0.001), trial("higher", 8, -0.01)], LOSS
    )
    assert found is not None
    assert found.trial_id == "better"
    extra = trial("extra", 8, -0.01, parent="top")  # a truncation is no training of its own
    assert improved_by_training(before, [TOP, TRUNCATED, extra], LOSS) is None


@pytest.mark.parametrize("left", [[TOP], [TRUNCATED]], ids=["no answer", "no reference"])
def test_without_the_files_of_the_answer_nothing_improves_it(left: list[TrialFinished]) -> None:
    assert improved_by_training(answer(TOP, TRUNCATED), [*left, trial("direct", 8, -0.1)], LOSS) is None


def on_test(value: float, **scores: object) -> TestEvaluated:
    return TestEvaluated.model_validate(
        {"trial_id": "t", "rank": 4, "value": value, "item_losses": [], "item_tokens": []} | scores
    )


@pytest.mark.parametrize(
    ("metric", "higher", "ours", "theirs", "difference"),
    [
        # The mean over tokens, in which the second example has three times the weight of the first.
        ("loss", False, ([3.0, 9.0], [1, 3]), ([1.0, 6.0], [1, 3]), 1.25),
        ("accuracy", True, [1, 0, 0, 0], [1, 1, 1, 0], 0.5),
        ("f1", True, [0.5, 0.0], [0.75, 1.0], 0.625),
        ("wer", False, [0.5, 0.0], [0.75, 1.0], -0.625),
    ],
)
def test_the_test_split_is_compared_by_example(
    metric: str, higher: bool, ours: object, theirs: object, difference: float
) -> None:
    def scored(one: object) -> TestEvaluated:
        if metric == "loss":
            assert isinstance(one, tuple)
            return on_test(7.0, item_losses=one[0], item_tokens=one[1])
        return on_test(7.0, **({"item_correct": one} if metric == "accuracy" else {"item_metrics": {metric: one}}))

    found = difference_on_test(scored(ours), scored(theirs), Criterion(metric, higher, None))
    assert found is not None
    assert found[0] == pytest.approx(difference)
    assert found[1] is not None
    assert found[1] > found[0]


def test_on_the_test_split_without_scores_by_example_the_values_are_compared() -> None:
    one, other = on_test(0.7), on_test(0.5)
    assert difference_on_test(one, other, Criterion("bleu", True, None)) == (pytest.approx(-0.2), None)
    assert difference_on_test(one, other, Criterion("accuracy", True, None)) == (pytest.approx(-0.2), None)
    assert difference_on_test(one, other, Criterion("cost", False, None)) == (pytest.approx(0.2), None)
    half = on_test(0.7, item_metrics={"bleu": [0.7]})
    assert difference_on_test(half, other, Criterion("bleu", True, None)) == (pytest.approx(-0.2), None)
    assert difference_on_test(other, half, Criterion("bleu", True, None)) == (pytest.approx(0.2), None)
    one_example = [on_test(0.7, item_metrics={"bleu": [value]}) for value in (0.7, 0.5)]
    assert difference_on_test(*one_example, Criterion("bleu", True, None)) == (pytest.approx(-0.2), None)
    assert difference_on_test(None, other, LOSS) is None
    assert difference_on_test(one, None, LOSS) is None


@pytest.mark.parametrize(("metric", "scale"), [("accuracy", 1), ("f1", 1), ("f1", 100), ("score", 7)])
def test_one_answer_that_differs_on_the_test_split_has_the_bound_of_a_rare_difference(metric: str, scale: int) -> None:
    ours, theirs = [scale] * 40, [*[scale] * 39, 0]
    sides = [
        on_test(0.5, **({"item_correct": one} if metric == "accuracy" else {"item_metrics": {metric: one}}))
        for one in (ours, theirs)
    ]
    found = difference_on_test(sides[1], sides[0], Criterion(metric, True, None))
    assert found is not None
    expected = estimate(np.subtract(ours, theirs, dtype=float)[None, :], np.ones(40), float(scale))
    assert found == (pytest.approx(scale / 40), pytest.approx(bounds_of(expected).high))
    assert found[1] is not None
    assert found[1] > scale * (1 + 3) / 40


def test_a_share_on_the_test_split_has_the_range_of_a_share() -> None:
    """Of which none reaches 1: the bound is still that of a score between 0 and 1."""
    ours, theirs = [0.5] * 40, [*[0.5] * 39, 0.0]
    sides = [on_test(0.5, item_metrics={"f1": one}) for one in (theirs, ours)]
    found = difference_on_test(sides[0], sides[1], Criterion("f1", True, None))
    expected = estimate(np.subtract(ours, theirs)[None, :], np.ones(40), 1.0)
    assert found == (pytest.approx(0.5 / 40), pytest.approx(bounds_of(expected).high))


def test_how_an_adapter_was_made() -> None:
    cut = TRUNCATED.model_copy(update={"truncation": "kfac"})
    plain = trial("plain", 8, 0.0, parent="top")
    finished = [TRUNCATED, TOP, plain]
    trained = "trained at rank 64 (learning rate 0.001, 100 steps)"
    assert making_of(TOP, finished).sentence() == trained
    assert making_of(cut, finished).sentence() == f"{trained}, truncated to rank 16 by K-FAC"
    assert making_of(plain, finished).sentence() == f"{trained}, truncated to rank 8 by SVD"
    kept = TOP.model_copy(update={"kept_step": 40})
    assert making_of(kept, [kept]).sentence() == "trained at rank 64 (learning rate 0.001, step 40 of 100 steps)"
    own = TOP.model_copy(update={"steps": 0})
    assert making_of(own, [own]).sentence() == "trained at rank 64 (learning rate 0.001)"
    made = making_of(cut, finished)
    assert (made.rank, made.trained_rank, made.steps, made.kept_step) == (16, 64, 100, None)


def test_a_trained_adapter_is_measured_against_the_reference_that_is_given() -> None:
    small = trial("small", 8, 0.003)
    alone, beside = trained_answer(small, LOSS), trained_answer(small, LOSS, TOP)
    assert (alone.reference_id, alone.difference, alone.trained_id, alone.trained_rank) == ("small", 0.0, "small", 8)
    assert (beside.reference_id, beside.trial_id, beside.trained_id) == ("top", "small", "small")
    assert beside.difference == pytest.approx(0.003)
    assert [one.trial_id for one in beside.candidates] == ["small"]
    assert trained_answer(small, Criterion("loss", False, None), TOP).margin == 0.005
    assert beside.sentence == "The adapter is the one trained at rank 8; no truncation was compared."


def test_the_spread_of_a_perplexity_is_in_its_own_unit() -> None:
    """By example it is a ratio: half as much again of 4 is 2."""
    scores = {"top": [4.0] * 40, "cut": [4.0] * 36 + [6.0] * 4}
    trials = [
        one.model_copy(
            update={
                "item_losses": [],
                "item_tokens": [],
                "item_scores": scores[one.trial_id],
                "metrics": {"perplexity": 4.0},
                "value": 4.0,
            }
        )
        for one in (TOP, trial("cut", 32, 0.0, parent="top"))
    ]
    found = answer(*trials, criterion=Criterion("perplexity", False, 1.0))
    cut = found.candidates[1]
    assert cut.spread is not None
    assert cut.spread.worst_tenth == pytest.approx(2.0)
    assert cut.difference == pytest.approx(4 * (1.5**0.1 - 1))
    assert "on average over held-out examples (difference" in found.sentence


def test_a_truncation_of_the_rank_of_the_top_is_no_lower_rank() -> None:
    found = answer(TOP, trial("as large", 64, 0.0, parent="top"))
    assert (found.trial_id, found.sentence) == (
        "top",
        "The adapter keeps rank 64: no lower rank is measured to be within the margin of 0.005.",
    )


def test_groups_of_the_test_split_widen_the_bound() -> None:
    losses = np.repeat(np.random.default_rng(2).normal(2.0, 0.5, 40), 10).tolist()
    sides = [
        on_test(2.0, item_losses=values, item_tokens=[1] * 400, item_groups=groups)
        for values, groups in ((losses, None), (losses, np.repeat(range(40), 10).tolist()), ([2.0] * 400, None))
    ]
    alone, grouped = (difference_on_test(side, sides[2], LOSS) for side in sides[:2])
    assert alone is not None
    assert grouped is not None
    assert grouped[0] == alone[0]
    assert grouped[1] is not None
    assert alone[1] is not None
    assert grouped[1] - grouped[0] > 2 * (alone[1] - alone[0])
