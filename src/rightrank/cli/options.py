"""Options: those of the settings, made from their table, and the parts that commands share."""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

import click

from rightrank.schema.errors import SettingsError
from rightrank.schema.setting_table import Group, Setting, Settings, is_list
from rightrank.schema.trials import SCHEMA_VERSION, Record
from rightrank.version import __version__

Command = TypeVar("Command", bound=Callable[..., Any])


def comma(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [part.strip() for part in value.split(",") if part.strip()]


def json_line(answer: Record | Mapping[str, object]) -> str:
    """Return the one object that `--json` prints, with the version of its fields first."""
    fields = json.loads(answer.model_dump_json()) if isinstance(answer, Record) else answer
    return json.dumps({"schema_version": SCHEMA_VERSION, **fields})


_UNITS = {"s": 1 / 3600, "sec": 1 / 3600, "m": 1 / 60, "min": 1 / 60, "h": 1.0, "d": 24.0}


def hours(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    """`3h`, `90min`, `1d` or `1h30m` as hours."""
    if value is None:
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]+)", value.lower())
    whole = "".join(number + unit for number, unit in parts)
    total = sum(float(number) * _UNITS.get(unit, 0.0) for number, unit in parts)
    if whole != value.lower().replace(" ", "") or any(unit not in _UNITS for _, unit in parts) or total <= 0:
        raise SettingsError(f"--time {value!r} is no time: give a number and a unit, such as 3h, 90min or 1h30m")
    return total


def setting_options(kind: type[Settings], *settings: str) -> Callable[[Command], Command]:
    """A decorator: an option for each of the settings that have one, or for each of those that are named."""
    listed = settings or [name for name, row in kind.model_fields.items() if row.option]

    def decorate(command: Command) -> Command:
        for name in reversed(listed):
            command = _option(name, kind.model_fields[name], kind.model_types[name])(command)
        return command

    return decorate


def _option(name: str, row: Setting, hint: Any) -> Callable[[Command], Command]:
    """The option of a setting. It is None or empty where it was not given; the settings check what was."""
    kinds = set(get_args(hint)) if get_origin(hint) is UnionType else {hint}
    further: dict[str, Any] = {}
    spelled = row.option
    if bool in kinds:
        further |= {"is_flag": True, "default": None}
        spelled += f"/{spelled.replace('--', '--no-', 1)}" if NoneType in kinds else ""
    elif is_list(hint):
        further |= {"callback": comma} if row.split else {"multiple": True}
    elif name == "budget_hours":  # which has a unit
        further |= {"callback": hours}
    elif row.parse is None and kinds & {int, float}:
        further |= {"type": float if float in kinds else int}
    return click.option(spelled, name, cls=_SettingOption, group=row.group, help=_option_help(row), **further)


def _option_help(row: Setting) -> str:
    """The first clause of a setting's meaning, without links and marks, and its default."""
    text = re.sub(r"[,;]? ?\[[^\]]*\]\([^)]*\)", "", row.help).replace(" ()", "").replace("`", "")
    text = text.partition("; ")[0]
    default = _shown_default(row.default)
    first = text[0] if row.help.startswith("`") else text[0].upper()
    return f"{first}{text[1:]}{f' (default {default})' if default else ''}."


def _shown_default(default: Any) -> str:
    """A default for a person; empty where it is nothing, or off."""
    if isinstance(default, tuple):
        return ",".join(map(_shown_default, default))
    if default is None or default is False:
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


class _SettingOption(click.Option):
    """The option of a setting, with its section of `--help`."""

    def __init__(self, *arguments: Any, group: Group, **further: Any) -> None:
        super().__init__(*arguments, **further)
        self.section = group.value


class SettingsCommand(click.Command):
    """A command whose `--help` lists the options of settings in their groups, after its own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for title in ("Options", *(group.value for group in Group)):
            if title in sections:
                with formatter.section(title):
                    formatter.write_dl(sections[title])


def gather(config_file: Path | None, assignments: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Settings from the config file, then `--set`, then named options: the later wins."""
    from rightrank.data.files import read_config

    values = read_config(config_file) if config_file is not None else {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise SettingsError(f"--set {assignment!r}: give NAME=VALUE, such as lora_dropout=0.05")
        values[name.strip().replace("-", "_")] = value
    return values | {name: value for name, value in options.items() if value is not None and value != ()}


def whole_numbers(values: Sequence[str] | None, option: str) -> list[int] | None:
    """The numbers of a list option.

    Raises:
        SettingsError: one that is not a whole number.
    """
    if values is None:
        return None
    wrong = next((value for value in values if not value.isdecimal()), None)
    if wrong is not None:
        raise SettingsError(f"{option}: got {wrong!r}; give whole numbers with commas between, such as 4,8,16")
    return [int(value) for value in values]


def announce(what: str, anywhere: bool = False) -> None:
    """One line on a terminal before the imports that take seconds; `anywhere`: in a pipe too."""
    if anywhere or sys.stderr.isatty():
        click.echo(f"rightrank {__version__}: {what} …", err=True)


@contextmanager
def collector_paused() -> Iterator[None]:
    """For a command that is over at once: the collector of cycles would visit what imports and a journal make again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # nor at the end of the process
        if was_on:
            gc.enable()
