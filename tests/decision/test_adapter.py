"""Test which truncation of a training is the smallest adapter within the margin."""

from __future__ import annotations

import numpy as np
import pytest

from rightrank.decision.adapter import Criterion
from rightrank.decision.comparison import compute_file_bounds
from rightrank.decision.run_answers import compare_adapters, prefer_direct_training, score_trials
from rightrank.decision.run_answers import compute_test_difference as difference_on_test
from rightrank.schema.events import TestEvaluated
from rightrank.schema.metrics import LossKind
from rightrank.schema.results import AdapterAnswer
from rightrank.schema.trials import TrialFinished
from rightrank.search.protocol import choose_adapter

EXAMPLES, TOKENS = 400, 10
LOSS = Criterion(metric="loss", higher_is_better=False, margin=0.005)
LEVELS = np.random.default_rng(7).normal(2.0, 0.5, EXAMPLES)  # the loss of each example, shared by all adapters


def make_trial(name: str, rank: int, shift: float, *, parent: str | None = None, noise: float = 0.01) -> TrialFinished:
    """Make a trial whose examples lose `shift` nats per token more than the shared levels, with paired noise."""
    noise_values = np.random.default_rng(rank * 7).normal(0.0, noise, EXAMPLES)
    losses = (LEVELS + shift + noise_values - noise_values.mean()) * TOKENS
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
        example_losses=losses.tolist(),
        example_tokens=[TOKENS] * EXAMPLES,
    )


def find_adapter(*trials: TrialFinished, criterion: Criterion = LOSS) -> AdapterAnswer:
    answer = choose_adapter(trials, criterion)
    assert answer is not None
    return answer


TOP = make_trial("top", 64, 0.0, noise=0.0)


def test_candidates_are_those_of_the_highest_rank_and_of_the_best_training_there() -> None:
    low = make_trial("low", 32, -0.5)
    worse = make_trial("a worse top", 64, 0.3)
    truncations = [
        make_trial(f"of {parent}", 16, shift, parent=parent) for parent, shift in (("low", -0.5), ("top", 0.0))
    ]
    truncations.append(make_trial("of a worse top", 16, 0.3, parent="a worse top"))
    answer = find_adapter(low, worse, TOP, *truncations)
    assert (answer.trained_id, answer.trial_id) == ("top", "of top")
    requested_answer = choose_adapter([low, worse, TOP, *truncations], LOSS, "low")
    assert requested_answer is not None
    assert (requested_answer.trained_id, requested_answer.trial_id) == ("low", "of low")
    assert choose_adapter([low, worse, TOP, *truncations], LOSS, "of low") is None


def test_without_scores_by_example_the_top_is_kept() -> None:
    bare = [
        trial.model_copy(update={"example_losses": [], "example_tokens": []})
        for trial in (TOP, make_trial("a", 32, 0.0, parent="top"))
    ]
    answer = find_adapter(*bare)
    assert answer.rank == 64
    assert answer.candidates[1].difference_high is None
    assert "without a score for each example" in answer.sentence


def test_adapters_scored_on_unequal_numbers_of_examples_are_compared_by_their_values() -> None:
    few_examples = make_trial("a", 32, 0.002, parent="top")
    few_examples = few_examples.model_copy(
        update={"example_losses": few_examples.example_losses[:50], "example_tokens": few_examples.example_tokens[:50]}
    )
    assert [file.cell.examples for file in score_trials([TOP, few_examples], LOSS).values()] == [0, 0]
    candidate = find_adapter(TOP, few_examples).candidates[1]
    assert candidate.difference == pytest.approx(0.002)
    assert (candidate.difference_high, candidate.is_within_margin) == (None, False)
    exact = Criterion("loss", False, 0.005, trusts_values=True)
    trusted = find_adapter(TOP, few_examples, criterion=exact)
    assert trusted.candidates[1].is_within_margin
    assert trusted.sentence == "Rank 32 differs from rank 64 by +0.002, within the margin of 0.005."


@pytest.mark.parametrize(
    ("metric", "higher", "loss", "values", "margin", "difference"),
    [
        ("loss", False, "token_loss", (2.0, 2.1), 0.005, 0.1),
        ("loss", False, "loss", (1.0, 1.1), 0.005, 0.1),
        ("accuracy", True, "token_loss", (0.9, 0.8), 0.005, 0.1),
        ("accuracy", True, "token_loss", (0.9, 80.0), 0.5, -79.1),  # one scale for all values
        ("perplexity", False, "token_loss", (8.0, 8.4), 0.04, 0.4),
    ],
)
def test_the_margin_and_the_unit_are_those_of_the_metric(
    metric: str, higher: bool, loss: LossKind, values: tuple[float, float], margin: float, difference: float
) -> None:
    without_scores = {"example_losses": [], "example_tokens": []}
    top, truncated = (
        trial.model_copy(update=without_scores | {"value": value, "metrics": {metric: value}})
        for trial, value in zip((TOP, make_trial("a", 32, 0.0, parent="top")), values, strict=True)
    )
    answer = find_adapter(top, truncated, criterion=Criterion(metric, higher, None, loss))
    assert (answer.reference_id, answer.margin) == ("top", pytest.approx(margin))
    assert answer.candidates[1].difference == pytest.approx(difference)


def test_the_best_adapter_of_each_rank_and_all_in_the_answer_are_compared() -> None:
    truncated, small = make_trial("cut", 16, 0.002, parent="top"), make_trial("small", 4, 0.1, parent="top")
    better, worse = make_trial("better", 16, -0.001), make_trial("worse", 16, 0.3)
    of_another = make_trial("of another", 32, 0.0, parent="worse")
    answer = find_adapter(TOP, truncated, small)
    assert answer.trial_id == "cut"
    adapters = compare_adapters(answer, [worse, better, small, truncated, TOP, of_another], LOSS)
    assert [(adapter.rank, adapter.trial_id) for adapter in adapters] == [
        (64, "top"),
        (16, "better"),
        (16, "cut"),
        (4, "small"),
    ]
    assert [adapter.difference for adapter in adapters[:1]] == [0.0]
    assert [adapter.is_within_margin for adapter in adapters] == [True, True, True, False]
    other_answer = answer.model_copy(
        update={"trial_id": "worse"}
    )  # a better training of the same rank may be handed over
    assert {adapter.trial_id for adapter in compare_adapters(other_answer, [worse, better, TOP, truncated], LOSS)} >= {
        "worse",
        "top",
    }
    wider = Criterion("loss", False, 0.5)  # the margin of the answer is used
    assert [adapter.is_within_margin for adapter in compare_adapters(answer, [truncated, small, TOP], wider)] == [
        True,
        True,
        False,
    ]
    unset = Criterion("loss", False, None)
    assert [adapter.is_within_margin for adapter in compare_adapters(answer, [truncated, small, TOP], unset)] == [
        True,
        True,
        False,
    ]
    second_top = make_trial("a second top", 64, 0.01)
    two_tops = compare_adapters(
        answer.model_copy(update={"trial_id": "a second top"}), [second_top, truncated, TOP], LOSS
    )
    assert [adapter.trial_id for adapter in two_tops] == [
        "top",
        "a second top",
        "cut",
    ]  # the better adapter comes first
    assert (
        compare_adapters(answer, [truncated, small], LOSS) == answer.candidates
    )  # the reference is not in the journal
    assert len(compare_adapters(answer, [truncated, TOP], LOSS)) == 2


def test_no_answer_before_a_training_is_truncated() -> None:
    assert choose_adapter([TOP], LOSS) is None


TRUNCATED = make_trial("cut", 16, 0.002, parent="top")


@pytest.mark.parametrize(
    ("rank", "shift", "is_replaced"),
    [
        (8, 0.003, True),  # within the margin of the reference
        (8, 0.008, False),
        (16, -0.01, True),  # at the same rank it must be better than the truncation
        (16, 0.0, True),  # the reference is better too
        (16, 0.002, False),
        (32, -0.01, False),  # a larger adapter is not an improvement
    ],
)
def test_a_better_direct_training_replaces_the_truncation(rank: int, shift: float, is_replaced: bool) -> None:
    truncated_answer = find_adapter(TOP, TRUNCATED)
    assert truncated_answer.rank == 16
    direct = make_trial("direct", rank, shift)
    improved_answer = prefer_direct_training(truncated_answer, [TOP, TRUNCATED, direct], LOSS)
    if not is_replaced:
        assert improved_answer is None
        return
    assert improved_answer is not None
    assert (improved_answer.trial_id, improved_answer.rank, improved_answer.method) == ("direct", rank, "trained")
    assert (improved_answer.reference_id, improved_answer.margin) == (
        truncated_answer.reference_id,
        truncated_answer.margin,
    )
    assert [candidate.trial_id for candidate in improved_answer.candidates] == [
        *(candidate.trial_id for candidate in truncated_answer.candidates),
        "direct",
    ]
    assert AdapterAnswer.model_validate(improved_answer.model_dump()) == improved_answer
    assert improved_answer.difference_high is not None
    assert improved_answer.sentence.endswith("with 95% confidence). It was trained at that rank.")


def test_the_best_direct_training_of_the_lowest_rank_is_chosen() -> None:
    truncated_answer = find_adapter(TOP, TRUNCATED)
    improved_answer = prefer_direct_training(
        truncated_answer,
        [TOP, TRUNCATED, make_trial("worse", 4, 0.003), make_trial("better", 4, 0.001), make_trial("higher", 8, -0.01)],
        LOSS,
    )
    assert improved_answer is not None
    assert improved_answer.trial_id == "better"
    extra = make_trial("extra", 8, -0.01, parent="top")  # a truncation is not a direct training
    assert prefer_direct_training(truncated_answer, [TOP, TRUNCATED, extra], LOSS) is None


def make_test_evaluation(value: float, **scores: object) -> TestEvaluated:
    return TestEvaluated.model_validate(
        {"trial_id": "t", "rank": 4, "value": value, "example_losses": [], "example_tokens": []} | scores
    )


@pytest.mark.parametrize(
    ("metric", "higher", "ours", "theirs", "difference"),
    [
        # The mean is over tokens, so the second example has three times the weight of the first.
        ("loss", False, ([3.0, 9.0], [1, 3]), ([1.0, 6.0], [1, 3]), 1.25),
        ("accuracy", True, [1, 0, 0, 0], [1, 1, 1, 0], 0.5),
        ("f1", True, [0.5, 0.0], [0.75, 1.0], 0.625),
        ("wer", False, [0.5, 0.0], [0.75, 1.0], -0.625),
    ],
)
def test_the_test_split_is_compared_by_example(
    metric: str, higher: bool, ours: object, theirs: object, difference: float
) -> None:
    def evaluate(scores: object) -> TestEvaluated:
        if metric == "loss":
            assert isinstance(scores, tuple)
            return make_test_evaluation(7.0, example_losses=scores[0], example_tokens=scores[1])
        return make_test_evaluation(
            7.0, **({"example_correct": scores} if metric == "accuracy" else {"example_metrics": {metric: scores}})
        )

    test_difference = difference_on_test(evaluate(ours), evaluate(theirs), Criterion(metric, higher, None))
    assert test_difference is not None
    assert test_difference[0] == pytest.approx(difference)
    assert test_difference[1] is not None
    assert test_difference[1] > test_difference[0]


def test_a_truncation_to_the_top_rank_is_not_a_lower_rank() -> None:
    answer = find_adapter(TOP, make_trial("as large", 64, 0.0, parent="top"))
    assert (answer.trial_id, answer.sentence) == ("top", "Rank 64 is kept: no lower rank was measured.")


@pytest.mark.parametrize(("metric", "scale"), [("accuracy", 1), ("f1", 1), ("f1", 100), ("score", 7)])
def test_one_differing_test_example_has_the_bound_of_a_rare_difference(metric: str, scale: int) -> None:
    ours, theirs = [scale] * 40, [*[scale] * 39, 0]
    sides = [
        make_test_evaluation(
            0.5, **({"example_correct": scores} if metric == "accuracy" else {"example_metrics": {metric: scores}})
        )
        for scores in (ours, theirs)
    ]
    difference = difference_on_test(sides[1], sides[0], Criterion(metric, True, None))
    assert difference is not None
    expected = compute_file_bounds(np.subtract(ours, theirs, dtype=float), np.ones(40), float(scale))
    assert difference == (pytest.approx(scale / 40), pytest.approx(expected.high))
    assert difference[1] is not None
    assert difference[1] > scale * (1 + 3) / 40


def test_groups_of_the_test_split_widen_the_bound() -> None:
    losses = np.repeat(np.random.default_rng(2).normal(2.0, 0.5, 40), 10).tolist()
    sides = [
        make_test_evaluation(2.0, example_losses=values, example_tokens=[1] * 400, example_groups=groups)
        for values, groups in ((losses, None), (losses, np.repeat(range(40), 10).tolist()), ([2.0] * 400, None))
    ]
    alone, grouped = (difference_on_test(evaluation, sides[2], LOSS) for evaluation in sides[:2])
    assert alone is not None
    assert grouped is not None
    assert grouped[0] == alone[0]
    assert grouped[1] is not None
    assert alone[1] is not None
    assert grouped[1] - grouped[0] > 2 * (alone[1] - alone[0])
