"""The example that brings many adapters to one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from examples.fleet import truncate_fleet
from peft import PeftModel

from tests.adapters.adapters import load_base, make_adapter, make_base
from tests.tiny import make_tokenizer, small_settings, write_completions


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_base(tmp_path_factory.mktemp("fleet") / "base")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_completions(tmp_path_factory.mktemp("data") / "rows.jsonl", 40)


def logits(base: Path, adapter: Path) -> torch.Tensor:
    model: Any = PeftModel.from_pretrained(load_base(base), str(adapter)).eval()
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=torch.arange(12)[None]).logits
    return output


@pytest.mark.trains
def test_a_wide_margin_brings_all_to_rank_1(base: Path, data: Path, tmp_path: Path) -> None:
    adapters = [
        make_adapter(base, tmp_path / "wide", rank=8),
        make_adapter(base, tmp_path / "low", "rslora", rank=2),
        make_adapter(base, tmp_path / "single", rank=1),
    ]
    out, settings = tmp_path / "out", small_settings(max_steps=4, device="cpu")
    assert truncate_fleet(adapters, out, str(base), [data], margin=50, settings=settings) == 1
    for adapter in adapters:
        assert json.loads((out / adapter.name / "adapter_config.json").read_text())["r"] == 1
        assert logits(base, out / adapter.name).isfinite().all()
    assert torch.allclose(logits(base, tmp_path / "single"), logits(base, out / "single"), atol=1e-6)


@pytest.mark.trains
def test_a_margin_of_nothing_keeps_every_rank(base: Path, data: Path, tmp_path: Path) -> None:
    adapters = [make_adapter(base, tmp_path / "a", rank=4), make_adapter(base, tmp_path / "b", rank=2)]
    out, settings = tmp_path / "out", small_settings(max_steps=4, device="cpu")
    assert truncate_fleet(adapters, out, str(base), [data, data], margin=1e-9, settings=settings) == 4
    for adapter in adapters:
        assert torch.allclose(logits(base, adapter), logits(base, out / adapter.name), atol=1e-4)


@pytest.mark.parametrize(
    ("names", "files", "message"),
    [
        (["a"], 1, "give two or more with different names"),
        (["a", "x/a"], 1, "give two or more with different names"),
        (["a", "b"], 3, "3 data files for 2 adapters"),
    ],
)
def test_what_makes_no_fleet_is_refused(names: list[str], files: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        truncate_fleet([tmp_path / name for name in names], tmp_path / "out", "model", [tmp_path / "d.jsonl"] * files)
    assert not (tmp_path / "out").exists()
