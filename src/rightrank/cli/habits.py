"""Answers an unknown option with the one that other tools' users mean."""

from __future__ import annotations

import click

# Options of other trainers, and single forms of ours.
MEANT = {
    **dict.fromkeys(("--lr", "--learning-rate", "--learning_rate"), "--learning-rates"),
    **dict.fromkeys(("--rank", "--r", "--lora-r", "--lora-rank"), "--ranks"),
    **dict.fromkeys(("--seed",), "--seeds"),
    **dict.fromkeys(("--epochs", "--num-epochs"), "--num-train-epochs"),
    **dict.fromkeys(("--steps", "--max-iters"), "--max-steps"),
    **dict.fromkeys(("--alpha",), "--lora-alpha"),
    **dict.fromkeys(("--layers",), "--layers-to-transform"),
    **dict.fromkeys(("--targets", "--lora-target-modules"), "--target-modules"),
    **dict.fromkeys(("--max-length", "--max-seq-length", "--cutoff-len"), "--seq-len"),
    **dict.fromkeys(("--per-device-train-batch-size", "--train-batch-size"), "--batch-size"),
    **dict.fromkeys(("--out-dir", "--output", "--output-dir", "--run", "-o"), "--out"),
    **dict.fromkeys(("--bf16", "--fp16"), "--dtype"),
    **dict.fromkeys(("--gpus", "--num-workers"), "--workers"),
    **dict.fromkeys(("--time-budget", "--budget", "--budget-hours"), "--time"),
}


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
    setting = error.option_name.removeprefix("--").replace("-", "_")
    if "--set" in options and command is not None and setting in _settings_of(command.name):
        return f"no such option {error.option_name}; give it as --set {setting}=VALUE"
    return error.format_message()


def _settings_of(command: str | None) -> set[str]:
    """The names that `--set` takes."""
    from rightrank.settings import PlanSettings, SelectSettings

    return set((PlanSettings if command == "plan" else SelectSettings).model_fields)
