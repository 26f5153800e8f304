"""Small random models of the real classes: our losses are PEFT's own, and arms in one pass equal each alone, or an obstacle is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from benchmarks.kinds.checks import plain_losses
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from rightrank.schema.errors import ModelError
from rightrank.schema.trials import Arm
from rightrank.train.pace import multi_lora_obstacle
from tests import commands
from tests.tiny import GPT2_SIZES, make_tokenizer
from tests.train.architectures import BERT, MODELS, PADDED, SIZES, STEPS, make_runtime, run, runtime_of

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


ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertLMHeadModel": ("BertConfig", BERT),
    "RobertaForCausalLM": ("RobertaConfig", BERT),
    "ElectraForCausalLM": ("ElectraConfig", BERT),
    "BertGenerationDecoder": ("BertGenerationConfig", BERT),
    "XLNetLMHeadModel": ("XLNetConfig", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
}


def made(model: str, config: str, tokenizer: Any, **sizes: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(vocab_size=len(tokenizer), **sizes))


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_that_sees_its_labels_is_refused(name: str, completion_file: Path, tmp_path: Path) -> None:
    config, sizes = ENCODERS[name]
    tokenizer = make_tokenizer()
    with pytest.raises(ModelError, match="it sees the tokens that follow, so a label is visible"):
        runtime_of(made(name, config, tokenizer, **sizes), tokenizer, completion_file, tmp_path)


def test_a_decoder_of_the_same_class_trains(completion_file: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model = made("BertLMHeadModel", "BertConfig", tokenizer, **BERT, is_decoder=True)
    assert runtime_of(model, tokenizer, completion_file, tmp_path).evaluate("selection").loss > 0


@pytest.mark.parametrize(
    ("model", "config", "sizes"),
    [
        ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}),
        ("MptForCausalLM", "MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    ],
    ids=["bloom", "mpt"],
)
def test_a_shortcut_that_raises_in_its_proof_is_not_used(
    model: str, config: str, sizes: dict[str, Any], completion_file: Path, tmp_path: Path
) -> None:
    """Their MLP takes a residual beside its input, of all rows."""
    tokenizer = make_tokenizer()
    runtime = runtime_of(made(model, config, tokenizer, **sizes), tokenizer, completion_file, tmp_path / "cache")
    assert runtime.fast_paths.last_block is None
    arm = Arm(rank=2, learning_rate=1e-2, lora_alpha=32.0, seed=0, steps=STEPS)
    (trained,) = run(runtime, [arm], tmp_path, 1)
    assert trained.train_losses == pytest.approx(plain_losses(runtime, arm), rel=2e-5)


def test_a_layer_that_returns_more_than_its_product_is_one_line(completion_file: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    sizes = SIZES | {"num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}
    model = made("Llama4ForCausalLM", "Llama4TextConfig", tokenizer, **sizes)
    with pytest.raises(
        ModelError, match=r"feed_forward\.router is a Llama4Router, which returns more than its product"
    ):
        runtime_of(model, tokenizer, completion_file, tmp_path)


@pytest.mark.parametrize(
    ("model", "config", "sizes"),
    [
        ("GPT2ForSequenceClassification", "GPT2Config", GPT2_SIZES),
        ("LlamaForSequenceClassification", "LlamaConfig", SIZES | {"pad_token_id": None}),
        ("LlamaForSequenceClassification", "LlamaConfig", SIZES | {"pad_token_id": 5}),
    ],
    ids=["gpt2", "llama", "another padding"],
)
def test_a_classifier_pads_as_its_batches_do(
    model: str, config: str, sizes: dict[str, Any], class_file: Path, tmp_path: Path
) -> None:
    """Neither the model nor the tokenizer has a token for padding, or the model has another: batches do not matter."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    classifier = made(model, config, tokenizer, **sizes)
    runtime = runtime_of(classifier, tokenizer, class_file, tmp_path / "cache")
    together = runtime.evaluate("selection").losses
    for index in range(3):
        with torch.no_grad():
            alone = runtime.losses("selection", runtime.batch("selection", [index]), 1.0).example_losses
        assert float(alone[0]) == pytest.approx(together[index], rel=1e-4)


def _folder(kind: str, place: Path) -> Path:
    tokenizer: Any = make_tokenizer()
    torch.manual_seed(0)
    model: Any
    if kind == "t5":
        t5 = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        model = T5ForConditionalGeneration(t5)
    elif kind == "mamba":
        mamba = MambaConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=8
        )
        model = MambaForCausalLM(mamba)
    else:
        qwen: Any = Qwen3NextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
            linear_value_head_dim=8, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4,
            num_experts_per_tok=2, max_position_embeddings=128,
        )  # fmt: skip
        model = Qwen3NextForCausalLM(qwen)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("t5", "an encoder-decoder, as T5, which select does not train; give a causal model"),
        ("mamba", ""),  # all-linear leaves out what PEFT refuses
        ("qwen3next", "or leave it out: --set exclude_modules=shared_expert_gate"),
    ],
)
def test_an_unusual_model_works_or_is_refused_in_words_of_ours(
    kind: str, said: str, completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = _folder(kind, tmp_path / kind)
    capsys.readouterr()
    given = commands.select_arguments(base, completion_file, tmp_path / "run", "--goal", "adapter", "--quiet", "--json")
    status, out, err = commands.run(given, capsys)
    if said:
        assert (status, out) == (2, "")
        assert said in err
    else:
        assert status == 0, err
        config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
        assert not any("out_proj" in name for name in config["target_modules"])
