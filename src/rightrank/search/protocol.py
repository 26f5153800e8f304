"""The interface of a strategy: the space that it searches, the trials so far, and a script, which yields the arms that it needs.

`replay_trials` replays the script from the beginning over the outcomes so far and stops at the first arms without one. The
script sees the outcomes of its own arms and nothing else, so that it is a pure function of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import TypeAlias

from rightrank.adapters.find_smallest import find_smallest
from rightrank.decision.adapter import Criterion, ReferenceComparison, build_truncation_answer
from rightrank.decision.evidence import Evidence
from rightrank.decision.run_answers import find_base, score_trials
from rightrank.decision.table import Contender, ScoreTable, build_table
from rightrank.schema.errors import SettingsError
from rightrank.schema.metrics import LossKind
from rightrank.schema.results import AdapterAnswer
from rightrank.schema.settings import LONGER_TRAININGS, Goal, SelectSettings
from rightrank.schema.trials import Arm, TrialFinished, TrialOutcome, compute_added_seconds, count_added_steps
from rightrank.search.rates import RATES, choose_start_rates

# Whole trainings that a goal needs beside that of the best learning rate: the longer one, or a second rank.
TRAININGS_AFTER_SEARCH: Mapping[Goal, int] = {"adapter": 0, "best-adapter": LONGER_TRAININGS, "training-rank": 1}

Requests: TypeAlias = Iterator[Sequence[Arm]]  # yielded by a script: arms that may run at the same time


@dataclass(frozen=True, slots=True)
class Space:
    """The space of a selection. Ranks and learning rates ascend."""

    ranks: tuple[int, ...]
    learning_rates: tuple[float, ...]  # to compare; with `start_rates`, those at which a walk may train
    seeds: tuple[int, ...]
    lora_alpha: float
    steps: int  # optimizer steps of a full training
    criterion: Criterion  # by which trainings and truncations are compared
    evaluates_base: bool = True  # False: there is no trial of rank 0 and no comparison with the base
    goal: Goal = "training-rank"
    can_stop_early: bool = True  # whether trainings can stop early and resume; False for custom trainers
    can_truncate: bool = True  # whether adapters can be truncated and evaluated
    start_rates: tuple[float, ...] = ()  # neighbours in `learning_rates` from which to walk; empty: compare all
    trains_other_modules: bool = False  # such as a head, which the base of the gain keeps
    budget_steps: float | None = None  # optimizer steps over all arms
    budget_seconds: float | None = None  # time of training and evaluation, over all arms

    @property
    def top(self) -> int:
        return self.ranks[-1]

    @property
    def first_rates(self) -> tuple[float, ...]:
        """Return the learning rates that a search trains first."""
        return self.start_rates or self.learning_rates

    @property
    def expected_rates(self) -> int:
        """Return the number of learning rates that a search is expected to compare."""
        return len(self.start_rates) + 1 if self.start_rates else len(self.learning_rates)

    @property
    def max_rates(self) -> int:
        """Return the maximum number of learning rates that a search compares: those of a walk to the farther end."""
        if not self.start_rates:
            return len(self.learning_rates)
        below = self.learning_rates.index(self.start_rates[0])
        above = len(self.learning_rates) - below - len(self.start_rates)
        return len(self.start_rates) + max(below, above)

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


def build_space(
    settings: SelectSettings, steps: int, loss_kind: LossKind = "token_loss", num_parameters: int | None = None
) -> Space:
    """Build the space of a selection with trainings of `steps` steps.

    Args:
        num_parameters: of the base model, which tell where a walk over learning rates starts; None if unknown.

    Raises:
        SettingsError: there is only one rank, although ranks are to be compared.
    """
    if len(settings.ranks) < 2 and settings.goal == "training-rank":
        raise SettingsError(
            f"ranks: got {settings.ranks[0]} only; a comparison needs two or more ranks, such as {settings.ranks[0]},"
            f"{4 * settings.ranks[0]}"
        )
    metric = settings.metric_name
    return Space(
        ranks=settings.ranks,
        learning_rates=settings.learning_rates or RATES,
        start_rates=() if settings.learning_rates else choose_start_rates(num_parameters),
        seeds=settings.seeds,
        lora_alpha=settings.lora_alpha,
        steps=steps,
        criterion=Criterion(metric, settings.is_higher_better(metric), settings.margin, loss_kind),
        goal=settings.goal,
        trains_other_modules=loss_kind == "loss" or bool(settings.modules_to_save),
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

    @property
    def affords_rate(self) -> bool:
        """Return whether the budget allows one more learning rate, and after it what the goal needs."""
        space, spent = self.space, self.spent_steps
        needed = (1 + TRAININGS_AFTER_SEARCH[space.goal]) * space.steps
        seconds = self.spent_seconds * (spent + needed) / spent if spent else 0.0
        limits = [(spent + needed, space.budget_steps), (seconds, space.budget_seconds)]
        return all(limit is None or amount <= limit for amount, limit in limits)

    def get_finished(self, arm: Arm) -> TrialFinished | None:
        outcome = self.outcomes.get(arm)
        return outcome if isinstance(outcome, TrialFinished) else None

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
        criterion = self.space.criterion
        return build_table(outcomes, criterion.metric, criterion.higher_is_better, loss=criterion.loss)

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

    @property
    def contenders(self) -> Mapping[int, Contender]:
        """Return what the decision compares: the full trainings of each rank at its best learning rate."""
        return {} if self.evidence is None else self.evidence.contenders

    def list_ranks(self) -> list[int]:
        """Return the ranks with a full training, descending."""
        return sorted(self.contenders, reverse=True)

    def get_training_loss(self, rank: int, learning_rate: float) -> float:
        """Return the loss of the full training with the first seed; infinite without a result."""
        outcome = self.get_training(rank, learning_rate)
        return math.inf if outcome is None else orient_value(outcome, self.space)

    def find_best_learning_rate(self, rank: int) -> float | None:
        """Return the learning rate at which the decision compares the rank; None without a result."""
        return self.contenders[rank].learning_rate if rank in self.contenders else None

    def compute_best_loss(self, rank: int) -> float:
        """Return the loss with which the decision compares the rank; infinite without a result."""
        return self.contenders[rank].loss if rank in self.contenders else math.inf

    def find_reference(self) -> int | None:
        """Return the best rank; None without a result."""
        return None if self.evidence is None else self.evidence.reference.rank

    @property
    def margin(self) -> float:
        """Return the margin in the unit of the losses. There must be a result."""
        assert self.evidence is not None
        return self.convert_margin(self.evidence)

    def convert_margin(self, evidence: Evidence) -> float:
        """Return the margin in the unit of the losses, with the gain over the base of these outcomes."""
        base = find_base(self.outcomes.values(), self.space.criterion)
        return evidence.convert_margin(self.space.criterion.margin, None if base is None else base.cell.loss)

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
    is_negated = space.criterion.higher_is_better and outcome.value_metric is None
    return -outcome.value if is_negated else outcome.value


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """The cost of a strategy in full trainings: the optimizer steps of all its arms over the steps of one training."""

    expected: float
    maximum: float
    expected_until_adapter: float  # expected cost until the deployment rank is found
    minimum: (
        float  # the smallest budget within which the strategy can answer: it finishes an adapter, or compares two ranks
    )
    max_arms: int  # an upper bound of the number of arms, including the base


class Strategy(ABC):
    """Decides which arms to train next, within the budget.

    A subclass defines `name` and `script`. These rules hold for every name in `STRATEGIES` (`tests/search/test_conformance.py`):

    - It is a pure function of the history and keeps no state. The same outcomes, in any order, give the same arms: a run
      resumes from its journal alone, and a table of finished runs replays as real training does.
    - Every arm lies in the space: a rank, a learning rate and a seed of the space, or the truncation of a finished trial.
      The base arm comes first.
    - It waits only for arms without an outcome, and for no arm twice.
    - It eventually waits for none, whichever trials fail or diverge. A failed trial is a missing cell and no evidence
      against its rank.
    - Arms and steps stay within `estimate_cost().max_arms`, `estimate_cost().maximum` and the budget of the space.
    - Outcomes of arms that the strategy did not request change nothing.

    For example::

        class TopAndBottom(Strategy):
            name = "top-and-bottom"

            def script(self, trials: Trials) -> Requests:
                learning_rate = yield from find_learning_rate(trials, self.space.top)
                if learning_rate is not None:
                    yield from try_rank(trials, self.space.ranks[0])

            def estimate_unbounded_cost(self) -> CostEstimate:
                rates = self.space.max_rates
                return CostEstimate(2.0, 2.0 * rates, 2.0 * rates, 2.0, 1 + 4 * rates)
    """

    name: str

    def __init__(self, space: Space) -> None:
        self.space = space

    @abstractmethod
    def script(self, trials: Trials) -> Requests:
        """Yield the arms to run, in turn. After a `yield`, `trials` holds the outcomes of all arms yielded so far."""

    @abstractmethod
    def estimate_unbounded_cost(self) -> CostEstimate:
        """Estimate the cost without a budget."""

    def _count_cells(self) -> int:
        """Return the maximum number of cells of the rank × learning rate × seed grid."""
        return len(self.space.ranks) * self.space.max_rates * len(self.space.seeds)

    def estimate_arms(self) -> int:
        """Estimate how many arms there will be in total, for the progress display."""
        cost = self.estimate_cost()
        return min(cost.max_arms, int(self.space.evaluates_base) + round(1.6 * cost.expected))

    def estimate_cost(self) -> CostEstimate:
        """Estimate the cost before anything has run, at most the budget of the space, including the base if the space evaluates it."""
        cost, budget, space = self.estimate_unbounded_cost(), self.space.budget_steps, self.space
        maximum = cost.maximum if budget is None else min(cost.maximum, budget / space.steps)
        arms = cost.max_arms - 1 + int(space.evaluates_base)
        expected, to_adapter = min(cost.expected, maximum), min(cost.expected_until_adapter, maximum)
        return CostEstimate(expected, maximum, to_adapter, cost.minimum, arms)

    def replay_trials(self, outcomes: Iterable[TrialOutcome]) -> Trials:
        """Replay the script. Return the outcomes that it has seen, the arms that it waits for, the deployment rank and its notes.

        The arms may run in any order and at the same time.
        """
        trials, outcomes_by_arm = Trials(self.space), {outcome.arm: outcome for outcome in outcomes}
        finished = {
            outcome.trial_id: outcome for outcome in outcomes_by_arm.values() if isinstance(outcome, TrialFinished)
        }
        limits = self.space.budget_steps, self.space.budget_seconds
        most_steps, most_seconds = (math.inf if limit is None else limit for limit in limits)
        # The base without an adapter is evaluated once and is a point of every curve.
        base_arm = Arm(rank=0, learning_rate=0.0, lora_alpha=self.space.lora_alpha, seed=0, steps=0)
        base = [[base_arm]] if self.space.evaluates_base else []
        for requested_arms in chain(base, self.script(trials)):
            for arm in requested_arms:
                if arm in trials.outcomes:
                    continue
                steps = count_added_steps(arm, finished)
                outcome = outcomes_by_arm.get(arm)
                pace = trials.spent_seconds / trials.spent_steps if trials.spent_steps else 0.0
                trials.spent_steps += steps
                seconds = trials.spent_seconds + (pace * steps if outcome is None else 0.0)
                # The evaluation of a truncation is short, and without it a training hands over no smaller adapter.
                if steps and (trials.spent_steps > most_steps or seconds > most_seconds):
                    if not trials.waiting:
                        trials.notes.append(
                            f"The budget ends before {arm.format_label()} ({steps} steps); with a larger one, the same command continues."
                        )
                    return trials
                if outcome is None:
                    trials.waiting.append(arm)
                    continue
                trials.outcomes[arm] = outcome
                if isinstance(outcome, TrialFinished):
                    trials.spent_seconds += compute_added_seconds(outcome, finished)
            if trials.waiting:
                break
        return trials


def choose_adapter(
    outcomes: Sequence[TrialOutcome], criterion: Criterion, top_id: str | None = None
) -> AdapterAnswer | None:
    """Choose the smallest adapter within the margin, or return None if no training has been truncated.

    Args:
        outcomes: the outcomes of a run; only finished trials count.
        top_id: the training whose truncations are the candidates; None: the best one that was truncated.
    """
    adapters = score_trials(outcomes, criterion)
    trials = {trial.trial_id: trial for trial in outcomes if isinstance(trial, TrialFinished)}
    parents = {name: trials[name].truncate_from for name in adapters}
    tops = [adapters[name] for name in adapters if name in parents.values() and top_id in (None, name)]
    if not tops:
        return None
    top = min(tops, key=lambda adapter: (-adapter.rank, adapter.cell.loss, adapter.name))
    truncations = [adapters[name] for name, parent in parents.items() if parent == top.name]
    base = find_base(outcomes, criterion, top.name)
    by_rank = {adapter.rank: adapter for adapter in [*truncations, *([base] if base else [])]}
    smallest = find_smallest(top, by_rank, by_rank.get, lambda adapter: adapter, criterion)
    comparison = ReferenceComparison(top, adapters, criterion, base)
    # A pass over the base evaluates all truncations together, so the answer also lists those below the first that fails.
    return build_truncation_answer(smallest.adapter, truncations, comparison)
