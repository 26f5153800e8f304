"""Small random models of the real classes: our losses are PEFT's own, and arms in one pass equal each alone, or an obstacle is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from benchmarks.kinds.checks import plain_losses

from rightrank.schema.trials import Arm
from rightrank.train.pace import multi_lora_obstacle
from tests.train.architectures import (
    MODELS,
    PADDED,
    STEPS,
    make_runtime,
    run,
)

pytestmark = pytest.mark.trains


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_pefts_and_shared_passes_equal_single_ones(
    name: str, completion_file: Path, class_file: Path, tmp_path: Path
) -> None:
    runtime = make_runtime(name, class_file if name == "bert" else completion_file, tmp_path / "cache")
    assert runtime.fast_paths.sequence_packing == (name not in PADDED)
    arms = [
        Arm(rank=rank, learning_rate=1e-2, lora_alpha=32.0, seed=seed, steps=STEPS) for rank, seed in ((2, 0), (4, 1))
    ]
    alone = run(runtime, arms, tmp_path / "alone", 1)
    for arm, trial in zip(arms, alone, strict=True):
        assert trial.train_losses == pytest.approx(plain_losses(runtime, arm), rel=2e-5)
    assert multi_lora_obstacle(runtime, arms) is None
    together = run(runtime, arms, tmp_path / "together", 2)
    for one, other in zip(together, alone, strict=True):
        assert one.adapters_per_pass == 2
        assert one.train_losses == pytest.approx(other.train_losses, rel=1e-5)
        assert one.item_losses == pytest.approx(other.item_losses, rel=1e-4)


def test_a_layer_that_mixes_arms_is_an_obstacle(completion_file: Path, tmp_path: Path) -> None:
    """An adapted layer that sees a choice of tokens, as an expert of a mixture does."""
    runtime = make_runtime("llama", completion_file, tmp_path / "cache")
    mlp = runtime.model.model.layers[0].mlp
    whole = mlp.forward

    def first_half_of_the_tokens(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        half = len(rows) // 2
        return torch.cat([whole(rows[:half]), rows[half:]]).view_as(x)

    mlp.forward = first_half_of_the_tokens
    arms = [Arm(rank=rank, learning_rate=1e-2, lora_alpha=32.0, seed=0, steps=STEPS) for rank in (2, 4)]
    obstacle = multi_lora_obstacle(runtime, arms)
    assert obstacle is not None
    assert re.fullmatch(r"a layer sees \d+ rows that can't be assigned to arms", obstacle)
    assert run(runtime, arms, tmp_path, 1)[0].adapters_per_pass == 1
