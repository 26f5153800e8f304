"""Answers an unknown option with the one that other tools' users mean."""

from __future__ import annotations

import click

from rightrank.settings.habits import HABITS

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
    from rightrank.settings import PlanSettings, SelectSettings

    return set((PlanSettings if command == "plan" else SelectSettings).model_fields)
