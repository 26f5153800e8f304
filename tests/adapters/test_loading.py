"""Test where a model is, and that PEFT loads every adapter, on a skeleton of its modules, before it counts as written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from rightrank import TrialResult, TrialTask, resize, select_rank_with
from rightrank.adapters.adapter_reader import open_adapter
from rightrank.bases.model_sources import ModelSource, find_model
from rightrank.demo import find_model_file
from rightrank.schema.errors import ModelError
from rightrank.training.loading import require_loadable
from tests.adapters.adapters import KINDS, LINEAR, edit_config, load_base, load_strictly, make_adapter, make_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loads(tmp_path: Path, kind: str) -> None:
    require_loadable(open_adapter(make_adapter(make_base(tmp_path / "base", kind), tmp_path / "adapter", kind)))


def test_fused_experts_load(tmp_path: Path) -> None:
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=3, vocab_size=64,
    )  # fmt: skip
    options = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    get_peft_model(MixtralForCausalLM(config), options).save_pretrained(str(tmp_path / "adapter"))
    adapter = open_adapter(tmp_path / "adapter")
    assert {module.kind.name for module in adapter.modules} == {"linear", "expert"}
    require_loadable(adapter)


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "initialisation": ({"init_lora_weights": "orthogonal"}, "requires the LoRA rank to be even, got 7"),
    "targets": ({"target_modules": ["q_proj", "v_proj"]}, "target_modules does not name its module"),
    "no targets": ({"target_modules": ["elsewhere"]}, "can't load it"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_peft_refuses_is_refused(base: Path, tmp_path: Path, name: str) -> None:
    changes, fault = CONTRADICTIONS[name]
    adapter = make_adapter(base, tmp_path / "adapter", rank=7)
    edit_config(adapter, **changes)
    with pytest.raises(ModelError, match=fault):
        require_loadable(open_adapter(adapter))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "init",
    [True, False, "gaussian", "Gaussian", "orthogonal", "eva", "mica", "MiCA", "pissa", "pissa_niter_2", "olora", "OLoRA", "corda", "loftq"],
)  # fmt: skip
def test_an_adapter_is_truncated_unless_peft_changes_the_base(base: Path, tmp_path: Path, init: Any) -> None:
    """Compare the refusal with what PEFT does to the base, and load the truncation to an odd rank."""
    adapter = make_adapter(base, tmp_path / "adapter")
    edit_config(adapter, init_lora_weights=init)
    try:
        model = PeftModel.from_pretrained(load_base(base), str(adapter)).get_base_model()
        initial_weights = load_base(base).state_dict()
        weights = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()}
        is_kept = all(torch.equal(value, weights[name]) for name, value in initial_weights.items())
    except (ValueError, TypeError, AttributeError):  # an initialization that needs data or another configuration
        is_kept = False
    if not is_kept:
        with pytest.raises(ModelError, match=f"init_lora_weights is '{init}'"):
            resize(adapter, tmp_path / "odd", rank=7)
        return
    resize(adapter, tmp_path / "odd", rank=7)
    load_strictly(base, tmp_path / "odd")


def test_an_adapter_that_peft_refuses_is_not_handed_over(base: Path, tmp_path: Path) -> None:
    def train(task: TrialTask) -> TrialResult:
        make_adapter(base, task.folder, rank=task.rank)
        edit_config(task.folder, target_modules=LINEAR[:2])
        return TrialResult(metrics={"loss": 1.0 / task.rank})

    with pytest.raises(ModelError, match="target_modules does not name its module"):
        select_rank_with(train, tmp_path / "run", ranks=(2, 4), learning_rates=(1e-3,), margin=0.01)
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_gguf_file_is_loaded_from_its_folder() -> None:
    path = find_model_file()
    assert find_model(str(path)) == ModelSource(str(path.parent), path.name)
