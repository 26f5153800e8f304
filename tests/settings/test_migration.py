"""Settings under their earlier names: read everywhere, with a notice, and the same selection as under today's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rightrank import select_rank
from rightrank.errors import SettingsError
from rightrank.io.journal import Journal
from rightrank.records import SCHEMA_VERSION, Certified, RunStarted, TrialFinished, content_hash
from rightrank.settings import make_settings, settings_difference, settings_of_identity
from rightrank.settings.migration import RENAMED, current_names, migrated
from tests.commands import run
from tests.tiny import write_completions

RUNS = Path(__file__).parents[1] / "fixtures" / "runs"
NOTICES = {
    "pack_size": "pack_size is now called adapters_per_pass; the old name is still read",
    "selection_fraction": "selection_fraction is now called validation_fraction; the old name is still read",
}


def test_every_renamed_setting_is_one_of_today_and_comes_with_a_version() -> None:
    known = make_settings({}).model_dump()
    for version, names in RENAMED.items():
        assert version <= SCHEMA_VERSION
        assert set(names.values()) <= set(known)
        assert not set(names) & set(known)


@pytest.mark.parametrize("old", NOTICES)
def test_settings_take_an_old_name_with_a_warning(old: str) -> None:
    value = 4 if old == "pack_size" else 0.2
    with pytest.warns(FutureWarning, match=NOTICES[old]):
        settings = make_settings({old: value})
    assert settings == make_settings({RENAMED[3][old]: value})


def test_both_names_of_one_setting_are_refused() -> None:
    with pytest.raises(SettingsError, match="pack_size and adapters_per_pass are one setting: give adapters_per_pass"):
        current_names({"pack_size": 2, "adapters_per_pass": 2})


def test_keywords_take_an_old_name_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match=NOTICES["pack_size"]), pytest.raises(SettingsError, match="nonsense"):
        select_rank("model", "data", tmp_path / "run", pack_size=2, strategy="nonsense")  # type: ignore[call-arg]


@pytest.mark.parametrize("given", ["config", "option", "set"])
def test_the_command_takes_an_old_name_with_one_notice(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("pack-size: 2\n")
    more = {
        "config": ["--config", str(config)],
        "option": ["--pack-size", "2"],
        "set": ["--set", "pack-size=2", "--set", "pack_size=2"],
    }
    command = ["select", "model", "data", "--out", str(tmp_path / "run"), *more[given], "--strategy", "nonsense"]
    status, _, err = run(command, capsys)
    assert status == 2
    assert err.count(f"note: {NOTICES['pack_size']}\n") == 1
    status, _, err = run([*command, "--log-json"], capsys)
    assert [json.loads(line)["text"] for line in err.splitlines() if line.startswith("{")] == [NOTICES["pack_size"]]


def test_a_later_source_wins_whichever_name_it_uses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, config = write_completions(tmp_path / "data.jsonl"), tmp_path / "config.yaml"
    config.write_text("selection_fraction: 0.85\n")
    command = ["select", "model", str(data), "--out", str(tmp_path / "run"), "--config", str(config)]
    refused = "test_fraction + validation_fraction leave less than a tenth"
    assert refused in run(command, capsys)[2]
    assert refused not in run([*command, "--set", "validation_fraction=0.2"], capsys)[2]


def test_a_new_name_is_no_new_selection() -> None:
    """The fingerprint of a run is a hash of these: under the old name they were the same."""
    old = make_settings({}).model_dump(mode="json")
    old["selection_fraction"] = old.pop("validation_fraction")
    old["pack_size"] = old.pop("adapters_per_pass")
    known = set(migrated(old, 2))
    assert content_hash(settings_of_identity(migrated(old, 2), known)) == content_hash(
        {name: value for name, value in settings_of_identity(old).items() if name != "pack_size"}
    )
    changed = make_settings({"validation_fraction": 0.2}).model_dump(mode="json")
    assert settings_difference(migrated(old, 2), changed) == ["validation_fraction: 0.1 → 0.2"]


@pytest.mark.parametrize("schema", [1, 2])
def test_a_journal_of_an_earlier_schema_is_read_under_todays_names(schema: int) -> None:
    path = RUNS / f"schema-{schema}" / "run" / "journal.jsonl"
    records = Journal(path).read()
    started = records[0]
    assert isinstance(started, RunStarted)
    assert '"selection_fraction"' in path.read_text()
    assert started.settings["validation_fraction"] == 0.1
    assert "selection_fraction" not in started.settings
    assert [record.adapters_per_pass for record in records if isinstance(record, TrialFinished)] == [1, 1, 1]


def test_a_record_takes_the_old_name_and_writes_the_new() -> None:
    values = {
        "trial_id": "a", "rank": 4, "steps": 1, "first_step_difference": 0.0, "loss_difference": 0.0,
        "adapter_difference": 0.0, "value_difference": 0.0, "seed_difference": None, "exact": True, "passed": True,
    }  # fmt: skip
    record = Certified.model_validate(values | {"pack_size": 3})
    assert record == Certified.model_validate(values | {"adapters_per_pass": 3})
    assert "pack_size" not in record.model_dump()
