"""Find the LoRA rank that is enough and no more: measured on your model and your data.

from rightrank import select_rank

selected = select_rank(model="path/to/model", data="data.jsonl", out="run", ranks=(4, 16, 64))
print(selected.decision.rank, selected.adapter)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rightrank.version import __version__

if TYPE_CHECKING:
    from rightrank.api import (
        AdapterComparison,
        Decided,
        Decision,
        EvalPoint,
        Inspection,
        Observer,
        Plan,
        PlanSettings,
        Preflight,
        Resized,
        ResizeOptions,
        Selected,
        SelectSettings,
        TrialResult,
        TrialTask,
        compare,
        decide,
        export,
        inspect,
        make_plan_settings,
        make_settings,
        plan,
        plan_selection,
        preflight,
        resize,
        select_rank,
        select_rank_with,
        write_report,
    )

__all__ = [
    "AdapterComparison",
    "Decided",
    "Decision",
    "EvalPoint",
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
    "__version__",
    "compare",
    "decide",
    "export",
    "inspect",
    "make_plan_settings",
    "make_settings",
    "plan",
    "plan_selection",
    "preflight",
    "resize",
    "select_rank",
    "select_rank_with",
    "write_report",
]


def __getattr__(name: str) -> object:
    """Import the public names on first use: `import rightrank` alone costs nothing."""
    if name in __all__:
        from rightrank import api

        return getattr(api, name)
    raise AttributeError(f"module 'rightrank' has no attribute {name!r}")
