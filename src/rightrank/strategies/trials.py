"""The trials of a strategy, oriented so that lower is better, and the comparison of two ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from rightrank.decision.judge import CONFIDENCE, walk_down
from rightrank.maths.intervals import estimate
from rightrank.records import AdapterAnswer, Arm, TrialDiverged, TrialFinished, TrialOutcome
from rightrank.strategies.protocol import base_arm
from rightrank.strategies.space import Space


@dataclass(frozen=True, slots=True)
class Excess:
    """How much worse one rank is than another, each at its best learning rate."""

    mean: float
    high: float  # 95% upper bound; the mean itself where examples were not scored one by one


@dataclass(slots=True)
class Trials:
    """The outcomes of the arms that a script asked for so far."""

    space: Space
    outcomes: dict[Arm, TrialOutcome] = field(default_factory=dict)
    adapter: AdapterAnswer | None = None  # the answer to the first question, once the script has it

    def add(self, arm: Arm, outcome: TrialOutcome) -> None:
        self.outcomes[arm] = outcome

    def finished(self, arm: Arm) -> TrialFinished | None:
        outcome = self.outcomes.get(arm)
        return outcome if isinstance(outcome, TrialFinished) else None

    def diverged(self, arm: Arm) -> bool:
        return isinstance(self.outcomes.get(arm), TrialDiverged)

    def loss(self, arm: Arm) -> float | None:
        """The held-out value, oriented so that lower is better; None without a result."""
        outcome = self.finished(arm)
        return None if outcome is None else oriented(outcome, self.space)

    def base_loss(self, *, during_training: bool) -> float | None:
        """The oriented value of the base; None where it is unknown.

        Comparable with values during training, which may be losses whatever the metric, or with final values.
        """
        outcome = self.finished(base_arm(self.space.lora_alpha))
        if outcome is None:
            return None
        is_loss = during_training and self.space.points_are_losses
        return outcome.metrics["loss"] if is_loss else oriented(outcome, self.space)

    def loss_after(self, rank: int, learning_rate: float, step: int) -> float | None:
        """The oriented value after `step` steps of a training with the first seed, stopped there or not; None if unknown."""
        for arm, outcome in self.outcomes.items():
            if (arm.rank, arm.learning_rate, arm.seed) != (rank, learning_rate, self.space.seeds[0]):
                continue
            if arm.truncate_from is not None or not self.space.is_plain(arm) or not isinstance(outcome, TrialFinished):
                continue
            losses = self.space.points_are_losses
            if (arm.stop_at or arm.steps) == step:
                return outcome.metrics["loss"] if losses else oriented(outcome, self.space)
            for point in outcome.points:
                if point.step == step:
                    return -point.value if self.space.higher_is_better and not losses else point.value
        return None

    def direct(self) -> dict[tuple[int, float, int], TrialFinished]:
        """Whole trainings by (rank, learning rate, seed)."""
        return {
            (arm.rank, arm.learning_rate, arm.seed): outcome
            for arm, outcome in self.outcomes.items()
            if arm.is_direct and arm.rank > 0 and self.space.is_plain(arm) and isinstance(outcome, TrialFinished)
        }

    def ranks(self) -> list[int]:
        """Ranks with a whole training, descending."""
        return sorted({rank for rank, _, _ in self.direct()}, reverse=True)

    def learning_rates(self, rank: int) -> list[float]:
        """Learning rates at which the rank has a whole training, ascending."""
        return sorted({lr for r, lr, _ in self.direct() if r == rank})

    def mean_loss(self, rank: int, learning_rate: float) -> float:
        """The mean over seeds."""
        cell = (rank, learning_rate)
        return float(np.mean([oriented(t, self.space) for key, t in self.direct().items() if key[:2] == cell]))

    def whole_loss(self, rank: int, learning_rate: float) -> float:
        """Of the whole training with the first seed; infinite without a result."""
        outcome = self.direct().get((rank, learning_rate, self.space.seeds[0]))
        return math.inf if outcome is None else oriented(outcome, self.space)

    def best_learning_rate(self, rank: int) -> float | None:
        """The learning rate with the best mean over seeds among those with the most seeds, so that one lucky seed loses."""
        direct = self.direct()
        counts = {lr: sum((rank, lr) == key[:2] for key in direct) for lr in self.learning_rates(rank)}
        candidates = [lr for lr, count in counts.items() if count == max(counts.values())]
        return min(candidates, key=lambda lr: (self.mean_loss(rank, lr), lr), default=None)

    def best_loss(self, rank: int) -> float:
        learning_rate = self.best_learning_rate(rank)
        return math.inf if learning_rate is None else self.mean_loss(rank, learning_rate)

    def reference(self) -> int | None:
        """The rank with the best mean."""
        return min(self.ranks(), key=lambda rank: (self.best_loss(rank), rank), default=None)

    def excess(self, rank: int, reference: int) -> Excess:
        """`rank` against `reference`, each at its best learning rate, over the seeds that both have."""
        cells = [(one, self.best_learning_rate(one)) for one in (rank, reference)]
        direct = self.direct()
        sides = [{seed: trial for (r, lr, seed), trial in direct.items() if (r, lr) == cell} for cell in cells]
        pairs = [(sides[0][seed], sides[1][seed]) for seed in self.space.seeds if seed in sides[0] and seed in sides[1]]
        return excess_of(pairs, self.space) if pairs else Excess(math.inf, math.inf)

    def holds(self, rank: int) -> bool:
        """Whether the rank's mean is within the margin of the reference's. The search goes by this."""
        return self._holds(rank, lambda excess: excess.mean)

    def surely_holds(self, rank: int) -> bool:
        """Whether the 95% upper bound is within the margin. The decision goes by this."""
        return self._holds(rank, lambda excess: excess.high)

    def _holds(self, rank: int, figure: Callable[[Excess], float]) -> bool:
        reference = self.reference()
        if reference is None or rank not in self.ranks():
            return False
        margin = self.space.margin_at(self.best_loss(reference))
        return rank == reference or is_within(figure(self.excess(rank, reference)), margin)

    def smallest_that_holds(self) -> int | None:
        """The result of the walk down from the reference over the ranks trained."""
        reference = self.reference()
        return None if reference is None else walk_down(self.ranks(), reference, self.holds)


def oriented(outcome: TrialFinished, space: Space) -> float:
    """The value with lower as better. A training that stopped early may have a loss for its value, whatever the metric."""
    is_turned = space.higher_is_better and outcome.value_metric is None
    return -outcome.value if is_turned else outcome.value


def is_within(excess: float, margin: float) -> bool:
    """Whether the excess is at most the margin, up to rounding."""
    return excess <= margin + 1e-9


def excess_of(pairs: Iterable[tuple[TrialFinished, TrialFinished]], space: Space) -> Excess:
    """The mean difference of paired outcomes and its 95% upper bound over examples and pairs (`maths.intervals`)."""
    pairs = list(pairs)
    mean = float(np.mean([oriented(left, space) - oriented(right, space) for left, right in pairs]))
    scored = [(left.items(space.metric), right.items(space.metric)) for left, right in pairs]
    known = [(ours, theirs) for ours, theirs in scored if ours and theirs and len(ours[0]) == len(theirs[0]) > 1]
    if len(known) < len(pairs):
        return Excess(mean, mean)
    sums = np.array([np.subtract(ours[0], theirs[0]) for ours, theirs in known])
    found = estimate(-sums if space.higher_is_better else sums, np.asarray(known[0][0][1], dtype=np.float64))
    return Excess(mean, replace(found, mean=mean).bound(CONFIDENCE))
