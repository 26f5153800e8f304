"""Settings as arguments of `rightrank select`, for the command that reproduces a run."""

from __future__ import annotations

import json
import shlex
from decimal import Decimal
from typing import Any

from rightrank.schema.setting_table import Setting
from rightrank.schema.settings import SelectSettings


def build_reproduce_command(
    model: str | None, data: str | None, settings: SelectSettings, out: str = "run"
) -> str | None:
    """Return the command that repeats a run in the folder `out`, or None if it used a custom trainer, or a model or data in memory."""
    if model is None or data is None or "in memory" in (model + data):
        return None
    arguments: list[str] = []
    for name, row in SelectSettings.model_fields.items():
        value = getattr(settings, name)
        if value is not None and value != row.default:
            arguments += build_arguments(name, row, value)
    return shlex.join(["rightrank", "select", model, data, "--out", out, *arguments])


def build_resume_command(run: str) -> str:
    """Return the command that continues a selection with the settings that it began with."""
    return shlex.join(["rightrank", "select", "--out", run])


def build_arguments(name: str, row: Setting, value: Any) -> list[str]:
    """Return the command-line arguments of a setting: its option, or `--set`."""
    if isinstance(value, dict) or (isinstance(value, tuple) and not _can_be_joined(value, row)):
        return ["--set", f"{name}={json.dumps(value)}"]
    if not row.option:
        return [
            "--set",
            f"{name}={','.join(map(_format_value, value)) if isinstance(value, tuple) else _format_value(value)}",
        ]
    if isinstance(value, bool):
        return [row.option if value else row.option.replace("--", "--no-", 1)]
    if isinstance(value, tuple) and not row.split:
        return [argument for entry in value for argument in _format_option(row.option, entry)]
    if name == "budget_hours":
        return _format_option(row.option, f"{Decimal(repr(value)).normalize():f}h")
    if name == "memory_bytes":
        return _format_option(row.option, f"{value // 2**30}GiB" if value % 2**30 == 0 else f"{value}B")
    return _format_option(
        row.option, ",".join(map(_format_value, value)) if isinstance(value, tuple) else _format_value(value)
    )


def _can_be_joined(values: tuple[Any, ...], row: Setting) -> bool:
    """Return whether a list can be written with commas between its values, or by a repeated option."""
    texts = list(map(_format_value, values))
    if not row.split:
        return bool(texts and row.option)
    return bool(texts) and not any(not text or text != text.strip() or "," in text or text[0] == "[" for text in texts)


def _format_option(option: str, text: str) -> list[str]:
    return [f"{option}={text}"] if text.startswith("-") else [option, text]


def _format_value(value: Any) -> str:
    """Format a value; a number gets the fewest digits from which it can be restored."""
    if not isinstance(value, float):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
