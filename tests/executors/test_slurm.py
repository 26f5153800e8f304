"""The Slurm example, with an `srun` that runs its step here and a `scontrol` that notes what it was asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.executors.test_workers import decision_of

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm.sh"
SRUN = """#!/bin/bash
echo "$@" >> "$(dirname "$0")/steps"
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = '#!/bin/bash\necho "$@" > "$(dirname "$0")/asked"\n'
RIGHTRANK = f'#!/bin/bash\nexec {sys.executable} -m rightrank "$@"\n'


@pytest.mark.parametrize("is_preempted", [False, True])
def test_workers_are_steps_of_the_job(
    is_preempted: bool, model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("rightrank", RIGHTRANK)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"}
    run, steps = tmp_path / "run", 2000 if is_preempted else 4
    command = ["bash", str(SCRIPT), str(model_folder), str(completion_file), "--out", str(run)]
    how = ["--strategy", "grid", "--ranks", "1,4", "--learning-rates", "1e-2", "--max-steps", str(steps), "--quiet"]
    small = ["--batch-size", "4", "--seq-len", "32", "--eval-items", "12", "--set", "samples=0"]
    job = subprocess.Popen([*command, *how, *small], env=environment, stderr=subprocess.PIPE, text=True)
    if is_preempted:
        while _read(run / "journal.jsonl").count('"type":"trial_started"') < 2 and job.poll() is None:
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=300)
    step = (programs / "steps").read_text().splitlines()[0]
    assert step.startswith("--ntasks=1 --exact --gpus=1")
    assert step.endswith("-m rightrank.executors.worker")
    if is_preempted:
        assert job.returncode == 143, err
        assert (programs / "asked").read_text() == "requeue 7\n"
    else:
        assert job.returncode == 0, err
        assert decision_of(run)["verdict"]


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
