"""The comparison on a GPU has not been run; every case of it can at least be planned here, on small models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.plan import hours
from benchmarks.plan.architectures import SMALL_CONFIGS
from benchmarks.plan.gpu import CASES, CONFIGS, dry_run

from rightrank.report.format import duration

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.trains

AXES = ("ranks", "batch_size", "seq_len", "gradient_checkpointing", "dtype", "load_in_4bit", "adapters_per_pass")


@pytest.mark.filterwarnings("ignore")
def test_every_case_is_traced() -> None:
    """One architecture of the small ones, at a short length; the step is the case's own."""
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
    """The page and the how-to show what the stored operations give; those of the small model are counted again."""
    models = json.loads(hours.RESULT.read_text(encoding="utf-8"))["models"]
    assert hours.PAGE.read_text(encoding="utf-8") == "\n".join(hours.page(models)) + "\n"
    how_to = (ROOT / "docs" / "how-to" / "plan.md").read_text(encoding="utf-8")
    assert "\n".join(hours.table(models)) in how_to
    found = hours.planned("SmolLM2-135M")
    assert found == models["SmolLM2-135M"]
    peak, utilisation = hours.GPUS["L4"][0] * 1e12, hours.UTILISATION["SmolLM2-135M"]
    assert duration(found["expected_flops"] / peak / utilisation) in hours.cell(found, "L4", utilisation)
    assert hours.cell(found | {"needed_bytes": 25 * 2**30}, "L4", utilisation) == "–"
