"""Sequence packing gives the losses and gradients of padded batches, attention is computed in float32, and the batch order is fair."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from rightrank.schema.trials import Arm
from rightrank.training.multi_lora import ArmBatch, MultiLora
from rightrank.training.runtime import Runtime, plan_batches
from tests.helpers import make_runtime
from tests.tiny import build_small_settings, make_tokenizer
from tests.training.architectures import SIZES, make_model_runtime

ARMS = [
    Arm(rank=rank, learning_rate=1e-2, lora_alpha=8.0, seed=seed, steps=4) for rank, seed in ((1, 0), (4, 1), (4, 2))
]


@contextmanager
def add_random_arms(runtime: Runtime, arms: list[Arm]) -> Iterator[tuple[MultiLora, dict[str, dict[str, Any]]]]:
    """Add arms with nonzero B, so that every tensor has a gradient."""
    generator = torch.Generator().manual_seed(1)
    with MultiLora(runtime.model, runtime.settings) as multi_lora:
        named = {
            f"a{number}": multi_lora.add(f"a{number}", arm, runtime.make_config(arm)) for number, arm in enumerate(arms)
        }
        for parameters in named.values():
            for parameter in parameters.values():
                parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        yield multi_lora, named


def compute_gradients(
    runtime: Runtime, multi_lora: MultiLora, arm_batches: list[ArmBatch], parameters: dict[str, Any]
) -> tuple[Any, list[torch.Tensor]]:
    """Return the example losses of every arm, and the gradients of one."""
    losses = runtime.accumulate_gradients(multi_lora, arm_batches)
    gradients = [parameter.grad.clone() for parameter in parameters.values()]
    multi_lora.peft_model.zero_grad(set_to_none=True)
    return losses, gradients


@pytest.mark.parametrize(
    "changes",
    [{}, {"layers_to_transform": (2,)}, {"gradient_checkpointing": True}],
    ids=["plain", "prefix", "checkpointing"],
)
def test_packed_sequences_have_the_losses_and_gradients_of_padded_ones(
    model_folder: Path, completion_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    runtime = make_runtime(model_folder, completion_file, build_small_settings(**changes), tmp_path / "cache")
    assert runtime.evaluator.fast_paths.sequence_packing
    with add_random_arms(runtime, ARMS[1:2]) as (multi_lora, named), runtime.use_gradient_checkpointing():
        batch = runtime.evaluator.make_batch("train", range(7))
        assert len(set(batch.attention_mask.sum(1).tolist())) > 1
        arm_batches = [ArmBatch("a0", batch, 0.1, None)]
        ours, gradients = compute_gradients(runtime, multi_lora, arm_batches, named["a0"])
        runtime.evaluator.fast_paths.sequence_packing = False
        theirs, expected = compute_gradients(runtime, multi_lora, arm_batches, named["a0"])
    assert torch.allclose(ours[0], theirs[0], rtol=1e-5)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_arm_in_a_shared_pass_computes_what_it_computes_alone(
    model_folder: Path, completion_file: Path, tmp_path: Path, dtype: str
) -> None:
    """Share the pass with arms of other ranks on other examples, and compare bits."""
    bound = 1e-6 if dtype == "float32" else 1e-3
    runtime = make_runtime(
        model_folder, completion_file, build_small_settings(dtype=dtype, lora_dropout=0.1), tmp_path / "cache"
    )
    with add_random_arms(runtime, ARMS) as (multi_lora, named):
        batches = [
            runtime.evaluator.make_batch("train", indices) for indices in ([0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10])
        ]
        arm_batches = [ArmBatch(f"a{number}", batch, 0.1, number) for number, batch in enumerate(batches)]
        for number, arm_batch in enumerate(arm_batches):
            shared_losses, shared_gradients = compute_gradients(
                runtime, multi_lora, arm_batches, named[arm_batch.adapter]
            )
            alone, expected = compute_gradients(runtime, multi_lora, [arm_batch], named[arm_batch.adapter])
            assert torch.allclose(shared_losses[number], alone[0], rtol=bound)
            for gradient, reference in zip(shared_gradients, expected, strict=True):
                assert float((gradient - reference).norm()) <= bound * float(reference.norm())


@pytest.mark.parametrize(("window", "joins"), [(None, True), (64, True), (8, False)])
def test_a_model_whose_attention_window_is_shorter_than_its_examples_is_padded(
    completion_file: Path, tmp_path: Path, window: int | None, joins: bool
) -> None:
    tokenizer = make_tokenizer()
    model = MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), sliding_window=window, **SIZES))
    assert (
        make_model_runtime(model, tokenizer, completion_file, tmp_path).evaluator.fast_paths.sequence_packing is joins
    )


def test_every_example_is_seen_once_per_pass() -> None:
    plan = plan_batches(500, 10, 100, seed=1)  # two passes
    for begin in (0, 50):
        indices = [index for batch in plan[begin : begin + 50] for index in batch]
        assert sorted(indices) == list(range(500))
