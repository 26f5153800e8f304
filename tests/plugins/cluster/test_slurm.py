"""The Slurm example, with a fake `srun` that runs its step here and a fake `scontrol` that logs its arguments."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.watch import GENEROUS_SECONDS, wait_until

pytestmark = pytest.mark.trains

SCRIPT = Path(__file__).parents[3] / "examples" / "slurm.sh"
SRUN = """#!/bin/bash
echo "$@" >> "$(dirname "$0")/steps"
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = '#!/bin/bash\necho "$@" > "$(dirname "$0")/asked"\n'
RIGHTRANK = f'#!/bin/bash\nexec {sys.executable} -m rightrank "$@"\n'


def test_workers_are_steps_of_the_job_which_is_put_back_when_its_time_is_over(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("rightrank", RIGHTRANK)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"}
    run = tmp_path / "run"
    command = ["bash", str(SCRIPT), str(model_folder), str(completion_file), "--out", str(run), "--quiet"]
    how = ["--strategy", "grid", "--ranks", "1,4", "--learning-rates", "1e-2", "--max-steps", "3000"]
    small = ["--batch-size", "4", "--seq-len", "32", "--eval-items", "12"]
    job = subprocess.Popen([*command, *how, *small], env=environment, stderr=subprocess.PIPE, text=True)
    started = '"type":"trial_started"'
    wait_until(lambda: _read(run / "journal.jsonl").count(started) >= 2 or job.poll() is not None, "two trials started")
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=GENEROUS_SECONDS)
    assert job.returncode == 143, err
    assert (programs / "asked").read_text() == "requeue 7\n"
    assert list((run / "checkpoints").iterdir())
    step = (programs / "steps").read_text().splitlines()[0]
    assert step.startswith("--ntasks=1 --exact --gpus=1")
    assert step.endswith("-m rightrank.plugins.cluster.worker")


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
