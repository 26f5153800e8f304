"""Test the learning rate as an answer: what the others lost at the step at which all were compared."""

from __future__ import annotations

from typing import Any

import pytest

from rightrank.decision.adapter import Criterion
from rightrank.decision.run_answers import describe_learning_rate
from rightrank.schema.trials import TrialDiverged, TrialFinished, TrialOutcome

CRITERION = Criterion("loss", higher_is_better=False, margin=0.01)
SHIFTS = {3e-4: 0.1, 1e-3: 0.002, 3e-3: 0.0}
EXAMPLES = 200


def make_trial(rate: float, shift: float, end: int, **changes: Any) -> TrialFinished:
    """Make a training of 100 steps; its examples differ from those of other rates by `shift` and a small noise."""
    losses = [2.0 + shift + (1e-3 if rate < 2e-3 else -1e-3) * (-1) ** example for example in range(EXAMPLES)]
    value = sum(losses) / EXAMPLES
    fields: dict[str, Any] = {
        "trial_id": f"{rate}-{end}", "rank": 64, "learning_rate": rate, "lora_alpha": 32.0, "seed": 0, "steps": 100,
        "stop_at": None if end == 100 else end, "value": value, "metrics": {"loss": value},
    }  # fmt: skip
    scores = {"example_losses": losses, "example_tokens": [1] * EXAMPLES}
    return TrialFinished(**(fields | scores | changes))


def make_search() -> tuple[TrialFinished, list[TrialOutcome]]:
    """Make a search: three learning rates at a quarter, a fourth that diverged, and the end of the third."""
    quarters: list[TrialOutcome] = [make_trial(rate, shift, 25) for rate, shift in SHIFTS.items()]
    arm = make_trial(1e-2, 0.0, 25).arm
    diverged = TrialDiverged(trial_id="x", step=3, reason="the loss is NaN", **arm.model_dump())
    end = make_trial(3e-3, -0.5, 100)
    other_rank = make_trial(1e-3, 0.0, 25, rank=16, trial_id="other")
    return end, [*quarters, diverged, end, other_rank]


def test_the_others_are_compared_with_the_chosen_one_at_a_quarter() -> None:
    end, outcomes = make_search()
    answer = describe_learning_rate(end, outcomes, CRITERION)
    assert answer is not None
    assert (answer.learning_rate, answer.rank, answer.step, answer.steps, answer.metric) == (3e-3, 64, 25, 100, "loss")
    low, close, chosen, lost = answer.candidates
    assert low.difference == pytest.approx(0.1, abs=1e-9)
    assert low.difference_low is not None
    assert low.difference_high is not None
    assert 0.09 < low.difference_low < 0.1 < low.difference_high < 0.11
    assert close.difference == pytest.approx(0.002, abs=1e-9)
    assert (chosen.difference, chosen.value, chosen.final_value) == (None, pytest.approx(2.0), pytest.approx(1.5))
    assert (lost.learning_rate, lost.value) == (1e-2, None)
    for words in (
        "is 0.003",
        "step 25 of 100, loss of rank 64 was worse with the others by +0.1 with 0.0003",
        "0.01 diverged at step 3: the loss is NaN.",
    ):
        assert words in answer.sentence
