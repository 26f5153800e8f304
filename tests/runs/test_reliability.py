"""Test selections on machines that are preempted, run out of space, or have their clock set back."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rightrank.cli import main
from rightrank.runs import process as processes
from rightrank.runs.folder import RunFolder
from rightrank.runs.journal import Journal
from rightrank.runs.prepare import LocalExecutor
from rightrank.schema import events
from rightrank.schema.errors import TerminatedRun
from rightrank.schema.events import Listener
from rightrank.schema.trials import Arm, Trial, TrialFailed, TrialFinished, TrialStarted
from rightrank.training import loop as training_loop
from rightrank.training import trial as arm_training
from rightrank.training.optimizer import load_checkpoint
from rightrank.training.trial import TrialFolders
from tests.commands import SELECT, read_journal_records, run, start, wait_for_trial
from tests.helpers import make_runtime
from tests.tiny import build_small_settings, make_tokenizer
from tests.watch import GENEROUS_SECONDS, Watch, wait_until

pytestmark = pytest.mark.trains

MIB = 2**20
LIMITED = """
import resource, sys
import rightrank.runs.prepare  # loaded before the limit
from rightrank.cli import main
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize:")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]), resource.RLIM_INFINITY))
main(sys.argv[2:])
"""


def save_wide_llama(folder: Path) -> Path:
    """Save a random Llama of one layer whose adapters are large compared with the base."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=2048, intermediate_size=4096, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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


def test_commands_that_read_a_run_keep_its_journal(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run / "run", folder)
    journal_before = (folder / "journal.jsonl").read_bytes()
    for command in (["status"], ["report"], ["decide"], ["export", "--to", "vllm"]):
        status, out, err = run([command[0], str(folder), *command[1:], "--json"], capsys)
        assert status == 0, err
        assert json.loads(out)
    assert (folder / "journal.jsonl").read_bytes() == journal_before


class _Backwards(datetime):
    """A clock that stands a year before the run's start and goes back a minute with every call."""

    calls = 0

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        cls.calls += 1
        return datetime(2020, 1, 1, tzinfo=UTC) - timedelta(minutes=cls.calls)


def test_a_clock_set_back_changes_nothing(
    work: Path, small_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = time.time()
    calls = iter(range(1, 10**9))
    monkeypatch.setattr(time, "time", lambda: start - 3600 * next(calls))
    monkeypatch.setattr(events, "datetime", _Backwards)
    monkeypatch.setattr(processes, "datetime", _Backwards)
    journal_before = (work / "journal.jsonl").read_bytes()
    assert run_selection(capsys, "--set", "checkpoint_seconds=0.001")[0] == 0
    assert _Backwards.calls > 0
    assert (work / "journal.jsonl").read_bytes().startswith(journal_before)
    require_correct(work, small_run)
    trials = read_journal_records(work, TrialFinished)
    trained = [trial for trial in trials if trial.arm.is_direct][-1]
    assert trained.train_seconds > 0
    assert trained.eval_seconds > 0


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


def test_a_damaged_line_is_named_and_without_it_only_what_was_lost_is_trained_again(
    work: Path, small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_selection(capsys)[0] == 0
    journal = work / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    number = next(n for n, line in enumerate(lines) if b'"trial_finished"' in line and b'"rank":1,' in line)
    damaged = bytearray(lines[number])
    damaged[len(damaged) // 2] ^= 1
    journal.write_bytes(b"".join([*lines[:number], bytes(damaged), *lines[number + 1 :]]))
    status, err = run_selection(capsys)
    assert status == 2
    assert f"journal.jsonl:{number + 1}: damaged" in err
    assert "delete this line" in err
    journal.write_bytes(b"".join([*lines[:number], *lines[number + 1 :]]))
    assert run_selection(capsys)[0] == 0
    require_correct(work, small_run)


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


def _run_forever() -> None:
    with processes.SignalHandler(lambda _: None, owns_process=True) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        time.sleep(GENEROUS_SECONDS)


def test_a_step_longer_than_the_grace_period_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.05)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TerminatedRun, match="the run resumes from the last checkpoint"):
        _run_forever()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited as Linux does it")
def test_out_of_memory_on_a_cpu_is_recorded_and_the_rest_goes_on(completion_file: Path, tmp_path: Path) -> None:
    """Set a real limit on the process: rank 2,048 takes over 1.1 GB for its factors, their gradients and AdamW's moments."""
    model = save_wide_llama(tmp_path / "model")
    arguments = [*SELECT, "--ranks", "1,4,2048", "--max-steps", "2"]
    arguments[1:3] = [str(model), str(completion_file)]
    arguments[4] = str(tmp_path / "run")
    arguments.remove("--quiet")
    command = [sys.executable, "-c", LIMITED, str(800 * MIB), *arguments]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=3600)
    assert ended.returncode == 0, ended.stderr
    records = Journal(tmp_path / "run" / "journal.jsonl").read()
    failed = [record for record in records if isinstance(record, TrialFailed)]
    assert [(record.rank, record.error) for record in failed] == [(2048, "out_of_memory")]
    assert "; the memory plan predicted " in failed[0].reason
    assert {record.rank for record in records if isinstance(record, TrialFinished)} == {0, 1, 4}


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
    def raise_error(_run: Path, _figures: object) -> Path:
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
        training_loop.run_trial(runtime, trial, 20.0, folders, stopper)
    content = folders.checkpoint.read_bytes()
    assert load_checkpoint(folders.checkpoint) is not None
    length = 8 + int.from_bytes(content[:8], "little")
    for position in (length, length + 997, (length + len(content)) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[position] ^= 2
        folders.checkpoint.write_bytes(bytes(damaged))
        assert load_checkpoint(folders.checkpoint) is None, position
    outcome = training_loop.run_trial(runtime, trial, 20.0, folders, Listener())
    assert isinstance(outcome, TrialFinished)
    assert len(outcome.train_losses) == 8


def test_a_process_that_trains_arm_after_arm_does_not_grow(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    """Detect a leak of a model's copy or of an arm's tensors: each fourth arm has a new seed with its own batches and initial values."""
    settings = build_small_settings(ranks=(1, 2, 4, 8), max_steps=3, num_evaluations=1, checkpoint_seconds=0.01)
    runtime = make_runtime(model_folder, completion_file, settings, tmp_path / "cache")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    arms = [
        Arm(rank=settings.ranks[number % 4], learning_rate=1e-3, lora_alpha=32.0, seed=number // 4, steps=3)
        for number in range(40)
    ]
    trials = [Trial(trial_id=f"arm-{number}", arm=arm) for number, arm in enumerate(arms)]
    resident_kib: list[float] = []
    for outcome in LocalExecutor(runtime, folder, Listener()).run(trials, base_loss=None):
        assert isinstance(outcome, TrialFinished)
        folder.journal.append(outcome)
        resident_kib.append(psutil.Process().memory_info().rss / 1024)
    growth = (resident_kib[-1] - resident_kib[7]) / 32  # caches are filled after a fifth of the arms
    assert growth < 400, (
        resident_kib
    )  # The base is 135 KiB; an arm of rank 8 with AdamW's moments is 134 KiB, and its graph is larger.


def test_checkpoints_take_a_limited_share_of_the_time(
    model_folder: Path, completion_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use a clock that advances only by three seconds in a save and by one second between steps."""
    clock = [1000.0]
    saved: list[float] = []
    monkeypatch.setattr(arm_training.time, "perf_counter", lambda: clock[0])

    def save(*_: object) -> None:
        saved.append(clock[0])
        clock[0] += 3.0

    monkeypatch.setattr(arm_training, "save_checkpoint", save)
    settings = build_small_settings(max_steps=500, num_evaluations=1, checkpoint_seconds=10)
    runtime = make_runtime(model_folder, completion_file, settings, tmp_path / "cache")
    monkeypatch.setattr(training_loop._TrainingLoop, "_step", lambda _: clock.__setitem__(0, clock[0] + 1.0))
    stop = Watch(should_stop=lambda: clock[0] > 2000)
    arm = Arm(rank=1, learning_rate=1e-2, lora_alpha=32.0, seed=0, steps=500)
    folders = TrialFolders(tmp_path / "checkpoint", tmp_path / "adapter")
    with pytest.raises(Exception, match="stopped at step"):
        training_loop.run_trial(runtime, Trial(trial_id="a" * 12, arm=arm), 20.0, folders, stop)
    due = saved[:-1]  # the last checkpoint is written when the run stops
    assert due[0] - 1000 == pytest.approx(
        11
    )  # the first after checkpoint_seconds, later ones by the cost of a checkpoint
    assert 3.0 / arm_training.MAX_CHECKPOINT_FRACTION < due[1] - due[0] < 3.0 / arm_training.MAX_CHECKPOINT_FRACTION + 6
    assert 3.0 * len(due) / (due[-1] - due[0]) < 0.02
