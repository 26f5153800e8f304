"""Gives rows the columns of a form of data: columns named by hand, Alpaca, ShareGPT, question and answer, tokenised rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from rightrank.errors import DataError, did_you_mean
from rightrank.io.rows import Row

Change: TypeAlias = Callable[[Row], Mapping[str, Any]]

PAIRS = (  # further names of prompt and completion, in the order in which they are looked for
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("instruction", "response"),
    ("question", "response"),
    ("input", "output"),
)
PROMPTS = ("question", "query", "instruction", "input")  # further names of a preference pair's prompt
CONVERSATIONS = ("messages", "conversations", "conversation")
SPELLED = {  # column names that are recognised in any spelling of upper and lower case
    *("prompt", "completion", "messages", "text", "label", "chosen", "rejected", "conversations", "instruction"),
    *("input", "output", "question", "answer", "query", "response", "group"),
}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """How rows of one shape become rows of a form."""

    name: str  # as it is reported: "alpaca", "sharegpt", "tokens", or the columns that were renamed
    change: Change
    renamed: Mapping[str, str] = field(default_factory=dict)  # a form's column → the file's name of it

    def __call__(self, row: Row) -> Row:
        return Row(self.change(row), row.where)


def shape_of(first: Row, columns: Sequence[str], known: Collection[str]) -> Shape | None:
    """How to change rows like `first`; None for rows that have a form's columns as they are.

    Args:
        columns: `NAME=COLUMN` for each column that has another name.
        known: the column names of all forms.

    Raises:
        DataError: `columns` names a column that no form has, or that the row lacks.
    """
    if not columns and not _spellings(first.fields):
        return _found(first.fields)
    renamed = _renaming(first, columns, known) if columns else _shape_renamed(_spellings(first.fields))
    inner = _found(renamed.change(first))
    if inner is None:
        return renamed
    return Shape(renamed.name, lambda row: inner.change(renamed(row)), renamed.renamed)


def _renaming(first: Row, columns: Sequence[str], known: Collection[str]) -> Shape:
    names = dict(entry.split("=", 1) for entry in columns)
    for name, column in names.items():
        if name not in known:
            near = f" (did you mean {column}={name}?)" if column in known else did_you_mean(name, list(known))
            raise DataError(
                f"columns: {name!r} is no column of a form{near or '; allowed: ' + ', '.join(sorted(known))}"
            )
        if column not in first.fields:
            found = ", ".join(f"`{one}`" for one in first.fields)
            raise DataError(f"{first.where}: no column {column!r}, which columns names for `{name}`; found {found}")
    return _shape_renamed(names)


def _spellings(fields: Mapping[str, Any]) -> dict[str, str]:
    """Known names to columns that differ from them in upper and lower case or in spaces around, such as `Prompt`."""
    names = {str(column).strip().lower(): column for column in fields}
    return {name: column for name, column in names.items() if name in SPELLED and name not in fields}


def _shape_renamed(names: Mapping[str, str]) -> Shape:
    def change(row: Row) -> Mapping[str, Any]:
        return dict(row.fields) | {name: row.fields.get(column) for name, column in names.items()}

    return Shape(", ".join(f"{column} → {name}" for name, column in names.items()), change, names)


def _found(fields: Mapping[str, Any]) -> Shape | None:
    if {"chosen", "rejected"} <= fields.keys():
        return _preference(fields)
    conversation = next((name for name in CONVERSATIONS if name in fields), None)
    if conversation is not None and (conversation != "messages" or _is_sharegpt(fields[conversation])):
        return Shape("sharegpt", lambda row: {**row.fields, "messages": _messages(row, conversation)})
    if {"prompt", "completion"} <= fields.keys() or "messages" in fields or "text" in fields:
        return None
    if {"instruction", "output"} <= fields.keys():
        return Shape("alpaca", _alpaca)
    pair = next((pair for pair in PAIRS if fields.keys() >= set(pair)), None)
    if pair is not None:
        names = zip(("prompt", "completion"), pair, strict=True)
        return _shape_renamed({name: column for name, column in names if name != column})
    return Shape("tokens", _tokens) if "input_ids" in fields else None


def _preference(fields: Mapping[str, Any]) -> Shape | None:
    """Preference pairs whose prompt has another name beside two answers of text."""
    column = next((name for name in PROMPTS if name in fields), None)
    if "prompt" in fields or column is None or not isinstance(fields["chosen"], str):
        return None
    return _shape_renamed({"prompt": column})


def _is_sharegpt(value: Any) -> bool:
    """Whether turns have ShareGPT's keys, or its names of roles."""
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return False
    return "from" in value[0] or value[0].get("role") in ("human", "gpt")


def _messages(row: Row, column: str) -> Any:
    turns = row.fields.get(column)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        return turns  # the check of `messages` reports it
    return [_renamed_role(turn) if "role" in turn else _message(turn, row.where) for turn in turns]


def _renamed_role(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A message with `user` and `assistant` for the roles that ShareGPT calls `human` and `gpt`."""
    role = turn["role"]
    return {**turn, "role": ROLES.get(role, role) if isinstance(role, str) else role}


def _message(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = ROLES.get(str(turn.get("from")))
    if role is None:
        raise DataError(
            f"{where}: a turn is from {turn.get('from')!r}; known: {', '.join(ROLES)} (give `messages` for other roles)"
        )
    return {"role": role, "content": turn.get("value")}


def _alpaca(row: Row) -> Mapping[str, Any]:
    """The prompt of Stanford Alpaca, which axolotl's `alpaca` and others use."""
    instruction, context = row.fields.get("instruction"), row.fields.get("input")
    if not isinstance(instruction, str) or not isinstance(context, str | None):
        raise DataError(f"{row.where}: `instruction` and `input` must be strings")
    template = ALPACA_WITH_INPUT if context else ALPACA
    prompt = template.format(instruction=instruction, input=context)
    return {**row.fields, "prompt": prompt, "completion": row.fields.get("output")}


def _tokens(row: Row) -> Mapping[str, Any]:
    """`input_ids` without padding, and a label for each: `labels`, those of `completion_mask`, or all tokens."""
    ids = _numbers(row, "input_ids")
    attended = _numbers(row, "attention_mask", len(ids)) if row.fields.get("attention_mask") else [1] * len(ids)
    if row.fields.get("labels") is not None:
        labels = _numbers(row, "labels", len(ids))
    elif row.fields.get("completion_mask") is not None:
        mask = _numbers(row, "completion_mask", len(ids))
        labels = [token if kept else -100 for token, kept in zip(ids, mask, strict=True)]
    else:
        labels = ids
    kept = [place for place, seen in enumerate(attended) if seen]
    return {**row.fields, "input_ids": [ids[place] for place in kept], "labels": [labels[place] for place in kept]}


def _numbers(row: Row, name: str, count: int | None = None) -> list[int]:
    values = row.fields.get(name)
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise DataError(f"{row.where}: `{name}` must be a list of integers")
    if count is not None and len(values) != count:
        raise DataError(f"{row.where}: `{name}` has {len(values)} numbers for {count} `input_ids`; give one for each")
    return values
