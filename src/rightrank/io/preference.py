"""Rows of preference pairs: `prompt`, `chosen` and `rejected`, or `chosen` and `rejected` that both begin with the prompt.

The second form is TRL's implicit prompt: two whole conversations, whose common beginning is the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rightrank.errors import DataError


def pair_of(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`{"prompt", "chosen", "rejected"}` of a row whose cells are strings or lists of messages.

    A `prompt` of text beside two whole conversations repeats their beginning, and is not used.

    Raises:
        DataError: the columns have different types, there is no prompt, or an answer of messages has no assistant turn.
    """
    chosen, rejected, prompt = fields["chosen"], fields["rejected"], fields.get("prompt")
    is_chat = isinstance(chosen, list)
    if isinstance(rejected, list) != is_chat or (isinstance(prompt, list) and not is_chat):
        raise DataError(
            f"{where}: `prompt`, `chosen` and `rejected` have different types; give strings or lists of messages"
        )
    if prompt is None or (is_chat and isinstance(prompt, str)):
        prompt, chosen, rejected = split_prompt(chosen, rejected)
        if not prompt and chosen != rejected:
            raise DataError(
                f"{where}: `chosen` and `rejected` have no common beginning to be the prompt; give `prompt`, or name its "
                "column: --columns prompt=COLUMN"
            )
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if is_chat and not any(message["role"] == "assistant" for message in answer):
            raise DataError(f"{where}: `{name}` has no assistant turn after the prompt; give one")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def split_prompt(chosen: Sequence[Any], rejected: Sequence[Any]) -> tuple[Any, Any, Any]:
    """`(prompt, chosen, rejected)` of two whole conversations, with the border of TRL's `extract_prompt`.

    The prompt is the longest common beginning. A space before the difference belongs to the answers. Where one conversation
    begins the other, its last message (or character) belongs to the answers.
    """
    least = min(len(chosen), len(rejected))
    shared = next((index for index in range(least) if chosen[index] != rejected[index]), None)
    if shared is None:
        shared = max(0, least - 1)
    elif shared and chosen[shared - 1] == " ":
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]
