"""One small random model for each kind of adapter, and the settings that give the kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from rightrank.data.splits import load_data
from rightrank.models.base_models import prepare_model
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm
from rightrank.train.runtime import Runtime
from rightrank.train.tokens import encode_splits
from tests.tiny import GPT2_SIZES, SIZES, make_tokenizer, small_settings, write_completions

STEPS, RANK = 3, 4
ARM = Arm(rank=RANK, learning_rate=1e-2, lora_alpha=32.0, seed=0, steps=STEPS)

HEAD = {"head_dim": 8}
TWO_OF_FOUR = {"num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SIZES | HEAD | {"tie_word_embeddings": False}),
    "gpt2": ("GPT2LMHeadModel", GPT2_SIZES),
    "mixtral": ("MixtralForCausalLM", SIZES | HEAD | TWO_OF_FOUR | {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", SIZES | HEAD | TWO_OF_FOUR | {"num_experts": 4, "moe_intermediate_size": 24}),
    "olmoe": ("OlmoeForCausalLM", SIZES | TWO_OF_FOUR | {"num_experts": 4}),
    "gpt-oss": ("GptOssForCausalLM", SIZES | HEAD | TWO_OF_FOUR | {"num_local_experts": 4, "sliding_window": 64}),
}
FUSED = {
    "target_modules": ("q_proj", "v_proj"),
    "target_parameters": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of adapter on a model."""

    name: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    shares_a_pass: bool = False
    is_truncated: bool = True


CASES = (
    Case("linear", "llama", {}, shares_a_pass=True),
    Case("linear, transposed (GPT-2)", "gpt2", {}, shares_a_pass=True),
    Case("embedding", "llama", {"target_modules": ("q_proj", "embed_tokens")}),
    Case("DoRA", "llama", {"use_dora": True}),
    Case("DoRA, transposed (GPT-2)", "gpt2", {"use_dora": True}),
    Case("DoRA on an embedding", "llama", {"use_dora": True, "target_modules": ("q_proj", "embed_tokens")}),
    Case("experts (Mixtral)", "mixtral", FUSED),
    Case("experts (Qwen3-MoE)", "qwen3-moe", FUSED),
    Case("experts (OLMoE)", "olmoe", FUSED),
    Case("experts (gpt-oss)", "gpt-oss", FUSED),
    Case("unknown (lora_bias)", "gpt2", {"peft_options": {"lora_bias": True}}, is_truncated=False),
)


def make_model(name: str, vocabulary: int) -> Any:
    """A random model, the same on every call."""
    architecture, sizes = MODELS[name]
    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    return kind(kind.config_class(vocab_size=vocabulary, **sizes)).eval()


def settings_of(case: Case) -> SelectSettings:
    return small_settings(max_steps=STEPS, num_evaluations=1, ranks=(2, RANK), dtype="float32", **case.settings)


def make_runtime(case: Case, folder: Path) -> Runtime:
    """The base in `folder/base`, saved as users have theirs, and the runtime that trains on it."""
    tokenizer, settings = make_tokenizer(), settings_of(case)
    model = make_model(case.model, len(tokenizer))
    model.save_pretrained(folder / "base")
    loaded = prepare_model(model, tokenizer, str(folder / "base"), torch.device("cpu"))
    data = write_completions(folder / "data.jsonl", 120)
    return Runtime(loaded, encode_splits(load_data(data, settings), loaded, settings), settings, STEPS, folder / "cache")


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@dataclass(slots=True)
class Trained:
    """A case after its training."""

    case: Case
    runtime: Runtime
    folder: Path

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def base(self) -> Path:
        return self.folder / "base"
