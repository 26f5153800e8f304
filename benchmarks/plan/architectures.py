"""Real architectures: five made small enough for a CPU, four at their own size as published configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

DECODER: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}

SMALL_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**DECODER, tie_word_embeddings=True),
    "qwen": lambda: transformers.Qwen2Config(**DECODER),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=4096, n_positions=512, n_embd=256, n_layer=6, n_head=8),
    "mistral": lambda: transformers.MistralConfig(**DECODER, head_dim=32, sliding_window=48),
    "moe": lambda: transformers.Qwen2MoeConfig(
        **DECODER,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=176,
        shared_expert_intermediate_size=256,
    ),
}

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}

# Sizes as in the models' published config.json.
FULL_CONFIGS: dict[str, Callable[[], Any]] = {
    "SmolLM2-135M": lambda: transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "Llama-3.2-3B": lambda: transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        rope_parameters=dict(LLAMA_3_ROPE),
    ),
    "Llama-3.1-8B": lambda: transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters=LLAMA_3_ROPE | {"factor": 8.0},
    ),
    "Llama-3.1-70B": lambda: transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters=LLAMA_3_ROPE | {"factor": 8.0},
    ),
}
