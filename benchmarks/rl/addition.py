"""The task of the live case: two-digit addition, by a small model that answers a quarter of the prompts correctly.

python -m benchmarks.rl.addition BASE     # trains the base, about two minutes on one core
"""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "0123456789+="
SPECIAL = ("<pad>", "<s>", "</s>")
MIN_SUCCESS = 0.25  # of greedy answers; the training of the base stops here
BATCH = 64
HELD_OUT = 300  # prompts for validation, and as many for the test


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SPECIAL) + len(CHARACTERS),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=True,
        )
    )


def rows() -> dict[str, list[dict[str, str]]]:
    """Prompts and answers in three splits: the sums of all pairs from 10 to 99, in a fixed order."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(pairs)
    made = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]
    return {
        "validation": made[:HELD_OUT],
        "test": made[HELD_OUT : 2 * HELD_OUT],
        "train": made[2 * HELD_OUT :],
    }


def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 for the right sum, else 0."""
    return [float(re.sub("[^0-9]", "", text) == right) for text, right in zip(completions, answer, strict=True)]


def train_base(folder: Path) -> float:
    """Train until `MIN_SUCCESS` of the validation prompts are answered correctly, and return that part."""
    model, tokenizer, splits = make_model(), make_tokenizer(), rows()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = random.Random(1)
    success, step = 0.0, 0
    while success < MIN_SUCCESS:
        batch = [generator.choice(splits["train"]) for _ in range(BATCH)]
        encoded = [tokenizer(row["prompt"])["input_ids"] + tokenizer(row["answer"])["input_ids"] + [2] for row in batch]
        width = max(map(len, encoded))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in encoded])
        labels = ids.masked_fill(ids == 0, -100)
        labels[:, :6] = -100  # the prompt
        loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 50 == 0:
            success = greedy_success(model, tokenizer, splits["validation"])
            print(f"step {step}: loss {loss.item():.3f}, {success:.1%} correct", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return success


@torch.no_grad()
def greedy_success(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]) -> float:
    model.eval()
    ids = tokenizer([row["prompt"] for row in rows], return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**ids, max_new_tokens=5, do_sample=False)[:, ids["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    model.train()
    return sum(reward(texts, [row["answer"] for row in rows])) / len(rows)


if __name__ == "__main__":
    train_base(Path(sys.argv[1]))
