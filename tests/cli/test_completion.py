"""Shell completion offers names and folders, Ctrl-C in watch leaves the run alone, and an unknown setting has near names."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from rightrank.cli import cli
from rightrank.cli.options import unknown_option
from rightrank.cli.runs import TARGETS as OFFERED
from rightrank.interop.exports import STUDY
from rightrank.interop.targets import TARGETS
from rightrank.schema.errors import SettingsError
from rightrank.schema.settings import SelectSettings, make_settings
from rightrank.search.strategies import STRATEGIES
from tests.report.runs import journal_of


def offered(*words: str, incomplete: str = "") -> list[str]:
    found = ShellComplete(cli, {}, "rightrank", "_RIGHTRANK_COMPLETE").get_completions(list(words), incomplete)
    return [item.value if item.type == "plain" else item.type for item in found]


def test_names_are_offered() -> None:
    assert set(offered("select", "--strategy")) <= set(STRATEGIES)
    assert offered("select", "--strategy", incomplete="br") == ["bracket"]
    assert offered("export", "run", "--to", incomplete="v") == ["vllm"]
    assert set(offered("select", "--dtype")) == {"auto", "bf16", "fp16", "fp32"}
    assert offered("select", incomplete="./mo") == ["file"]
    assert offered("plan", incomplete="./mo") == ["file"]


def test_every_target_is_offered() -> None:
    assert set(OFFERED) == {*TARGETS, STUDY}


def test_ctrl_c_in_watch_does_not_say_that_the_training_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(run: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rightrank.api.status", interrupted)
    run = journal_of(tmp_path / "run")
    shown = CliRunner().invoke(cli, ["status", str(run), "--watch"])
    assert shown.exit_code == 130
    assert f"stopped watching; the selection in {run} is not affected" in shown.output


def test_an_unknown_setting_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(SettingsError, match=r"unknown setting 'zzz'; the nearest: (\w+), (\w+), (\w+)$"):
        make_settings({"zzz": 1e-3})
    with pytest.raises(SettingsError, match=r"unknown setting 'lr' \(did you mean 'learning_rates'\?\)$"):
        make_settings({"lr": 1e-3})
    with pytest.raises(SettingsError, match="did you mean 'seq_len'"):
        make_settings({"seqlen": 8})


def test_help_lists_the_commands_in_the_order_of_use_and_no_line_is_shortened() -> None:
    shown = CliRunner().invoke(cli, ["--help"], terminal_width=80).output
    assert shown.endswith("\n")
    listed = [line.split()[0] for line in shown.partition("Commands:\n")[2].splitlines()]
    assert listed[:2] == ["demo", "select"]
    assert "..." not in shown.partition("Commands:\n")[2]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--lr", "(did you mean --learning-rates?)"),
        ("--budget", "(did you mean --time?)"),
        ("--memory-bytes", "(did you mean --memory?)"),
        ("--output-dir", "(did you mean --out?)"),
        ("--dropout", "; give it as --set lora_dropout=VALUE"),
    ],
)
def test_a_name_of_other_trainers_is_answered_with_the_option(option: str, said: str) -> None:
    with pytest.raises(click.NoSuchOption) as raised:
        cli.commands["select"].make_context("select", [option, "1"])
    assert unknown_option(raised.value) == f"no such option {option} {said}".replace(" ;", ";")


def test_names_of_other_tools_mean_one_setting_each() -> None:
    rows = SelectSettings.model_fields
    listed = [name for row in rows.values() for name in row.also]
    assert len(listed) == len(set(listed))
    assert not set(listed) & rows.keys()
