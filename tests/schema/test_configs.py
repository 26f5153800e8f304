"""`LoraConfig` and `SFTConfig` as settings: what they say is kept, what a selection cannot do is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rightrank.schema.configs import settings_of_configs
from rightrank.schema.errors import SettingsError
from rightrank.schema.settings import SelectSettings

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")  # of TRL's own default
peft = pytest.importorskip("peft")


def sft(folder: Path, **values: Any) -> Any:
    trl = pytest.importorskip("trl")
    return trl.SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", **values)


def test_the_adapter_of_a_lora_config() -> None:
    config = peft.LoraConfig(
        r=16, lora_alpha=64, lora_dropout=0.1, use_rslora=True, target_modules=["v_proj", "q_proj"], lora_bias=True
    )
    settings = SelectSettings(**settings_of_configs(config))
    assert (settings.lora_alpha, settings.lora_dropout, settings.scaling) == (64, 0.1, "alpha/sqrt(r)")
    assert settings.target_modules == ("q_proj", "v_proj")
    assert settings.peft_options == {"lora_bias": True}
    assert "ranks" not in settings.model_fields_set


def test_the_training_of_an_sft_config(tmp_path: Path) -> None:
    args = sft(
        tmp_path, learning_rate=2e-4, max_steps=200, warmup_steps=20, per_device_train_batch_size=4, max_length=256,
        lr_scheduler_type="cosine", adam_beta2=0.95, seed=7, dataset_text_field="body", logging_steps=1,
    )  # fmt: skip
    settings = SelectSettings(**settings_of_configs(None, args))
    assert (settings.learning_rates, settings.seeds) == ((2e-4,), (7,))
    assert (settings.max_steps, settings.num_train_epochs, settings.warmup_ratio) == (200, None, 0.1)
    assert (settings.batch_size, settings.seq_len, settings.adam_beta2) == (4, 256, 0.95)
    assert (settings.lr_scheduler_type, settings.device) == ("cosine", "cpu")
    assert settings.columns == ("text=body",)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"target_modules": ".*_proj"}, "is a pattern"),
        ({"layer_replication": [(0, 1)]}, "layer_replication="),
    ],
)
def test_an_adapter_that_a_selection_cannot_train_is_refused_by_name(values: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        SelectSettings(**settings_of_configs(peft.LoraConfig(**values)))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"packing": True}, "packing=True"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0"),
        ({"warmup_steps": 50}, "warmup_steps 50 needs max_steps"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type: got 'polynomial'"),
    ],
)
def test_a_training_that_a_selection_cannot_run_is_refused_by_name(
    values: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=said):
        SelectSettings(**settings_of_configs(None, sft(tmp_path, **values)))
