"""Tables of settings: pydantic models whose fields also state their option, their section and their names in other tools.

    class Example(Settings):
        batch_size: int = option(8, Group.TRAINING, "Examples in a forward pass.", gt=0)

The options, the keywords of the API, the settings page and the command that reproduces a run are all generated from the rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from difflib import get_close_matches
from enum import Enum
from functools import cache
from typing import Any, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rightrank.schema.errors import MAX_EXACT_INTEGER, SettingsError, quote_value, redact_secrets, suggest_name

MAX_SUGGESTIONS = 3  # names that the error about an unknown setting suggests


class Group(Enum):
    """The sections of `--help` and of the settings page, in order."""

    COMPARE = "What to compare"
    DECIDE = "How to decide"
    BUDGET = "The budget"
    ADAPTER = "The adapter"
    TRAINING = "The training"
    DATA = "The data"
    MACHINE = "The machine"


@dataclass(frozen=True, slots=True)
class Row:
    """What the program and the docs say about one setting, beside its type and its bounds.

    `help` is Markdown; the command line shows it without the marks. `option` is the name at the command line, empty for a
    setting that only `--set` accepts. A different value of an `identity` setting makes another run; a `continuable` setting may
    change when a run is continued. `foreign_names` are its names in other tools, for which errors suggest its own name.
    `aliases` are other tools' names of values. A text with commas is a list, for a setting that takes several values.
    """

    default: Any
    group: Group
    help: str
    option: str = ""
    identity: bool = True
    continuable: bool = False
    foreign_names: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)


def setting(default: Any, group: Group, help: str, **row_options: Any) -> Any:
    """Define a setting. Bounds are keyword arguments: `gt`, `ge`, `lt`, `le`."""
    bounds = {name: row_options.pop(name) for name in ("gt", "ge", "lt", "le") if name in row_options}
    return Field(default, json_schema_extra={"row": Row(default, group, help, **row_options)}, **bounds)  # type: ignore[dict-item]


def option(default: Any, group: Group, help: str, **row_options: Any) -> Any:
    """Define a setting with the option `--name-of-the-setting`."""
    return setting(default, group, help, option="--", **row_options)


class Settings(BaseModel):
    """A frozen record of settings. A subclass checks its values together in `_require_consistent`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        """Create settings with these values; all others have their defaults.

        Raises:
            SettingsError: an unknown name (with the nearest existing one), or a value that is not allowed.
        """
        for name in values:
            _require_known_name(type(self), name)
        try:
            super().__init__(**{name: _convert_value(type(self), name, values[name]) for name in values})
        except ValidationError as error:
            raise SettingsError(_describe_first_error(error)) from None

    @model_validator(mode="after")
    def _require_valid(self) -> Self:
        for name in self.model_fields_set:
            value = getattr(self, name)
            for inner in value if isinstance(value, tuple) else (value,):
                if isinstance(inner, int) and abs(inner) > MAX_EXACT_INTEGER:
                    raise ValueError(
                        f"{name}: got {quote_value(inner)}; integers are at most 2**53 ({MAX_EXACT_INTEGER})"
                    )
            require_no_secret(name, value)
        self._require_consistent()
        return self

    def _require_consistent(self) -> None:
        """Raise ValueError if values contradict each other."""

    @classmethod
    def from_stored(cls, values: Mapping[str, Any]) -> Self:
        """Restore settings from a journal, written by `model_dump` in the mode `json`. The values are not checked again."""
        stored = {name: values[name] for name in cls.model_fields if name in values}
        settings: Any = cls.model_construct(
            {*stored}, **{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
        )
        return settings  # type: ignore[no-any-return]


@cache
def list_rows(kind: type[Settings]) -> Mapping[str, Row]:
    """Return the rows by name, in the order of their groups."""
    rows: dict[str, Row] = {}
    for name, info in kind.model_fields.items():
        extra: Any = info.json_schema_extra
        row: Row = extra["row"]
        rows[name] = replace(row, option=f"--{name.replace('_', '-')}") if row.option == "--" else row
    order = list(Group)
    return dict(sorted(rows.items(), key=lambda named: order.index(named[1].group)))


def get_explicit_values(settings: Settings | None) -> dict[str, Any]:
    """Return the values that were given explicitly, by name."""
    return {} if settings is None else settings.model_dump(include=settings.model_fields_set)


def is_list_type(hint: Any) -> bool:
    """Return whether a setting of this type takes several values."""
    return any(get_origin(alternative) is tuple for alternative in (hint, *get_args(hint)))


def _require_known_name(kind: type[Settings], name: str) -> None:
    if name in kind.model_fields:
        return
    suggestion = next((setting for setting, row in list_rows(kind).items() if name in row.foreign_names), None)
    hint = f" (did you mean {suggestion!r}?)" if suggestion else suggest_name(name, kind.model_fields)
    nearest = ", ".join(get_close_matches(name, kind.model_fields, n=MAX_SUGGESTIONS, cutoff=0.0))
    raise SettingsError(f"unknown setting {name!r}{hint or '; similar settings: ' + nearest}")


def _describe_first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    message, setting_name = first["msg"].partition(", unable to parse")[0], str(first["loc"][0])
    is_size = first["type"].startswith("byte_size") or setting_name == "memory_bytes"
    example = "; give a size with its unit, such as 24GiB" if is_size else ""
    return f"{setting_name}: got {quote_value(first['input'])}; {message[0].lower()}{message[1:]}{example}"


def _convert_value(kind: type[Settings], name: str, value: Any) -> Any:
    """Convert a user's value to the setting's type: a value to a list, a text with commas to a list, JSON, names of other tools."""
    row, hint = list_rows(kind)[name], kind.model_fields[name].annotation
    is_list = is_list_type(hint)
    if isinstance(value, str):
        value = row.aliases.get(value, value)
        if get_origin(hint) is dict or (is_list and value.startswith("[")):
            with suppress(ValueError):  # no JSON, or a number of more digits than Python converts
                value = json.loads(value)
    if is_list and isinstance(value, str):
        return [entry.strip() for entry in value.split(",") if entry.strip()]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return [value] if is_list and is_number else value


def require_no_secret(name: str, value: object) -> None:
    """Raise SettingsError if the value looks like a secret, since the journal stores it and the report shows it."""
    if not isinstance(value, int | float | None) and redact_secrets(str(value)) != str(value):
        raise SettingsError(
            f"{name}: this looks like a password, key or token, which would be stored in the run folder; set it in the environment instead"
        )


def build_options(kind: type[Settings], values: Mapping[str, Any]) -> list[str]:
    """Build the command-line arguments that give settings these values: their options, or `--set`."""
    rows = list_rows(kind)
    return [argument for name, value in values.items() for argument in _build_arguments(name, rows[name], value)]


def _build_arguments(name: str, row: Row, value: Any) -> list[str]:
    entries = value if isinstance(value, tuple) else (value,)
    texts = [str(entry).removesuffix(".0") if isinstance(entry, float) else str(entry) for entry in entries]
    text = ",".join(texts)
    if isinstance(value, dict) or (isinstance(value, tuple) and not _can_be_joined(texts)):
        return ["--set", f"{name}={json.dumps(value)}"]
    if not row.option:
        return ["--set", f"{name}={text}"]
    if isinstance(value, bool):
        return [row.option if value else row.option.replace("--", "--no-", 1)]
    if name == "budget_hours":
        text = f"{Decimal(repr(value)).normalize():f}h"
    if name == "memory_bytes":
        text = f"{value // 2**30}GiB" if value % 2**30 == 0 else f"{value}B"
    return [f"{row.option}={text}"] if text.startswith("-") else [row.option, text]


def _can_be_joined(texts: list[str]) -> bool:
    return bool(texts) and not any(not text or text != text.strip() or "," in text or text[0] == "[" for text in texts)
