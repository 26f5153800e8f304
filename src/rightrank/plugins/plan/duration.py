"""Operations and time of a whole selection: the trainings its strategy requests, times the cost of one training.

    flops = trainings · (steps · step + eval_points · evaluation) + extra · evaluation
            + RUN_EVALUATIONS · evaluation + prefix

A strategy gives the whole trainings that it expects and its maximum (`strategies.protocol.CostEstimate`). `extra` counts
the evaluations of arms that are stopped early or truncated from another. Each run also evaluates the base, three times
the test split (base, chosen, reference), and computes the frozen blocks below the adapters once (`prefix`). Preference
pairs take one more pass over every example, for the log-probabilities under the base (`reference`). The traces count operations; a few real steps give seconds. Not counted: loading, checkpoints, samples, the report.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from rightrank.plugins.plan.estimate import Estimator
from rightrank.schema.errors import SettingsError
from rightrank.schema.plan_settings import TRAININGS_OF_SELECT, PlanSettings
from rightrank.schema.results import Extent, RankTraining, SelectionCost
from rightrank.schema.settings import make_settings
from rightrank.search.protocol import Strategy
from rightrank.search.strategies import make_strategy

RUN_EVALUATIONS = 4  # of the base, and three of the test split, which is about as large


@dataclass(frozen=True, slots=True)
class Workload:
    """The size of one training, beside the plan's settings."""

    steps: int  # optimizer steps of a whole training
    examples: int  # different training examples that it sees
    eval_examples: int
    eval_points: int
    passes: int = 1  # micro-batches in a step
    filled: float = 1.0  # mean positions computed for an example, padding included, as a share of the planned length
    labelled: float = 1.0  # share of positions with a label, where the output head runs
    reference: float = 0.0  # the passes for the reference of preference pairs, in evaluations


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds per operation, of training steps and of forward passes."""

    seconds_per_flop: float
    seconds_per_forward_flop: float
    seconds_per_prefix_flop: float | None = None  # of the blocks that are computed once; None: as of forward passes

    def seconds(self, training: float, forward: float, prefix: float) -> float:
        of_prefix = self.seconds_per_prefix_flop or self.seconds_per_forward_flop
        return training * self.seconds_per_flop + forward * self.seconds_per_forward_flop + prefix * of_prefix


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of one rank: the steps of a whole training, and one pass over the held-out examples."""

    training: float
    evaluation: float


def planned_strategy(settings: PlanSettings) -> Strategy | None:
    """The strategy of the plan; None where none was given.

    Raises:
        SettingsError: an unknown strategy, a single rank, or a budget too small for any comparison.
    """
    if settings.strategy is None or settings.max_steps is None:
        return None
    shared = {name: getattr(settings, name) for name in ("ranks", *TRAININGS_OF_SELECT)}
    return make_strategy(make_settings(shared), settings.max_steps)


def workload_of(settings: PlanSettings) -> Workload:
    """The workload of a plan without data: rows of full length, every example seen once."""
    if settings.max_steps is None:
        raise SettingsError("the cost of a selection needs the steps of a training; give max_steps")
    return Workload(
        settings.max_steps, settings.max_steps * settings.batch_size, settings.eval_items, settings.eval_points
    )


def selection_cost(
    estimator: Estimator, strategy: Strategy, work: Workload, speed: Speed | None = None
) -> SelectionCost:
    """The cost of the selection, expected and at most; its seconds where the speed of this device was measured."""
    counted = {rank: flops_of(estimator, rank, work) for rank in estimator.settings.ranks}
    mean = Flops(fmean(f.training for f in counted.values()), fmean(f.evaluation for f in counted.values()))
    costliest = max(counted.values(), key=lambda flops: flops.training)
    prefix = prefix_flops(estimator) * (work.examples + 2 * work.eval_examples) * work.filled
    shared = mean.evaluation * (RUN_EVALUATIONS + work.reference)
    cost = strategy.cost()

    def extent(trainings: float, arms: float, each: Flops) -> Extent:
        training, extra = each.training * trainings, max(0.0, arms - 1 - trainings)
        forward = each.evaluation * (trainings * work.eval_points + extra) + shared
        seconds = None if speed is None else speed.seconds(training, forward, prefix)
        return Extent(trainings=trainings, flops=training + forward + prefix, seconds=seconds)

    return SelectionCost(
        strategy=strategy.name,
        steps=work.steps,
        ranks=[
            RankTraining(rank=rank, flops=flops.training + flops.evaluation * work.eval_points)
            for rank, flops in counted.items()
        ],
        prefix_flops=prefix,
        evaluation_flops=mean.evaluation,
        expected=extent(cost.expected, strategy.expected_arms(), mean),
        most=extent(cost.maximum, strategy.max_arms(), costliest),
    )


def flops_of(estimator: Estimator, rank: int, work: Workload) -> Flops:
    """Operations of one rank, less what the cached prefix and positions without a label save."""
    settings = estimator.settings
    rows = settings.batch_size * settings.adapters_per_pass
    prefix = prefix_flops(estimator)
    head = estimator.head_flops * (1 - work.labelled)
    step = estimator.flops(rank) - rows * (prefix + 2 * head)  # the head runs forward and backward
    forward = estimator.forward_flops(rank) - prefix - head
    scale = work.filled
    return Flops(
        step / settings.adapters_per_pass * scale * work.passes * work.steps, forward * scale * work.eval_examples
    )


def prefix_flops(estimator: Estimator) -> float:
    """Forward operations of one row through the blocks that `select` computes once."""
    return estimator.frozen_flops if estimator.settings.is_packed else 0.0
