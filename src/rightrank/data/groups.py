"""Groups of examples that belong together: those with the same value in a column, or with the same prompt."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from itertools import chain, islice, takewhile
from typing import Any

from rightrank.data.forms import Example, to_json_value
from rightrank.data.rows import Row, RowsBySplit
from rightrank.data.sampling import MAX_DETECTION_ROWS, are_instructions
from rightrank.schema.errors import DataError

MAX_COUNTED_GROUPS = 1000  # with more groups no split is too small


class Grouping:
    """The group of each row: by the column that the settings name, else by a column `group`, else by the prompt."""

    def __init__(self, column: str, by_prompt: bool) -> None:
        self.grouped_by = column or ("prompt" if by_prompt else "group")
        self._column, self._by_prompt = column, by_prompt
        # Maps each group to its first example. It stops growing at `MAX_COUNTED_GROUPS`, once some group has two examples.
        self._first_example_ids: dict[int, str] = {}
        self._is_shared = False  # whether a group has several examples

    def compute_group(self, row: Row, example: Example) -> int:
        """Return a hash of the row's value in the group column, else of the prompt, else of the example."""
        column = self._column
        value = row.fields.get(column or "group")
        is_missing = value is None or (isinstance(value, str) and not value)
        is_missing |= isinstance(value, float) and math.isnan(value)
        if is_missing and column:
            raise DataError(
                f"{row.origin}: the row has no value in column {column!r}, which --columns names for `group`; its columns are {', '.join(row.fields)}. Name "
                "a column that every row has, or leave `group` out"
            )
        prompt = _extract_prompt(example.content) if self._by_prompt and is_missing else None
        if is_missing:
            key = (
                example.example_id
                if prompt is None
                else f"prompt:{json.dumps(prompt, sort_keys=True, default=to_json_value)}"
            )
        else:
            key = (
                f"group:{value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=to_json_value)}"
            )
            self.grouped_by = column or "group"
        group = int(hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16], 16)
        if len(self._first_example_ids) < MAX_COUNTED_GROUPS or (column and not self._is_shared):
            first = self._first_example_ids.setdefault(group, example.example_id)
            self._is_shared |= first != example.example_id
        return group

    @property
    def num_groups(self) -> int:
        """Return the number of groups, or 0 if there are `MAX_COUNTED_GROUPS` or more, or if every group has one example."""
        return (
            len(self._first_example_ids) if self._is_shared and len(self._first_example_ids) < MAX_COUNTED_GROUPS else 0
        )

    def require_groups(self, name: str) -> None:
        """Raise if the group column has the same value in all rows, or a different value in each row."""
        column = self._column
        if column and (len(self._first_example_ids) == 1 or (self._first_example_ids and not self._is_shared)):
            fault = "all rows share" if self._is_shared else "no two rows share"
            raise DataError(
                f"{name}: {fault} a value of {column!r}, which --columns names for `group`; name a column in which several "
                "rows share each value, or leave it out: rows are then treated as independent"
            )


def detect_prompt_groups(rows: RowsBySplit) -> tuple[bool, RowsBySplit]:
    """Return whether rows with the same prompt form a group, and all rows.

    They do not if the first rows share a few prompts, which then are instructions rather than questions.
    """
    for split, in_split in rows.items():
        if first_rows := list(islice(in_split, MAX_DETECTION_ROWS)):
            prompts = {
                json.dumps(_extract_prompt(row.fields), sort_keys=True, default=to_json_value) for row in first_rows
            }
            return not are_instructions(len(prompts), len(first_rows)), {**rows, split: chain(first_rows, in_split)}
    return True, rows


def _extract_prompt(content: Mapping[str, Any]) -> Any:
    """Return the prompt, or the turns before the first assistant turn. Return None without a prompt or user turn."""
    messages = content.get("messages")
    if not isinstance(messages, list):
        return content.get("prompt") or None
    turns = [turn for turn in messages if isinstance(turn, Mapping)]
    prompt_turns = list(takewhile(lambda turn: turn.get("role") != "assistant", turns))
    return prompt_turns if any(turn.get("role") == "user" for turn in prompt_turns) else None


def number_groups(examples: Iterable[Example]) -> list[int] | None:
    """Assign group numbers in order of appearance. Return None if no examples share a group or all share one."""
    numbers_by_group: dict[int, int] = {}
    numbers = [numbers_by_group.setdefault(example.group, len(numbers_by_group)) for example in examples]
    return numbers if 1 < len(numbers_by_group) < len(numbers) else None
