"""A base in 4 or 8 bits: refused in one line where it can't be, and packs equal alone where it can."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rightrank.engine.pack_size import packing_obstacle
from rightrank.errors import MissingExtraError, SettingsError
from rightrank.io import models
from rightrank.records import Arm
from tests.engine.test_architectures import SIZES, plain_losses, run
from tests.helpers import make_bench
from tests.tiny import make_tokenizer, small_settings


def test_without_the_extra_it_is_named(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(
        MissingExtraError, match=r"load_in_4bit needs the `bitsandbytes` package: pip install 'rightrank\[bnb\]'"
    ):
        models.load_model(str(model_folder), "float32", "cpu", None, weight_bits=4)


def test_a_device_without_quantised_matrices_is_named(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_device", lambda _: torch.device("mps"))
    with pytest.raises(SettingsError, match="no 8-bit matrices on mps; give device cuda or cpu"):
        models.load_model(str(model_folder), "float32", "mps", None, weight_bits=8)


def test_both_widths_at_once_are_refused() -> None:
    with pytest.raises(SettingsError, match="both given: give one of them"):
        small_settings(load_in_4bit=True, load_in_8bit=True)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra bnb")
@pytest.mark.parametrize(("bits", "layer"), [(4, "Linear4bit"), (8, "Linear8bitLt")])
def test_a_pack_over_few_bits_equals_alone(completion_file: Path, tmp_path: Path, bits: int, layer: str) -> None:
    tokenizer = make_tokenizer()
    wide = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}  # blocks of 64 weights share a scale
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **(SIZES | wide))).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = small_settings(**{f"load_in_{bits}bit": True, "max_steps": 4})
    bench = make_bench(tmp_path / "model", completion_file, settings, tmp_path / "cache")
    assert type(bench.model.model.layers[0].mlp.up_proj).__name__ == layer
    arms = [Arm(rank=rank, learning_rate=1e-2, lora_alpha=32.0, seed=seed, steps=4) for rank, seed in ((2, 0), (4, 1))]
    assert packing_obstacle(bench, arms) is None
    alone, together = run(bench, arms, tmp_path / "alone", 1), run(bench, arms, tmp_path / "together", 2)
    assert alone[0].train_losses == pytest.approx(plain_losses(bench, arms[0]), rel=1e-4)
    for one, other in zip(together, alone, strict=True):
        assert one.pack_size == 2
        assert one.train_losses == pytest.approx(other.train_losses, rel=1e-5)
