"""The time of a selection on this device, and its plan: operations at the speed of a few real steps or of a calibration."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rightrank.data.token_store import longest_sequence
from rightrank.plugins.plan.calibrate import calibrate
from rightrank.plugins.plan.duration import PlannedTrainings, Speed, Workload, flops_of, prefix_flops, selection_cost
from rightrank.plugins.plan.planner import plan_config, speed_of
from rightrank.plugins.plan.selection import SelectionPlan
from rightrank.report.format import quantity
from rightrank.runs.prepare import Prepared, prepare, strategy_of
from rightrank.runs.request import Request
from rightrank.schema.errors import ModelError
from rightrank.schema.plan_settings import TRAININGS_OF_SELECT
from rightrank.schema.results import Plan, SelectionCost
from rightrank.schema.trials import Arm
from rightrank.search.protocol import Strategy
from rightrank.train.pace import Pace, measure_pace
from rightrank.train.tokens import label_count


class SelectionClock:
    """The time of the prepared selection's trainings under any strategy."""

    def __init__(self, plan: SelectionPlan, prepared: Prepared, measured: MeasuredSpeed | None) -> None:
        self._plan, self._prepared, self._measured = plan, prepared, measured

    @property
    def basis(self) -> str | None:
        return None if self._measured is None else self._measured.basis()

    def cost(self, strategy: Strategy) -> SelectionCost | None:
        return None if self.speed is None else self.cost_at(strategy, self.speed)

    @property
    def speed(self) -> Speed | None:
        """Measured, or of the calibration; None where there is neither."""
        plan = self._plan
        if self._measured is not None:
            return self._measured.speed
        return speed_of(plan.calibration, plan.estimator.settings) if plan.is_timed else None

    def cost_at(self, strategy: Strategy, speed: Speed) -> SelectionCost:
        fitting = self._plan.estimator.variant(ranks=self._plan.ranks)
        return selection_cost(fitting, PlannedTrainings.of(strategy), workload(self._prepared), speed)


def workload(
    prepared: Prepared, batches: Sequence[Sequence[int]] | None = None, evaluated: Sequence[int] | None = None
) -> Workload:
    """The work of one training, counted over all its batches.

    Args:
        prepared: the selection.
        batches: training examples of each step; None for those of a whole training.
        evaluated: validation examples; None for all.
    """
    data, settings = prepared.runtime.data, prepared.settings
    train = data.splits["train"]
    batches = prepared.runtime.batch_plan(settings.seeds[0]) if batches is None else batches
    size = settings.batch_size
    micro = [batch[start : start + size] for batch in batches for start in range(0, len(batch), size)]
    used = [train[index] for rows in micro for index in rows]
    if prepared.runtime.fast_paths.sequence_packing:
        computed = sum(example.length for example in used)
    else:
        padded = sum(len(rows) * longest_sequence([train[index] for index in rows]) for rows in micro)
        computed = padded * data.sequences_per_example
    labels = sum(label_count(example) for example in used)
    trained = len({index for rows in micro for index in rows})
    held_out = len(data.splits["selection"]) if evaluated is None else len(evaluated)
    return Workload(
        steps=len(batches),
        examples=trained * data.sequences_per_example,
        eval_examples=held_out * data.sequences_per_example,
        eval_points=settings.eval_points,
        passes=settings.gradient_accumulation_steps,
        filled=computed / (len(used) * data.sequences_per_example * data.longest),
        labelled=1.0 if data.is_classification else labels / computed,
        reference=trained / held_out + 2 if data.is_preference else 0.0,
    )


@dataclass(frozen=True, slots=True)
class MeasuredSpeed:
    """Seconds per operation of this run, and the steps that they come from."""

    speed: Speed
    pace: Pace

    def basis(self) -> str:
        steps = quantity(len(self.pace.batches), "step")
        return f"{steps} of rank {self.pace.rank} and {quantity(len(self.pace.evaluated), 'validation example')}"


def measured_speed(planned: SelectionPlan, prepared: Prepared) -> MeasuredSpeed | None:
    """Measure; None where trainings run in other processes, operations can't be counted, or memory runs out."""
    settings = prepared.settings
    if settings.executor != "local" or planned.estimator.untraceable is not None:
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


def plan_data(request: Request, price_per_hour: float | None = None, measure: bool = False) -> Plan:
    """The plan of `select` with the same request: its ranks, steps, lengths, splits and trainings.

    Args:
        request: as for the selection.
        price_per_hour: of this device.
        measure: calibrate this device for plans without data, in place of a few steps of this selection.

    Raises:
        InputError: as a selection raises it before its first training.
        ModelError: an architecture that can't be planned.
    """
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="rightrank-") as folder:
        prepared = prepare(request, Path(folder) / "cache", notes.append)
        planned = prepared.planned
        if not isinstance(planned, SelectionPlan):
            raise ModelError(
                f"{request.model_name}: this architecture can't be planned; `select` runs it without a plan"
            )
        config = prepared.runtime.model.config
        given = {name: getattr(prepared.settings, name) for name in TRAININGS_OF_SELECT}
        given |= {"max_steps": prepared.steps, "price_per_hour": price_per_hour}
        settings = planned.estimator.settings.model_copy(update=given)
        calibration = calibrate(config, settings) if measure else planned.calibration
        clock = planned.clock(prepared, measure=not measure)
        if clock.basis is not None:
            notes.append(f"time: measured on this device: {clock.basis}, then discarded")
            assert clock.speed is not None
            speed = replace(clock.speed, price_per_hour=price_per_hour)
        else:
            speed = speed_of(calibration, settings)
        cost = clock.cost_at(strategy_of(prepared), speed)
        plan = plan_config(config, request.model_name, settings, calibration, selection=cost)
    return plan.model_copy(update={"notes": [*notes, *plan.notes], "data": prepared.started.data})
