"""Test suggestions for unknown settings and options, and the list of export targets."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from rightrank.cli import cli
from rightrank.exports.servers import MERGED, SERVERS
from rightrank.schema.errors import SettingsError
from rightrank.schema.settings import SelectSettings
from tests.commands import COMMANDS


def test_every_target_is_offered() -> None:
    (option,) = (option for option in COMMANDS["export"].params if option.name == "to")
    assert set(re.findall(r"\w+", option.help)) == {*SERVERS, MERGED, "or"}


def test_an_unknown_setting_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(SettingsError, match=r"unknown setting 'zzz'; similar settings: (\w+), (\w+), (\w+)$"):
        SelectSettings(zzz=1e-3)
    with pytest.raises(SettingsError, match=r"unknown setting 'lr' \(did you mean 'learning_rates'\?\)$"):
        SelectSettings(lr=1e-3)
    with pytest.raises(SettingsError, match="did you mean 'seq_len'"):
        SelectSettings(seqlen=8)


def test_help_lists_the_commands_in_the_order_of_use_and_no_line_is_shortened() -> None:
    help_text = CliRunner().invoke(cli, ["--help"], terminal_width=80).output
    assert help_text.endswith("\n")
    listed = [line.split()[0] for line in help_text.partition("Commands:\n")[2].splitlines()]
    assert listed[:2] == ["demo", "select"]
    assert "..." not in help_text.partition("Commands:\n")[2]


def test_names_from_other_tools_map_to_one_setting() -> None:
    rows = SelectSettings.model_fields
    listed = [name for row in rows.values() for name in row.foreign_names]
    assert len(listed) == len(set(listed))
    assert not set(listed) & rows.keys()
