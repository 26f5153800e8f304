"""Small random models of the real classes are planned, trained, loaded and truncated as with PEFT, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rightrank.schema.errors import ModelError
from tests.tiny import GPT2_SIZES, make_tokenizer
from tests.training.architecture_cases import ARCHITECTURES
from tests.training.architecture_checks import check_configuration
from tests.training.architecture_table import MARK, PAGE, RESULTS, format_tables, read_rows
from tests.training.architectures import SIZES, make_model_runtime

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


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    row = check_configuration(name, 0, tmp_path)
    assert row.outcome == "refused", row.reason
    assert ARCHITECTURES[name].refused in row.reason


def test_the_page_has_the_table_of_what_is_stored() -> None:
    assert PAGE.read_text(encoding="utf-8").partition(MARK)[2].strip() == format_tables(read_rows(RESULTS)).strip()


def made(model: str, config: str, tokenizer: Any, **sizes: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(vocab_size=len(tokenizer), **sizes))


def test_a_classifier_pads_as_its_batches_do(class_file: Path, tmp_path: Path) -> None:
    """Check that batches do not change the losses if the model and the tokenizer have different padding tokens."""
    tokenizer = make_tokenizer()
    classifier = made("LlamaForSequenceClassification", "LlamaConfig", tokenizer, **SIZES | {"pad_token_id": 5})
    runtime = make_model_runtime(classifier, tokenizer, class_file, tmp_path / "cache")
    batch_losses = runtime.evaluator.evaluate("validation").losses
    for index in range(3):
        with torch.no_grad():
            alone = runtime.evaluator.compute_losses(
                "validation", runtime.evaluator.make_batch("validation", [index]), 1.0
            ).example_losses
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
