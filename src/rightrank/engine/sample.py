"""What a model writes for a held-out prompt."""

from __future__ import annotations

from typing import Any

import torch

from rightrank.engine.runtime import Runtime
from rightrank.io.example_store import Example

MAX_NEW_TOKENS = 64
MAX_PROMPT_TOKENS = 256


def promptable_items(runtime: Runtime, count: int) -> list[Example]:
    """The first `count` test items with a string prompt that is not too long to read."""
    if runtime.data.summary.form != "prompt_completion":
        return []
    tokenizer = runtime.loaded.tokenizer
    found: list[Example] = []
    for item in runtime.data.texts["test"]:
        if len(found) == count:
            break
        prompt = item.content["prompt"]
        if isinstance(prompt, str) and 0 < len(tokenizer(prompt)["input_ids"]) <= MAX_PROMPT_TOKENS:
            found.append(item)
    return found


@torch.no_grad()
def write_completion(runtime: Runtime, item: Example) -> str:
    """Greedy, at most 64 new tokens, with whatever adapter the base now carries."""
    tokenizer: Any = runtime.loaded.tokenizer
    encoded = tokenizer(item.content["prompt"], return_tensors="pt").to(runtime.loaded.device)
    output = runtime.model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    text: str = tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
