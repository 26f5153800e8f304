"""The input of a strategy: the space that it searches, with its budget, and the trials so far, with values for which lower is better."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

from rightrank.decision.adapter import Criterion
from rightrank.decision.evidence import Evidence
from rightrank.decision.run import find_base
from rightrank.decision.table import ScoreTable, build_table
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.errors import SettingsError
from rightrank.schema.metrics import LossKind, Margin, MetricKind, infer_metric_kind
from rightrank.schema.settings import Goal, SelectSettings
from rightrank.schema.trials import Arm, TrialDiverged, TrialFinished, TrialOutcome

QUARTER = 0.25  # of a training

Requests: TypeAlias = Iterator[Sequence[Arm]]  # yielded by a script: arms that may run at the same time


@dataclass(frozen=True, slots=True)
class Space:
    """The space of a selection. Ranks and learning rates ascend."""

    ranks: tuple[int, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    lora_alpha: float
    steps: int  # optimizer steps of a full training
    margin: Margin | None  # None: the default
    metric: str = "loss"
    kind: MetricKind = "loss"
    higher_is_better: bool = False
    points_are_losses: bool = False  # whether evaluations during training measure the loss instead of the metric
    evaluates_base: bool = True  # False: there is no trial of rank 0 and no comparison with the base
    goal: Goal = "training-rank"
    can_stop_early: bool = True  # whether trainings can stop early and resume; False for custom trainers
    can_truncate: bool = True  # whether adapters can be truncated and evaluated
    trains_other_modules: bool = False  # such as a head, which the base of the gain keeps
    trusts_values: bool = False  # whether values without scores by example suffice to accept a truncation (tables)
    budget_steps: float | None = None  # optimizer steps over all arms
    budget_seconds: float | None = None  # time of training and evaluation, over all arms

    @property
    def criterion(self) -> Criterion:
        """Return the criterion that compares the truncated candidates."""
        loss_kind = self.kind if self.kind == "token_loss" or self.kind == "pair_loss" else "loss"
        is_eval_metric = not self.points_are_losses
        return Criterion(self.metric, self.higher_is_better, self.margin, loss_kind, is_eval_metric, self.trusts_values)

    @property
    def top(self) -> int:
        return self.ranks[-1]

    def make_arm(self, rank: int, learning_rate: float, seed: int | None = None) -> Arm:
        """Return the arm of a full training. `seed` defaults to the first seed."""
        return Arm(
            rank=rank,
            learning_rate=learning_rate,
            lora_alpha=self.lora_alpha,
            seed=self.seeds[0] if seed is None else seed,
            steps=self.steps,
        )

    @property
    def truncated_ranks(self) -> list[int]:
        """Return the ranks to truncate the top adapter to, descending: lower ranks of the space and powers of two."""
        powers = {2**power for power in range(self.top.bit_length())}
        return sorted((rank for rank in powers | set(self.ranks) if rank < self.top), reverse=True)

    def get_lower_rank(self, rank: int) -> int | None:
        """Return the next lower rank, or None for the lowest."""
        return next((low for low, high in pairwise(self.ranks) if high == rank), None)

    def get_higher_rank(self, rank: int) -> int | None:
        """Return the next higher rank, or None for the highest."""
        return next((high for low, high in pairwise(self.ranks) if low == rank), None)


def make_truncation_arm(parent: TrialFinished, rank: int) -> Arm:
    """Return the arm that truncates the adapter of `parent` to `rank`."""
    changed = {"rank": rank, "steps": 0, "truncate_from": parent.trial_id, "continue_from": None}
    return parent.arm.model_copy(update=changed)


def make_base_arm(lora_alpha: float) -> Arm:
    """Return the arm of rank 0: the base without an adapter. It is evaluated once and is a point of every curve."""
    return Arm(rank=0, learning_rate=0.0, lora_alpha=lora_alpha, seed=0, steps=0)


def build_space(settings: SelectSettings, steps: int, loss_kind: LossKind = "token_loss") -> Space:
    """Build the space of a selection with trainings of `steps` steps.

    Raises:
        SettingsError: there is only one rank, although ranks are to be compared.
    """
    if len(settings.ranks) < 2 and settings.goal == "training-rank":
        raise SettingsError(
            f"ranks: got {settings.ranks[0]} only; a comparison needs two or more ranks, such as {settings.ranks[0]},"
            f"{4 * settings.ranks[0]}"
        )
    name = settings.metric_name
    higher_is_better = settings.is_higher_better(name)
    return Space(
        ranks=settings.ranks,
        learning_rates=settings.learning_rates,
        seeds=settings.seeds,
        lora_alpha=settings.lora_alpha,
        steps=steps,
        goal=settings.goal,
        margin=settings.margin,
        metric=name,
        kind=infer_metric_kind(name, higher_is_better, loss_kind),
        higher_is_better=higher_is_better,
        trains_other_modules=loss_kind == "loss" or bool(settings.modules_to_save),
        points_are_losses=settings.points_metric != name,
        budget_steps=None if settings.budget_trainings is None else settings.budget_trainings * steps,
        budget_seconds=None if settings.budget_hours is None else settings.budget_hours * 3600,
    )


@dataclass(slots=True)
class Trials:
    """The outcomes of the arms that a strategy has requested so far."""

    space: Space
    outcomes: dict[Arm, TrialOutcome] = field(default_factory=dict)
    waiting: list[Arm] = field(default_factory=list)  # the requested arms without an outcome, which are to run now
    adapter: AdapterAnswer | None = None  # the deployment rank, once the script has found it
    # Notes of the script for the user. Later outcomes only append notes; each is printed once.
    notes: list[str] = field(default_factory=list)
    _evidence: Evidence | None = None  # of the first `_compared` outcomes; outcomes are only appended
    _compared: int = 0

    spent_steps: int = 0  # of all requested arms
    spent_seconds: float = 0.0  # of those with an outcome

    def get_finished(self, arm: Arm) -> TrialFinished | None:
        outcome = self.outcomes.get(arm)
        return outcome if isinstance(outcome, TrialFinished) else None

    def has_diverged(self, arm: Arm) -> bool:
        return isinstance(self.outcomes.get(arm), TrialDiverged)

    def get_loss(self, arm: Arm) -> float | None:
        """Return the held-out value for which lower is better; None without a result."""
        outcome = self.get_finished(arm)
        return None if outcome is None else orient_value(outcome, self.space)

    @property
    def evidence(self) -> Evidence | None:
        """Return the decision's evidence in the full trainings; None without a result."""
        if self._compared < len(self.outcomes):
            trainings = [
                outcome
                for arm, outcome in self.outcomes.items()
                if arm.is_direct and arm.rank > 0 and arm.steps == self.space.steps
            ]
            table = self.build_table(trainings)
            self._evidence, self._compared = Evidence(table) if table.cells else None, len(self.outcomes)
        return self._evidence

    def build_table(self, outcomes: Sequence[TrialOutcome]) -> ScoreTable:
        """Build the table of outcomes by the metric that decides."""
        space = self.space
        return build_table(outcomes, space.metric, space.higher_is_better, loss=space.criterion.loss)

    def get_training(self, rank: int, learning_rate: float) -> TrialFinished | None:
        """Return the full training with the first seed; None without a result."""
        return self.get_trials_by_seed(rank, learning_rate).get(self.space.seeds[0])

    def get_trials_by_seed(self, rank: int, learning_rate: float) -> dict[int, TrialFinished]:
        """Return the full trainings of the rank at the learning rate."""
        return {
            arm.seed: outcome
            for arm, outcome in self.outcomes.items()
            if (arm.rank, arm.learning_rate, arm.steps) == (rank, learning_rate, self.space.steps)
            if arm.is_direct and isinstance(outcome, TrialFinished)
        }

    def list_ranks(self) -> list[int]:
        """Return the ranks with a full training, descending."""
        return [] if self.evidence is None else sorted(self.evidence.contenders, reverse=True)

    def get_training_loss(self, rank: int, learning_rate: float) -> float:
        """Return the loss of the full training with the first seed; infinite without a result."""
        outcome = self.get_training(rank, learning_rate)
        return math.inf if outcome is None else orient_value(outcome, self.space)

    def find_best_learning_rate(self, rank: int) -> float | None:
        """Return the learning rate at which the decision compares the rank; None without a result."""
        contender = None if self.evidence is None else self.evidence.contenders.get(rank)
        return None if contender is None else contender.learning_rate

    def compute_best_loss(self, rank: int) -> float:
        """Return the loss with which the decision compares the rank; infinite without a result."""
        contender = None if self.evidence is None else self.evidence.contenders.get(rank)
        return math.inf if contender is None else contender.loss

    def find_reference(self) -> int | None:
        """Return the best rank; None without a result."""
        return None if self.evidence is None else self.evidence.reference.rank

    @property
    def margin(self) -> float:
        """Return the margin in the unit of the losses. There must be a result."""
        assert self.evidence is not None
        base = find_base(self.outcomes.values(), self.space.criterion)
        return self.evidence.convert_margin(self.space.margin, None if base is None else base.cell.loss)

    def is_within_margin(self, rank: int) -> bool:
        """Return whether the rank is within the margin of the best by the values. The search uses no bounds."""
        return self.evidence is not None and self.evidence.is_within(rank, self.margin)

    def find_smallest_rank(self) -> int | None:
        """Return the rank that the decision picks by the values; None without a result."""
        return None if self.evidence is None else self.evidence.pick_by_values(self.margin)


def orient_value(outcome: TrialFinished, space: Space) -> float:
    """Return the value with a sign such that lower is better.

    A training that stopped early may have a loss as its value, whatever the metric.
    """
    is_negated = space.higher_is_better and outcome.value_metric is None
    return -outcome.value if is_negated else outcome.value
