"""Test a complete selection of adapters that learn nothing: no rank is recommended."""

from __future__ import annotations

from pathlib import Path

import pytest

from rightrank import select_rank
from tests.tiny import build_small_settings

pytestmark = pytest.mark.trains


def test_adapters_that_learned_nothing_end_in_no_gain(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    settings = build_small_settings(learning_rates=(1e-9,), max_steps=2, margin=0.005)
    decision = select_rank(str(model_folder), completion_file, tmp_path / "run", settings=settings).decision
    assert (decision.rank, decision.verdict) == (None, "no_gain")
