"""Plan every case of the GPU comparison on small models, and compare traced peaks with what torch's profiler counts in real steps."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.plan.measure import measure

from rightrank.planning.planner import plan_config
from rightrank.schema.settings import PlanSettings
from tests.planning import CONFIGS as PROFILED_CONFIGS

pytestmark = pytest.mark.trains


MULTI_LORA: dict[str, Any] = {"packed": True, "loss": "chunked", "optim": "adamw_fused"}
PROFILED_CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen", {"loss": "chunked", "optim": "adamw_fused", "gradient_checkpointing": True}),
    ("gpt2", {"target_modules": ("c_attn",)}),
    ("mistral", {"padding": True}),
    ("moe", {"exclude_modules": ("shared_expert_gate",)}),
    (
        "moe",
        {"target_modules": ("q_proj",), "target_parameters": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")},
    ),
    ("gpt2", MULTI_LORA | {"adapters_per_pass": 2}),
    ("llama", MULTI_LORA | {"adapters_per_pass": 3, "gradient_checkpointing": True}),
    ("bert", {"packed": True, "optim": "adamw_fused", "num_labels": 3, "padding": True, "adapters_per_pass": 2}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options"), PROFILED_CASES)
def test_peaks_are_within_three_percent(name: str, options: dict[str, Any]) -> None:
    values = {"device": "cpu", "dtype": "float32", "ranks": (8,), "batch_size": 4, "seq_len": 64}
    settings = PlanSettings(**values | options)
    plan = plan_config(PROFILED_CONFIGS[name](), name, settings)
    measured = measure(PROFILED_CONFIGS[name](), settings, 8)
    row = plan.ranks[0]
    assert row.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.03)
    assert abs(row.peak_bytes / measured.peak_bytes - 1) <= plan.error_share
