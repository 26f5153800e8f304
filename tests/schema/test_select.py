"""Test settings of a selection as users write them in Python and in YAML."""

from __future__ import annotations

import re

import pytest

from rightrank.schema.errors import SettingsError
from rightrank.schema.settings import PlanSettings, SelectSettings


def test_one_value_is_a_list_of_one() -> None:
    settings = SelectSettings(ranks=8, learning_rates=1e-3, seeds=0, target_modules="all-linear")
    assert (settings.ranks, settings.learning_rates, settings.seeds) == ((8,), (1e-3,), (0,))
    assert settings.target_modules == ("all-linear",)


def test_a_string_with_commas_is_a_list() -> None:
    settings = SelectSettings(ranks="4,8", learning_rates="1e-4, 3e-4", target_modules="q_proj,v_proj")
    assert settings.ranks == (4, 8)
    assert settings.learning_rates == (1e-4, 3e-4)
    assert settings.target_modules == ("q_proj", "v_proj")


def test_other_values_are_refused() -> None:
    for values in [{"ranks": True}, {"seeds": "first"}, {"learning_rates": ""}, {"columns": "ask"}]:
        with pytest.raises(SettingsError, match=next(iter(values))):
            SelectSettings(**values)


def test_short_names_of_types() -> None:
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "float32": "float32", "auto": "auto"}
    assert {name: SelectSettings(dtype=name).dtype for name in names} == names
    assert PlanSettings(dtype="bf16").dtype == "bfloat16"


def test_auto_is_bfloat16_where_the_cuda_device_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, dtype in [((8, 0), "bfloat16"), ((7, 5), "float32")]:
        import torch

        from rightrank.bases.base_models import resolve_dtype

        assert resolve_dtype("auto", "cpu") == "float32"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, pair=capability: pair)
        assert resolve_dtype("auto", "cuda") == dtype
        assert resolve_dtype("float16", "cuda") == "float16"


def test_held_out_examples_follow_from_steps_and_data_alone() -> None:
    short, long = SelectSettings(max_steps=20), SelectSettings(max_steps=400, batch_size=8)
    assert short.compute_max_eval_examples(10_000) == 200
    assert (
        long.compute_max_eval_examples(10_000) == long.compute_max_eval_examples(50) == 960
    )  # a tenth of the time of a training, at three evaluated examples per trained one
    assert SelectSettings(num_train_epochs=1.0).compute_max_eval_examples(100_000) == 2000
    assert (
        SelectSettings(max_steps=400, metric="exact_match").compute_max_eval_examples(10_000) == 200
    )  # the model generates answers
    assert SelectSettings(max_steps=400, max_eval_examples=30).compute_max_eval_examples(10_000) == 30


def test_names_of_other_tools_are_refused_with_the_setting() -> None:
    for values, words in [
        ({"use_rslora": True}, "unknown setting 'use_rslora' (did you mean 'scaling'?)"),
        ({"r": 8}, "unknown setting 'r' (did you mean 'ranks'?)"),
        ({"rank_pattern": {"q": 4}}, "unknown setting 'rank_pattern'"),
        ({"lora_alpha": "large"}, "lora_alpha: got 'large'"),
        ({"init_lora_weights": "PiSSA"}, "init_lora_weights: got 'PiSSA'; input should be 'default' or 'gaussian'"),
        ({"peft_options": {"bias": "all"}}, "peft_options: got {'bias': 'all'}; give a mapping of lora_bias"),
        ({"peft_options": "all"}, "peft_options: got 'all'"),
    ]:
        with pytest.raises(SettingsError, match=re.escape(words)):
            SelectSettings(**values)


def test_too_many_steps_are_refused() -> None:
    for config_values in [{"max_steps": 10**15}, {"num_train_epochs": 1e15}]:
        with pytest.raises(
            SettingsError, match=rf"{next(iter(config_values))}: [\d,]+ steps of 8 examples; give at most 1,000,000"
        ):
            SelectSettings(**config_values).count_training_steps(80)
