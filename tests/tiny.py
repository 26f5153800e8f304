"""Small real models, data and settings that tests and benchmarks make for themselves: nothing is downloaded."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from rightrank.bases.safetensors_files import write_tensors
from rightrank.schema.settings import SelectSettings

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "one",
    "dog",
    "run",
    "far",
    "from",
    "its",
    "old",
    "red",
    "house",
    "by",
    "the",
    "blue",
    "sea",
    "at",
    "noon",
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_adapter(folder: Path, base: str = "model") -> Path:
    """Write an adapter of two matrices [6, 5] at rank 4, the first with most of its energy in one direction, without PEFT."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    tensors = {}
    for name, decay in (("q_proj", 0.01), ("v_proj", 1.0)):
        key = f"base_model.model.model.layers.0.self_attn.{name}"
        tensors[f"{key}.lora_A.weight"] = generator.standard_normal((4, 5)).astype(np.float32)
        tensors[f"{key}.lora_B.weight"] = (generator.standard_normal((6, 4)) * [1, decay, decay, decay]).astype(
            np.float32
        )
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return folder


def generate_sentences(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(4, 14))) for _ in range(count)]


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from tokenizers.decoders import ByteLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(generate_sentences(200), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


SIZES: dict[str, Any] = {  # of a small random model, in the names of most configurations
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "initializer_range": 0.2,
}
GPT2_SIZES: dict[str, Any] = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.2,
}  # fmt: skip


def build_tiny_llama_config(vocabulary: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **(SIZES | {"num_hidden_layers": 3}))


def save_tiny_llama(folder: Path) -> Path:
    """Save a random 3-layer Llama with a byte-level tokenizer, in the way that users do."""
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(build_tiny_llama_config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_completions(path: Path, count: int = 200, seed: int = 1) -> Path:
    """Prompt and completion: the completion repeats the prompt's first words, which can be learned."""
    rows = [
        {"prompt": f"{text} : ", "completion": " ".join(text.split()[:3])} for text in generate_sentences(count, seed)
    ]
    return write_jsonl(path, rows)


ON_CPU = SelectSettings(dtype="float32", device="cpu")


def build_small_settings(**changes: Any) -> SelectSettings:
    """Return the settings of a selection of two ranks that takes a second or two."""
    values: dict[str, Any] = {
        "goal": "training-rank",
        "strategy": "grid",
        "ranks": (1, 4),
        "learning_rates": (1e-2,),
        "max_steps": 8,
        "batch_size": 4,
        "seq_len": 32,
        "max_eval_examples": 12,
        "num_evaluations": 2,
        "dtype": "float32",  # what is planned without a preparation has a type of its own
    }
    return SelectSettings(**values | changes)


def write_pairs(path: Path, count: int = 200) -> Path:
    """Preference pairs: the chosen answer repeats the prompt's first words, the rejected one its last, which can be learned."""
    rows = [
        {
            "prompt": f"{text} : ",
            "chosen": " ".join(text.split()[:3]),
            "rejected": " ".join(text.split()[-2:]),
        }
        for text in generate_sentences(count, seed=4)
    ]
    return write_jsonl(path, rows)
