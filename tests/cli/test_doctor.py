"""`doctor`: one screen about this machine, without torch where there is no accelerator."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from rightrank.runs import machine as system
from tests.commands import run


def test_one_screen_and_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    status, text, err = run(["doctor"], capsys)
    assert (status, err) == (0, "")
    assert len(text.splitlines()) <= 24
    assert f"torch {version('torch')}" in text
    status, out, _ = run(["doctor", "--json"], capsys)
    found = json.loads(out)
    assert status == 0
    assert found["versions"]["peft"] == version("peft")
    assert found["memory_bytes"] >= found["available_bytes"] > 0
    assert {one["extra"]: one["installed"] for one in found["extras"]}["ray"] is True
    assert all(place["writable"] for place in found["places"])


def test_what_is_missing_or_not_writable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("HF_HOME", str(file / "hub"))
    monkeypatch.setattr(system, "NEEDED", (*system.NEEDED, "no-such-package"))
    found = system.examine()
    assert found.versions["no-such-package"] is None
    assert [problem for problem in found.problems if "GiB" not in problem] == [
        "no-such-package is not installed: pip install no-such-package",
        f"{file / 'hub'} (models of the hub) can't be written: give another place, or its permissions",
    ]


def test_without_an_accelerator_torch_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rightrank.runs import machine as system; system.shutil.which = lambda _: None; "
        f"system.NVIDIA = Path({str(tmp_path / 'none')!r}); system.sys.platform = 'linux'; found = system.examine(); "
        "print(found.device, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cpu", "False"]
