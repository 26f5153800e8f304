"""Compare the answers of random runs, from truncations to learning rates, with the stored answers.

Store them again with `python -m tests.decision.test_answers` if a change is intended, and read the diff: it shows what
changes for users. Of each sentence only the numbers are stored.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from rightrank.decision.adapter import Criterion, find_wider_margin, is_shown_enough
from rightrank.decision.run_answers import (
    build_trained_answer,
    compare_adapters,
    compute_test_difference,
    describe_learning_rate,
    format_provenance,
    prefer_direct_training,
)
from rightrank.schema.events import TestEvaluated
from rightrank.schema.metrics import parse_margin
from rightrank.schema.trials import TrialDiverged, TrialFailed, TrialFinished, TrialOutcome
from rightrank.search.protocol import choose_adapter
from tests.decision.worlds import require_equal, round_numbers
from tests.examples import limit_examples

NUMBER = 60
STORED = Path(__file__).parent / "answers.json"
HIGHER = {"loss": False, "perplexity": False, "wer": False, "accuracy": True, "f1": True, "score": True}


class DrawnRun:
    """A run at rank 16 with truncations, trainings of other ranks and learning rates, and one or two bases."""

    def __init__(self, number: int) -> None:
        self.draw = random.Random(number)
        self.generator = np.random.default_rng(number)
        pick = self.draw.choice
        self.metric = pick(list(HIGHER))
        self.examples = pick((0, 40, 150, 150))
        self.ease = self.generator.normal(2, 0.4, self.examples or 1)
        self.tokens = self.generator.integers(1, 9, self.examples or 1).tolist()
        self.groups = (
            [index // 3 for index in range(self.examples)] if self.examples and pick((True, False, False)) else None
        )
        self.noise = pick((0.0, 0.002, 0.02))
        margin = pick((None, "2%", "20%", 0.02))
        gain = pick((-0.01, 0.05, 0.5, 0.5, 0.5))
        self.criterion = Criterion(
            self.metric, HIGHER[self.metric], margin, pick(("token_loss", "loss")), pick((True, False))
        )
        steep = pick((-0.05, 0.002, 0.02, 0.1))
        self.top = self.make("top", 16, 0.0)
        self.outcomes: list[TrialOutcome] = [self.top]
        has_base = self.metric in ("perplexity", "wer", "score") or self.draw.random() < 0.8
        self.outcomes += (
            [self.make("base", 0, gain, rate=0.0, steps=0, count=pick((None, None, 0)))] if has_base else []
        )
        self.outcomes += (
            [self.make("zero", 0, gain / 2, steps=0, truncate_from="top")] if self.draw.random() < 0.3 else []
        )
        for rank in (1, 2, 4, 8):
            loss = steep / rank + self.draw.uniform(-0.002, 0.004)
            self.outcomes.append(self.make(f"cut {rank}", rank, loss, steps=0, truncate_from="top"))
        self.low = self.make("low", 4, steep / 4)
        for trial in (self.low, self.make("low again", 4, steep / 3, seed=1), self.make("tops", 16, 0.03, seed=1)):
            self.outcomes += [trial] if self.draw.random() < 0.7 else []
        self.outcomes += (
            [self.make("other cut", 8, -0.3, steps=0, truncate_from="low")] if self.draw.random() < 0.3 else []
        )
        for rate in pick(((1e-3,), (1e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2), (1e-4, 3e-4, 1e-3))):
            self.outcomes += self.search(rate)
        if self.examples and self.draw.random() < 0.15:  # one training has fewer examples
            self.outcomes.append(self.make("few", 8, 0.0, count=self.examples // 2))
        self.draw.shuffle(self.outcomes)

    def make(
        self, name: str, rank: int, worse: float, rate: float = 1e-3, count: int | None = None, **fields: Any
    ) -> TrialFinished:
        """Make a training whose examples are worse than those of the top rank by this on average."""
        count = self.examples if count is None else count
        scores = self.ease + worse + self.noise * self.generator.standard_normal(len(self.ease)) * (rank != 16)
        weights = self.tokens
        values = {
            "loss": scores, "perplexity": np.exp(scores), "wer": scores / 2, "accuracy": 1.0 * (scores < 2.3),
            "f1": np.clip(1 - scores / 4, 0, 1), "score": 10 - scores,
        }  # fmt: skip
        shown = values[self.metric]
        is_weighted = self.metric in ("loss", "perplexity", "score")
        value = float(np.average(shown, weights=weights if is_weighted else None))
        lists: dict[str, Any] = {"example_groups": self.groups} if count == self.examples else {}
        if count:
            lists |= {"example_losses": (scores * weights)[:count].tolist(), "example_tokens": weights[:count]}
            lists |= {
                "accuracy": {"example_correct": shown[:count].astype(int).tolist()},
                "f1": {"example_metrics": {"f1": shown[:count].tolist()}},
                "loss": {},
            }.get(
                self.metric,
                {"example_scores": shown[:count].tolist(), "example_weights": [1.0 * w for w in weights[:count]]},
            )
        fields = {"learning_rate": rate, "seed": 0, "steps": 100, "lora_alpha": 32.0} | fields
        metrics = {"loss": float(np.average(scores, weights=weights)), self.metric: value}
        return TrialFinished(trial_id=name, rank=rank, value=value, metrics=metrics, **lists, **fields)

    def search(self, rate: float) -> list[TrialOutcome]:
        """Make the trainings of the learning-rate search: a quarter, and sometimes the end, at each rate."""
        fields = {"rank": 16, "learning_rate": rate, "seed": 0, "steps": 100, "lora_alpha": 32.0, "stop_at": 25}
        event = self.draw.random()
        if rate > 1e-3 and event < 0.2:
            return [TrialDiverged(trial_id=f"diverged {rate}", **fields, step=9, reason="loss")]
        if rate > 1e-3 and event < 0.3:
            return [TrialFailed(trial_id=f"failed {rate}", **fields, error="error", reason="full")]
        quarter = self.make(f"quarter {rate}", 16, self.draw.uniform(0, 0.1), rate, stop_at=25)
        if self.examples and self.draw.random() < 0.8:
            means = [value * self.draw.uniform(0.95, 1.0) for value in quarter.example_losses]
            quarter = quarter.model_copy(update={"mean_losses": means})
        is_finished = rate != 1e-3 and self.draw.random() < 0.3
        return [quarter, *([self.make(f"end {rate}", 16, 0.05, rate)] if is_finished else [])]


def summarize(value: Any, name: str = "") -> Any:
    """Return records as mappings without empty values, and texts as their numbers."""
    if isinstance(value, BaseModel):
        fields = {key: summarize(getattr(value, key), key) for key in type(value).model_fields}
        return {key: inner for key, inner in fields.items() if inner not in (None, [], "")}
    if isinstance(value, list | tuple):
        return [summarize(inner, name) for inner in value]
    if name in ("sentence", "notes", "failure") and value is not None:
        return " ".join(re.findall(r"[-+]?\d+(?:\.\d+)?%?", value))
    return value


def answer_run(number: int) -> dict[str, Any]:
    run = DrawnRun(number)
    outcomes, criterion = run.outcomes, run.criterion
    answer = choose_adapter(outcomes, criterion, "top")
    assert answer is not None
    ours, theirs = (
        TestEvaluated(**trial.model_dump(include={*TestEvaluated.model_fields} - {"type", "schema_version"}))
        for trial in (run.low, run.top)
    )
    wide = replace(criterion, margin=0.5)  # the margin of the answer counts
    compared = compare_adapters(answer, outcomes, wide)
    return round_numbers({
        "run": f"{run.metric} {run.examples} {criterion.margin}",
        "answer": summarize(answer),
        "wider": find_wider_margin(answer),
        "shown": [is_shown_enough(candidate, answer) for candidate in answer.candidates],
        "direct": summarize(prefer_direct_training(answer, outcomes, wide)),
        "compared": [[candidate.trial_id, candidate.difference, candidate.is_within_margin] for candidate in compared],
        "trained": summarize(build_trained_answer(run.low, criterion, run.draw.choice((None, run.top)), outcomes).candidates),
        "rates": summarize(describe_learning_rate(run.top, outcomes, criterion)),
        "test": compute_test_difference(ours, theirs, criterion),
    })  # fmt: skip


def test_the_answers_of_each_run_are_the_stored_ones() -> None:
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    for number in range(NUMBER):
        require_equal(json.loads(json.dumps(answer_run(number))), stored[str(number)], str(number))


def test_a_learning_rate_at_the_edge_of_those_tried_names_the_option_for_others() -> None:
    at_edge = []
    for run in map(DrawnRun, range(NUMBER)):
        if (answer := describe_learning_rate(run.top, run.outcomes, run.criterion)) is not None:
            rates = [candidate.learning_rate for candidate in answer.candidates]
            at_edge.append(answer.learning_rate in (min(rates), max(rates)))
            assert ("--learning-rates" in answer.sentence) == at_edge[-1]
    assert set(at_edge) == {True, False}


def test_the_next_lower_rank_is_enough_at_the_wider_margin() -> None:
    units = set()
    for run, margin in product(map(DrawnRun, range(100)), ("1%", 0.02)):
        answer = choose_adapter(run.outcomes, replace(run.criterion, margin=margin), "top")
        if answer is not None and answer.gain is not None and (wider := find_wider_margin(answer)) is not None:
            units.add(margin)
            assert wider.endswith("%") == (margin == "1%")
            again = choose_adapter(run.outcomes, replace(run.criterion, margin=parse_margin(wider)), "top")
            assert again is not None
            assert again.candidates[1].is_within_margin
    assert units == {"1%", 0.02}


@limit_examples(60)
@given(
    rank=st.sampled_from([4, 16]),
    rate=st.sampled_from([0.0, 1e-3]),
    steps=st.sampled_from([0, 100]),
    step=st.sampled_from([None, 40]),
    is_mean=st.booleans(),
    truncation=st.sampled_from([None, "svd", "kfac"]),
)
def test_the_provenance_of_an_adapter_names_all_that_is_known(
    rank: int, rate: float, steps: int, step: int | None, is_mean: bool, truncation: str | None
) -> None:
    trial = DrawnRun(0).top
    fields = {"learning_rate": rate, "steps": steps, "checkpoint_step": step, "checkpoint_is_mean": is_mean}
    text = format_provenance(
        trial.model_copy(update={"rank": rank, "truncation": truncation}), trial.model_copy(update=fields)
    )
    is_truncated = rank < 16
    assert {"learning rate 0.001" in text, "learning rate" in text} == {rate > 0}
    assert ("100 steps" in text, "step 40 of" in text) == (steps > 0, steps > 0 and step == 40)
    assert ("mean of the factors" in text) == (steps > 0 and is_mean)
    assert ("truncated to rank 4" in text) == is_truncated
    assert ("K-FAC" in text, "SVD" in text) == (
        is_truncated and truncation == "kfac",
        is_truncated and truncation != "kfac",
    )


if __name__ == "__main__":
    lines = [f"{json.dumps(str(number))}: {json.dumps(answer_run(number))}" for number in range(NUMBER)]
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
