"""The Python API: one function for each verb, records in and records out, nothing printed.

The command line is a thin layer over it. Every function imports what it needs when it is called, so that importing
this package costs nothing.
"""

from __future__ import annotations

from rightrank.api.adapters import allocate, inspect, inspect_gradient, resize, resize_together
from rightrank.api.comparing import compare, fleet
from rightrank.api.custom import select_rank_with
from rightrank.api.deciding import decide, judge, plan
from rightrank.api.runs import doctor, export, repair, status, write_report, write_side_by_side
from rightrank.api.selecting import begun_as, plan_selection, preflight, select_rank
from rightrank.records import Decision, EvalPoint, TrialResult, TrialTask
from rightrank.records.compare import AdapterComparison
from rightrank.records.fleet import Fleet
from rightrank.records.observer import Observer
from rightrank.records.plan import Plan
from rightrank.records.preflight import Preflight
from rightrank.records.probe import Inspection, Resized
from rightrank.returns import Decided, Selected
from rightrank.settings import PlanSettings, SelectSettings, make_plan_settings, make_settings
from rightrank.settings.resize import ResizeOptions

__all__ = [
    "AdapterComparison",
    "Decided",
    "Decision",
    "EvalPoint",
    "Fleet",
    "Inspection",
    "Observer",
    "Plan",
    "PlanSettings",
    "Preflight",
    "ResizeOptions",
    "Resized",
    "SelectSettings",
    "Selected",
    "TrialResult",
    "TrialTask",
    "allocate",
    "begun_as",
    "compare",
    "decide",
    "doctor",
    "export",
    "fleet",
    "inspect",
    "inspect_gradient",
    "judge",
    "make_plan_settings",
    "make_settings",
    "plan",
    "plan_selection",
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
