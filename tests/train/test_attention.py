"""Attention in float32 inside a 16-bit model on a CPU is closer to float32, and is restored when the block ends."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rightrank.train.batches import FUSED_ATTENTION, use_float32_attention
from tests.helpers import make_runtime
from tests.tiny import build_small_settings


def test_products_are_in_float32_and_the_table_is_as_before(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    original = ALL_ATTENTION_FUNCTIONS[FUSED_ATTENTION]
    runtime = make_runtime(model_folder, completion_file, build_small_settings(dtype="bfloat16"), tmp_path)
    assert runtime.fast_paths.float32_attention
    batch = runtime.make_batch("validation", range(6))
    dtypes: list[torch.dtype] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def noting(query: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        dtypes.append(query.dtype)
        return real(query, *args, **options)  # type: ignore[arg-type]

    torch.nn.functional.scaled_dot_product_attention = noting
    try:
        with torch.no_grad():
            ours = runtime.compute_losses("validation", batch, 1.0).example_losses
    finally:
        torch.nn.functional.scaled_dot_product_attention = real
    assert set(dtypes) == {torch.float32}
    assert ALL_ATTENTION_FUNCTIONS[FUSED_ATTENTION] is original
    with torch.no_grad():
        plain = runtime.objective(runtime.model, batch, 1.0).example_losses
        with use_float32_attention():
            widened = runtime.objective(runtime.model, batch, 1.0).example_losses
    assert torch.equal(ours, widened)
    assert torch.allclose(ours, plain, rtol=3e-2)
