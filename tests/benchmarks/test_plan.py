"""Plan every case of the GPU comparison, which has not been run, on small models."""

from __future__ import annotations

import json
from typing import Any

import pytest
from benchmarks.plan import hours
from benchmarks.plan.architectures import SMALL_CONFIGS
from benchmarks.plan.gpu import CASES, CONFIGS, dry_run

from rightrank.report.format import format_duration

pytestmark = pytest.mark.trains

AXES = ("ranks", "batch_size", "seq_len", "gradient_checkpointing", "dtype", "load_in_4bit", "adapters_per_pass")


@pytest.mark.filterwarnings("ignore")
def test_every_case_is_traced() -> None:
    """Trace one of the small architectures at a short length, with each case's own step."""
    planned = dry_run({"llama": SMALL_CONFIGS["llama"]}, seq_len=32)
    assert len(planned) == len(CASES)
    for _, case, plan in planned:
        assert plan.source == "traced", case
        assert plan.ranks[0].peak_reserved_bytes >= plan.ranks[0].peak_bytes > 0


def test_the_cases_cover_what_was_promised() -> None:
    varied: set[str] = set().union(*(case.keys() for case in CASES))
    assert varied >= set(AXES)
    assert len(CONFIGS) * len(CASES) >= 24
    distinct: list[dict[str, Any]] = []
    for case in CASES:
        assert case not in distinct
        distinct.append(case)


def test_hours_follow_from_the_stored_operations() -> None:
    """Check that the page and the how-to show the stored operations, and count those of the small model again."""
    models = json.loads(hours.RESULT.read_text(encoding="utf-8"))["models"]
    assert hours.PAGE.read_text(encoding="utf-8") == "\n".join(hours.format_page(models)) + "\n"
    cost = hours.plan_selection_cost("SmolLM2-135M")
    assert cost == models["SmolLM2-135M"]
    peak, utilisation = hours.GPUS["L4"][0] * 1e12, hours.UTILISATION["SmolLM2-135M"]
    assert format_duration(cost["expected_flops"] / peak / utilisation) in hours.format_cell(cost, "L4", utilisation)
    assert hours.format_cell(cost | {"needed_bytes": 25 * 2**30}, "L4", utilisation) == "–"
