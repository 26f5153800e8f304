"""Find the LoRA rank that is enough and no more: measured on your model and your data.

from rightrank import make_settings, select_rank

selected = select_rank("path/to/model", "data.jsonl", "run", settings=make_settings({"ranks": [4, 16, 64]}))
print(selected.decision.rank, selected.adapter)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from rightrank.version import __version__

if TYPE_CHECKING:
    from rightrank.api import Selected, Watching, select_rank
    from rightrank.own_trainer import select_rank_with
    from rightrank.records import Decision, EvalPoint, TrialResult, TrialTask
    from rightrank.settings import SelectSettings, make_settings

__all__ = [
    "Decision",
    "EvalPoint",
    "SelectSettings",
    "Selected",
    "TrialResult",
    "TrialTask",
    "Watching",
    "__version__",
    "make_settings",
    "select_rank",
    "select_rank_with",
]

_HOMES = {
    "Decision": "rightrank.records",
    "EvalPoint": "rightrank.records",
    "SelectSettings": "rightrank.settings",
    "Selected": "rightrank.api",
    "TrialResult": "rightrank.records",
    "TrialTask": "rightrank.records",
    "Watching": "rightrank.api",
    "make_settings": "rightrank.settings",
    "select_rank": "rightrank.api",
    "select_rank_with": "rightrank.own_trainer",
}


def __getattr__(name: str) -> object:
    """The public names, imported on first use: `import rightrank` alone costs nothing."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rightrank' has no attribute {name!r}")
