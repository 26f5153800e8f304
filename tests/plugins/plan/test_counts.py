"""Counts are PEFT's own: parameters equal `numel()`, file sizes equal the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benchmarks.plan.architectures import FULL_CONFIGS
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rightrank.plugins.plan.planner import plan_config
from rightrank.schema.plan_settings import make_plan_settings
from tests.plugins.plan import CONFIGS

pytestmark = pytest.mark.trains

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),  # tied to the output head
    ("llama", {"layers_to_transform": [1, 4], "target_modules": ["q_proj", "o_proj"]}),
    ("qwen", {"target_modules": ["q_proj", "v_proj"]}),
    ("gpt2", {"target_modules": ["c_attn"]}),  # one matrix for query, key and value, stored transposed
    ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    ("moe", {"exclude_modules": ["shared_expert_gate"]}),
    ("moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options"), CASES)
def test_counts_are_those_of_peft(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Ranks 2, 4 and 8: the one between is computed from the two at the ends, so all three are compared."""
    values = {"dtype": "float32", "ranks": (2, 4, 8), "batch_size": 1, "seq_len": 16, **options}
    rows = plan_config(CONFIGS[name](), name, make_plan_settings(values)).ranks
    for row in rows:
        model = AutoModelForCausalLM.from_config(CONFIGS[name]())
        peft_options: dict[str, Any] = {"target_modules": "all-linear"} | options
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=row.rank, **peft_options))
        adapted.save_pretrained(tmp_path / str(row.rank))
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        assert row.trainable_parameters == sum(parameter.numel() for parameter in trained)
        file = tmp_path / str(row.rank) / "adapter_model.safetensors"
        assert row.adapter_bytes == file.stat().st_size


def test_published_counts_of_llama_3b() -> None:
    """PEFT's own table (method_comparison, MetaMathQA, lora--llama-3.2-3B-rank32): parameters and file size."""
    config = FULL_CONFIGS["Llama-3.2-3B"]()
    settings = make_plan_settings({"ranks": (32,), "target_modules": ("q_proj", "v_proj"), "seq_len": 16})
    plan = plan_config(config, "llama", settings)
    assert plan.ranks[0].trainable_parameters == 9_175_040
    assert plan.ranks[0].adapter_bytes == 36_715_216
    assert plan.base_parameters + 9_175_040 == 3_221_924_864
