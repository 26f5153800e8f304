"""The comparison on a GPU has not been run; every case of it can at least be planned here, on small models."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.plan.architectures import SMALL_CONFIGS
from benchmarks.plan.gpu import CASES, CONFIGS, dry_run

pytestmark = pytest.mark.trains

AXES = ("ranks", "batch_size", "seq_len", "gradient_checkpointing", "dtype", "load_in_4bit", "arms")


@pytest.mark.filterwarnings("ignore")
def test_every_case_is_traced() -> None:
    """One architecture of the small ones, at a short length; the step is the case's own."""
    planned = dry_run({"llama": SMALL_CONFIGS["llama"]}, seq_len=32)
    assert len(planned) == len(CASES)
    for _, case, plan in planned:
        assert plan.sources["peak_bytes"] == "traced", case
        assert plan.ranks[0].peak_reserved_bytes >= plan.ranks[0].peak_bytes > 0


def test_the_cases_cover_what_was_promised() -> None:
    varied: set[str] = set().union(*(case.keys() for case in CASES))
    assert varied >= set(AXES)
    assert len(CONFIGS) * len(CASES) >= 24
    distinct: list[dict[str, Any]] = []
    for case in CASES:
        assert case not in distinct
        distinct.append(case)
