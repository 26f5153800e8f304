"""What the model answers to held-out items: greedy text in batches with a key-value cache, or the class it names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from rightrank.engine.distributed import broadcast, process_index, world_size
from rightrank.engine.runtime import Runtime
from rightrank.errors import DataError, is_out_of_memory
from rightrank.io.example_store import Example
from rightrank.io.scorers import ModelAnswer
from rightrank.records import SplitName


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt as the model sees it, and what the data has for its answer."""

    item_id: str
    prompt: str
    expected: str
    special: bool  # whether the tokenizer adds its own beginning: a chat template has it already
    end: str = ""  # what the chat template writes after an answer


def questions(runtime: Runtime, split: SplitName) -> list[Question]:
    """The items of a split that have a prompt and a label left, in the split's order.

    Raises:
        DataError: plain texts, which have no prompt.
    """
    if runtime.data.summary.form == "text":
        raise DataError("the data has `text` alone: metrics of what the model writes need `prompt` and `completion`")
    kept = {item.item_id.split("#")[0] for item in runtime.items(split)}
    return [_question(runtime, item) for item in runtime.data.texts[split] if item.item_id in kept]


def answers(runtime: Runtime, split: SplitName) -> list[ModelAnswer]:
    """The answer to every item of a split under whatever adapter the base now carries; adapter dropout off."""
    if runtime.data.is_classification:
        return _classes(runtime, split)
    asked = questions(runtime, split)
    with runtime.without_dropout(), kv_cache(runtime.model):
        written = _shared(runtime, asked)
    return [ModelAnswer(q.item_id, q.prompt, text, q.expected) for q, text in zip(asked, written, strict=True)]


def _question(runtime: Runtime, item: Example) -> Question:
    prompt, completion = item.content.get("prompt"), item.content.get("completion")
    if isinstance(prompt, str):
        return Question(item.item_id, prompt, str(completion), special=True)
    messages = [*item.content["messages"]] if prompt is None else [*prompt, *(completion or [])]
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    tokenizer: Any = runtime.loaded.tokenizer
    before = tokenizer.apply_chat_template(messages[:last], tokenize=False, add_generation_prompt=True) if last else ""
    whole = tokenizer.apply_chat_template(messages[: last + 1], tokenize=False)
    expected = messages[last]["content"]
    _, found, end = whole[len(before) :].rpartition(expected)
    return Question(item.item_id, before, expected, False, end if found else "")


def _shared(runtime: Runtime, asked: Sequence[Question]) -> list[str]:
    """Texts in the order of the questions; of several processes, each writes its share."""
    texts: dict[int, str] = {}
    for process in range(world_size()):
        mine = list(range(len(asked)))[process :: world_size()]
        written = _write(runtime, [asked[index] for index in mine]) if process == process_index() else None
        texts |= dict(zip(mine, broadcast(process, written), strict=True))
    return [texts[index] for index in range(len(asked))]


@torch.no_grad()
def _write(runtime: Runtime, asked: Sequence[Question]) -> list[str]:
    """Greedy; prompts of like length together; half the batch where memory does not do."""
    encoded = [_prompt_ids(runtime, question) for question in asked]
    order = sorted(range(len(asked)), key=lambda index: len(encoded[index]))
    config = _generation(runtime, asked)
    texts = [""] * len(asked)
    size, begin = runtime.settings.eval_batch_size, 0
    while begin < len(order):
        chosen = order[begin : begin + size]
        try:
            written = _batch(runtime, [encoded[index] for index in chosen], config)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            size //= 2
            continue
        for index, text in zip(chosen, written, strict=True):
            texts[index] = text
        begin += len(chosen)
    return texts


def _prompt_ids(runtime: Runtime, question: Question) -> list[int]:
    """Token ids; a prompt too long for the model keeps its end. An empty one begins as texts do."""
    tokenizer: Any = runtime.loaded.tokenizer
    ids: list[int] = tokenizer(question.prompt, add_special_tokens=question.special, verbose=False)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id and question.special:
        ids = ids[:-1]  # of a tokenizer that ends every text
    positions = getattr(runtime.model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int):
        ids = ids[-max(1, positions - runtime.settings.max_new_tokens) :]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids or [start if start is not None else 0]


def _batch(runtime: Runtime, prompts: Sequence[list[int]], config: Any) -> list[str]:
    """Padding is on the left, so that every answer begins where its prompt ends."""
    tokenizer: Any = runtime.loaded.tokenizer
    longest, pad = max(map(len, prompts)), tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = runtime.loaded.device
    output = runtime.model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
    texts: list[str] = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return texts


def _generation(runtime: Runtime, asked: Sequence[Question]) -> Any:
    """Greedy whatever the model's own configuration says of sampling; the end is any that model or template has."""
    tokenizer: Any = runtime.loaded.tokenizer
    own = getattr(runtime.model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    for end in {question.end for question in asked if question.end}:
        first = tokenizer(end.lstrip(), add_special_tokens=False)["input_ids"][:1]
        ends |= set(first) & set(tokenizer.all_special_ids) | set(first) & set(tokenizer.added_tokens_decoder)
    config: Any = GenerationConfig  # untyped in transformers
    return config(
        max_new_tokens=runtime.settings.max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(end for end in ends if end is not None) or None,
    )


@torch.no_grad()
def _classes(runtime: Runtime, split: SplitName) -> list[ModelAnswer]:
    names, items = runtime.data.summary.classes or [], runtime.items(split)
    texts = {item.item_id: str(item.content["text"]) for item in runtime.data.texts[split]}
    found: list[ModelAnswer] = []
    size = runtime.settings.eval_batch_size
    with runtime.without_dropout():
        for begin in range(0, len(items), size):
            rows = list(range(begin, min(begin + size, len(items))))
            batch = runtime.batch(split, rows)
            logits = runtime.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            for row, predicted in zip(rows, logits.argmax(-1).tolist(), strict=True):
                item = items[row]
                found.append(ModelAnswer(item.item_id, texts[item.item_id], names[predicted], names[item.labels[0]]))
    return found


@contextmanager
def kv_cache(model: Any) -> Iterator[None]:
    """The key-value cache works: blocks that recompute their activations in training do not while writing."""
    blocks = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and m.training]
    for block in blocks:
        block.training = False
    try:
        yield
    finally:
        for block in blocks:
            block.training = True
