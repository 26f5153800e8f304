"""Every setting, changed from its default, changes the training, or is listed here with the reason why it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rightrank.schema.errors import ModelError
from rightrank.schema.settings import PEFT_OPTIONS, SelectSettings
from rightrank.schema.trials import Arm
from tests.adapters.kind_checks import make_model
from tests.helpers import train_ours
from tests.tiny import build_small_settings, make_tokenizer, write_completions
from tests.training.architectures import make_model_runtime

pytestmark = [pytest.mark.trains, pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")]

STEPS = 3
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {}),
    "DoRA": ("llama", {"use_dora": True}),
    "transposed DoRA": ("gpt2", {"use_dora": True}),
    "embedding": ("llama", {"target_modules": ("embed_tokens",)}),
    "DoRA on an embedding": ("llama", {"target_modules": ("embed_tokens",), "use_dora": True}),
    "experts": ("mixtral", {"target_modules": ("q_proj",), "target_parameters": EXPERTS}),
    "with a bias": ("gpt2", {"peft_options": {"lora_bias": True}}),
}
ADAPTER: dict[str, Any] = {
    "lora_dropout": 0.3,
    "lora_alpha": 64.0,
    "scaling": "alpha/sqrt(r)",
    "init_lora_weights": "gaussian",
    "layers_to_transform": (1,),
    "modules_to_save": ("lm_head",),
}
SAME_BY_KIND = {  # as in PEFT
    ("embedding", "lora_dropout"): "PEFT's embeddings drop nothing out",
    ("DoRA on an embedding", "lora_dropout"): "PEFT's embeddings drop nothing out",
    ("embedding", "init_lora_weights"): "PEFT draws an embedding's B from a normal distribution in both",
    ("DoRA on an embedding", "init_lora_weights"): "PEFT draws an embedding's B from a normal distribution in both",
}
REFUSED = {("experts", "lora_dropout"), ("with a bias", "init_lora_weights")}  # by PEFT
TRAINING: dict[str, Any] = {
    "exclude_modules": ("q_proj",),
    "target_modules": ("q_proj",),
    "use_dora": True,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "seq_len": 16,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.7,
    "weight_decay": 0.5,
    "max_grad_norm": 1e-6,
    "test_fraction": 0.2,
    "validation_fraction": 0.2,
    "max_eval_examples": 3,
    "dtype": "bfloat16",
}
OTHER_MODELS = {  # that need another base, data or machine; the test that shows the change
    "target_parameters": "a base with experts: kinds/test_select.py",
    "peft_options": "below",
    "beta": "preference pairs: test_preference.py",
    "columns": "data of other names: tests/data",
    "validation": "a second file: tests/data",
    "data_config": "a data set on the hub: tests/data/test_hub.py",
    "load_in_4bit": "bitsandbytes: test_equality.py",
    "load_in_8bit": "bitsandbytes: test_equality.py",
    "trust_remote_code": "a model with its own code",
    "device": "another device",
}
PLANS_TRAININGS = {  # they choose which trainings there are, and change none of a given arm
    "goal", "strategy", "ranks", "learning_rates", "seeds", "budget_trainings", "budget_hours",
    "max_steps", "num_train_epochs",
}  # fmt: skip
JUDGES = {  # they measure and judge what was trained
    "metric", "margin", "metrics", "max_new_tokens", "num_evaluations", "report_to", "checkpoint",
}  # fmt: skip
CHANGES_NO_LOSS = {  # they say where and how trainings run; tests of each show equal losses
    "memory_bytes", "gradient_checkpointing", "adapters_per_pass", "ray", "workers",
}  # fmt: skip


def losses(model: str, folder: Path, **changes: Any) -> tuple[list[float], list[float]]:
    values = {"max_steps": STEPS, "num_evaluations": 1, "ranks": (4,)} | changes
    settings, tokenizer = build_small_settings(**values), make_tokenizer()
    base = make_model(model, len(tokenizer)).to(getattr(torch, settings.dtype))
    data = write_completions(folder / "data.jsonl", 60)
    runtime = make_model_runtime(base, tokenizer, data, folder / "cache", **values)
    arm = Arm(rank=4, learning_rate=1e-2, lora_alpha=settings.lora_alpha, seed=0, steps=STEPS)
    outcome, train_losses, _ = train_ours(runtime, arm, folder)
    return train_losses, outcome.example_losses


@pytest.fixture(scope="module")
def default_losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[float], list[float]]]:
    return {
        kind: losses(model, tmp_path_factory.mktemp("default"), **settings) for kind, (model, settings) in KINDS.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_setting_of_the_adapter_changes_every_kind(kind: str, default_losses: dict[str, Any], tmp_path: Path) -> None:
    model, settings = KINDS[kind]
    for name, value in ADAPTER.items():
        if kind.endswith("embedding") and name == "layers_to_transform":
            continue  # an embedding is in no layer
        folder = tmp_path / name
        folder.mkdir()
        try:
            changed_losses = losses(model, folder, **settings, **{name: value})
        except ModelError:
            assert (kind, name) in REFUSED
            continue
        assert (kind, name) not in REFUSED
        assert (changed_losses == default_losses[kind]) == ((kind, name) in SAME_BY_KIND)


@pytest.mark.parametrize("name", TRAINING)
def test_a_setting_of_the_training_changes_it(name: str, default_losses: dict[str, Any], tmp_path: Path) -> None:
    assert losses("llama", tmp_path, **{name: TRAINING[name]}) != default_losses["linear"]


def test_every_setting_is_here() -> None:
    named = [*ADAPTER, *TRAINING, *OTHER_MODELS, *PLANS_TRAININGS, *JUDGES, *CHANGES_NO_LOSS]
    assert sorted(named) == sorted(SelectSettings.model_fields)
    assert set(PEFT_OPTIONS) == {"lora_bias", "layers_pattern", "use_qalora", "qalora_group_size",
                                 "ensure_weight_tying", "fan_in_fan_out"}  # fmt: skip
