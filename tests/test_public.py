"""The public surface: what there is, that it is all there, and that a user's typed script stays typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import rightrank

PUBLIC = {
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
}

ROOT = Path(__file__).parent.parent
SCRIPT = """\
from collections.abc import Mapping
from pathlib import Path

from rightrank import Decision, TrialResult, TrialTask, export, make_settings, select_rank, select_rank_with


def train(task: TrialTask) -> TrialResult:
    return TrialResult(metrics={"reward": float(task.rank)}, item_scores=[float(task.rank), task.learning_rate])


def train_plainly(task: TrialTask) -> Mapping[str, float]:
    return {"loss": 1 / task.rank}


decision: Decision = select_rank_with(train, "run", ranks=(1, 4), metric="reward").decision
rank: int | None = decision.rank
values: list[float] = [evidence.value for evidence in select_rank_with(train_plainly, "other").decision.ranks]
adapter: Path | None = select_rank("model", "data.jsonl", "run", settings=make_settings({"ranks": [1, 4]})).adapter
files: list[str] = export("run", "peft").files
reveal_type(select_rank)
reveal_type(select_rank_with)
reveal_type(export)
reveal_type(decision.ranks)
reveal_type(decision.staircase)
reveal_type(train)
"""


def test_the_public_names_are_these_and_are_there() -> None:
    assert set(rightrank.__all__) == PUBLIC
    assert rightrank.__all__ == sorted(rightrank.__all__)
    for name in rightrank.__all__:
        assert not isinstance(getattr(rightrank, name), ModuleType)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(rightrank, "nonsense")  # noqa: B009


def test_a_typed_script_has_no_any(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    # the project's own settings (strict), so that its cache serves
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(script)]
    checked = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert checked.returncode == 0, checked.stdout
    revealed = [line for line in checked.stdout.splitlines() if "Revealed type" in line]
    assert len(revealed) == 6
    assert [line for line in revealed if "Any" in line] == []
