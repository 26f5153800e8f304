"""Test several metrics of the same trials: one decides, and ranks on which another one disagrees are reported."""

from __future__ import annotations

import numpy as np
import pytest

from rightrank.decision.rule import decide_table
from rightrank.decision.table import build_other_tables, build_table
from rightrank.schema.trials import EvalPoint, TrialFinished
from tests.decision.tables import make_trial

NUM_EXAMPLES = 800  # if no example differs, the bound of 3 / 800 is below the margin


def make_scored_trial(rank: int, seed: int, loss: float, right: float) -> TrialFinished:
    """Make a trial whose examples scatter around these means in the same way at every rank."""
    generator = np.random.default_rng(seed)
    losses = (
        loss
        + generator.normal(0, 0.5, NUM_EXAMPLES)
        + np.random.default_rng([seed, rank]).normal(0, 0.01, NUM_EXAMPLES)
    )
    scores = (np.argsort(np.argsort(np.random.default_rng(7).random(NUM_EXAMPLES))) < right * NUM_EXAMPLES).astype(
        float
    )
    return TrialFinished(
        trial_id=f"{rank}-{seed}",
        rank=rank,
        learning_rate=1e-3,
        lora_alpha=32,
        seed=seed,
        steps=10,
        value=float(losses.mean()),
        metrics={"loss": float(losses.mean()), "exact_match": float(scores.mean()), "bleu": 20.0 + rank / 64},
        example_metrics={"exact_match": scores.tolist()},
        example_losses=losses.tolist(),
        example_tokens=[1] * NUM_EXAMPLES,
        train_value=1.0,
    )


def decide_with_other_metrics(losses: dict[int, float], right: dict[int, float]):  # type: ignore[no-untyped-def]
    trials = [make_scored_trial(rank, seed, losses[rank], right[rank]) for rank in losses for seed in (0, 1, 2)]
    other_tables = [build_table(trials, "exact_match", True), build_table(trials, "bleu", True)]
    return decide_table(build_table(trials, "loss", False), 0.005, other_tables=other_tables)


def test_a_rank_that_the_other_metric_shows_to_be_too_small() -> None:
    decision = decide_with_other_metrics({1: 2.2, 4: 2.0, 16: 2.0}, {1: 0.2, 4: 0.5, 16: 0.7})
    assert decision.rank == 4
    assert "metric_conflict" in decision.flags
    exact, bleu = decision.other_metrics
    assert (exact.metric, exact.rank, exact.conflict, exact.margin) == ("exact_match", 16, True, 0.005)
    assert exact.sentence == "exact_match disagrees: rank 4 is 0.2 worse by this metric, more than its margin of 0.005."
    assert (bleu.metric, bleu.conflict, bleu.higher_is_better) == ("bleu", False, True)
    assert [evidence.rank for evidence in exact.ranks] == [1, 4, 16]
    assert {evidence.rank: evidence.value for evidence in exact.ranks}[16] == pytest.approx(0.7)


def test_a_rank_that_the_other_metric_shows_to_be_enough() -> None:
    decision = decide_with_other_metrics({1: 2.2, 4: 2.1, 16: 2.0}, {1: 0.2, 4: 0.7, 16: 0.7})
    assert decision.rank == 16
    assert "metric_conflict" in decision.flags
    assert "rank 4 is enough by this metric, within its margin" in decision.other_metrics[0].sentence


def test_metrics_that_agree_raise_no_flag() -> None:
    decision = decide_with_other_metrics({1: 2.2, 4: 2.0, 16: 2.0}, {1: 0.2, 4: 0.7, 16: 0.7})
    assert (decision.rank, decision.other_metrics[0].rank) == (4, 4)
    assert "metric_conflict" not in decision.flags
    assert not decision.other_metrics[0].conflict


def test_trials_without_examples_of_a_metric_are_compared_by_value() -> None:
    trials = [make_scored_trial(rank, seed, 2.0, 0.5) for rank in (1, 4) for seed in (0, 1)]
    ragged = [trials[0].model_copy(update={"example_metrics": {}}), *trials[1:]]
    assert all(cell.examples == 0 for cell in build_table(ragged, "exact_match", True).cells.values())
    gone = trials[0].model_copy(update={"metrics": {"loss": 2.0}, "failed_metrics": {"exact_match": "away"}})
    table = build_table([gone, *trials[1:]], "exact_match", True)
    assert table.missing == {1: 1}
    assert all(cell.examples == NUM_EXAMPLES for cell in table.cells.values())


def test_a_metric_that_is_zero_everywhere_has_a_margin() -> None:
    trials = [make_scored_trial(rank, seed, 2.0, 0.5) for rank in (1, 4) for seed in (0, 1)]
    none = [
        t.model_copy(update={"metrics": {"rougeL": 0.0}, "example_metrics": {"rougeL": [0.0] * NUM_EXAMPLES}})
        for t in trials
    ]
    decision = decide_table(build_table(none, "rougeL", True))
    assert (decision.margin, decision.verdict) == (0.01, "flat")


def test_the_other_metric_is_judged_as_the_one_that_decides() -> None:
    right = {1: 0.5, 4: 0.5025, 16: 0.505}
    points = [EvalPoint(step=5, value=0.9), EvalPoint(step=10, value=0.5)]
    trials = [make_scored_trial(rank, 0, 2.0, right[rank]).model_copy(update={"points": points}) for rank in right]
    other_table = build_table(trials, "exact_match", True)
    answers = set()
    for confidence, checkpoint in ((0.5, "last"), (0.9, "last"), (0.7, "best")):
        alone = decide_table(other_table, confidence=confidence, checkpoint=checkpoint)
        (other_metric,) = decide_table(
            build_table(trials, "loss", False),
            0.005,
            other_tables=[other_table],
            confidence=confidence,
            checkpoint=checkpoint,
        ).other_metrics
        assert (other_metric.rank, other_metric.verdict, other_metric.ranks) == (alone.rank, alone.verdict, alone.ranks)
        answers.add((other_metric.rank, other_metric.verdict, other_metric.ranks[0].value))
    assert len(answers) == 3


def test_metrics_that_differ_on_the_base_alone_are_no_conflict() -> None:
    decision = decide_with_other_metrics({0: 2.2, 4: 2.0, 16: 2.0}, {0: 0.7, 4: 0.7, 16: 0.7})
    assert (decision.verdict, decision.other_metrics[0].verdict) == ("flat", "no_gain")
    assert not decision.other_metrics[0].conflict


def test_the_other_columns_of_a_table_are_tables_of_their_own_values() -> None:
    results = [
        make_trial(
            trial_id=f"{rank}",
            rank=rank,
            value=2.0,
            metric="loss",
            example_scores=[1.0, 3.0],
            other_metrics={"f1": right, "vram": 3.0},
        )
        for rank, right in ((4, 0.25), (16, 0.5))
    ]
    (table,) = build_other_tables(results, "loss")  # the direction of `vram` is not known
    assert (table.metric, table.higher_is_better) == ("f1", True)
    assert [(cell.value, cell.examples) for cell in table.cells.values()] == [
        (0.25, 0),
        (0.5, 0),
    ]  # no examples, since those of the loss measure another metric


def test_other_columns_of_weighted_examples_have_one_number_per_training() -> None:
    """Use only the values of `eval/accuracy`, since the weights of the examples belong to the loss."""
    example_scores = {"example_scores": [1.0, 3.0], "example_weights": [2.0, 5.0]}
    results = [
        make_trial(
            trial_id=f"{rank}",
            rank=rank,
            value=2.0,
            metric="loss",
            other_metrics={"eval/accuracy": right},
            **example_scores,
        )
        for rank, right in ((4, 0.25), (16, 0.5))
    ]
    (table,) = build_other_tables(results, "loss")
    assert (table.metric, table.higher_is_better) == ("eval/accuracy", True)
    assert [cell.weights.tolist() for cell in table.cells.values()] == [[1.0], [1.0]]
