"""Test that the comparison of two checkouts notices a changed adapter, a changed decision, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks.equal import TOLERANCE, compare_folders
from safetensors.numpy import save_file


def write_results(folder: Path, *, rank: int = 4, seconds: float = 1.0, change: float = 0.0) -> Path:
    """Write the results of one job, with a trained and a truncated adapter of norm 1 whose tensors are off by `change`."""
    for name in ("run/trials/a", "resized"):
        (folder / name).mkdir(parents=True)
        save_file({"A": np.array([1.0, change])}, folder / name / "adapter_model.safetensors")
    answer = {"rank": rank, "wall_seconds": seconds, "notes": [f"Measured in {seconds} s, 5% of the training's time"]}
    (folder / "results.json").write_text(json.dumps({"select": {"status": 0, "answer": answer}}))
    return folder


@pytest.mark.parametrize(
    ("changes", "differences"),
    [
        ({}, []),
        ({"seconds": 2.0}, []),
        ({"rank": 8}, ["results.select.answer.rank: 4 → 8"]),
        ({"change": TOLERANCE / 2}, ["run/trials/a/adapter_model.safetensors: differs by 5.0e-07 of the norm"]),
        (
            {"change": 2 * TOLERANCE},
            [
                "resized/adapter_model.safetensors: differs by 2.0e-06 of the norm",
                "run/trials/a/adapter_model.safetensors: differs by 2.0e-06 of the norm",
            ],
        ),
    ],
)
def test_a_trained_adapter_is_equal_to_the_byte_and_a_truncated_one_within_the_tolerance(
    changes: dict[str, float], differences: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write_results(tmp_path / "before")
    after = write_results(tmp_path / "after", **changes)  # type: ignore[arg-type]
    assert compare_folders(before, after) == bool(differences)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines == (differences or ["equal: 1 jobs, 2 adapters"])
