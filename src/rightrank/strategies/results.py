"""What a strategy has seen, oriented so that lower is better, and how two results compare."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from rightrank.decision.judge import CONFIDENCE, walk_down
from rightrank.maths.intervals import estimate
from rightrank.records import Arm, TrialDiverged, TrialFinished, TrialOutcome
from rightrank.strategies.protocol import base_arm
from rightrank.strategies.space import Space


@dataclass(frozen=True, slots=True)
class Excess:
    """How much worse one rank is than another, each at its best rate."""

    mean: float
    high: float  # 95% upper bound where item losses are known; the mean itself where values alone are


@dataclass(slots=True)
class Results:
    """Outcomes of the arms asked for so far."""

    space: Space
    outcomes: dict[Arm, TrialOutcome] = field(default_factory=dict)

    def add(self, arm: Arm, outcome: TrialOutcome) -> None:
        self.outcomes[arm] = outcome

    def finished(self, arm: Arm) -> TrialFinished | None:
        outcome = self.outcomes.get(arm)
        return outcome if isinstance(outcome, TrialFinished) else None

    def diverged(self, arm: Arm) -> bool:
        return isinstance(self.outcomes.get(arm), TrialDiverged)

    def loss(self, arm: Arm) -> float | None:
        """The held-out value turned so that lower is better; None where the arm gave none."""
        outcome = self.finished(arm)
        return None if outcome is None else oriented(outcome, self.space)

    def base_loss(self, *, on_the_way: bool) -> float | None:
        """Of the base without an adapter, comparable with values on the way or with those at the end; None where unknown."""
        outcome = self.finished(base_arm(self.space.lora_alpha))
        if outcome is None:
            return None
        return outcome.metrics["loss"] if on_the_way and self.space.points_are_losses else oriented(outcome, self.space)

    def loss_after(self, rank: int, rate: float, step: int) -> float | None:
        """The held-out loss after `step` steps of a training with the first seed, whether it stopped there or went on.

        None where it was not taken.
        """
        for arm, outcome in self.outcomes.items():
            if (arm.rank, arm.learning_rate, arm.seed) != (rank, rate, self.space.seeds[0]):
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
        """Whole trainings by (rank, rate, seed)."""
        return {
            (arm.rank, arm.learning_rate, arm.seed): outcome
            for arm, outcome in self.outcomes.items()
            if arm.is_direct and arm.rank > 0 and self.space.is_plain(arm) and isinstance(outcome, TrialFinished)
        }

    def ranks(self) -> list[int]:
        """Ranks with a whole training, descending."""
        return sorted({rank for rank, _, _ in self.direct()}, reverse=True)

    def rates(self, rank: int) -> list[float]:
        """Rates at which the rank has a whole training, ascending."""
        return sorted({rate for r, rate, _ in self.direct() if r == rank})

    def mean_loss(self, rank: int, rate: float) -> float:
        """Over seeds."""
        return float(
            np.mean([oriented(t, self.space) for (r, lr, _), t in self.direct().items() if (r, lr) == (rank, rate)])
        )

    def best_rate(self, rank: int) -> float | None:
        """The rate with the best mean over seeds, the most seeds first: a lucky single seed does not win."""
        direct = self.direct()
        counts = {rate: sum((rank, rate) == key[:2] for key in direct) for rate in self.rates(rank)}
        most = max(counts.values(), default=0)
        rates = [rate for rate, count in counts.items() if count == most]
        return min(rates, key=lambda rate: (self.mean_loss(rank, rate), rate), default=None)

    def best_loss(self, rank: int) -> float:
        rate = self.best_rate(rank)
        return math.inf if rate is None else self.mean_loss(rank, rate)

    def reference(self) -> int | None:
        """The rank with the best mean."""
        return min(self.ranks(), key=lambda rank: (self.best_loss(rank), rank), default=None)

    def excess(self, rank: int, reference: int) -> Excess:
        """`rank` against `reference`, each at its best rate, over the seeds that both have."""
        rate, reference_rate = self.best_rate(rank), self.best_rate(reference)
        if rate is None or reference_rate is None:
            return Excess(math.inf, math.inf)
        direct = self.direct()
        pairs = [
            (direct[rank, rate, seed], direct[reference, reference_rate, seed])
            for seed in self.space.seeds
            if (rank, rate, seed) in direct and (reference, reference_rate, seed) in direct
        ]
        return excess_of(pairs, self.space) if pairs else Excess(math.inf, math.inf)

    def holds(self, rank: int) -> bool:
        """Whether the rank's value is within the margin of the best rank's: what the search goes by."""
        return self._within(rank, sure=False)

    def surely_holds(self, rank: int) -> bool:
        """The same of the 95% upper bound, where item losses give one: what the decision goes by."""
        return self._within(rank, sure=True)

    def _within(self, rank: int, sure: bool) -> bool:
        reference = self.reference()
        if reference is None or rank not in self.ranks():
            return False
        if rank == reference:
            return True
        excess = self.excess(rank, reference)
        return within(excess.high if sure else excess.mean, self.space.margin_at(self.best_loss(reference)))

    def smallest_that_holds(self) -> int | None:
        """From the reference downward over the ranks trained, before the first that fails."""
        reference = self.reference()
        return None if reference is None else walk_down(self.ranks(), reference, self.holds)


def oriented(outcome: TrialFinished, space: Space) -> float:
    """Lower is better. A training that was stopped early may be judged by its loss: it is compared with its like alone."""
    turned = space.higher_is_better and outcome.value_metric is None
    return -outcome.value if turned else outcome.value


def within(excess: float, margin: float) -> bool:
    """Not above the margin, but for rounding."""
    return excess <= margin + 1e-9


def excess_of(pairs: Iterable[tuple[TrialFinished, TrialFinished]], space: Space) -> Excess:
    """The mean difference of paired outcomes and its 95% upper bound, which is the mean where outcomes hold no examples."""
    pairs = list(pairs)
    mean = float(np.mean([oriented(left, space) - oriented(right, space) for left, right in pairs]))
    scored = [(left.items(space.metric), right.items(space.metric)) for left, right in pairs]
    known = [(ours, theirs) for ours, theirs in scored if ours and theirs and len(ours[0]) == len(theirs[0]) > 1]
    if len(known) < len(pairs):
        return Excess(mean, mean)
    sums = np.array([np.subtract(ours[0], theirs[0]) for ours, theirs in known])
    found = estimate(-sums if space.higher_is_better else sums, np.asarray(known[0][0][1], dtype=np.float64))
    return Excess(mean, replace(found, mean=mean).bound(CONFIDENCE))
