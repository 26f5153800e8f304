"""Short form of `benchmarks/plan/cpu.py`: traced peaks against what torch's profiler counts in real steps."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.plan.measure import measure

from rightrank.planning.planner import plan_config
from rightrank.settings import make_plan_settings
from tests.plan.architectures import CONFIGS

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen", {"loss": "chunked", "optimizer": "adamw_fused", "gradient_checkpointing": True}),
    ("gpt2", {"target_modules": ("c_attn",)}),
    ("mistral", {"padding": True}),
    ("moe", {"exclude_modules": ("shared_expert_gate",)}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options"), CASES)
def test_peaks_are_within_three_percent(name: str, options: dict[str, Any]) -> None:
    values = {"device": "cpu", "dtype": "float32", "ranks": (8,), "batch_size": 4, "seq_len": 64}
    settings = make_plan_settings(values | options)
    plan = plan_config(CONFIGS[name](), name, settings, prices=False)
    assert plan.sources["peak_bytes"] == "traced"
    measured = measure(CONFIGS[name](), settings, 8)
    assert plan.ranks[0].peak_bytes == pytest.approx(measured.peak_bytes, rel=0.03)
