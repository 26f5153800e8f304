"""Rehearse the GPU benchmarks on a CPU, and the engine on a device that is not the CPU (`benchmarks/gpu/pretend.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.gpu.parts import PARTS, Job

pytestmark = pytest.mark.trains


QUICK = [name for name in PARTS if name not in ("plan", "speed", "packs")]  # those have tests of their own


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.filterwarnings("ignore")
def test_a_part_is_rehearsed(name: str, model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    rows = list(PARTS[name](Job("cpu", model_folder, completion_file, tmp_path, rehearse=True)))
    assert rows
    assert all(row.keys() == rows[0].keys() for row in rows)
    differences = [row[key] for row in rows for key in ("to_peft", "to_alone") if row.get(key) is not None]
    assert all(difference < 1e-2 for difference in differences)


ROOT = Path(__file__).parents[2]
CASES = ("other ends", "dropout, accumulation", "classes", "pairs, frozen prefix", "DoRA")


def test_the_engine_trains_evaluates_and_refuses_there_as_on_the_cpu(tmp_path: Path) -> None:
    """Run in a separate process, because an installed device cannot be removed."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.gpu.devices", "--cases", ";".join(CASES), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    result = json.loads(out.read_text())
    assert {row["case"] for row in result["cases"] if row["losses"] < 2e-5 and row["adapters"] < 1e-3} == set(CASES)
    assert all(result["refused"].values()), result["refused"]
