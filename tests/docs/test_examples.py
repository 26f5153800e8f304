"""Every example runs, in small; one of them in a process of its own, as a user would run it."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import sentences, write_completions, write_jsonl
from tests.watch import GENEROUS_SECONDS

pytestmark = pytest.mark.trains

EXAMPLES = Path(__file__).parents[2] / "examples"
WITH_DATA = (
    "plain_loop.py",
    "transformers_trainer.py",
    "trl_sft.py",
    "trl_grpo.py",
    "lightning_trainer.py",
    "peft_classification.py",
)
ALL = (*WITH_DATA, "vision.py")
NEEDS = {"trl_sft.py": "trl", "trl_grpo.py": "trl", "lightning_trainer.py": "lightning"}
OF_OTHERS = "ignore"  # a trainer's own deprecations are no failure of an example


def test_no_example_is_left_out() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {
        *ALL,
        "common.py",
        "fleet.py",  # test_fleet_example.py
        "preference_pairs.py",
        "notebook.ipynb",
        "text_to_image.py",  # tests/interop/test_images.py
        "the_method.py",  # test_the_method.py
        "tinker_service.py",  # test_tinker_example.py
    }


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """Rows of prompt, chosen and rejected."""
    rows = [
        {"prompt": f"{text} : ", "chosen": text.split()[0], "rejected": text.split()[-1]} for text in sentences(80, 3)
    ]
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


def arguments(name: str, folder: Path, model: Path, data: Path) -> list[str]:
    given = ["--out", str(folder / "run"), "--steps", "3"]
    if name in WITH_DATA:
        given += ["--model", str(model), "--data", str(data), "--held-out", "20"]
    return given


def check(run: Path, printed: str) -> None:
    """A printed decision, an adapter, and the same held-out examples in every trial."""
    decision = json.loads((run / "decision.json").read_text())
    assert decision["sentence"] in printed
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    journal = map(json.loads, (run / "journal.jsonl").read_text().splitlines())
    items = {len(record["item_scores"]) for record in journal if record["type"] == "trial_finished"}
    assert len(items) == 1
    assert items.pop() >= 20


@pytest.mark.parametrize("name", ALL[1:])
@pytest.mark.filterwarnings(OF_OTHERS)
def test_it_ends_with_a_decision(
    name: str,
    model_folder: Path,
    completion_file: Path,
    class_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process: what the examples import is there already."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    data = class_file if name == "peft_classification.py" else completion_file
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, *arguments(name, tmp_path, model_folder, data)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    check(tmp_path / "run", capsys.readouterr().out)


def test_preference_pairs_end_with_a_decision(
    model_folder: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--model", str(model_folder), "--data", str(pairs_file), "--out", str(tmp_path / "run"), "--steps", "3"]
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["preference_pairs.py", *given])
    runpy.run_path(str(EXAMPLES / "preference_pairs.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "decision.json").read_text())["sentence"] in printed
    assert "by reward_accuracy: " in printed
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_it_runs_as_a_script(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    script = EXAMPLES / ALL[0]
    command = [sys.executable, str(script), *arguments(script.name, tmp_path, model_folder, completion_file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    check(tmp_path / "run", done.stdout)


@pytest.mark.filterwarnings(OF_OTHERS)
def test_the_notebook_runs(model_folder: Path, tmp_path: Path) -> None:
    """All cells, in a folder with a model and data; no cell fails, the answer and the plot are shown."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    shutil.copytree(model_folder, tmp_path / "model")
    write_completions(tmp_path / "data.jsonl", 80)
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # kept without outputs
    nbclient.NotebookClient(
        notebook, timeout=int(GENEROUS_SECONDS), resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    decision = json.loads((tmp_path / "run" / "decision.json").read_text())
    pages = [data["text/html"] for data in shown if "text/html" in data]
    assert any("<svg" in page for page in pages)
    assert any("difference_high" in page for page in pages)  # the table
    named = [decision[name] for name in ("rank", "fallback_rank", "best_so_far")]
    assert str(next(rank for rank in named if rank is not None)) in shown[-1]["text/plain"]
