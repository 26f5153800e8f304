"""Run every example in a small form, and test the refusals of those that call services."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from tests.commands import run
from tests.tiny import generate_sentences, write_completions, write_jsonl
from tests.watch import GENEROUS_SECONDS

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


@pytest.mark.trains
def test_no_example_is_left_out() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {
        *ALL,
        "common.py",
        "mcp_server.py",  # tests/docs/test_mcp_server.py
        "preference_pairs.py",
        "notebook.ipynb",
        "text_to_image.py",  # tests/trainers/test_images.py
        "the_method.py",
    }


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """Write rows of prompt, chosen and rejected."""
    rows = [
        {"prompt": f"{text} : ", "chosen": text.split()[0], "rejected": text.split()[-1]}
        for text in generate_sentences(80, 3)
    ]
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


def build_arguments(name: str, folder: Path, model: Path, data: Path) -> list[str]:
    arguments = ["--out", str(folder / "run"), "--steps", "3"]
    if name in WITH_DATA:
        arguments += ["--model", str(model), "--data", str(data), "--held-out", "20"]
    return arguments


def check_run(run: Path, printed: str) -> None:
    """Check for a printed decision, an adapter, and the same held-out examples in every trial."""
    decision = json.loads((run / "decision.json").read_text())
    assert decision["sentence"] in printed
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    journal = map(json.loads, (run / "journal.jsonl").read_text().splitlines())
    items = {len(record["example_scores"]) for record in journal if record["type"] == "trial_finished"}
    assert len(items) == 1
    assert items.pop() >= 20


@pytest.mark.trains
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
    """Run the example in this process, which has already imported its libraries."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    data = class_file if name == "peft_classification.py" else completion_file
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, *build_arguments(name, tmp_path, model_folder, data)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    check_run(tmp_path / "run", capsys.readouterr().out)


@pytest.mark.trains
def test_preference_pairs_end_with_a_decision(
    model_folder: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        "--model",
        str(model_folder),
        "--data",
        str(pairs_file),
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "3",
    ]
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["preference_pairs.py", *arguments])
    runpy.run_path(str(EXAMPLES / "preference_pairs.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "decision.json").read_text())["sentence"] in printed
    assert "by reward_accuracy: " in printed
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.trains
@pytest.mark.filterwarnings(OF_OTHERS)
def test_the_notebook_runs(model_folder: Path, tmp_path: Path) -> None:
    """Run all cells in a folder with a model and data; no cell fails, and the answer and the table are shown."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    shutil.copytree(model_folder, tmp_path / "model")
    write_completions(tmp_path / "data.jsonl", 80)
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # kept without outputs
    nbclient.NotebookClient(
        notebook, timeout=int(GENEROUS_SECONDS), resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.get("data", {}) for output in outputs]
    decision = json.loads((tmp_path / "run" / "decision.json").read_text())
    pages = [data["text/html"] for data in shown if "text/html" in data]
    assert any("details: run/report.html" in output.get("text", "") for output in outputs)
    assert any("difference_high" in page for page in pages)  # the table
    assert str(decision["recommended_rank"]) in shown[-1]["text/plain"]


METHOD = Path(__file__).parents[2] / "examples" / "the_method.py"


def test_the_page_and_the_command_name_the_same_rank(
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    margin, rank = "0.1", 8
    rows = completion_file.read_text(encoding="utf-8").splitlines()
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    train.write_text("\n".join(rows[:140]), encoding="utf-8")
    held_out.write_text("\n".join(rows[140:]), encoding="utf-8")
    shared = ["--ranks", "1,2,4,8,16", "--margin", margin]
    names = ["the_method.py", str(model_folder), str(train), str(held_out)]
    monkeypatch.setattr(sys, "argv", [*names, *shared, "--learning-rate", "1e-2", "--steps", "100"])
    runpy.run_path(str(METHOD), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"Rank {rank} of 16 is enough."
    folder = ["--out", str(tmp_path / "run"), "--validation", str(held_out), "--goal", "adapter", "--json", "--quiet"]
    chosen = ["--learning-rates", "1e-2", "--max-steps", "100", "--batch-size", "8", "--lora-alpha", "32"]
    status, out, err = run(["select", str(model_folder), str(train), *folder, *shared, *chosen], capsys)
    assert status == 0, err
    assert json.loads(out)["handed_over"]["rank"] == rank
