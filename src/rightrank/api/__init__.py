"""The Python API: one function for each verb, records in and records out, nothing printed.

The command line is a thin layer over it. Every function imports what it needs when it is called, so that importing
this package costs nothing.
"""

from __future__ import annotations

from rightrank.adapters.resize import ResizeOptions
from rightrank.api.adapters import compare, inspect, inspect_gradient, resize, resize_together
from rightrank.api.deciding import decide
from rightrank.api.runs import doctor, export, repair, status, write_report, write_side_by_side
from rightrank.api.selecting import begun_as, preflight, select_rank, select_rank_with
from rightrank.runs.returns import Decided, Selected
from rightrank.schema.decision import Decision
from rightrank.schema.plan_settings import PlanSettings, make_plan_settings
from rightrank.schema.results import AdapterComparison, Inspection, Plan, Preflight, Resized
from rightrank.schema.settings import SelectSettings, make_settings
from rightrank.schema.trials import EvalPoint, TrialResult, TrialTask

__all__ = [
    "AdapterComparison",
    "Decided",
    "Decision",
    "EvalPoint",
    "Inspection",
    "Plan",
    "PlanSettings",
    "Preflight",
    "ResizeOptions",
    "Resized",
    "SelectSettings",
    "Selected",
    "TrialResult",
    "TrialTask",
    "begun_as",
    "compare",
    "decide",
    "doctor",
    "export",
    "inspect",
    "inspect_gradient",
    "make_plan_settings",
    "make_settings",
    "preflight",
    "repair",
    "resize",
    "resize_together",
    "select_rank",
    "select_rank_with",
    "status",
    "write_report",
    "write_side_by_side",
]
