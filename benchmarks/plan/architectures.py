"""Real architectures: small versions for a CPU (also for tests), and four at their published size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import transformers

Configs: TypeAlias = dict[str, Callable[[], Any]]


def make_small_configs(width: int, heads: int, vocabulary: int, positions: int, blocks: int = 6) -> Configs:
    """Return seven architectures with this number of blocks, from their own configuration classes."""
    decoder: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": width * 5 // 2,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": positions,
    }
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": width * 3 // 4,
        "shared_expert_intermediate_size": width,
        "decoder_sparse_step": 1,
    }
    head = width // heads
    gpt2 = {"n_embd": width, "n_layer": blocks, "n_head": heads, "n_positions": positions}
    encoder = {name: decoder[name] for name in decoder if name != "num_key_value_heads"}
    return {
        "llama": lambda: transformers.LlamaConfig(**decoder, tie_word_embeddings=True),
        "qwen": lambda: transformers.Qwen2Config(**decoder),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=vocabulary, **gpt2, bos_token_id=None, eos_token_id=None),
        "mistral": lambda: transformers.MistralConfig(**decoder, head_dim=head, sliding_window=positions // 8),
        "phi3": lambda: transformers.Phi3Config(**decoder, pad_token_id=0, bos_token_id=None, eos_token_id=None),
        "moe": lambda: transformers.Qwen2MoeConfig(**decoder, **experts),
        "bert": lambda: transformers.BertConfig(**encoder),
    }


SMALL_CONFIGS = make_small_configs(256, 8, 4096, 512)

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}

# Sizes as in the models' published config.json.
FULL_CONFIGS: Configs = {
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
