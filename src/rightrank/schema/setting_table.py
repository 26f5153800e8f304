"""Tables of settings: rows that define each setting once, and records whose values are checked by the rows.

    class Example(Settings):
        batch_size: int = option(8, Group.TRAINING, "Examples in a forward pass.", gt=0)

The rows are plain values, so that the command line lists its options without importing pydantic, which checks the types once
there are values. The options, the keywords of the API, the settings page and the command that reproduces a run are all
generated from the rows.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args, get_origin, get_type_hints

from rightrank.schema.errors import MAX_EXACT_INTEGER, SettingsError, redact_secrets, suggest_name

if TYPE_CHECKING:
    from pydantic import BaseModel

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
class Setting:
    """One setting with everything that the program and the docs say about it.

    `help` is Markdown; the command line shows it without the marks. `option` is the name at the command line, empty for a
    setting that only `--set` accepts. A different value of an `identity` setting makes another run; a `continuable` setting may
    change when a run is continued. `foreign_names` are its names in other tools, for which errors suggest its own name.
    `split` accepts a text with commas as several values. `aliases` are other tools' names of values, `parse` converts
    user input to a value, and `check` raises ValueError for a value that is not allowed.
    """

    default: Any
    group: Group
    help: str
    option: str = ""
    identity: bool = True
    continuable: bool = False
    foreign_names: tuple[str, ...] = ()
    split: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    parse: Callable[[Any], Any] | None = None
    check: Callable[[Any], Any] | None = None
    bounds: Mapping[str, Any] = field(default_factory=dict)  # gt, ge, lt and le

    def __set_name__(self, owner: type, name: str) -> None:
        if self.option == "--":
            object.__setattr__(self, "option", f"--{name.replace('_', '-')}")


def option(default: Any, group: Group, help: str, **row_options: Any) -> Any:
    """Define a setting with the option `--name-of-the-setting`."""
    return setting(default, group, help, option="--", **row_options)


def setting(default: Any, group: Group, help: str, **row_options: Any) -> Any:
    """Define a setting. Bounds are keyword arguments: `gt`, `ge`, `lt`, `le`."""
    bounds: dict[str, Any] = {name: row_options.pop(name) for name in ("gt", "ge", "lt", "le") if name in row_options}
    return Setting(default, group, help, **row_options, bounds=bounds)


class Settings:
    """A frozen record of settings. Its methods have the names of pydantic's, which all other records are.

    A subclass defines its rows, and consistency checks between values in `_require_consistent`.
    """

    model_fields: ClassVar[Mapping[str, Setting]] = {}
    model_types: ClassVar[Mapping[str, Any]] = {}
    settings_by_foreign_name: ClassVar[
        Mapping[str, str]
    ] = {}  # names in other tools → the setting with the same meaning
    pydantic_model: ClassVar[type[Any] | None] = None  # pydantic's model with the same types, created at first use
    model_fields_set: frozenset[str]  # the explicitly given ones
    expected_fields: Mapping[str, Any] = {}  # given fields that are no settings, with which the run must agree

    def __init_subclass__(cls) -> None:
        rows: dict[str, Setting] = {}
        for base in reversed(cls.__mro__):
            rows |= {name: row for name, row in vars(base).items() if isinstance(row, Setting)}
        order = list(Group)
        hints = get_type_hints(cls)
        cls.pydantic_model = None
        cls.model_types = {name: hints[name] for name in rows}
        cls.settings_by_foreign_name = {
            foreign_name: name for name, row in rows.items() for foreign_name in row.foreign_names
        }
        cls.model_fields = dict(sorted(rows.items(), key=lambda named: order.index(named[1].group)))

    def __init__(self, **values: Any) -> None:
        """Create settings with these values; all others have their defaults.

        Raises:
            SettingsError: an unknown name (with the nearest existing one), or a value that is not allowed.
        """
        unknown = next((name for name in values if name not in self.model_fields), None)
        if unknown is not None:
            suggestion = self.settings_by_foreign_name.get(unknown)
            hint = f" (did you mean {suggestion!r}?)" if suggestion else suggest_name(unknown, self.model_fields)
            nearest = ", ".join(get_close_matches(unknown, self.model_fields, n=MAX_SUGGESTIONS, cutoff=0.0))
            raise SettingsError(f"unknown setting {unknown!r}{hint or '; similar settings: ' + nearest}")
        defaults = {name: row.default for name, row in self.model_fields.items()}
        self.__dict__.update(defaults | _validate_values(type(self), values), model_fields_set=frozenset(values))
        try:
            self._require_consistent()
        except ValueError as error:
            raise SettingsError(str(error)) from None

    def _require_consistent(self) -> None:
        """Raise ValueError if values contradict each other."""

    @classmethod
    def from_stored(cls, values: Mapping[str, Any]) -> Self:
        """Restore settings from a journal, written by `model_dump` in the mode `json`. The values are not checked again."""
        stored_values = {name: value for name, value in values.items() if name in cls.model_fields}
        return cls._build(
            {name: row.default for name, row in cls.model_fields.items()}
            | {name: tuple(value) if isinstance(value, list) else value for name, value in stored_values.items()},
            stored_values.keys(),
        )

    @classmethod
    def _build(cls, values: Mapping[str, Any], names: Collection[str]) -> Self:
        settings = object.__new__(cls)
        settings.__dict__.update(values, model_fields_set=frozenset(names))
        return settings

    def model_copy(self, *, update: Mapping[str, Any]) -> Self:
        """Return a copy with some values changed. The values are not checked."""
        return self._build(self.__dict__ | dict(update), self.model_fields_set | update.keys())

    def model_dump(self, *, mode: str = "python", include: Iterable[str] | None = None) -> dict[str, Any]:
        """Return the values by name; in the mode `json`, tuples become lists."""
        names = [name for name in self.model_fields if include is None or name in include]
        values = {name: self.__dict__[name] for name in names}
        if mode != "json":
            return values
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"settings can't be changed; use model_copy to get settings with another {name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and type(other) is type(self) and self.model_dump() == other.model_dump()

    def __repr__(self) -> str:
        assignments = (f"{name}={self.__dict__[name]!r}" for name in self.model_fields if name in self.model_fields_set)
        return f"{type(self).__name__}({', '.join(assignments)})"


def get_explicit_values(settings: Settings | None) -> dict[str, Any]:
    """Return the values that were given explicitly, by name, with the fields that the run must agree with."""
    return (
        {}
        if settings is None
        else {**settings.model_dump(include=settings.model_fields_set), **settings.expected_fields}
    )


def is_list_type(hint: Any) -> bool:
    """Return whether a setting of this type takes several values."""
    return any(get_origin(alternative) is tuple for alternative in (hint, *get_args(hint)))


def _validate_values(kind: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    from pydantic import ValidationError

    try:
        raw_values = {name: _convert_value(kind, name, value) for name, value in values.items()}
        model = _build_model(kind).model_validate(raw_values)
        checked = {name: getattr(model, name) for name in values}
        for name, value in checked.items():
            for inner in value if isinstance(value, tuple) else (value,):
                if isinstance(inner, int) and abs(inner) > MAX_EXACT_INTEGER:
                    raise ValueError(
                        f"{name}: got {_SHORT_REPR.repr(inner)}; integers are at most 2**53 ({MAX_EXACT_INTEGER})"
                    )
            check = kind.model_fields[name].check
            checked[name] = value if check is None else check(value)
            require_no_secret(name, value)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].partition(", unable to parse")[0]
        setting_name = str(first["loc"][0]) if first["loc"] else "settings"
        given_value = f"{setting_name}: got {_SHORT_REPR.repr(first['input'])}"
        raise SettingsError(f"{given_value}; {message[0].lower()}{message[1:]}") from None
    except ValueError as error:
        raise SettingsError(str(error)) from None
    return checked


def _convert_value(kind: type[Settings], name: str, value: Any) -> Any:
    """Convert a user's value to the setting's type: a value to a list, a text with commas to a list, JSON, names of other tools."""
    row, hint = kind.model_fields[name], kind.model_types[name]
    if row.parse is not None:
        value = row.parse(value)
    if isinstance(value, str):
        value = row.aliases.get(value, value)
    if get_origin(hint) is dict:
        return parse_json_value(value)
    if not is_list_type(hint):
        return value
    if isinstance(value, str):
        parsed = parse_json_value(value) if value.startswith("[") else None
        if isinstance(parsed, list):
            return parsed
        return [entry.strip() for entry in value.split(",") if entry.strip()] if row.split else [value]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


def parse_json_value(value: Any) -> Any:
    """Parse a text such as `true` or `16` as JSON if possible; return any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _build_model(kind: type[Settings]) -> type[BaseModel]:
    """Return the pydantic model that checks types and bounds."""
    from pydantic import ConfigDict, Field, create_model

    if kind.pydantic_model is not None:
        return kind.pydantic_model
    fields: dict[str, Any] = {
        name: (hint, Field(default=None, **kind.model_fields[name].bounds)) for name, hint in kind.model_types.items()
    }
    kind.pydantic_model = create_model(
        kind.__name__, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields
    )
    return kind.pydantic_model


def require_no_secret(name: str, value: object) -> None:
    """Raise ValueError if the value looks like a secret, since the journal stores it and the report shows it."""
    if not isinstance(value, int | float | None) and redact_secrets(str(value)) != str(value):
        raise ValueError(
            f"{name}: this looks like a password, key or token, which would be stored in the run folder; set it in the environment instead"
        )


_SHORT_REPR = reprlib.Repr()
_SHORT_REPR.maxstring = _SHORT_REPR.maxother = 120  # Longer or nested values are shortened.
