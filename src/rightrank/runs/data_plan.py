"""The plan of a selection on its data: the same preparation as the selection's, and no training."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from rightrank.hooks.outlook import measured_speed, strategy_of, workload
from rightrank.plugins.plan.calibrate import calibrate
from rightrank.plugins.plan.duration import PlannedTrainings, selection_cost
from rightrank.plugins.plan.planner import plan_config, speed_of
from rightrank.runs.prepare import Prepared, Request, prepare
from rightrank.schema.errors import ModelError
from rightrank.schema.plan_settings import TRAININGS_OF_SELECT, PlanSettings
from rightrank.schema.results import Plan


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
        if planned is None:
            raise ModelError(
                f"{request.model_name}: this architecture can't be planned; `select` runs it without a plan"
            )
        config, settings = prepared.runtime.model.config, _with_trainings(planned.estimator.settings, prepared)
        settings = settings.model_copy(update={"price_per_hour": price_per_hour})
        calibration = calibrate(config, settings) if measure else planned.calibration
        trainings = PlannedTrainings.of(strategy_of(prepared))
        fitting = planned.estimator.variant(ranks=planned.ranks)
        measured = None if measure else measured_speed(prepared)
        speed = (
            speed_of(calibration, settings)
            if measured is None
            else replace(measured.speed, price_per_hour=price_per_hour)
        )
        if measured is not None:
            notes.append(f"time: measured on this device: {measured.basis()}, then discarded")
        cost = selection_cost(fitting, trainings, workload(prepared), speed)
        plan = plan_config(config, request.model_name, settings, calibration, selection=cost)
    return plan.model_copy(update={"notes": [*notes, *plan.notes], "data": prepared.started.data})


def _with_trainings(settings: PlanSettings, prepared: Prepared) -> PlanSettings:
    """The plan's settings with those of the selection's trainings."""
    given = {name: getattr(prepared.settings, name) for name in TRAININGS_OF_SELECT}
    return settings.model_copy(update=given | {"max_steps": prepared.steps})
