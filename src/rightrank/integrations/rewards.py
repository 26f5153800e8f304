"""Rewards of held-out prompts: one greedy completion for each, scored by the reward functions as TRL calls them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeAlias

import torch

from rightrank.errors import NotFiniteError, SettingsError

RewardFunction: TypeAlias = Callable[..., Sequence[float | None]]


def checked_reward(function: RewardFunction) -> RewardFunction:
    """The reward function, which raises where it returns the wrong count or a number that is not finite.

    None stands for a reward that does not apply to a completion, as in TRL.

    Raises:
        SettingsError: not a plain function; reward models and coroutines need a `train` function of your own.
    """
    if not callable(function) or isinstance(function, torch.nn.Module) or inspect.iscoroutinefunction(function):
        raise SettingsError(
            f"reward_funcs: got {type(function).__name__}; give plain functions of prompts and completions that return one number each"
        )
    name = getattr(function, "__name__", type(function).__name__)

    def checked(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        rewards = list(function(completions=completions, **columns))
        if len(rewards) != len(completions):
            raise ValueError(f"{name} returned {len(rewards)} rewards for {len(completions)} completions")
        bad = next((reward for reward in rewards if reward is not None and not math.isfinite(reward)), None)
        if bad is not None:
            raise NotFiniteError(f"{name} returned {bad}; return finite rewards, or None where it does not apply")
        return [None if reward is None else float(reward) for reward in rewards]

    return wraps(function)(checked)


@torch.no_grad()
def greedy_rewards(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    functions: Sequence[RewardFunction],
    weights: Sequence[float],
    max_new_tokens: int,
    batch_size: int,
) -> list[float]:
    """The weighted sum of the rewards of each row's greedy completion, in the order of the rows.

    Args:
        rows: `prompt`, a string or a list of messages, and the columns that the functions read.
    """
    was_training, rewards = model.training, []
    model.eval()
    for start in range(0, len(rows), batch_size):
        batch = [rows[place] for place in range(start, min(start + batch_size, len(rows)))]
        completions, ids = _greedy(model, tokenizer, [row["prompt"] for row in batch], max_new_tokens)
        columns = {name: [row[name] for row in batch] for name in batch[0] if name != "prompt"}
        prompts = [row["prompt"] for row in batch]
        found = [
            function(prompts=prompts, completions=completions, completion_ids=ids, **columns) for function in functions
        ]
        rewards += [
            sum(w * r for w, r in zip(weights, one, strict=True) if r is not None) for one in zip(*found, strict=True)
        ]
    model.train(was_training)
    return rewards


def _greedy(model: Any, tokenizer: Any, prompts: list[Any], max_new_tokens: int) -> tuple[list[Any], list[list[int]]]:
    """The completions, strings or messages as the prompts are, and their tokens."""
    chat = not isinstance(prompts[0], str)
    texts = (
        [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
        if chat
        else prompts
    )
    encoded = tokenizer(
        texts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=not chat,
        return_token_type_ids=False,
    ).to(model.device)
    written = model.generate(
        **encoded,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    ids = [_until_end(row, tokenizer) for row in written[:, encoded["input_ids"].shape[1] :].tolist()]
    answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [[{"role": "assistant", "content": text}] for text in answers] if chat else answers, ids


def _until_end(ids: list[int], tokenizer: Any) -> list[int]:
    """The tokens up to the end token, without padding."""
    end = tokenizer.eos_token_id
    return ids[: ids.index(end) + 1] if end in ids else ids
