"""The public surface: what there is, that it is all there, and that a user's typed script stays typed."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import rightrank

ROOT = Path(__file__).parent.parent
SCRIPT = """\
from collections.abc import Mapping
from pathlib import Path

from rightrank import Decision, SelectSettings, TrialResult, TrialTask, export, select_rank, select_rank_with


def train(task: TrialTask) -> TrialResult:
    return TrialResult(metrics={"reward": float(task.rank)}, example_scores=[float(task.rank), task.learning_rate])


def train_plainly(task: TrialTask) -> Mapping[str, float]:
    return {"loss": 1 / task.rank}


decision: Decision = select_rank_with(train, "run", ranks=(1, 4), metric="reward").decision
rank: int | None = decision.rank
values: list[float] = [evidence.value for evidence in select_rank_with(train_plainly, "other").decision.ranks]
first = select_rank("model", "data.jsonl", "run", settings=SelectSettings(ranks=[1, 4])).adapter
adapter: Path | None = None if first is None else first.path
cost: float | None = select_rank("model", "data.jsonl", "run", ranks=(1, 4), margin=0.01, memory_bytes="24GiB").cost["trainings"]
files: list[str] = export("run", "vllm").files
reveal_type(select_rank)
reveal_type(select_rank_with)
reveal_type(export)
reveal_type(decision.ranks)
reveal_type(decision.staircase)
reveal_type(train)
"""
WRONG = """\
from rightrank import select_rank

select_rank(model="model", data="data.jsonl", out="run", rank=4)
select_rank(model="model", data="data.jsonl", out="run", margin=[1])
"""


def test_there_are_at_most_23_public_names_and_all_are_there() -> None:
    imported_on_use = [name for names in rightrank._MODULES.values() for name in names]
    assert sorted([*imported_on_use, "__version__"]) == rightrank.__all__
    assert len(rightrank.__all__) <= 23
    assert rightrank.__all__ == sorted(rightrank.__all__)
    for name in rightrank.__all__:
        assert not isinstance(getattr(rightrank, name), ModuleType)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(rightrank, "nonsense")  # noqa: B009


def run_mypy(folder: Path, *scripts: str) -> str:
    """Run mypy with the project's own strict settings, so that its cache is used, and return its output."""
    files = [folder / f"script_{number}.py" for number in range(len(scripts))]
    for file, script in zip(files, scripts, strict=True):
        file.write_text(script, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout


@pytest.mark.trains
def test_a_typed_script_has_no_any_and_a_wrong_one_is_told(tmp_path: Path) -> None:
    output = run_mypy(tmp_path, SCRIPT, WRONG).splitlines()
    revealed = [line for line in output if "Revealed type" in line]
    assert len(revealed) == 6
    assert [line for line in revealed if "Any" in line] == []
    errors = [line for line in output if ": error:" in line]
    assert len(errors) == 2, errors
    assert 'script_1.py:3: error: Unexpected keyword argument "rank"' in errors[0]
    assert 'script_1.py:4: error: Argument "margin"' in errors[1]


def test_every_public_name_has_a_page_and_every_name_of_a_page_exists() -> None:
    pages = [file.read_text(encoding="utf-8") for file in (ROOT / "docs").rglob("*.md")]
    described = {name for page in pages for name in re.findall(r"(?m)^::: (rightrank[\w.]*)$", page)}
    assert {f"rightrank.{name}" for name in rightrank.__all__ if name != "__version__"} <= described
    for name in described:
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(module), last), name
