"""The model's answers to held-out examples: greedy text, generated in batches with a key-value cache, or the predicted class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from rightrank.data.forms import Example, select_template_inputs
from rightrank.schema.errors import DataError, is_out_of_memory
from rightrank.schema.trials import SplitName
from rightrank.training.device import enable_kv_cache
from rightrank.training.runtime import Runtime
from rightrank.training.tokens import Chat


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """The model's answer to one held-out example; for classification, the predicted class."""

    example_id: str
    prompt: str
    completion: str
    expected: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the model sees it, with the expected answer from the data."""

    example_id: str
    text: str
    expected: str
    add_special_tokens: bool  # False for a chat template, which writes them itself
    end: str = ""  # the text that the chat template writes after an answer


def build_prompts(runtime: Runtime, split: SplitName) -> list[Prompt]:
    """Build the prompts of a split's examples that have a label within `seq_len`, in the order of the split.

    Raises:
        DataError: the data is plain text, which has no prompts.
    """
    if runtime.data.summary.form == "text":
        raise DataError("the data has no prompts: metrics of generated answers need `prompt` and `completion`")
    encoded_ids = {example.example_id for example in runtime.data.splits[split]}
    return [
        _build_prompt(runtime, example) for example in runtime.data.texts[split] if example.example_id in encoded_ids
    ]


def generate_answers(runtime: Runtime, split: SplitName) -> list[ModelAnswer]:
    """Generate the answer to every example of a split with the current adapter, without adapter dropout."""
    if runtime.data.is_classification:
        return _predict_classes(runtime, split)
    prompts = build_prompts(runtime, split)
    texts = zip(prompts, _generate(runtime, prompts), strict=True)
    return [ModelAnswer(prompt.example_id, prompt.text, text, prompt.expected) for prompt, text in texts]


def _build_prompt(runtime: Runtime, example: Example) -> Prompt:
    prompt = example.content.get("prompt")
    completion = example.content.get(
        "completion", example.content.get("chosen")
    )  # preference pairs have a chosen answer instead
    if isinstance(prompt, str):
        return Prompt(example.example_id, prompt, str(completion), add_special_tokens=True)
    messages = [*example.content["messages"]] if prompt is None else [*prompt, *(completion or [])]
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    chat = Chat(runtime.loaded.tokenizer, select_template_inputs(example.content))
    text, end = chat.split_around_answer(messages[: last + 1])
    return Prompt(example.example_id, text, messages[last]["content"], add_special_tokens=False, end=end)


@torch.no_grad()
def _generate(runtime: Runtime, prompts: Sequence[Prompt]) -> list[str]:
    """Generate greedy text for each prompt, without adapter dropout.

    Prompts of similar length are batched. If memory runs out, the batch size is halved.
    """
    encoded = [_encode_prompt(runtime, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    config = _make_generation_config(runtime, prompts)
    texts = [""] * len(prompts)
    batch_size, begin = runtime.settings.eval_batch_size, 0
    while begin < len(order):
        batch_indices = order[begin : begin + batch_size]
        try:
            with runtime.disable_dropout(), enable_kv_cache(runtime.model):
                generated = _generate_batch(runtime, [encoded[index] for index in batch_indices], config)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or batch_size == 1:
                raise
            batch_size //= 2
            continue
        for index, text in zip(batch_indices, generated, strict=True):
            texts[index] = text
        begin += len(batch_indices)
    return texts


def _encode_prompt(runtime: Runtime, prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt. A prompt that is too long loses its beginning; an empty one becomes the beginning-of-text token."""
    tokenizer: Any = runtime.loaded.tokenizer
    ids: list[int] = tokenizer(prompt.text, add_special_tokens=prompt.add_special_tokens, verbose=False)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id and prompt.add_special_tokens:
        ids = ids[:-1]  # some tokenizers add an end token to every text
    positions = getattr(runtime.model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int):
        ids = ids[-max(1, positions - runtime.settings.max_new_tokens) :]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids or [start if start is not None else 0]


def _generate_batch(runtime: Runtime, token_ids: Sequence[list[int]], config: Any) -> list[str]:
    """Generate text for one batch. Prompts are padded on the left, so that every answer begins where its prompt ends."""
    tokenizer: Any = runtime.loaded.tokenizer
    longest, pad = max(map(len, token_ids)), tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in token_ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in token_ids])
    device = runtime.loaded.device
    output = runtime.model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
    texts: list[str] = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return texts


def _make_generation_config(runtime: Runtime, prompts: Sequence[Prompt]) -> Any:
    """Configure greedy decoding, which ends at any end token of the model, the tokenizer or the chat template.

    The model's own generation settings are ignored, except for its end tokens.
    """
    tokenizer: Any = runtime.loaded.tokenizer
    model_end_ids = getattr(runtime.model.generation_config, "eos_token_id", None)
    end_ids = {tokenizer.eos_token_id, *(model_end_ids if isinstance(model_end_ids, list) else [model_end_ids])}
    for end in {prompt.end for prompt in prompts if prompt.end}:
        first_id = tokenizer(end.lstrip(), add_special_tokens=False)["input_ids"][:1]
        end_ids |= set(first_id) & set(tokenizer.all_special_ids) | set(first_id) & set(tokenizer.added_tokens_decoder)
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
        eos_token_id=sorted(end for end in end_ids if end is not None) or None,
    )


@torch.no_grad()
def _predict_classes(runtime: Runtime, split: SplitName) -> list[ModelAnswer]:
    names, examples = runtime.data.summary.classes or [], runtime.data.splits[split]
    texts = {example.example_id: str(example.content["text"]) for example in runtime.data.texts[split]}
    answers: list[ModelAnswer] = []
    size = runtime.settings.eval_batch_size
    with runtime.disable_dropout():
        for begin in range(0, len(examples), size):
            rows = list(range(begin, min(begin + size, len(examples))))
            batch = runtime.make_batch(split, rows)
            logits = runtime.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            for row, predicted in zip(rows, logits.argmax(-1).tolist(), strict=True):
                example = examples[row]
                expected = names[example.labels[0]]
                answers.append(ModelAnswer(example.example_id, texts[example.example_id], names[predicted], expected))
    return answers
