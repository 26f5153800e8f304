"""Test the trace: two ranks determine the ranks between exactly, and counts are equal to PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from rightrank.planning.estimate import Estimator
from rightrank.planning.planner import plan_config
from rightrank.schema.errors import ModelError
from rightrank.schema.settings import PlanSettings
from tests.planning import CONFIGS

pytestmark = pytest.mark.trains


def make_settings(**values: Any) -> PlanSettings:
    return PlanSettings(**{"ranks": (4, 12), "batch_size": 2, "seq_len": 32} | values)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "bert"])
def test_two_ranks_give_the_ranks_between(name: str) -> None:
    """Rank 8 from traces of 4 and 12 is rank 8 traced."""
    settings = make_settings(exclude_modules=["shared_expert_gate"] if name == "moe" else [])
    between = Estimator(CONFIGS[name](), settings)
    direct = Estimator(CONFIGS[name](), settings.model_copy(update={"ranks": (8,)}))
    assert between.estimate(8) == direct.estimate(8)
    kinds = [
        [(tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in estimator.get_inventory(8).stored]
        for estimator in (between, direct)
    ]
    assert kinds[0] == kinds[1]


def test_a_step_that_cannot_be_traced_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from rightrank.planning.planner import plan_config

    def fail(*_: Any) -> None:
        raise NotImplementedError("aten::nonzero: attempted to run this operator with Meta tensors")

    monkeypatch.setattr("rightrank.planning.estimate.trace_step", fail)
    with pytest.raises(
        ModelError,
        match=r"llama cannot be planned, because its training step cannot be traced \(NotImplementedError: aten::nonzero",
    ):
        plan_config(
            CONFIGS["llama"](), "llama", make_settings(memory_bytes=2**40, seq_len=23)
        )  # no other test traces it


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),  # tied to the output head
    ("llama", {"layers_to_transform": [0, 2], "target_modules": ["q_proj", "o_proj"]}),
    ("qwen", {"target_modules": ["q_proj", "v_proj"]}),
    ("gpt2", {"target_modules": ["c_attn"]}),  # one matrix for query, key and value, stored transposed
    ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    ("moe", {"exclude_modules": ["shared_expert_gate"]}),
    ("moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options"), CASES)
def test_counts_are_those_of_peft(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Compare ranks 2, 4 and 8, of which the middle one is interpolated from the other two."""
    values = {"dtype": "float32", "ranks": (2, 4, 8), "batch_size": 1, "seq_len": 16, **options}
    rows = plan_config(CONFIGS[name](), name, PlanSettings(**values)).ranks
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
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    )
    settings = PlanSettings(ranks=(32,), target_modules=("q_proj", "v_proj"), seq_len=16)
    plan = plan_config(config, "llama", settings)
    assert plan.ranks[0].trainable_parameters == 9_175_040
    assert plan.ranks[0].adapter_bytes == 36_715_216
    assert plan.base_parameters + 9_175_040 == 3_221_924_864
