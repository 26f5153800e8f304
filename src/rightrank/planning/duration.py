"""Time and price of a whole selection: what its strategy asks for, times what a training of each rank takes.

A strategy says how many whole trainings it expects and needs at most (`strategies.protocol.CostEstimate`). A training is its
steps and the evaluations on its way. Once for a run come the base's evaluation, three on the test split (base, chosen,
reference) and the frozen blocks below the adapters; arms that are stopped early or cut from another end with an
evaluation of their own. Operations are counted in the traces; seconds come from what was measured on this device.
Not counted: loading, checkpoints, samples, the report.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean

from rightrank.errors import SettingsError
from rightrank.planning.estimate import Estimator
from rightrank.records.plan import Extent, RankTraining, SelectionCost
from rightrank.settings import PlanSettings, make_settings
from rightrank.strategies import Strategy, make_strategy

ONCE_EVALUATED = 4  # the base, and three on the test split, which is about as large


@dataclass(frozen=True, slots=True)
class Workload:
    """What a training runs, beside what the plan's settings say."""

    steps: int  # optimizer steps of a whole training
    items: int  # different training items that it sees
    eval_items: int
    eval_points: int
    passes: int = 1  # over micro-batches, in a step
    filled: float = 1.0  # positions computed for an item in the mean, with padding, as a share of the planned length
    labelled: float = 1.0  # share of positions with a label, where the output head runs


@dataclass(frozen=True, slots=True)
class Asked:
    """Trainings that a strategy asks for, and the evaluations that are not on the way of one."""

    strategy: str | None
    expected: float
    most: float
    expected_extra: float = 0.0
    most_extra: float = 0.0

    @classmethod
    def of(cls, strategy: Strategy) -> Asked:
        cost = strategy.cost()
        extra = [
            max(0.0, arms - 1 - trainings)
            for arms, trainings in ((strategy.expected_arms(), cost.expected), (strategy.max_arms(), cost.maximum))
        ]
        return cls(strategy.name, cost.expected, cost.maximum, extra[0], extra[1])


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds an operation, of steps and of forward passes alone; and the price of an hour."""

    seconds_per_flop: float | None = None
    seconds_per_forward_flop: float | None = None
    price_per_hour: float | None = None

    def seconds(self, training: float, forward: float) -> float | None:
        if self.seconds_per_flop is None or self.seconds_per_forward_flop is None:
            return None
        return training * self.seconds_per_flop + forward * self.seconds_per_forward_flop

    def price(self, seconds: float | None) -> float | None:
        return None if seconds is None or self.price_per_hour is None else seconds / 3600 * self.price_per_hour


@dataclass(frozen=True, slots=True)
class _Flops:
    """Of one rank: a whole training's steps, and one pass over the held-out items."""

    training: float
    evaluation: float


def asked_by(settings: PlanSettings) -> Asked | None:
    """What the plan's strategy, or its number of trainings, asks for; None where neither was given.

    Raises:
        SettingsError: an unknown strategy, one rank alone, or a budget that compares nothing.
    """
    if settings.trainings is not None:
        return Asked(None, settings.trainings, settings.trainings)
    if settings.strategy is None or settings.steps is None:
        return None
    shared = {name: getattr(settings, name) for name in ("strategy", "ranks", "learning_rates", "seeds")}
    return Asked.of(
        make_strategy(make_settings(shared | {"budget_trainings": settings.budget_trainings}), settings.steps)
    )


def workload_of(settings: PlanSettings) -> Workload:
    """Of a plan without data: rows of full length, every item seen once."""
    if settings.steps is None:
        raise SettingsError("the time of a selection needs the steps of a training: give steps")
    return Workload(settings.steps, settings.steps * settings.batch_size, settings.eval_items, settings.eval_points)


def selection_cost(estimator: Estimator, asked: Asked, work: Workload, pace: Pace) -> SelectionCost:
    """What the selection takes, expected and at most."""
    settings = estimator.settings
    counted = {rank: _flops_of(estimator, rank, work) for rank in settings.ranks}
    trainings = []
    for rank, flops in counted.items():
        forward = flops.evaluation * work.eval_points
        seconds = pace.seconds(flops.training, forward)
        trainings.append(
            RankTraining(rank=rank, flops=flops.training + forward, seconds=seconds, price=pace.price(seconds))
        )
    mean = _Flops(fmean(f.training for f in counted.values()), fmean(f.evaluation for f in counted.values()))
    dearest = max(counted.values(), key=lambda flops: flops.training)
    prefix = _prefix_flops(estimator) * (work.items + 2 * work.eval_items) * work.filled
    once = replace(mean, training=0.0)
    return SelectionCost(
        strategy=asked.strategy,
        steps=work.steps,
        ranks=trainings,
        prefix_flops=prefix,
        evaluation_flops=mean.evaluation,
        expected=_extent(asked.expected, asked.expected_extra, mean, once, prefix, work, pace),
        most=_extent(asked.most, asked.most_extra, dearest, once, prefix, work, pace),
    )


def _extent(
    trainings: float, extra: float, each: _Flops, once: _Flops, prefix: float, work: Workload, pace: Pace
) -> Extent:
    training = each.training * trainings
    forward = each.evaluation * (trainings * work.eval_points + extra) + once.evaluation * ONCE_EVALUATED + prefix
    seconds = pace.seconds(training, forward)
    return Extent(trainings=trainings, flops=training + forward, seconds=seconds, price=pace.price(seconds))


def _flops_of(estimator: Estimator, rank: int, work: Workload) -> _Flops:
    """Of the trained arms alone: what the frozen prefix and unlabelled positions save is taken off."""
    settings = estimator.settings
    rows = settings.batch_size * settings.arms
    prefix = _prefix_flops(estimator)
    head = estimator.head_flops * (1 - work.labelled)
    step = estimator.flops(rank) - rows * (prefix + 2 * head)  # the head runs forwards and backwards
    forward = estimator.forward_flops(rank) - prefix - head
    scale = work.filled
    return _Flops(step / settings.arms * scale * work.passes * work.steps, forward * scale * work.eval_items)


def _prefix_flops(estimator: Estimator) -> float:
    """Forward through the blocks that `select` computes once, of one row."""
    return estimator.frozen_flops if estimator.settings.is_packed else 0.0
