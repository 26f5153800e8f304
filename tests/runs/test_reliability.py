"""Test selections on machines that are preempted, run out of space, or have their clock set back."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from rightrank.cli import main
from rightrank.runs.folder import Journal
from rightrank.runs.hooks import SignalHandler
from rightrank.schema.errors import TerminatedRun
from rightrank.schema.events import Listener
from rightrank.schema.trials import Arm, Trial, TrialFinished, TrialStarted
from rightrank.training.loop import TrialFolders
from rightrank.training.optimizer import load_checkpoint
from tests.commands import SELECT, run, start, wait_for_trial
from tests.helpers import make_runtime, run_trial
from tests.tiny import build_small_settings
from tests.watch import Watch, wait_until

pytestmark = pytest.mark.trains


def make_half_finished_run(small_run: Path, folder: Path) -> Path:
    """Create a run whose first arm has finished, next to the model and the data."""
    shutil.copytree(small_run, folder)
    run_folder = folder / "run"
    lines = (run_folder / "journal.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept_lines = [line for line in lines if '"type":"trial_' in line or '"run_started"' in line]
    last = next(number for number, line in enumerate(kept_lines) if '"trial_started"' in line and '"rank":1,' in line)
    (run_folder / "journal.jsonl").write_text("".join(kept_lines[: last + 1]), encoding="utf-8")
    for name in ("decision.json", "config.yaml"):
        (run_folder / name).unlink()
    return run_folder


@pytest.fixture
def work(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the half-finished run, in the folder to which its settings are relative."""
    folder = make_half_finished_run(small_run, tmp_path / "work")
    monkeypatch.chdir(folder.parent)
    return folder


def run_selection(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    status, _, err = run([*SELECT[:-1], *options, "--quiet"], capsys)
    return status, err


def require_correct(folder: Path, small_run: Path) -> None:
    """Require that the first arm was trained once before the stop, the second after it, and that the answer is right."""
    records = Journal(folder / "journal.jsonl").read()
    trained = [record for record in records if isinstance(record, TrialFinished) and record.arm.is_direct]
    assert [record.rank for record in trained] == [0, 4, 1]
    assert len([r for r in records if isinstance(r, TrialStarted) and r.rank == 4 and r.arm.is_direct]) == 1
    expected = json.loads((small_run / "run" / "decision.json").read_text())
    decision = json.loads((folder / "decision.json").read_text())
    assert {name: decision[name] for name in ("rank", "recommended_rank", "verdict")} == {
        name: expected[name] for name in ("rank", "recommended_rank", "verdict")
    }
    assert [row["value"] for row in decision["ranks"]] == pytest.approx(
        [row["value"] for row in expected["ranks"]], rel=1e-3
    )


def test_a_read_only_folder_can_be_inspected_and_resumed_later(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        folder = make_half_finished_run(small_run, disk / "work")
        monkeypatch.chdir(folder.parent)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        status, err = run_selection(capsys)
        assert status == 2
        assert err.count("\n") == 1
        assert "can't write there (Read-only file system); give a writable --out" in err
        assert run(["status", "run"], capsys)[0] == 0
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert run_selection(capsys)[0] == 0
        require_correct(folder, small_run)
    finally:
        monkeypatch.chdir(tmp_path)
        subprocess.run(["umount", "-l", str(disk)], check=True)  # the model may still be mapped


def test_sigterm_writes_a_checkpoint_and_says_how_to_resume(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    process = start(model_folder, completion_file, tmp_path / "run", "--max-steps", "5000")
    wait_for_trial(tmp_path / "run", process)
    wait_until(lambda: _has_stepped(tmp_path / "run" / "progress.json"), "a step is written")
    process.signal(signal.SIGTERM)
    status, err = process.end()
    assert status == 143
    last = err.strip().splitlines()[-1]
    assert "stopped at step" in last
    assert f"to resume {tmp_path / 'run'}: rightrank select {model_folder}" in last
    checkpoints = list((tmp_path / "run" / "checkpoints").iterdir())
    assert len(checkpoints) == 1
    checkpoint = load_checkpoint(checkpoints[0])
    assert checkpoint[1]["step"] > 0


def _has_stepped(file: Path) -> bool:
    """Check whether a training has taken steps, in the file that `status` reads."""
    return file.exists() and re.search(r"step [1-9]", json.loads(file.read_text())["progress"]) is not None


def test_a_second_sigterm_stops_at_once() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with SignalHandler(lambda _: None, owns_process=True) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(TerminatedRun, match="the run resumes from the last checkpoint"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True), (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True), (RuntimeError("std::bad_alloc"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True), (RuntimeError("shape mismatch"), False),
    ],
)  # fmt: skip
def test_out_of_memory_anywhere_is_one_line(
    error: Exception,
    is_memory: bool,
    work: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raise_error(_run: Path) -> Path:
        raise error

    monkeypatch.setattr("rightrank.api.folders.write_report", raise_error)
    if not is_memory:
        with pytest.raises(RuntimeError, match="shape mismatch"):
            main(["report", "run"])
        return
    status, out, err = run(["report", "run"], capsys)
    assert (status, out) == (1, "")
    assert err.startswith("rightrank: out of memory; finished trials are kept")
    assert err.count("\n") == 1


def test_a_flipped_bit_in_a_checkpoint_is_found_and_the_trial_starts_again(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    runtime = make_runtime(model_folder, completion_file, build_small_settings(), tmp_path / "cache")
    arm = Arm(rank=4, learning_rate=1e-2, lora_alpha=32.0, seed=0, steps=8)
    trial = Trial(trial_id="a" * 12, arm=arm)
    folders = TrialFolders(tmp_path / "checkpoint", tmp_path / "adapter")
    steps = iter(range(1000))
    stopper = Watch(should_stop=lambda: next(steps) == 3)
    with pytest.raises(Exception, match="stopped at step 4"):
        run_trial(runtime, trial, 20.0, folders, stopper)
    content = folders.checkpoint.read_bytes()
    assert load_checkpoint(folders.checkpoint) is not None
    length = 8 + int.from_bytes(content[:8], "little")
    for position in (length, length + 997, (length + len(content)) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[position] ^= 2
        folders.checkpoint.write_bytes(bytes(damaged))
        assert load_checkpoint(folders.checkpoint) is None, position
    outcome = run_trial(runtime, trial, 20.0, folders, Listener())
    assert isinstance(outcome, TrialFinished)
    assert len(outcome.train_losses) == 8
