"""Options that several commands share: lists, settings files, assignments."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import click
from click.shell_completion import CompletionItem

from rightrank.schema.errors import SettingsError
from rightrank.schema.peft_options import HABITS
from rightrank.version import __version__

Complete: TypeAlias = Callable[[click.Context, click.Parameter, str], "list[str]"]


def comma(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [part.strip() for part in value.split(",") if part.strip()]


def names(*known: str) -> Complete:
    """Shell completion of a value from a list; the value itself is checked where it is used."""
    return lambda _context, _parameter, incomplete: [name for name in known if name.startswith(incomplete)]


def folders(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Shell completion of a path for a value that may be another name too."""
    return [CompletionItem(incomplete, type="file")]


def comma_list(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


_UNITS = {"s": 1 / 3600, "sec": 1 / 3600, "m": 1 / 60, "min": 1 / 60, "h": 1.0, "d": 24.0}


def hours(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    """`3h`, `90min`, `1d` or `1h30m` as hours."""
    if value is None:
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]+)", value.lower())
    whole = "".join(number + unit for number, unit in parts)
    found = sum(float(number) * _UNITS.get(unit, 0.0) for number, unit in parts)
    if whole != value.lower().replace(" ", "") or any(unit not in _UNITS for _, unit in parts) or found <= 0:
        raise SettingsError(f"--time {value!r} is no time: give a number and a unit, such as 3h, 90min or 1h30m")
    return found


# Of metrics that are the user's own.
DIRECTION_OPTIONS = [
    click.option(
        f"--{way}-is-better", multiple=True, metavar="METRIC", help=f"A metric of yours by which {way} is better."
    )
    for way in ("higher", "lower")
]


def gather(config_file: Path | None, assignments: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Settings from the config file, then `--set`, then named options: the later wins."""
    from rightrank.data.files import read_config

    values = read_config(config_file) if config_file is not None else {}
    values |= dict(_assigned(assignment) for assignment in assignments)
    return values | {name: value for name, value in options.items() if value is not None and value != ()}


def _assigned(assignment: str) -> tuple[str, Any]:
    name, equals, value = assignment.partition("=")
    if not equals:
        raise SettingsError(f"--set {assignment!r}: give NAME=VALUE, such as lora_dropout=0.05")
    return name.strip().replace("-", "_"), comma_list(value) if "," in value else value


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


def announce(what: str) -> None:
    """One line on a terminal before the imports that take seconds."""
    if sys.stderr.isatty():
        click.echo(f"rightrank {__version__}: {what} …", err=True)


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Within the block, no garbage collection: importing torch and transformers takes a quarter less time.

    For short commands. What a command leaves behind ends with the process.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


OPTION_OF = {"budget_hours": "--time", "memory_bytes": "--memory"}  # options that are not called as their setting
OUTPUTS = ("--out-dir", "--output", "--output-dir", "--run", "-o")
MEANT = {f"--{name.replace('_', '-')}": OPTION_OF.get(to, f"--{to.replace('_', '-')}") for name, to in HABITS.items()}
MEANT |= dict.fromkeys(OUTPUTS, "--out")


def unknown_option(error: click.NoSuchOption) -> str:
    """The message for an option that the command does not have.

    It names the command's own option for a known habit, `--set` for a setting that has no option, else the nearest
    options.
    """
    command = error.ctx.command if error.ctx is not None else None
    options = {name for parameter in command.params for name in parameter.opts} if command is not None else set()
    meant = MEANT.get(error.option_name)
    if meant in options:
        return f"no such option {error.option_name} (did you mean {meant}?)"
    name = error.option_name.removeprefix("--").replace("-", "_")
    setting = HABITS.get(name, name)
    if "--set" in options and command is not None and setting in _settings_of(command.name):
        return f"no such option {error.option_name}; give it as --set {setting}=VALUE"
    return error.format_message()


def _settings_of(command: str | None) -> set[str]:
    """The names that `--set` takes."""
    from rightrank.schema.plan_settings import PlanSettings
    from rightrank.schema.settings import SelectSettings

    return set((PlanSettings if command == "plan" else SelectSettings).model_fields)
