"""Test what we write and print: no secrets, no terminal escapes, and one line for errors."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from rightrank.api.folders import export
from rightrank.cli import main
from rightrank.schema.errors import MAX_MESSAGE_CHARACTERS, DataError, RightrankError, format_one_line
from tests.commands import build_select_arguments, run

SECRETS = {
    "HF_TOKEN": "hf_s3cretTokenOfAnyone",
    "AWS_SECRET_ACCESS_KEY": "awsS3cretOfAnyone",
    "WANDB_API_KEY": "wandbS3cretOfAnyone",
    "HTTPS_PROXY_PASSWORD": "proxyS3cretOfAnyone",
    "RIGHTRANK_UNRELATED": "unrelatedS3cretOfAnyone",
}
ENVIRONMENT = {"python", "system", "torch", "transformers", "peft", "device", "threads", "gpu"}


@pytest.fixture(scope="module")
def small_run(
    model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """Run a selection by the command in an environment full of secrets, and return its folder and its output."""
    out, printed, stderr = tmp_path_factory.mktemp("secrets") / "run", io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(stderr):
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit, match=r"^0$"):
            main(build_select_arguments(model_folder, completion_file, out))
    return out, {"out": printed.getvalue(), "err": stderr.getvalue()}


def test_no_secret_of_the_environment_is_written_or_printed(
    small_run: tuple[Path, dict[str, str]],
) -> None:
    out, printed = small_run
    export(out, "vllm")
    written = [path for path in out.rglob("*") if path.is_file()]
    assert len(written) > 8
    texts = {str(path): path.read_bytes() for path in written} | {name: text.encode() for name, text in printed.items()}
    for secret in SECRETS.values():
        assert not [name for name, text in texts.items() if secret.encode() in text]


def test_the_environment_in_the_journal_is_a_list_of_what_is_allowed(
    small_run: tuple[Path, dict[str, str]],
) -> None:
    out, _ = small_run
    started = json.loads((out / "journal.jsonl").read_text().splitlines()[0])
    environment = started.get("environment") or started["record"]["environment"]
    assert set(environment) <= ENVIRONMENT


# one line


def test_a_message_is_one_visible_line_whatever_it_quotes() -> None:
    assert format_one_line("a\n\tb \x1b[2J \x00 \x9b c") == "a b \\x1b[2J \\x00 \\x9b c"
    long = format_one_line("start " + "x" * 10**6 + " end")
    assert len(long) <= MAX_MESSAGE_CHARACTERS
    assert long.startswith("start xx")
    assert long.endswith("xx end")
    assert str(DataError("a\nb")) == "a b"
    assert str(RightrankError()) == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["decide", "x" * 300],
        ["decide", "x" * 5000 + ".csv"],
        ["inspect", "x" * 300],
        ["status", "x" * 300],
        ["report", "x" * 300],
        ["plan", "x" * 300],
        ["select", "x" * 300, "y" * 300, "--out", "z" * 300],
        ["decide", "a\udcff.csv"],
        ["inspect", "a\udcff\x1b[2J"],
        ["decide", "/dev/null"],
        ["decide", "/proc/self/mem"],
    ],
    ids=lambda arguments: f"{arguments[0]} {ascii(arguments[1])[:12]} {len(arguments[1])}",
)
def test_names_that_no_file_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(arguments, capsys)
    assert status in (1, 2)
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("rightrank: ")
    assert len(lines[0]) <= MAX_MESSAGE_CHARACTERS + 20
    assert "\x1b" not in err


def test_data_with_a_name_that_is_no_text_is_journalled(
    model_folder: Path, completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Use a file name with bytes that are not UTF-8, which JSON cannot contain."""
    path = tmp_path / "data\udcff.jsonl"
    path.write_bytes(completion_file.read_bytes())
    status, _, err = run(build_select_arguments(model_folder, path, tmp_path / "run"), capsys)
    assert status == 0, err
    assert "data" in (tmp_path / "run" / "journal.jsonl").read_text(encoding="utf-8")
