"""Real workers of another version, with another protocol, or on a machine that does not see the run folder."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import rightrank
from rightrank import select_rank
from rightrank.schema.errors import InputError
from tests.tiny import small_settings

pytestmark = pytest.mark.trains

HIDING = "mount -t tmpfs none {} && exec"  # in a namespace of its own: another disk where the run folder is


def another_rightrank(folder: Path, version: str, changed: tuple[str, str] | None = None) -> str:
    """The launcher that starts a worker from a changed copy of the package."""
    package = folder / "rightrank"
    shutil.copytree(Path(rightrank.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "vendor"))
    (package / "version.py").write_text(f'__version__ = "{version}"\n')
    if changed is not None:
        messages = package / "plugins" / "cluster" / "messages.py"
        messages.write_text(messages.read_text().replace(*changed))
    return f"env PYTHONPATH={shlex.quote(str(folder))}"


def refusal(launcher: str, model: Path, data: Path, out: Path) -> str:
    settings = small_settings(executor="processes", workers=1, launcher=launcher)
    with pytest.raises(InputError) as caught:
        select_rank(str(model), data, out, settings=settings)
    assert "\n" not in str(caught.value)
    assert (out / "journal.jsonl").read_text().count("\n") == 1  # its start, and no trial
    return str(caught.value)


def test_a_worker_of_another_version_is_refused(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    launcher = another_rightrank(tmp_path / "old", "0.0.1")
    message = refusal(launcher, model_folder, completion_file, tmp_path / "run")
    assert message == (
        f"worker-1 has rightrank 0.0.1, this process {rightrank.__version__}: install the same version on every machine"
    )


def test_a_worker_that_does_not_understand_says_so(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    launcher = another_rightrank(tmp_path / "old", "0.0.1", changed=("    share: str", "    probe_path: str"))
    message = refusal(launcher, model_folder, completion_file, tmp_path / "run")
    assert "the worker, rightrank 0.0.1, does not understand this command: install the same version" in message


def test_a_worker_that_does_not_see_the_run_folder_is_refused(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    launcher = ["unshare", "--mount", "sh", "-c", f'{HIDING.format(shlex.quote(str(out)))} "$@"', "sh"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*launcher, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("no mount namespaces here")
    message = refusal(shlex.join(launcher), model_folder, completion_file, out)
    assert "does not see the run folder that this process writes to" in message
