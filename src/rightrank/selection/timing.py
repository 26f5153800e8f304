"""The time of a selection before its start, from a few steps measured on this device with this model and this data."""

from __future__ import annotations

from dataclasses import dataclass

from rightrank.engine.pace import Pace, measure_pace
from rightrank.planning.duration import Speed, flops_of, prefix_flops
from rightrank.preparation import Prepared
from rightrank.records import Arm
from rightrank.records.plan import SelectionCost
from rightrank.report.format import duration, quantity
from rightrank.selection.workload import workload

MIN_STEPS = 30  # of a training; the measured steps of a shorter one would be a noticeable part of it


@dataclass(frozen=True, slots=True)
class MeasuredSpeed:
    """Seconds per operation of this run, and the steps that they come from."""

    speed: Speed
    pace: Pace

    def basis(self) -> str:
        steps = quantity(len(self.pace.batches), "step")
        return f"{steps} of rank {self.pace.rank} and {quantity(len(self.pace.evaluated), 'validation example')}"


def measured_speed(prepared: Prepared) -> MeasuredSpeed | None:
    """Measure; None where trainings run in other processes, operations can't be counted, or memory runs out."""
    settings, planned = prepared.settings, prepared.planned
    if settings.executor != "local" or planned is None or planned.estimator.untraceable is not None:
        return None
    rank = max(settings.ranks)
    arm = Arm(
        rank=rank,
        learning_rate=min(settings.learning_rates),
        lora_alpha=settings.lora_alpha,
        seed=settings.seeds[0],
        steps=prepared.steps,
    )
    pace = measure_pace(prepared.runtime, arm)
    if pace is None:
        return None
    work = workload(prepared, pace.batches, pace.evaluated)
    flops = flops_of(planned.estimator, rank, work)
    speed = Speed(
        pace.train_seconds / flops.training,
        pace.eval_seconds / flops.evaluation,
        seconds_per_prefix_flop=_of_prefix(prepared, pace, prefix_flops(planned.estimator) * work.filled),
    )
    return MeasuredSpeed(speed, pace)


def _of_prefix(prepared: Prepared, pace: Pace, flops_each: float) -> float | None:
    """Seconds per operation of the blocks that are computed once; None where there are none, or a reference beside them."""
    if not pace.filled or not flops_each or prepared.runtime.data.is_preference:
        return None
    return pace.fill_seconds / (pace.filled * flops_each)


def time_line(cost: SelectionCost, measured: MeasuredSpeed, budget_hours: float | None) -> str:
    """The expected and the largest time of the selection, within its budget."""
    expected, most = cost.expected.seconds, cost.most.seconds
    assert expected is not None
    assert most is not None
    basis = f"measured before the start: {measured.basis()}, then discarded"
    if budget_hours is not None and most > budget_hours * 3600:
        allowed = budget_hours * 3600
        without = "" if expected <= allowed else f"; without the budget of time about {duration(expected)}"
        return f"time: about {duration(min(expected, allowed))}, at most {duration(allowed)}{without} ({basis})"
    return f"time: about {duration(expected)}, at most {duration(most)} ({basis})"
