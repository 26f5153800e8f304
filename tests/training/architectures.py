"""Small random models of transformers' classes, and a plain PEFT loop over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from rightrank.bases.base_models import prepare_model
from rightrank.data.splits import load_data
from rightrank.evaluation.tokens import encode_splits
from rightrank.schema.events import Listener
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.training.loop import TrialFolders, train_trials
from rightrank.training.runtime import Runtime, build_runtime
from tests.tiny import GPT2_SIZES, build_small_settings, make_tokenizer
from tests.tiny import SIZES as BARE_SIZES

STEPS = 3
SIZES = BARE_SIZES | {"head_dim": 8}
MIXTURE: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
BERT = {name: value for name, value in BARE_SIZES.items() if name != "num_key_value_heads"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", SIZES),
    "mistral": ("Mistral", SIZES | {"sliding_window": 8}),
    "gemma2": ("Gemma2", SIZES | {"query_pre_attn_scalar": 8, "sliding_window": 8}),
    "gemma3": ("Gemma3", SIZES | {"query_pre_attn_scalar": 8, "sliding_window": 8}),
    "gpt2": ("GPT2", GPT2_SIZES),
    "phi": ("Phi", SIZES | {"num_key_value_heads": 4}),
    "phi3": ("Phi3", SIZES),
    "mixtral": ("Mixtral", SIZES | MIXTURE),
    "olmo2": ("Olmo2", SIZES),
    "smollm3": ("SmolLM3", SIZES),
    "lfm2": ("Lfm2", SIZES | {"layer_types": ["conv", "full_attention"]}),
    "bert": ("Bert", BERT),
}


def make_model(name: str, vocabulary: int) -> Any:
    family, sizes = MODELS[name]
    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_name)(vocab_size=vocabulary, **sizes)
    kind = "ForSequenceClassification" if name == "bert" else "LMHeadModel" if name == "gpt2" else "ForCausalLM"
    torch.manual_seed(0)
    return getattr(transformers, f"{family}{kind}")(config)


def make_runtime(name: str, data: Path, cache: Path) -> Runtime:
    changes = {"layers_to_transform": (1,)} if name == "qwen3" else {}  # one of them with a frozen prefix
    tokenizer = make_tokenizer()
    return make_model_runtime(make_model(name, len(tokenizer)), tokenizer, data, cache, **changes)


def make_model_runtime(model: Any, tokenizer: Any, data: Path, cache: Path, **changes: Any) -> Runtime:
    settings = build_small_settings(**{"max_steps": STEPS, "num_evaluations": 1} | changes)
    loaded = prepare_model(model, tokenizer, type(model).__name__, torch.device("cpu"))
    return build_runtime(loaded, encode_splits(load_data(data, settings), loaded, settings), settings, STEPS, cache)


def run(runtime: Runtime, arms: list[Arm], folder: Path, size: int) -> list[TrialFinished]:
    trials = [Trial(trial_id=f"t{number}", arm=arm) for number, arm in enumerate(arms)]
    folders = lambda trial: TrialFolders(folder / f"{trial.trial_id}.safetensors", folder / trial.trial_id)  # noqa: E731
    outcomes = list(train_trials(runtime, trials, None, folders, Listener(), size))
    finished = [outcome for outcome in outcomes if isinstance(outcome, TrialFinished)]
    assert len(finished) == len(arms)
    return sorted(finished, key=lambda outcome: outcome.trial_id)
