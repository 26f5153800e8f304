"""Seven architectures that are small enough for a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers


def small_configs(
    width: int, heads: int, vocabulary: int, positions: int, blocks: int = 6
) -> dict[str, Callable[[], Any]]:
    """Seven architectures of so many blocks, from their own configuration classes."""
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


CONFIGS = small_configs(64, 4, 512, 256, blocks=3)
