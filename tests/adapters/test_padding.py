"""A padded adapter computes the same function, whatever its scales were, with one rank and one scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rightrank.adapters.resize import write_padded
from rightrank.schema.errors import ModelError
from tests.adapters.adapters import load_strictly, logits, make_adapter, make_base, tensors_of

pytestmark = pytest.mark.trains

PADDED = 16
SERVED_AS_IT_IS = ("plain", "embedding", "layers", "conv1d", "bfloat16", "modules_to_save")  # 2 · 16 is a whole alpha


def test_plain_numbers_stay_to_the_bit(tmp_path: Path) -> None:
    adapter = make_adapter(make_base(tmp_path / "base"), tmp_path / "adapter")
    write_padded(adapter, tmp_path / "padded", PADDED)
    before, after = tensors_of(adapter), tensors_of(tmp_path / "padded")
    assert before.keys() == after.keys()
    for key, value in before.items():
        kept = after[key][:8] if "lora_A" in key else after[key][:, :8]
        added = after[key][8:] if "lora_A" in key else after[key][:, 8:]
        assert torch.equal(kept, value)
        assert added.numel() > 0
        assert not added.any()


@pytest.mark.parametrize("kind", [*SERVED_AS_IT_IS, "rslora", "rank_pattern", "alpha_pattern"])
def test_the_function_stays(kind: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", kind)
    adapter = make_adapter(base, tmp_path / "adapter", kind)
    write_padded(adapter, tmp_path / "padded", PADDED)
    config = json.loads((tmp_path / "padded" / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == (
        PADDED,
        False,
        {},
        {},
    )
    assert isinstance(config["lora_alpha"], int)
    before, after = (logits(load_strictly(base, folder)) for folder in (adapter, tmp_path / "padded"))
    assert (
        float((before - logits(load_strictly(base, adapter).unload())).abs().max()) > 0.01
    )  # the adapter does something
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_a_rank_that_no_power_divides(tmp_path: Path) -> None:
    """16/6 times 8 is no whole number: what is left of the scale goes into B."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", rank=6)
    write_padded(adapter, tmp_path / "padded", 8)
    assert json.loads((tmp_path / "padded" / "adapter_config.json").read_text())["lora_alpha"] == 21
    before, after = (logits(load_strictly(base, folder)) for folder in (adapter, tmp_path / "padded"))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "setting"), [("dora", "use_dora"), ("lora_bias", "lora_bias")])
def test_adapters_that_zeros_would_change_are_refused(kind: str, setting: str, tmp_path: Path) -> None:
    adapter = make_adapter(make_base(tmp_path / "base", kind), tmp_path / "adapter", kind)
    with pytest.raises(ModelError, match=f"an adapter with {setting} can't be padded"):
        write_padded(adapter, tmp_path / "padded", PADDED)
    assert not (tmp_path / "padded").exists()


def test_below_the_rank_is_refused(tmp_path: Path) -> None:
    adapter = make_adapter(make_base(tmp_path / "base"), tmp_path / "adapter")
    with pytest.raises(ModelError, match="has rank 8, above 4; resize the adapter first"):
        write_padded(adapter, tmp_path / "padded", 4)
