"""Find the LoRA rank that is enough and no more: measured on your model and your data.

from rightrank import select_rank

selected = select_rank(model="path/to/model", data="data.jsonl", out="run", ranks=(4, 16, 64))
print(selected.decision.rank, selected.adapter)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from rightrank.version import __version__

if TYPE_CHECKING:
    from rightrank.api import Decided, Selected, Watching, decide, inspect, plan, resize, select_rank
    from rightrank.own_trainer import select_rank_with
    from rightrank.probe.resizing import ResizeOptions
    from rightrank.records import Decision, EvalPoint, TrialResult, TrialTask
    from rightrank.records.plan import Plan
    from rightrank.records.probe import Inspection, Resized
    from rightrank.runs import export, write_report
    from rightrank.settings import PlanSettings, SelectSettings, make_plan_settings, make_settings

__all__ = [
    "Decided",
    "Decision",
    "EvalPoint",
    "Inspection",
    "Plan",
    "PlanSettings",
    "ResizeOptions",
    "Resized",
    "SelectSettings",
    "Selected",
    "TrialResult",
    "TrialTask",
    "Watching",
    "__version__",
    "decide",
    "export",
    "inspect",
    "make_plan_settings",
    "make_settings",
    "plan",
    "resize",
    "select_rank",
    "select_rank_with",
    "write_report",
]

_HOMES = {
    "Decided": "rightrank.api",
    "Decision": "rightrank.records",
    "EvalPoint": "rightrank.records",
    "Inspection": "rightrank.records.probe",
    "Plan": "rightrank.records.plan",
    "PlanSettings": "rightrank.settings",
    "ResizeOptions": "rightrank.probe.resizing",
    "Resized": "rightrank.records.probe",
    "SelectSettings": "rightrank.settings",
    "Selected": "rightrank.api",
    "TrialResult": "rightrank.records",
    "TrialTask": "rightrank.records",
    "Watching": "rightrank.api",
    "decide": "rightrank.api",
    "export": "rightrank.runs",
    "inspect": "rightrank.api",
    "make_plan_settings": "rightrank.settings",
    "make_settings": "rightrank.settings",
    "plan": "rightrank.api",
    "resize": "rightrank.api",
    "select_rank": "rightrank.api",
    "select_rank_with": "rightrank.own_trainer",
    "write_report": "rightrank.runs",
}


def __getattr__(name: str) -> object:
    """The public names, imported on first use: `import rightrank` alone costs nothing."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rightrank' has no attribute {name!r}")
