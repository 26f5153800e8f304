"""Small models of real architectures, from their own configuration classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

SMALL = {"vocab_size": 512, "max_position_embeddings": 256}
DECODER = SMALL | {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**DECODER, tie_word_embeddings=True),
    "qwen": lambda: transformers.Qwen2Config(**DECODER),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=512, n_positions=256, n_embd=64, n_layer=6, n_head=4),
    "mistral": lambda: transformers.MistralConfig(**DECODER, head_dim=16, sliding_window=32),
    "phi3": lambda: transformers.Phi3Config(**DECODER, pad_token_id=0),
    "moe": lambda: transformers.Qwen2MoeConfig(
        **DECODER,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=64,
        decoder_sparse_step=1,
    ),
}
