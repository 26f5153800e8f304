"""The threat table of SECURITY.md: each row names tests that exist; a secret planted in every place that takes one is kept nowhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rightrank import select_rank_with
from rightrank.hooks import trackers
from rightrank.schema.errors import RunError, SettingsError, described, first_line, one_line, without_secrets
from rightrank.schema.settings import SelectSettings
from tests.commands import COMMANDS, run

ROOT = Path(__file__).parents[2]
SECRET = "hunter2OfAnyone4711"
FORMS = {  # how a secret comes with other text
    "an address": f"s3://someone:{SECRET}@bucket/runs",
    "an address as a path": f"https:/someone:{SECRET}@host/rows.jsonl",
    "a query": f"https://host/rows.jsonl?X-Amz-Signature={SECRET}&part=1",
    "an option": f"python judge.py --api-key {SECRET}",
    "a variable": f"srun --export=PASSWORD={SECRET} --ntasks=1",
    "JSON": f'{{"api_key": "{SECRET}"}}',
    "a header": f"Authorization: Bearer {SECRET}",
    "a token of the hub": f"hf_{SECRET}",
}
PLAIN = (  # what looks a little like one
    "q_proj,v_proj", r".*\.layers\.(0|1)\..*", "hf_internal_testing_tiny_random", "organisation/task-classification2024",
    "no pad token: give --tokens 10", "token_loss=1.5", "s3://bucket/runs", "abfs://box@account.dfs.core.windows.net/runs",
    "file:///mnt/share", "https://host/rows.jsonl?part=1", "the password is asked for", "Password: {answer}",
)  # fmt: skip


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_a_secret_that_a_message_quotes_is_left_out(text: str) -> None:
    assert SECRET not in str(RunError(f"could not read {text}"))
    assert SECRET not in first_line(OSError(f"can't connect\nto {text}".replace("\n", " ")))
    assert SECRET not in described(OSError(f"refused: {text}"))


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_is_shown(text: str) -> None:
    assert without_secrets(text) == text
    assert one_line(text) == text


def texts() -> Iterator[str]:
    """Settings that take text."""
    for name, hint in SelectSettings.model_types.items():
        if "str" in str(hint) and "Literal" not in str(hint):
            yield name


@pytest.mark.parametrize("form", ["an address", "an option", "a token of the hub"])
@pytest.mark.parametrize("name", list(texts()))
def test_a_setting_that_holds_a_secret_is_refused(name: str, form: str) -> None:
    """Settings are in the journal, the report, the card and the trackers."""
    with pytest.raises(SettingsError) as caught:
        SelectSettings(**{name: FORMS[form]})
    assert SECRET not in str(caught.value)


READ_ONE = ["decide", "inspect", "status", "report", "repair", "plan", "export"]


@pytest.mark.parametrize("form", ["an address", "an address as a path", "a query", "a token of the hub"])
@pytest.mark.parametrize("command", [name for name in READ_ONE if name in COMMANDS])
def test_an_address_with_a_secret_is_not_repeated(
    command: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run([command, FORMS[form]], capsys)
    assert status != 0
    assert SECRET not in out + err


@pytest.mark.parametrize("place", ["model", "data", "--out"])
def test_a_selection_with_a_secret_in_a_name_is_refused(
    place: str, model_folder: Path, completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"model": str(model_folder), "data": str(completion_file), "--out": str(tmp_path / "run")}
    given[place] = FORMS["a query"]
    if place == "--out":
        given["data"] = "nowhere.jsonl"
    status, out, err = run(["select", given["model"], given["data"], "--out", given["--out"]], capsys)
    assert status == 2
    assert SECRET not in out + err
    assert not (tmp_path / "run").exists()


def test_a_secret_in_a_trainer_s_error_reaches_no_file_and_no_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The callback, the tracker and the trainer of a user fail with a secret in their messages."""

    def train(task: Any) -> dict[str, float]:
        if task.rank == 4:
            raise ConnectionError(f"no answer from {FORMS['an address']}; {FORMS['JSON']}")
        return {"loss": 2 + 1 / float(task.rank)}

    def unreachable(*_: object) -> None:
        raise OSError(f"401 for {FORMS['a query']}")

    monkeypatch.setitem(trackers._WRITERS, "mlflow", unreachable)
    monkeypatch.setattr("rightrank.hooks.trackers.find_spec", lambda _: True)
    out = tmp_path / "run"
    ranks = {"ranks": (1, 4, 16), "learning_rates": (1e-3,)}
    select_rank_with(train, out, **ranks, metric="loss", callbacks=[trackers.Trackers(["mlflow"], out)])
    printed = "".join(capfd.readouterr())
    written = {
        path.name: path.read_text(encoding="utf-8", errors="replace") for path in out.rglob("*") if path.is_file()
    }
    assert "ConnectionError" in written["journal.jsonl"]
    assert "report.html" in written
    assert not [name for name, text in {**written, "printed": printed}.items() if SECRET in text]


@pytest.mark.plug_in("cluster")
def test_a_cluster_is_joined_only_where_it_is_asked_for() -> None:
    assert SelectSettings().executor == "local"


def test_each_threat_has_tests_that_exist() -> None:
    """A test of a plug-in is named with its file, which may go with the plug-in."""
    section = (ROOT / "SECURITY.md").read_text(encoding="utf-8").split("## Threats")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| **")]
    assert len(rows) >= 6
    every = {
        name: path
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    for row in rows:
        named = re.findall(r"`(?:plugins/(\w+)/\w+\.py::)?(test_\w+)`", row.split("|")[-2])
        assert named, f"{row}: no test"
        gone = [plug_in for plug_in, _ in named if plug_in and not (ROOT / "tests" / "plugins" / plug_in).is_dir()]
        assert not [name for plug_in, name in named if plug_in not in gone and name not in every], row
