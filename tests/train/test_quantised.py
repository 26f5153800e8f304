"""A base in 4 or 8 bits: refused in one line without CUDA or bitsandbytes; otherwise arms in one pass equal each alone."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from rightrank.models import base_models as models
from rightrank.schema.errors import MissingExtraError, ModelError, SettingsError
from rightrank.schema.trials import Arm
from rightrank.train.pace import multi_lora_obstacle
from rightrank.train.runtime import Runtime
from tests.helpers import make_runtime
from tests.models.kind_checks import plain_losses
from tests.tiny import ON_CPU, make_tokenizer, small_settings
from tests.train.architectures import SIZES, run


def test_without_the_extra_it_is_named(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(
        MissingExtraError, match=r"load_in_4bit needs the `bitsandbytes` package: pip install 'rightrank\[bnb\]'"
    ):
        models.load_base(str(model_folder), ON_CPU.model_copy(update={"load_in_4bit": True}), None)


def test_a_device_without_quantised_matrices_is_named(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_device", lambda _: torch.device("mps"))
    with pytest.raises(SettingsError, match="no 8-bit matrices on mps; give device cuda or cpu"):
        models.load_base(str(model_folder), ON_CPU.model_copy(update={"device": "mps", "load_in_8bit": True}), None)


def test_both_widths_at_once_are_refused() -> None:
    with pytest.raises(SettingsError, match="both given: give one of them"):
        small_settings(load_in_4bit=True, load_in_8bit=True)


def quantised_runtime(completion_file: Path, folder: Path, bits: int, **changes: Any) -> Runtime:
    tokenizer = make_tokenizer()
    wide = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}  # blocks of 64 weights share a scale
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **(SIZES | wide))).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    settings = small_settings(**{f"load_in_{bits}bit": True, "max_steps": 4, **changes})
    return make_runtime(folder / "model", completion_file, settings, folder / "cache")


ARMS = [Arm(rank=rank, learning_rate=1e-2, lora_alpha=32.0, seed=seed, steps=4) for rank, seed in ((2, 0), (4, 1))]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra bnb")
def test_arms_over_four_bits_in_one_pass_equal_each_alone(completion_file: Path, tmp_path: Path) -> None:
    runtime = quantised_runtime(completion_file, tmp_path, 4)
    assert type(runtime.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert multi_lora_obstacle(runtime, ARMS) is None
    alone, together = run(runtime, ARMS, tmp_path / "alone", 1), run(runtime, ARMS, tmp_path / "together", 2)
    assert alone[0].train_losses == pytest.approx(plain_losses(runtime, ARMS[0]), rel=1e-4)
    for one, other in zip(together, alone, strict=True):
        assert one.adapters_per_pass == 2
        assert one.train_losses == pytest.approx(other.train_losses, rel=1e-5)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra bnb")
def test_eight_bits_train_alone_as_plain_peft(completion_file: Path, tmp_path: Path) -> None:
    """LLM.int8 searches outliers over all rows of a batch, so another arm's rows change an arm's output: one arm per pass."""
    runtime = quantised_runtime(completion_file, tmp_path, 8)
    assert type(runtime.model.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    assert multi_lora_obstacle(runtime, ARMS) == "this model's losses differ when two arms share a pass"
    (alone,) = run(runtime, ARMS[:1], tmp_path / "alone", 1)
    assert alone.train_losses == pytest.approx(plain_losses(runtime, ARMS[0]), rel=1e-3)
    assert len(set(alone.train_losses)) == 4


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra bnb")
def test_dora_over_four_bits_is_pefts(completion_file: Path, tmp_path: Path) -> None:
    runtime = quantised_runtime(completion_file, tmp_path, 4, use_dora=True)
    (alone,) = run(runtime, ARMS[:1], tmp_path / "alone", 1)
    assert alone.train_losses == pytest.approx(plain_losses(runtime, ARMS[0]), rel=1e-4)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra bnb")
def test_dora_over_eight_bits_on_a_cpu_is_refused(completion_file: Path, tmp_path: Path) -> None:
    """PEFT's own second pass fails there."""
    with pytest.raises(ModelError, match="use_dora with load_in_8bit: PEFT loses the scales"):
        quantised_runtime(completion_file, tmp_path, 8, use_dora=True)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra bnb")
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_trained_whole_keeps_its_bits(class_file: Path, tmp_path: Path, bits: int) -> None:
    """An encoder's head, which has a bias as its last parameter and is no output embedding, and a module in modules_to_save."""
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = small_settings(**{f"load_in_{bits}bit": True, "modules_to_save": ("pooler.dense",), "max_steps": 4})
    runtime = make_runtime(tmp_path / "model", class_file, settings, tmp_path / "cache")
    assert type(runtime.model.classifier) is type(runtime.model.bert.pooler.dense) is torch.nn.Linear
    assert type(runtime.model.bert.encoder.layer[0].output.dense) is not torch.nn.Linear
    assert len(run(runtime, ARMS[:1], tmp_path / "alone", 1)[0].train_losses) == 4
