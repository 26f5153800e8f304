"""Small random models of the real classes are planned, trained, loaded and truncated as with PEFT, or refused in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rightrank.schema.errors import ModelError
from rightrank.schema.trials import Arm
from rightrank.training.pace import find_multi_lora_obstacle
from tests.tiny import GPT2_SIZES, generate_sentences, make_tokenizer, write_jsonl
from tests.training.architecture_cases import ARCHITECTURES
from tests.training.architecture_checks import check_configuration
from tests.training.architecture_table import MARK, PAGE, RESULTS, format_tables, read_rows
from tests.training.architectures import SIZES, STEPS, make_model, make_model_runtime, make_runtime, run

pytestmark = pytest.mark.trains


# Every other architecture of the generator is in the benchmark.
NAMED = (
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "falcon",
    "stablelm", "olmo", "olmo2", "granite", "cohere", "deepseek_v3", "mixtral", "gpt_oss", "smollm3", "lfm2", "mamba", "bert", "roberta",
    "modernbert", "deberta", "distilbert", "gpt2, classes", "mixtral, classes", "bloom, text", "llama, text",
)  # fmt: skip
REFUSED = tuple(name for name, architecture in ARCHITECTURES.items() if architecture.refused)
SEEDS = {
    "olmo": 1,
    "gpt2, classes": 1,
    "bloom": 1,
    "bloom, text": 1,
}  # writes into a layer's output; no token for padding; two layers


@pytest.mark.parametrize("name", NAMED)
def test_an_architecture_is_planned_trained_loaded_and_truncated_as_by_peft(name: str, tmp_path: Path) -> None:
    row = check_configuration(name, SEEDS.get(name, 0), tmp_path)
    assert row.outcome == "equal", row.reason
    if name.startswith("bloom"):
        assert "label rows" in row.shortcuts  # the residual, which its MLP takes, has the same rows
    assert "label rows" not in row.shortcuts or name not in ("bert", "deberta")  # what raises in its proof is not used


def test_a_module_that_reads_its_neighbours_runs_at_every_position(tmp_path: Path) -> None:
    """Check a batch in which nearly every position has a label, as in plain text."""
    texts = write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in generate_sentences(80)])
    tokenizer = make_tokenizer()
    model = make_model("llama", len(tokenizer))
    mlp = model.model.layers[-1].mlp
    alone = mlp.forward
    mlp.forward = lambda x: alone(x + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])
    assert make_model_runtime(model, tokenizer, texts, tmp_path / "cache").fast_paths.last_block is None
    mlp.forward = alone
    assert make_model_runtime(model, tokenizer, texts, tmp_path / "other").fast_paths.last_block is not None


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_in_one_line_before_a_weight_is_read(name: str, tmp_path: Path) -> None:
    row = check_configuration(name, 0, tmp_path)
    assert row.outcome == "refused", row.reason
    assert ARCHITECTURES[name].refused in row.reason


def test_the_page_has_the_table_of_what_is_stored() -> None:
    assert PAGE.read_text(encoding="utf-8").partition(MARK)[2].strip() == format_tables(read_rows(RESULTS)).strip()


def test_a_layer_that_mixes_arms_is_an_obstacle(completion_file: Path, tmp_path: Path) -> None:
    """Check an adapted layer that sees a selection of tokens, as an expert of a mixture does."""
    runtime = make_runtime("llama", completion_file, tmp_path / "cache")
    mlp = runtime.model.model.layers[0].mlp
    original_forward = mlp.forward

    def keep_first_tokens(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        half = len(rows) // 2
        return torch.cat([original_forward(rows[:half]), rows[half:]]).view_as(x)

    mlp.forward = keep_first_tokens
    arms = [Arm(rank=rank, learning_rate=1e-2, lora_alpha=32.0, seed=0, steps=STEPS) for rank in (2, 4)]
    obstacle = find_multi_lora_obstacle(runtime, arms)
    assert obstacle is not None
    assert re.fullmatch(r"a layer sees \d+ rows that can't be assigned to arms", obstacle)
    assert run(runtime, arms, tmp_path, 1)[0].adapters_per_pass == 1


def made(model: str, config: str, tokenizer: Any, **sizes: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(vocab_size=len(tokenizer), **sizes))


def test_an_encoder_that_only_a_batch_shows_is_refused(completion_file: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model = made("XLNetLMHeadModel", "XLNetConfig", tokenizer, d_model=32, n_layer=2, n_head=4, d_inner=48)
    with pytest.raises(ModelError, match="it sees the tokens that follow, so a label is visible"):
        make_model_runtime(model, tokenizer, completion_file, tmp_path)


def test_a_classifier_pads_as_its_batches_do(class_file: Path, tmp_path: Path) -> None:
    """Check that batches do not change the losses if the model and the tokenizer have different padding tokens."""
    tokenizer = make_tokenizer()
    classifier = made("LlamaForSequenceClassification", "LlamaConfig", tokenizer, **SIZES | {"pad_token_id": 5})
    runtime = make_model_runtime(classifier, tokenizer, class_file, tmp_path / "cache")
    batch_losses = runtime.evaluate("validation").losses
    for index in range(3):
        with torch.no_grad():
            alone = runtime.compute_losses("validation", runtime.make_batch("validation", [index]), 1.0).example_losses
        assert float(alone[0]) == pytest.approx(batch_losses[index], rel=1e-4)


def test_a_base_that_fails_by_itself_is_named_in_one_line(completion_file: Path, tmp_path: Path) -> None:
    """Check texts that are longer than the model's positions, and an odd rotary size."""
    tokenizer = make_tokenizer()
    short = made("GPT2LMHeadModel", "GPT2Config", tokenizer, **GPT2_SIZES | {"n_positions": 4})
    with pytest.raises(
        ModelError, match=r"^GPT2LMHeadModel: the base model fails without any adapter on texts of .*seq_len"
    ):
        make_model_runtime(short, tokenizer, completion_file, tmp_path)
    with pytest.raises(
        ModelError, match=r"in 8 bits on this device: leave load_in_8bit out, or choose another device$"
    ):
        make_model_runtime(short, tokenizer, completion_file, tmp_path, load_in_8bit=True)
    odd = made(
        "StableLmForCausalLM",
        "StableLmConfig",
        tokenizer,
        **SIZES | {"head_dim": 6, "hidden_size": 24, "partial_rotary_factor": 0.5},
    )
    with pytest.raises(ModelError, match=r"^StableLmForCausalLM: the base model fails.*RuntimeError: .*config\.json"):
        make_model_runtime(odd, tokenizer, completion_file, tmp_path)
