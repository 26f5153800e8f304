"""Experts in a list of modules and in one parameter: their number, their rank, and the scale that a rule keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rightrank.schema.errors import ModelError
from rightrank.schema.settings import SelectSettings
from rightrank.train.targets import LISTED, expert_counts, expert_patterns, in_layers, require_targets
from tests.tiny import small_settings


class Mixture(torch.nn.Module):
    """Two layers of four experts in a list, with a fused parameter beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
        for layer in self.layers:
            layer.q_proj = torch.nn.Linear(8, 8)
            layer.experts = torch.nn.ModuleList(torch.nn.Module() for _ in range(4))
            for expert in layer.experts:
                expert.w1 = torch.nn.Linear(8, 16)
            layer.fused = torch.nn.Module()
            layer.fused.down_proj = torch.nn.Parameter(torch.zeros(4, 8, 16))


def of_parameters(name: str, **changes: Any) -> SelectSettings:
    return small_settings(target_modules=["q_proj"], target_parameters=[name], **changes)


def test_listed_and_fused_experts_are_counted() -> None:
    counts = expert_counts(Mixture(), ["fused.down_proj"], ["w1", "q_proj"])
    assert counts == {"fused.down_proj": 4, LISTED: 4}
    assert expert_counts(Mixture(), [], ["q_proj"]) == {}


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)", "constant"])
def test_pefts_patterns_give_experts_their_rank_and_the_rule_its_scale(scaling: Any) -> None:
    from rightrank.schema.variants import lora_scale, peft_scaling

    ranks, alphas = expert_patterns({LISTED: 4}, 8, 32.0, scaling)
    alpha, use_rslora = peft_scaling(scaling, 32.0, 8)
    config = LoraConfig(
        r=8, lora_alpha=alpha, use_rslora=use_rslora, rank_pattern=ranks, alpha_pattern=alphas,  # type: ignore[arg-type]
        target_modules=["w1", "q_proj"],
    )  # fmt: skip
    model: Any = get_peft_model(Mixture(), config).base_model.model
    expert, attention = model.layers[0].experts[2].w1, model.layers[0].q_proj
    assert (expert.r["default"], attention.r["default"]) == (2, 8)
    assert expert.scaling["default"] == pytest.approx(lora_scale(scaling, 32.0, 2))
    assert attention.scaling["default"] == pytest.approx(lora_scale(scaling, 32.0, 8))


def test_layers_choose_among_parameters_too() -> None:
    assert in_layers(Mixture(), of_parameters("fused.down_proj", layers_to_transform=[1])) == [
        "layers.1.fused.down_proj"
    ]
    assert in_layers(Mixture(), of_parameters("fused.down_proj")) == ["fused.down_proj"]


def test_a_parameter_that_matches_nothing_is_one_line() -> None:
    with pytest.raises(ModelError, match="no parameter is named 'fused") as raised:
        require_targets(Mixture(), of_parameters("fused.down"))
    assert "fused.down_proj" in str(raised.value)
    assert "\n" not in str(raised.value)
