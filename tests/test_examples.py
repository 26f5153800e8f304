"""Every example runs, in small, as a user would run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.tiny import sentences, write_jsonl

EXAMPLES = Path(__file__).parent.parent / "examples"
WITH_DATA = ("plain_loop.py", "transformers_trainer.py", "trl_sft.py", "trl_dpo.py")
ALL = (*WITH_DATA, "vision.py")


def test_no_example_is_left_out() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*ALL, "common.py"}


@pytest.mark.parametrize("name", ALL)
def test_it_ends_with_a_decision(name: str, model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    if name.startswith("trl") and find_spec("trl") is None:
        pytest.skip("trl is not installed")
    data = completion_file
    if name == "trl_dpo.py":
        rows = [
            {"prompt": f"{text} : ", "chosen": text.split()[0], "rejected": text.split()[-1]}
            for text in sentences(80, 3)
        ]
        data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    command = [sys.executable, str(EXAMPLES / name), "--out", str(tmp_path / "run"), "--steps", "3"]
    if name in WITH_DATA:
        command += ["--model", str(model_folder), "--data", str(data), "--held-out", "20"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    decision = json.loads((tmp_path / "run" / "decision.json").read_text())
    assert decision["sentence"] in done.stdout
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    items = {
        len(record["item_scores"])
        for record in map(json.loads, (tmp_path / "run" / "journal.jsonl").read_text().splitlines())
        if record["type"] == "trial_finished"
    }
    assert len(items) == 1
    assert items.pop() >= 20
