"""Find the LoRA rank that is enough and no more: measured on your model and your data.

from rightrank import select_rank

selected = select_rank(model="path/to/model", data="data.jsonl", out="run", ranks=(4, 16, 64))
print(selected.decision.rank, selected.adapter.path)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rightrank.version import __version__

if TYPE_CHECKING:
    from rightrank.api.adapters import compare, inspect, resize
    from rightrank.api.folders import export, write_report
    from rightrank.api.runs import decide, to_pandas
    from rightrank.api.selecting import preflight, select_rank
    from rightrank.atlas import expect
    from rightrank.planning import plan
    from rightrank.runs.run import Selected
    from rightrank.schema.errors import RightrankError
    from rightrank.schema.results import Decision
    from rightrank.schema.settings import PlanSettings, SelectSettings
    from rightrank.schema.trials import EvalPoint
    from rightrank.trainers.custom_trainer import TrialResult, TrialTask, select_rank_with
    from rightrank.trainers.smallest import SmallestAdapter

_MODULES = {
    "api.adapters": ("compare", "inspect", "resize"),
    "api.folders": ("export", "write_report"),
    "api.runs": ("decide", "to_pandas"),
    "api.selecting": ("preflight", "select_rank"),
    "trainers.smallest": ("SmallestAdapter",),
    "trainers.custom_trainer": ("TrialResult", "TrialTask", "select_rank_with"),
    "atlas": ("expect",),
    "planning": ("plan",),
    "runs.run": ("Selected",),
    "schema.errors": ("RightrankError",),
    "schema.results": ("Decision",),
    "schema.settings": ("PlanSettings", "SelectSettings"),
    "schema.trials": ("EvalPoint",),
}

__all__ = [
    "Decision",
    "EvalPoint",
    "PlanSettings",
    "RightrankError",
    "SelectSettings",
    "Selected",
    "SmallestAdapter",
    "TrialResult",
    "TrialTask",
    "__version__",
    "compare",
    "decide",
    "expect",
    "export",
    "inspect",
    "plan",
    "preflight",
    "resize",
    "select_rank",
    "select_rank_with",
    "to_pandas",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import rightrank` alone costs nothing."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"rightrank.{module}"), name)
    if name == "plots":
        return import_module("rightrank.plots")
    raise AttributeError(f"module 'rightrank' has no attribute {name!r}")
