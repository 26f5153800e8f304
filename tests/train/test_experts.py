"""Parameters of fused experts: their layers, and names that match nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rightrank.schema.errors import ModelError
from rightrank.schema.settings import SelectSettings
from rightrank.train.targets import find_target_parameters, require_targets
from tests.tiny import build_small_settings


class Mixture(torch.nn.Module):
    """A model of two layers with fused experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
        for layer in self.layers:
            layer.q_proj = torch.nn.Linear(8, 8)
            layer.fused = torch.nn.Module()
            layer.fused.down_proj = torch.nn.Parameter(torch.zeros(4, 8, 16))


def make_settings(name: str, **changes: Any) -> SelectSettings:
    return build_small_settings(target_modules=["q_proj"], target_parameters=[name], **changes)


def test_layers_choose_among_parameters_too() -> None:
    assert find_target_parameters(Mixture(), make_settings("fused.down_proj", layers_to_transform=[1])) == [
        "layers.1.fused.down_proj"
    ]
    assert find_target_parameters(Mixture(), make_settings("fused.down_proj")) == ["fused.down_proj"]


def test_a_parameter_that_matches_nothing_is_one_line() -> None:
    with pytest.raises(ModelError, match="no parameter is named 'fused") as raised:
        require_targets(Mixture(), make_settings("fused.down"), False)
    assert "fused.down_proj" in str(raised.value)
    assert "\n" not in str(raised.value)
