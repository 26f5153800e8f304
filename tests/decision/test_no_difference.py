"""Test the verdict `no_difference`: on request, choose the smallest rank that is not shown to be worse."""

from __future__ import annotations

import re

import numpy as np
import pytest

from rightrank.decision.comparison import CONFIDENCE
from rightrank.decision.rule import decide_table
from rightrank.decision.table import ScoreTable, build_table
from tests.decision.tables import make_trial

PROMPTS, SEEDS = 200, 3
EASE = (np.arange(PROMPTS) + 0.5) / PROMPTS


def draw_table(levels: dict[int, float], noise: float) -> ScoreTable:
    """Draw a table in which each rank answers the prompts below its level correctly; the level varies by seed."""
    generator = np.random.default_rng(3)
    results = [
        make_trial(
            trial_id=f"{rank} {seed}",
            rank=rank,
            seed=seed,
            value=float(scores.mean()),
            metric="reward",
            example_scores=scores.tolist(),
        )
        for rank, level in levels.items()
        for seed in range(SEEDS if rank else 1)
        for scores in [(level + generator.normal(0, noise if rank else 0) > EASE).astype(float)]
    ]
    return build_table(results, "reward", True)


@pytest.mark.parametrize(
    ("levels", "noise", "verdict", "rank"),
    [
        ({1: 0.6, 4: 0.6, 16: 0.6}, 0.06, "no_difference", 1),
        ({1: 0.3, 4: 0.6, 16: 0.6}, 0.06, "saturated", 4),
        ({1: 0.6, 4: 0.6, 16: 0.6}, 0.0, "flat", 1),
        ({1: 0.3, 4: 0.6, 16: 0.6}, 0.0, "saturated", 4),
        ({0: 0.2, 1: 0.6, 4: 0.6}, 0.06, "no_difference", 1),
        ({0: 0.58, 1: 0.6, 4: 0.6}, 0.06, "no_gain", None),
    ],
)
def test_no_difference_replaces_undecided(
    levels: dict[int, float], noise: float, verdict: str, rank: int | None
) -> None:
    decision = decide_table(draw_table(levels, noise), 0.02, smallest_if_undecided=True, confidence=CONFIDENCE)
    assert (decision.verdict, decision.rank) == (verdict, rank)
    plain = decide_table(draw_table(levels, noise), 0.02, confidence=CONFIDENCE)
    if verdict == "no_difference":
        assert (plain.verdict, plain.rank) == ("undecided", None)
        changed = {
            "verdict",
            "rank",
            "learning_rate",
            "sentence",
            "recommended_rank",
            "probability",
            "recommended_margin",
        }
        assert decision.model_dump(exclude=changed) == plain.model_dump(exclude=changed)
    else:
        assert decision == plain


def write_sentence(*rows: tuple[int, int, list[float]], metric: str = "reward") -> str:
    """Return the sentence of a decision on trainings by rank, seed and scores, at a margin of 0.02."""
    results = [
        make_trial(
            trial_id=f"{rank} {seed}",
            rank=rank,
            seed=seed,
            value=float(np.mean(scores)),
            metric=metric,
            example_scores=scores,
        )
        for rank, seed, scores in rows
    ]
    decision = decide_table(build_table(results, metric, True), 0.02, smallest_if_undecided=True, confidence=CONFIDENCE)
    assert decision.verdict == "no_difference"
    return decision.sentence


def test_one_seed_shows_no_noise() -> None:
    generator = np.random.default_rng(5)
    ease = generator.normal(0.5, 0.1, 40)
    low, high = ease + 0.001, ease + generator.normal(0, 0.2, 40)
    high += low.mean() - high.mean()
    best = write_sentence((1, 0, list(low + 0.001)), (4, 0, list(high)))
    assert best == (
        "No difference between ranks 1 and 4 can be shown at this noise: take rank 1, the smallest. "
        "It also has the best mean."
    )
    other_sentence = write_sentence((1, 0, list(low)), (4, 0, list(high + 0.01)))
    assert other_sentence == (
        "No difference between ranks 1 and 4 can be shown at this noise: take rank 1, the smallest. "
        "Rank 4 looks 0.01 better."
    )


def test_three_ranks_are_listed_and_two_seeds_show_their_noise() -> None:
    sentence = decide_table(
        draw_table({1: 0.6, 4: 0.6, 16: 0.6}, 0.06), 0.02, smallest_if_undecided=True, confidence=CONFIDENCE
    ).sentence
    assert re.fullmatch(
        r"No difference between ranks 1, 4 and 16 can be shown at this noise \(seed standard deviation 0\.0\d+\): take rank 1, "
        r"the smallest\. (It also has the best mean|Rank \d+ looks 0\.\d+ better); a difference of 0\.02 in reward would "
        r"need about \d+ seeds per rank\.",
        sentence,
    )


@pytest.mark.parametrize(
    ("shifts", "deviation"),
    [
        # Shared noise counts as noise, but it does not change the seeds that a difference needs.
        ({(1, 0): 0.0, (1, 1): 0.03, (4, 0): 0.0, (4, 1): 0.03}, r"0\.021"),
        ({(1, 0): 0.0, (1, 1): 0.0, (4, 0): 0.0, (4, 1): -0.004}, r"0\.00\d+"),
    ],
)
def test_the_seeds_of_a_difference_follow_the_noise_that_ranks_do_not_share(
    shifts: dict[tuple[int, int], float], deviation: str
) -> None:
    generator = np.random.default_rng(5)
    ease = generator.normal(0.5, 0.1, 40)
    scores = {1: ease + 0.001, 4: ease + generator.normal(0, 0.2, 40)}
    scores[4] += ease.mean() - scores[4].mean()
    sentence = write_sentence(*((rank, seed, list(scores[rank] + shift)) for (rank, seed), shift in shifts.items()))
    start = r"No difference between ranks 1 and 4 can be shown at this noise \(seed standard deviation "
    assert re.fullmatch(
        rf"{start}{deviation}\): .*; a difference of 0\.02 in reward would need about 1 seed per rank\.", sentence
    )
