"""Compare what the strategies request on random tables, round by round, with the stored traces.

Store them again with `python -m tests.search.test_traces` if a change is intended, and read the diff: it shows what is
trained, in which order, and what each search hands over.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rightrank.schema.errors import SettingsError
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, TrialFinished, TrialOutcome
from rightrank.search.protocol import Space, build_space
from rightrank.search.strategies import make_strategy
from tests.search.worlds import World

NUMBER = 150
STORED = Path(__file__).parent / "traces.json"
SCORE = "max:score=module:function"  # generated answers: a training that stops early has its loss as its value


@dataclass
class DrawnWorld(World):
    """A world that draws the noise of each arm, its failure, and the order of its examples from a number."""

    number: int = 0
    grain: float = 0.0  # of losses; where they are multiples, many differences equal the margin
    metric: str = "loss"
    examples: int = 0
    has_means: bool = False
    undertrained: float = 0.0  # how much worse a training at rank 1 is than the truncation to it
    drift: float = 0.0  # by which power of the rank the best learning rate changes

    def draw(self, arm: Arm, purpose: str) -> float:
        names = (
            self.number,
            purpose,
            arm.rank,
            arm.learning_rate,
            arm.seed,
            arm.stop_at,
            arm.steps,
            arm.truncate_from is None,
        )
        return random.Random(str(names)).random()

    def loss(self, arm: Arm) -> float:
        is_long = arm.steps > 100 or (arm.truncate_from is not None and self.arms[arm.truncate_from].steps > 100)
        shifted = arm.model_copy(update={"learning_rate": arm.learning_rate * max(arm.rank, 1) ** self.drift})
        loss = super().loss(shifted) + (self.number % 3 - 1) * 0.02 * is_long
        if arm.rank > 0:
            of_rank = self.draw(
                Arm(rank=arm.rank, learning_rate=0, lora_alpha=1, seed=0, steps=int(arm.is_direct)), "rank"
            )
            loss += self.noise * (self.draw(arm, "noise") + of_rank) + arm.is_direct * self.undertrained / arm.rank
        return round(loss / self.grain) * self.grain if self.grain else loss

    def run(self, arm: Arm) -> TrialOutcome:
        outcome = super().run(arm)
        if not isinstance(outcome, TrialFinished):
            return outcome
        changes: dict[str, Any] = {"eval_seconds": 7.0}
        if self.examples:
            swings = [0.01 * (self.draw(arm, f"{index}") - 0.5) for index in range(self.examples)]
            changes |= {
                "example_losses": [outcome.value + swing for swing in swings],
                "example_tokens": [1] * self.examples,
            }
        if self.has_means and arm.is_searched:
            changes["mean_losses"] = [value + 0.1 * self.draw(arm, "mean") for value in changes["example_losses"]]
        if self.metric == SCORE:
            is_scored = arm.stop_at is None
            changes["value"] = 3 - outcome.value if is_scored else outcome.value
            changes["value_metric"] = None if is_scored else "loss"
            changes["metrics"] = outcome.metrics | ({"score": changes["value"]} if is_scored else {})
        return outcome.model_copy(update=changes)


def draw_search(number: int) -> tuple[str, Space, World]:
    generator = random.Random(number)
    pick = generator.choice
    strategy = pick((*5 * ("bracket",), "grid", "upward"))
    metric = pick(("loss", "loss", SCORE))
    rates = pick(((3e-4, 1e-3, 3e-3, 1e-2), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (1e-3, 3e-3), (1e-3, 3e-3, 1e-2), (1e-3,)))
    settings = SelectSettings(
        strategy=strategy,
        goal=pick((*4 * ("training-rank",), "adapter", "best-adapter")),
        ranks=pick(((1, 4, 16, 64), (1, 2, 4, 8, 16, 32), (3, 12, 50), (8, 16))),
        learning_rates=rates,
        seeds=pick(((0,), (0, 1), (2, 5, 7), (0, 1, 2, 3, 4))),
        metric=metric,
        margin=pick((1 / 64, "2%", "20%")),
        modules_to_save=pick(((), (), ("head",))),
        budget_trainings=pick((None, None, None, len(rates) + generator.uniform(-1, 12), len(rates) + 1.0)),
        budget_hours=pick((None, None, None, generator.uniform(50, 1500) / 3600)),
    )
    is_table = generator.random() < 0.25
    space = replace(
        build_space(settings, pick((100, 100, 100, 6, 4)), pick(("token_loss", "loss"))),
        evaluates_base=generator.random() < 0.85 or isinstance(settings.margin, str),
        can_stop_early=not is_table and generator.random() < 0.85,
        can_truncate=not is_table,
    )
    world = DrawnWorld(
        gain=pick((0.0, 0.015, 0.05, 0.2)),
        best_learning_rate=pick(rates),
        noise=pick((0.0, 0.002, 0.02, 0.06)),
        can_stop_early=space.can_stop_early,
        can_truncate=space.can_truncate,
        number=number,
        grain=pick((0.0, 0.0, 1 / 128)),
        metric=metric,
        undertrained=pick((0.0, 0.0, 0.2)),
        drift=pick((0.0, -0.4, 0.4)),
        examples=pick((0, 0, 12)) if metric == "loss" else 0,
    )
    world.has_means = bool(world.examples) and generator.random() < 0.5
    failures, failing_rank = pick((0.0, 0.0, 0.08)), pick((*4 * (None,), *settings.ranks))
    breaks_quarters = pick((True, False))
    world.breaks = lambda arm: (
        arm.rank > 0
        and (
            (arm.rank == failing_rank and (breaks_quarters or arm.stop_at is None))
            or world.draw(arm, "breaks") < failures
        )
    )
    world.diverges = lambda arm: (
        arm.learning_rate > world.best_learning_rate and world.draw(arm, "diverges") < 2 * failures
    )
    return strategy, space, world


def trace_search(number: int) -> dict[str, Any]:
    """Return the requested arms of each round, the cost, the answer, and the numbers in the notes."""
    name, space, world = draw_search(number)
    search = {"search": f"{name} {space.goal}"}
    try:
        strategy = make_strategy(name, space)
    except SettingsError as error:
        return search | {"refused": list_numbers(error)}

    def describe(arm: Arm) -> str:
        texts = [f"{arm.rank} {arm.learning_rate:g} {arm.seed}" if arm.rank else "base"]
        texts += [f"of {arm.steps}"] if arm.steps not in (0, space.steps) else []
        texts += [f"to {arm.stop_at}"] if arm.stop_at is not None else []
        for word, parent in (("after", arm.continue_from), ("from", arm.truncate_from)):
            texts += [f"{word} #{list(world.arms).index(parent)}"] if parent is not None else []
        return " ".join(texts)

    outcomes: list[TrialOutcome] = []
    rounds = []
    while arms := strategy.replay_trials(outcomes).waiting:
        rounds.append(", ".join(map(describe, arms)))
        outcomes += map(world.run, arms)
    trials = strategy.replay_trials(outcomes)
    cost, answer = strategy.estimate_cost(), trials.adapter
    notes = [*trials.notes, *(answer.notes if answer else [])]
    return search | {
        "rounds": rounds,
        "cost": [
            cost.expected,
            cost.maximum,
            cost.expected_until_adapter,
            cost.minimum,
            cost.max_arms,
            strategy.estimate_arms(),
        ],
        "spent": [trials.spent_steps, round(trials.spent_seconds, 6)],
        "adapter": answer
        and [describe(world.arms[answer.trial_id]), float(f"{answer.margin:.6g}"), answer.is_top_rank_required],
        "notes": list(map(list_numbers, notes)),
    }


def list_numbers(text: object) -> str:
    return " ".join(re.findall(r"\d+\.?\d*", str(text)))


def test_the_trace_of_each_search_is_the_stored_one() -> None:
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    for number in range(NUMBER):
        assert trace_search(number) == stored[str(number)], number


if __name__ == "__main__":
    lines = [f"{json.dumps(str(number))}: {json.dumps(trace_search(number))}" for number in range(NUMBER)]
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
