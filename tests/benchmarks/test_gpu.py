"""Rehearse the GPU benchmarks on a CPU, and the engine on a device that is not the CPU (`benchmarks/gpu/pretend.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.page import MARK, write_page
from benchmarks.gpu.parts import PARTS, VARIANTS, Job

from rightrank.schema.errors import MissingExtraError

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


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="it would load them")
def test_the_bits_of_a_part_reach_the_base(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match="load_in_4bit needs"):
        Job("cpu", model_folder, completion_file, tmp_path, rehearse=True).runtime("bits", **VARIANTS["4 bits"])


def test_a_rehearsal_is_kept_and_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    assert main(["--rehearse", "--parts", "memory", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [part_result["state"] for part_result in result["parts"].values()] == ["done"]
    assert "memory" in capfd.readouterr().out
    page.write_text(f"What is above stays.\n{MARK}\nold\n")
    write_page(result, page)
    assert page.read_text().startswith("What is above stays.")
    assert "old" not in page.read_text()
    assert "four arms where two fit" in page.read_text()


def test_minutes_that_are_over_stop_a_part(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main(["--rehearse", "--minutes", "0", "--parts", "demo", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["parts"]["demo"]["state"] == "stopped"


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


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
    """Run in a separate process, because an installed device cannot be removed."""
    out = tmp_path_factory.mktemp("devices") / "out.json"
    command = [sys.executable, "-m", "benchmarks.gpu.devices", "--cases", ";".join(CASES), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    content: dict[str, Any] = json.loads(out.read_text())
    return content


@pytest.mark.full  # they take minutes
@pytest.mark.parametrize("case", CASES)
def test_the_engine_trains_and_evaluates_there_as_on_the_cpu(case: str, result: dict[str, Any]) -> None:
    row = next(row for row in result["cases"] if row["case"] == case)
    assert row["losses"] < 2e-5
    assert row["adapters"] < 1e-3


@pytest.mark.full  # they take minutes
def test_what_cuda_refuses_is_refused_there(result: dict[str, Any]) -> None:
    assert all(result["refused"].values()), result["refused"]
