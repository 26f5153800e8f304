"""What several commands read alike: lists, settings files, assignments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from rightrank.errors import SettingsError


def comma(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [part.strip() for part in value.split(",") if part.strip()]


def comma_list(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


def gather(config_file: Path | None, assignments: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Settings from the config file, then `--set`, then named options: the later wins."""
    from rightrank.io.config import read_config

    values: dict[str, Any] = read_config(config_file) if config_file is not None else {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise SettingsError(f"--set {assignment!r}: give NAME=VALUE, such as lora_dropout=0.05")
        values[name.strip().replace("-", "_")] = comma_list(value) if "," in value else value
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
