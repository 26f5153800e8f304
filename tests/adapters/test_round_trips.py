"""Every kind of adapter, resized, loads in PEFT without a warning, at the reported distance from the original."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rightrank.api.adapters import resize
from tests.adapters.adapters import (
    KINDS,
    compute_deltas,
    compute_logits,
    load_strictly,
    load_tensors,
    make_adapter,
    make_base,
)

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("bases")

    def make_kind(kind: str) -> Path:
        family = kind if kind in ("conv1d", "lora_bias", "embedding") else "plain"
        return make_base(root / family, family)

    return make_kind


def compute_relative_distance(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> float:
    assert old.keys() == new.keys()
    error = math.hypot(*(float((new[name] - old[name]).norm()) for name in old))
    return error / math.hypot(*(float(value.norm()) for value in old.values()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.8}], ids=["rank", "energy"])
def test_the_reported_error_is_the_error_after_reloading(
    bases: Any, tmp_path: Path, kind: str, rule: dict[str, Any]
) -> None:
    base = bases(kind)
    adapter = make_adapter(base, tmp_path / "adapter", kind)
    resized = resize(adapter, tmp_path / "small", **rule)
    old, new = load_strictly(base, adapter), load_strictly(base, tmp_path / "small")
    measured = compute_relative_distance(compute_deltas(old), compute_deltas(new))
    assert 0.01 < resized.relative_delta_error < 0.9
    assert measured == pytest.approx(resized.relative_delta_error, abs=1e-6)
    for module in resized.modules:
        old_delta, new_delta = compute_deltas(old)[module.name], compute_deltas(new)[module.name]
        assert float((new_delta - old_delta).norm() / old_delta.norm()) == pytest.approx(
            module.relative_delta_error, abs=1e-6
        )
        assert module.rank <= module.from_rank


@pytest.mark.parametrize("kind", KINDS)
def test_padding_keeps_the_function(bases: Any, tmp_path: Path, kind: str) -> None:
    base = bases(kind)
    adapter = make_adapter(base, tmp_path / "adapter", kind)
    resized = resize(adapter, tmp_path / "wide", rank=16)
    assert resized.rank == 16
    assert resized.relative_delta_error == pytest.approx(0, abs=5e-3 if kind == "bfloat16" else 1e-6)
    new = load_strictly(base, tmp_path / "wide")
    assert torch.allclose(compute_logits(new), compute_logits(load_strictly(base, adapter)), atol=1e-4)
    # the new directions can learn: a row of zeros in A beside a column of zeros in B never would
    for key, value in load_tensors(tmp_path / "wide").items():
        if "lora_A" in key or "lora_embedding_A" in key:
            assert bool(value.abs().sum(1).min() > 0)


def test_a_pattern_on_a_name_that_ends_another_is_anchored() -> None:
    from rightrank.adapters.rank_math import build_exact_pattern, get_pattern_value

    names = ["layers.0.q_proj", "vision.layers.0.q_proj", "layers.1.q_proj"]
    ranks = {"layers.0.q_proj": 2, "vision.layers.0.q_proj": 8, "layers.1.q_proj": 4}
    pattern = build_exact_pattern(ranks, 8, names)
    assert {name: get_pattern_value(pattern, name, 8) for name in names} == ranks
