"""The engine on a device that is not the CPU (`benchmarks/gpu/pretend.py`): nothing mixes devices, and the losses are the CPU's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.trains
ROOT = Path(__file__).parents[2]
CASES = (
    "other ends",
    "dropout, accumulation",
    "classes",
    "pairs, frozen prefix",
    "DoRA",
)  # all are in the benchmark


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a process of its own: a device, once installed, stays."""
    out = tmp_path_factory.mktemp("devices") / "out.json"
    command = [sys.executable, "-m", "benchmarks.gpu.devices", "--cases", ";".join(CASES), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_engine_trains_and_evaluates_there_as_on_the_cpu(case: str, result: dict[str, Any]) -> None:
    row = next(row for row in result["cases"] if row["case"] == case)
    assert row["losses"] < 2e-5
    assert row["adapters"] < 1e-3


def test_what_cuda_refuses_is_refused_there(result: dict[str, Any]) -> None:
    assert all(result["refused"].values()), result["refused"]
