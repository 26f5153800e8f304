"""Detect the form of the data and convert rows to it: renamed columns, Alpaca, ShareGPT, question and answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal, TypeAlias

from rightrank.data.files import UnreadableError, parse_json
from rightrank.data.rows import Row, RowsBySplit
from rightrank.schema.errors import DataError, suggest_name

DataForm: TypeAlias = Literal["text", "prompt_completion", "messages", "classification", "preference"]

FORMS: tuple[tuple[DataForm, tuple[str, ...]], ...] = (  # The first form whose columns all exist is used.
    ("preference", ("prompt", "chosen", "rejected")),
    ("preference", ("chosen", "rejected")),  # both begin with the prompt
    ("messages", ("messages",)),
    ("prompt_completion", ("prompt", "completion")),
    ("classification", ("text", "label")),
    ("text", ("text",)),
)
FORM_COLUMNS = {column for _, columns in FORMS for column in columns} | {"group"}
COMPLETION_COLUMNS = (  # other names of prompt and completion, in order of preference
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("instruction", "response"),
    ("question", "response"),
    ("input", "output"),
)
PROMPT_COLUMNS = ("question", "query", "instruction", "input")  # other names of a preference pair's prompt
MEDIA_COLUMNS = (
    "image",
    "images",
    "video",
    "videos",
    "audio",
    "pixel_values",
)  # not read; without them rows would be scored as text
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
TEMPLATE_COLUMNS = ("tools", "documents")  # of a chat row: passed to the chat template under these names
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ALPACA_TEMPLATE = (
    "Below is an instruction that describes a task{input_clause}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input_section}### Response:\n"
)
ALPACA_INPUT_CLAUSE = ", paired with an input that provides further context"


@dataclass(frozen=True, slots=True)
class Shape:
    """A layout of rows, with the function that converts them to a form."""

    name: str  # "alpaca", "sharegpt", or the renamed columns; used in reports
    convert: Callable[[Row], Mapping[str, Any]]
    columns: tuple[str, ...]  # the columns of the file that it reads

    def __call__(self, row: Row) -> Row:
        return Row(self.convert(row), row.origin)


PLAIN = Shape("", lambda row: row.fields, ())  # rows that have the columns of a form


@dataclass(frozen=True, slots=True)
class Layout:
    form: DataForm
    columns: tuple[str, ...]  # of the form
    shape: Shape
    unused_columns: tuple[str, ...]  # of the first row


def detect_form(rows: RowsBySplit, name: str, column_settings: Sequence[str]) -> tuple[Layout, RowsBySplit]:
    """Detect the form of the first row.

    Returns:
        `(layout, all rows converted to the columns of the form)`. While it is iterated, a row raises a `DataError` if it has a picture,
        sound or video, or if it is a conversation with a column that is neither used nor ignored.
    """
    options = [entry.partition("=")[::2] for entry in column_settings]
    ignored = {column for option, column in options if option == "ignore"}
    renaming = {option: column for option, column in options if option not in ("ignore", "group")}
    rows = {split: map(partial(_drop_columns, ignored), in_split) for split, in_split in rows.items()}
    for split, in_split in rows.items():
        first = next(in_split, None)
        if first is not None:
            rows[split] = chain([first], in_split)
            break
    else:
        raise DataError(f"{name}: no rows; give at least one row of text")
    _require_text_columns(first)
    form, columns, shape = _match_form(first, renaming)
    used = {*columns, *shape.columns, dict(options).get("group", "group"), "group"}
    unused_columns = () if _is_chat(shape(first), columns) else tuple(name for name in first.fields if name not in used)
    convert = partial(_convert_row, shape, columns, used)
    return Layout(form, columns, shape, unused_columns), {
        split: map(convert, in_split) for split, in_split in rows.items()
    }


def _drop_columns(ignored: Collection[str], row: Row) -> Row:
    return Row({name: value for name, value in row.fields.items() if name not in ignored}, row.origin)


def _match_form(first: Row, renaming: Mapping[str, str]) -> tuple[DataForm, tuple[str, ...], Shape]:
    """Return the first form whose columns all exist, with these columns and the shape of the rows.

    Args:
        renaming: The column in the file for each column of a form that has another name there.

    Raises:
        DataError: The columns fit no form, or `renaming` names a column that no form has or that the row lacks.
    """
    _require_columns(first, renaming)
    renamed = _build_renaming_shape(renaming)
    layout = _match_shape(renamed.convert(first))
    shape = Shape(
        renamed.name or layout.name,
        lambda row: layout.convert(renamed(row)),
        (*renamed.columns, *layout.columns),
    )
    fields = shape.convert(first)
    for form, columns in FORMS:
        if all(column in fields for column in columns):
            return form, columns, shape
    allowed = "; or ".join(", ".join(f"`{column}`" for column in columns) for _, columns in FORMS)
    column_names = ", ".join(f"`{column}`" for column in first.fields) or "none"
    raise DataError(
        f"{first.origin}: the columns ({column_names}) fit no form; give {allowed}, or name your columns: "
        "--columns prompt=COLUMN,completion=COLUMN"
    )


def _convert_row(shape: Shape, columns: Sequence[str], used: Collection[str], row: Row) -> Row:
    """Convert a row, and refuse it if the conversion would lose content in silence."""
    _require_text_columns(row)
    converted = shape(row)
    unused_columns = [
        name
        for name, value in row.fields.items()
        if name not in used and name not in TEMPLATE_COLUMNS and not is_empty(value)
    ]
    if unused_columns and _is_chat(converted, columns):
        names = ", ".join(f"`{name}`" for name in unused_columns)
        option = ",".join(f"ignore={name}" for name in unused_columns)
        raise DataError(
            f"{row.origin}: nothing uses the columns {names} of this conversation; leave them out, or ignore them: --set columns={option}"
        )
    return converted


def _is_chat(row: Row, columns: Sequence[str]) -> bool:
    return any(isinstance(row.fields.get(column), list) for column in columns)


def is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | Mapping) and not value)


def _require_text_columns(row: Row) -> None:
    media = next(
        (
            column
            for column, value in row.fields.items()
            if str(column).lower() in MEDIA_COLUMNS and not is_empty(value)
        ),
        None,
    )
    if media is not None:
        raise DataError(
            f"{row.origin}: the column `{media}`: only text is read here; add SmallestAdapter(trainer) to the trainer that reads it, or score "
            f"adapters by your own function (select_rank_with), or ignore the column: --set columns=ignore={media}"
        )


def _require_columns(first: Row, renaming: Mapping[str, str]) -> None:
    for name, column in renaming.items():
        if name not in FORM_COLUMNS:
            allowed = suggest_name(name, sorted(FORM_COLUMNS)) or f"; allowed: {', '.join(sorted(FORM_COLUMNS))}"
            raise DataError(f"--columns: {name!r} is not a column of any form{allowed}; give NAME=COLUMN")
        if column not in first.fields:
            available = ", ".join(f"`{name_in_file}`" for name_in_file in first.fields)
            raise DataError(
                f"{first.origin}: the row has no column {column!r}, which --columns names for `{name}`; its columns are {available}"
            )


def _build_renaming_shape(names: Mapping[str, str]) -> Shape:
    return Shape(
        ", ".join(f"{column} → {name}" for name, column in names.items()),
        lambda row: {**row.fields, **{name: row.fields.get(column) for name, column in names.items()}},
        tuple(names.values()),
    )


def _match_shape(fields: Mapping[str, Any]) -> Shape:
    if {"chosen", "rejected"} <= fields.keys():
        prompt = next((name for name in PROMPT_COLUMNS if name in fields), None)  # used if both answers are text
        if "prompt" in fields or prompt is None or not isinstance(fields["chosen"], str):
            return PLAIN
        return _build_renaming_shape({"prompt": prompt})
    conversation = next((name for name in CONVERSATION_COLUMNS if name in fields), None)
    if conversation is not None and (conversation != "messages" or _is_sharegpt(fields[conversation])):
        return Shape(
            "sharegpt", lambda row: {**row.fields, "messages": _convert_sharegpt(row, conversation)}, (conversation,)
        )
    if {"prompt", "completion"} <= fields.keys() or "messages" in fields or "text" in fields:
        return PLAIN
    if {"instruction", "output"} <= fields.keys():
        return Shape("alpaca", _convert_alpaca, ("instruction", "input", "output"))
    pair = next((pair for pair in COMPLETION_COLUMNS if fields.keys() >= set(pair)), None)
    if pair is not None:
        names = zip(("prompt", "completion"), pair, strict=True)
        return _build_renaming_shape({name: column for name, column in names if name != column})
    return PLAIN


def _is_sharegpt(value: Any) -> bool:
    """Return whether the turns have the keys or the role names of ShareGPT."""
    turn = value[0] if isinstance(value, list) and value else None
    return isinstance(turn, Mapping) and ("from" in turn or turn.get("role") in ("human", "gpt"))


def _convert_sharegpt(row: Row, column: str) -> Any:
    """Convert the turns of ShareGPT to messages. The roles `human` and `gpt` become `user` and `assistant`."""
    turns = row.fields.get(column)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        return turns  # `_check_messages` reports it.
    for turn in turns:
        if "role" not in turn and str(turn.get("from")) not in ROLES:
            raise DataError(
                f"{row.origin}: a turn is from {turn.get('from')!r}; allowed: {', '.join(ROLES)}. Give a column `messages` for other roles"
            )
    return [
        {**turn, "role": ROLES.get(str(turn["role"]), turn["role"])}
        if "role" in turn
        else {"role": ROLES[str(turn["from"])], "content": turn.get("value")}
        for turn in turns
    ]


def _convert_alpaca(row: Row) -> Mapping[str, Any]:
    """Add the prompt of Stanford Alpaca, which axolotl's `alpaca` and others use."""
    instruction, context = row.fields.get("instruction"), row.fields.get("input")
    if not isinstance(instruction, str) or not isinstance(context, str | None):
        raise DataError(f"{row.origin}: `instruction` and `input` must be strings")
    input_clause, input_section = (ALPACA_INPUT_CLAUSE, f"### Input:\n{context}\n\n") if context else ("", "")
    prompt = ALPACA_TEMPLATE.format(instruction=instruction, input_clause=input_clause, input_section=input_section)
    return {**row.fields, "prompt": prompt, "completion": row.fields.get("output")}


@dataclass(frozen=True, slots=True)
class Example:
    """An example: the columns of its form, and a hash of them as its identity."""

    example_id: str  # 16 hexadecimal digits
    content: Mapping[str, Any]  # of JSON values
    origin: str  # file and row
    group: int = 0  # 64 bits, equal for rows of one group


def build_example(row: Row, form: DataForm, columns: tuple[str, ...]) -> Example:
    """Check the cells of a row and build its example.

    Raises:
        DataError: a cell does not fit the form.
    """
    content = {column: _join_text_content(row.fields.get(column)) for column in columns}
    label = content.get("label")
    if isinstance(label, bool):
        content["label"] = str(label)
    elif isinstance(label, float) and label.is_integer():  # Spreadsheets store whole numbers as floats.
        content["label"] = int(label)
    for column, value in content.items():
        _CHECKS[column](value, f"{row.origin}: `{column}`")
    inputs = _read_template_inputs(row) if _is_chat(row, columns) else {}
    if form == "preference":
        content = _build_preference_pair(content, row.origin)
    content |= inputs
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, default=to_json_value)
    return Example(hashlib.sha256(canonical.encode()).hexdigest()[:16], content, row.origin)


def select_template_inputs(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the chat template receives in addition to the messages of an example."""
    return {name: content[name] for name in TEMPLATE_COLUMNS if name in content}


def _read_template_inputs(row: Row) -> dict[str, Any]:
    """Read the columns that a chat template receives: lists of mappings, or such lists as JSON, as for TRL.

    Raises:
        DataError: a column has something else.
    """
    inputs: dict[str, Any] = {}
    for name in TEMPLATE_COLUMNS:
        value = row.fields.get(name)
        if is_empty(value):
            continue
        try:
            entries = parse_json(value) if isinstance(value, str) else value
        except UnreadableError:
            entries = None
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise DataError(
                f"{row.origin}: `{name}`: got {_describe_type(value)}; give a list of mappings, or such a list as JSON"
            )
        if entries:
            inputs[name] = _drop_missing_values(entries)
    return inputs


def _drop_missing_values(value: Any) -> Any:
    """Drop keys without a value at every depth: Arrow tables give all mappings of a list the same keys."""
    if isinstance(value, Mapping):
        return {name: _drop_missing_values(inner) for name, inner in value.items() if inner is not None}
    return [_drop_missing_values(inner) for inner in value] if isinstance(value, list) else value


def to_json_value(value: Any) -> Any:
    """Convert a value for `json.dumps`. Arrays become lists, because the text of an array omits values."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _join_text_content(value: Any) -> Any:
    """Replace lists of text fragments in messages by the joined text. Return other values unchanged."""
    if not isinstance(value, list):
        return value
    return [
        {**message, "content": "".join(fragment["text"] for fragment in message["content"])}
        if isinstance(message, Mapping) and _is_text_content(message.get("content"))
        else message
        for message in value
    ]


def _is_text_content(content: Any) -> bool:
    return (
        isinstance(content, list)
        and bool(content)
        and all(
            isinstance(fragment, Mapping) and fragment.get("type") == "text" and isinstance(fragment.get("text"), str)
            for fragment in content
        )
    )


def _check_text(value: Any, location: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{location}: got {_describe_type(value)}; give a string")


def _check_prompt(value: Any, location: str) -> None:
    if isinstance(value, list):
        _check_messages(value, location)
    else:
        _check_text(value, location)


def _check_label(value: Any, location: str) -> None:
    if not isinstance(value, int | str) or value == "":
        raise DataError(f"{location}: got {_describe_type(value)}; give an integer or a name")


def _check_messages(value: Any, location: str) -> None:
    if not isinstance(value, list) or not value:
        raise DataError(f"{location}: got {_describe_type(value)}; give a list of {{role, content}}")
    for message in value:
        if (
            not isinstance(message, Mapping)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            raise DataError(
                f"{location}: a message needs a `role` and a `content`, both strings; `content` can also be a list of text fragments"
            )


def _describe_type(value: Any) -> str:
    if is_empty(value):
        return "nothing"
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


_CHECKS: dict[str, Callable[[Any, str], None]] = {
    "text": _check_text,
    "prompt": _check_prompt,
    "completion": _check_prompt,
    "label": _check_label,
    "messages": _check_messages,
    "chosen": _check_prompt,
    "rejected": _check_prompt,
}


def _build_preference_pair(fields: Mapping[str, Any], location: str) -> dict[str, Any]:
    """Return `{"prompt", "chosen", "rejected"}` for a row whose cells are strings or lists of messages.

    If `chosen` and `rejected` are complete conversations, a `prompt` of text repeats their beginning and is ignored.
    """
    chosen, rejected, prompt = fields["chosen"], fields["rejected"], fields.get("prompt")
    is_chat = isinstance(chosen, list)
    if isinstance(rejected, list) != is_chat or (isinstance(prompt, list) and not is_chat):
        raise DataError(
            f"{location}: `prompt`, `chosen` and `rejected` have different types; give strings or lists of messages"
        )
    if prompt is None or (is_chat and isinstance(prompt, str)):
        prompt, chosen, rejected = _split_prompt(chosen, rejected)
        if not prompt and chosen != rejected:
            raise DataError(
                f"{location}: `chosen` and `rejected` have no common beginning to be the prompt; give `prompt`, or name its "
                "column: --columns prompt=COLUMN"
            )
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if is_chat and not any(message["role"] == "assistant" for message in answer):
            raise DataError(f"{location}: `{name}` has no assistant turn after the prompt; give one")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _split_prompt(chosen: Sequence[Any], rejected: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Return `(prompt, chosen, rejected)` of two complete conversations, split where TRL's `extract_prompt` splits them.

    The prompt is the longest common beginning. A space before the first difference belongs to the answers. If one conversation
    is the beginning of the other, its last message (or character) belongs to the answers.
    """
    min_length = min(len(chosen), len(rejected))
    prompt_length = next((index for index in range(min_length) if chosen[index] != rejected[index]), None)
    if prompt_length is None:
        prompt_length = max(0, min_length - 1)
    elif prompt_length and chosen[prompt_length - 1] == " ":
        prompt_length -= 1
    return chosen[:prompt_length], chosen[prompt_length:], rejected[prompt_length:]
