"""An adapter that is resized loads in PEFT without a warning, at the reported distance from the original."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rightrank.adapters.adapter_files import open_adapter
from rightrank.adapters.resize import resize_adapter
from rightrank.adapters.truncation import Moments
from rightrank.api.adapters import inspect
from tests.adapters.adapters import (
    KINDS,
    compute_deltas,
    load_strictly,
    load_tensors,
    make_adapter,
    make_base,
    write_tensors,
)
from tests.examples import limit_examples

MakeAdapter = Callable[[str, torch.dtype], tuple[Path, Path]]


@pytest.fixture(scope="module")
def make_original(tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    """Return a function that makes an adapter of a kind and a type of values once, and returns its base and its folder."""
    root = tmp_path_factory.mktemp("originals")

    def make(kind: str, dtype: torch.dtype) -> tuple[Path, Path]:
        family = kind if kind in ("conv1d", "lora_bias", "embedding") else "plain"
        base, folder = make_base(root / family, family), root / f"{kind} {dtype}"
        if not folder.exists():
            make_adapter(base, folder, kind)
            write_tensors(folder, {key: value.to(dtype) for key, value in load_tensors(folder).items()})
        return base, folder

    return make


@pytest.mark.trains
@limit_examples(40)
@given(
    st.sampled_from(sorted(KINDS)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 10_000),
    st.sampled_from(["truncated", "padded", "mixed"]),
    st.booleans(),
)
def test_a_resized_adapter_loads_in_peft_with_the_stated_update(
    make_original: MakeAdapter,
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    dtype: torch.dtype,
    seed: int,
    change: str,
    has_moments: bool,
) -> None:
    base, folder = make_original(kind, dtype)
    adapter, generator = open_adapter(folder), np.random.default_rng(seed)
    out = tmp_path_factory.mktemp("resized") / "small"
    low, high = {"truncated": (1, 4), "padded": (12, 16), "mixed": (1, 16)}[change]
    ranks = {module.name: int(generator.integers(low, high, endpoint=True)) for module in adapter.modules}
    draws = {module.name: generator.standard_normal((2, 20, module.rank)) for module in adapter.modules}
    moments = {name: Moments(*(factor.T @ factor for factor in pair)) for name, pair in draws.items()}
    resized = resize_adapter(adapter, out, ranks, moments if has_moments else None)

    old, new = (compute_deltas(load_strictly(base, path)) for path in (folder, out))
    for module, spectrum in zip(resized.modules, inspect(out).modules, strict=True):
        old_delta, new_delta = old[module.name], new[module.name]
        error = float((new_delta - old_delta).norm() / old_delta.norm())
        assert module.relative_delta_error == pytest.approx(error, abs=2e-6)
        assert error < 1.5 if module.rank < module.from_rank else error < torch.finfo(dtype).eps
        dense = torch.linalg.svdvals(new_delta)[: module.rank].numpy()
        assert spectrum.singular_values[: len(dense)] == pytest.approx(dense, abs=1e-5 * dense[0])

    old_tensors, new_tensors = load_tensors(folder), load_tensors(out)
    unchanged = [value.numel() for key, value in old_tensors.items() if "lora_" not in key]
    note = f"unchanged: {len(unchanged)} fully trained tensors with {sum(unchanged):,} parameters"
    assert [line for line in resized.notes if not line.startswith("DoRA")] == [note] * bool(unchanged)
    assert open_adapter(out).config["init_lora_weights"] is True
    assert resized.rank == (ranks[module.name] if len({module.rank for module in resized.modules}) == 1 else None)
    assert new_tensors.keys() == old_tensors.keys()
    for tensors, parameters in ((old_tensors, resized.parameters_before), (new_tensors, resized.parameters_after)):
        assert (
            sum(
                value.numel() for key, value in tensors.items() if re.search(r"lora_(embedding_)?[AB](\.weight)?$", key)
            )
            == parameters
        )
    for key, value in new_tensors.items():
        assert value.dtype == old_tensors[key].dtype
        if ".lora_A" in key:  # a row of zeros beside a column of zeros in B could never be trained
            assert bool(value.abs().sum(1).min() > 0)
        elif ".lora_B" not in key and "lora_embedding" not in key:  # magnitudes, and modules_to_save
            assert torch.equal(value, old_tensors[key])
