"""Test suggestions for unknown settings and options, and the list of export targets."""

from __future__ import annotations

import re

import pytest

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
