"""Test output that is closed, cut off, or not UTF-8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.watch import GENEROUS_SECONDS

pytestmark = pytest.mark.trains

FRAME = "\u2524"  # a character of the chart that no 8-bit character set contains


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "runs.csv"
    path.write_text("rank,eval_loss\n1,2.3\n4,2.05\n16,2.001\n64,2.0\n", encoding="utf-8")
    return path


def run_in_shell(words: str, table: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run `rightrank` with these arguments in a shell, in which `$T` is the table."""
    command = ["bash", "-o", "pipefail", "-c", words.replace("rightrank", f"{sys.executable} -m rightrank")]
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        timeout=GENEROUS_SECONDS,
        env=os.environ | {"T": str(table)} | environment,
    )


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
    ids=["posix", "ascii", "latin-1"],
)
@pytest.mark.parametrize("words", ["", "--json"])
def test_the_answer_is_utf_8_whatever_the_locale(table: Path, environment: dict[str, str], words: str) -> None:
    answer = run_in_shell(f"rightrank decide $T {words}", table, **environment)
    assert (answer.returncode, answer.stderr) == (0, b"")
    text = answer.stdout.decode("utf-8")
    assert json.loads(text)["rank"] == 16 if words else FRAME in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("words", "status", "lines"),
    [
        ("decide $T >/dev/full", 1, 1),
        ("decide $T --json >/dev/full", 1, 1),
        ("--help >/dev/full", 1, 1),
        ("decide $T >&-", 0, 0),
        ("decide $T 2>&-", 0, 0),
        ("decide nothing 2>/dev/full", 2, 0),
        ("decide nothing 2>&-", 2, 0),
        ("decide $T 2>/dev/full >/dev/full", 1, 0),
    ],
)
def test_output_to_a_closed_stream(table: Path, words: str, status: int, lines: int) -> None:
    answer = run_in_shell(f"rightrank {words}", table)
    assert answer.returncode == status
    assert answer.stderr.count(b"\n") == lines
    assert b"Traceback" not in answer.stderr


def test_a_closed_pipe_is_not_an_error(table: Path) -> None:
    answer = run_in_shell("rightrank decide $T | head -c 1", table)
    assert answer.returncode in (0, 1)  # the reader may have read everything before it closed
    assert answer.stderr == b""
