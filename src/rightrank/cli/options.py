"""The options of settings, made from their table, and helpers that commands share."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

import click

from rightrank.schema.errors import SettingsError
from rightrank.schema.setting_table import Group, Row, Settings, is_list_type, list_rows
from rightrank.schema.settings import PlanSettings, SelectSettings
from rightrank.version import __version__

if TYPE_CHECKING:
    from rightrank.schema.trials import Record

Command = TypeVar("Command", bound=Callable[..., Any])


def split_commas(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [item.strip() for item in value.split(",") if item.strip()]


def format_json(answer: Record | Mapping[str, object]) -> str:
    """Return the one object that `--json` prints, with the version of its fields first."""
    from rightrank.schema.trials import SCHEMA_VERSION, Record  # models that --help does not need

    fields = json.loads(answer.model_dump_json()) if isinstance(answer, Record) else answer
    return json.dumps({"schema_version": SCHEMA_VERSION, **fields})


_UNITS = {"s": 1 / 3600, "sec": 1 / 3600, "m": 1 / 60, "min": 1 / 60, "h": 1.0, "d": 24.0}


def parse_hours(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    """Parse `3h`, `90min` or `1d` as hours."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", value.lower())
    if match is None or match[2] not in _UNITS:
        raise SettingsError(f"--time {value!r} is not a time: give a number and a unit, such as 3h or 90min")
    return float(match[1]) * _UNITS[match[2]]


def add_setting_options(kind: type[Settings], *settings: str) -> Callable[[Command], Command]:
    """Return a decorator that adds the options of the named settings, or of all settings that have one."""
    rows = list_rows(kind)
    names = settings or [name for name, row in rows.items() if row.option]

    def decorate(command: Command) -> Command:
        for name in reversed(names):
            command = _build_option(name, rows[name], kind.model_fields[name].annotation)(command)
        return command

    return decorate


def _build_option(name: str, row: Row, hint: Any) -> Callable[[Command], Command]:
    """Build the option of a setting. It is None or empty if it was not given; the settings validate given values."""
    kinds = set(get_args(hint)) if get_origin(hint) is UnionType else {hint}
    arguments: dict[str, Any] = {}
    flag = row.option
    if bool in kinds:
        arguments |= {"is_flag": True, "default": None}
        flag += f"/{flag.replace('--', '--no-', 1)}" if NoneType in kinds else ""
    elif is_list_type(hint):
        arguments |= {"callback": split_commas}
    elif name == "budget_hours":  # the value has a unit
        arguments |= {"callback": parse_hours}
    elif kinds & {int, float}:
        arguments |= {"metavar": "NUMBER"}
    return click.option(flag, name, help=_format_help(row), **arguments)


def _format_help(row: Row) -> str:
    """Return the first clause of a setting's description, without links and marks, and its default."""
    text = re.sub(r"[,;]? ?\[[^\]]*\]\([^)]*\)", "", row.help).replace(" ()", "").replace("`", "")
    text = text.partition("; ")[0]
    default = _format_default(row.default)
    first = text[0] if row.help.startswith("`") else text[0].upper()
    return f"{first}{text[1:]}{f' (default {default})' if default else ''}."


def _format_default(default: Any) -> str:
    """Format a default for a person; empty for None and False."""
    if isinstance(default, tuple):
        return ",".join(map(_format_default, default))
    if default is None or default is False:
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


class SettingsCommand(click.Command):
    """A command whose `--help` lists its own options first, then the options of settings by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        kinds = (PlanSettings, SelectSettings)
        titles = {name: row.group.value for kind in kinds for name, row in list_rows(kind).items()}
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(titles.get(parameter.name or "", "Options"), []).append(record)
        for title in ("Options", *(group.value for group in Group)):
            if title in sections:
                with formatter.section(title):
                    formatter.write_dl(sections[title])


def gather_settings(config_file: Path | None, assignments: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Collect settings from the config file, `--set` and named options; later ones override earlier ones."""
    from rightrank.data.files import read_config

    values = read_config(config_file) if config_file is not None else {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise SettingsError(f"--set {assignment!r}: give NAME=VALUE, such as lora_dropout=0.05")
        values[name.strip().replace("-", "_")] = value
    return values | {name: value for name, value in options.items() if value is not None and value != ()}


def announce(activity: str) -> None:
    """Print one line on a terminal before imports that take seconds."""
    if sys.stderr.isatty():
        click.echo(f"rightrank {__version__}: {activity} …", err=True)
