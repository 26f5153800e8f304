"""The short form of benchmarks/metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.metrics.answers import bench_of, compare

from tests.tiny import small_settings

pytestmark = pytest.mark.trains


def test_every_way_of_writing_gives_the_same_texts(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    settings = small_settings(eval_items=6, max_new_tokens=6, metric="f1")
    found = compare(bench_of(model_folder, completion_file, settings, tmp_path), 1)
    assert found["items"] == 6
    assert found["same texts"] == {"one at a time, cached": 6, "one at a time, no cache": 6}
    assert set(found["seconds"]) == {*found["same texts"], "batched, cached", "held-out loss"}
