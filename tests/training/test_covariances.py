"""Moments of an adapter's modules equal those of explicitly computed covariances."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from rightrank.evaluation.evaluator import Evaluator
from rightrank.training.moments import gather_moments
from rightrank.training.runtime import Runtime
from tests.helpers import make_runtime
from tests.tiny import build_small_settings

EXAMPLES = list(range(12))


@pytest.fixture
def runtime(model_folder: Path, completion_file: Path, tmp_path: Path) -> Runtime:
    return make_runtime(model_folder, completion_file, build_small_settings(batch_size=4), tmp_path / "cache")


def add_adapter(runtime: Runtime, **options: Any) -> Any:
    """Add a random frozen adapter to the base."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **options)
    peft_model: Any = get_peft_model(runtime.model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    peft_model.requires_grad_(False)
    peft_model.train(False)
    return peft_model


def test_they_are_the_whole_covariances_seen_by_the_factors(runtime: Runtime) -> None:
    """Compare with A·C·Aᵀ and s²·Bᵀ·G·B, with C and G from hooks on the adapted module itself."""
    peft_model = add_adapter(runtime)
    name = "model.layers.1.mlp.down_proj"
    module = peft_model.base_model.model.get_submodule(name)
    inputs: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []

    def keep(x: torch.Tensor, gradient: torch.Tensor) -> None:
        inputs.append(x)
        gradients.append(gradient.flatten(0, -2))

    def hook(_module: Any, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = arguments[0].detach().flatten(0, -2)
        output.register_hook(lambda gradient: keep(x, gradient))

    handle = module.register_forward_hook(hook)
    gathered = gather_moments(runtime.evaluator, runtime.settings, peft_model, EXAMPLES, 10**6)
    handle.remove()
    x, g = torch.cat(inputs).double(), torch.cat(gradients).double()
    is_active = g.abs().amax(dim=1) > 1e-6 * g.abs().max()
    rows = int(is_active.sum())
    labels = sum(sum(label != -100 for label in runtime.data.splits["train"][index].labels[1:]) for index in EXAMPLES)
    a, b = (factor["default"].weight.detach().double() for factor in (module.lora_A, module.lora_B))
    hidden, delta = x[is_active] @ a.T, module.scaling["default"] * g[is_active] @ b
    ours = gathered.moments[name]
    assert np.allclose(ours.inputs, (hidden.T @ hidden / rows).numpy(), rtol=1e-3, atol=1e-9)
    assert np.allclose(ours.gradients, (delta.T @ delta / labels).numpy(), rtol=1e-3, atol=1e-12)
    assert gathered.tokens == sum(runtime.data.splits["train"][index].length for index in EXAMPLES)
    assert set(gathered.moments) == {m for m, _ in runtime.model.named_modules() if m.endswith(("q_proj", "down_proj"))}
    assert gathered.notices == ()


@pytest.mark.parametrize("cause", ["DoRA", "memory", "infinite gradient"])
def test_moments_that_cannot_be_gathered_are_a_notice(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    peft_model = add_adapter(runtime, use_dora=cause == "DoRA")
    if cause == "memory":
        monkeypatch.setattr(Evaluator, "compute_losses", fails)
    if cause == "infinite gradient":
        with torch.no_grad():
            runtime.model.get_submodule("model.layers.1.mlp.down_proj").lora_B["default"].weight.fill_(float("inf"))
    gathered = gather_moments(runtime.evaluator, runtime.settings, peft_model, EXAMPLES)
    assert gathered.moments == {}
    expected = {"DoRA": "plain SVD", "memory": "out of memory.*plain SVD", "infinite gradient": "not finite"}
    assert re.search(expected[cause], gathered.notices[0])
