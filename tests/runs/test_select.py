"""Test a selection on the command line: the run folder, resuming, refusals and stopping."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from peft import AutoPeftModelForCausalLM

from rightrank.cli import main
from rightrank.evaluation import peft_models
from rightrank.report import html
from rightrank.runs import run as job
from rightrank.runs.folder import Journal, RunFolder
from rightrank.schema.trials import TrialFinished, TrialStarted
from rightrank.training import loop, optimizer
from rightrank.training.runtime import Runtime
from tests.commands import (
    SMALL,
    build_select_arguments,
    read_journal_records,
    read_trial_values,
    run,
    run_forked,
    start,
    wait_for_trial,
)


@pytest.fixture(scope="module")
def finished_run(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a selection once; tests copy or only read it."""
    out = tmp_path_factory.mktemp("select") / "run"
    with pytest.raises(SystemExit) as ended:
        main([*build_select_arguments(model_folder, completion_file, out), "--json", "--quiet"])
    assert ended.value.code == 0
    return out


def test_the_adapter_loads_as_it_is_and_its_card_holds_the_evidence(finished_run: Path) -> None:

    model = AutoPeftModelForCausalLM.from_pretrained(finished_run / "adapter")
    assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) > 0
    card = (finished_run / "adapter" / "README.md").read_text()
    decision = json.loads((finished_run / "decision.json").read_text())
    assert decision["sentence"] in card
    assert "library_name: peft" in card


def test_running_again_trains_nothing_again(
    finished_run: Path,
    model_folder: Path,
    completion_file: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run again in the folder that is named after the data and the model."""
    folder = tmp_path / f"{completion_file.stem}-{model_folder.name}"
    shutil.copytree(finished_run, folder)
    monkeypatch.chdir(tmp_path)
    status, out, err = run(["select", str(model_folder), str(completion_file), *SMALL], capsys)
    assert f"run folder {folder.name}: loading model and data" in err
    assert f"{folder.name}/adapter" in out
    assert status == 0
    started = [len(read_journal_records(run, TrialStarted)) for run in (folder, finished_run)]
    assert started[0] == started[1]
    assert (folder / "decision.json").read_bytes() == (finished_run / "decision.json").read_bytes()


def test_other_settings_are_refused_with_the_difference(
    finished_run: Path, model_folder: Path, completion_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--lora-alpha", "16", "--quiet"]
    status, _, err = run(build_select_arguments(model_folder, completion_file, finished_run, *options), capsys)
    assert status == 2
    assert "lora_alpha: 32.0 → 16.0" in err
    assert err.count("\n") == 1


def test_a_second_process_is_refused(
    finished_run: Path, model_folder: Path, completion_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunFolder(finished_run).lock():
        status, _, err = run(build_select_arguments(model_folder, completion_file, finished_run), capsys)
    assert status == 2
    assert "another process is using this folder" in err


LONG = ("--max-steps", "60")  # long enough for a signal to arrive during a training


@pytest.fixture(scope="module")
def undisturbed(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the selection with which interrupted ones are compared."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.raises(SystemExit) as ended:
        main([*build_select_arguments(model_folder, completion_file, out, *LONG), "--quiet"])
    assert ended.value.code == 0
    return out


def kill_inside(owner: Any, name: str, entry: int) -> None:
    """Kill this process shortly after that call of a function has begun, wherever the function is imported."""
    function, calls = getattr(owner, name), itertools.count(1)

    def call(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == entry:
            Timer(random.uniform(0, 0.005), os.kill, (os.getpid(), signal.SIGKILL)).start()
        return function(*arguments, **keywords)

    for module in [owner, *sys.modules.values()]:
        if (
            getattr(module, "__name__", "").startswith(("rightrank", owner.__name__))
            and vars(module).get(name) is function
        ):
            setattr(module, name, call)


def run_and_kill(arguments: list[str], owner: Any, name: str, entry: int) -> None:
    loop.CHECKPOINT_SECONDS = 0.05
    kill_inside(owner, name, entry)
    main(arguments)


KILLS: list[tuple[Any, str, int]] = [
    (Journal, "append", 2), (optimizer, "take_step", 5), (optimizer, "save_checkpoint", 1), (Runtime, "evaluate_adapters", 2),
    (peft_models, "save_adapter", 1), (job, "export_adapter", 1), (html, "render_report", 1),
]  # fmt: skip


def test_a_run_that_is_stopped_and_killed_gives_the_same_result(
    undisturbed: Path, model_folder: Path, completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stop by Ctrl-C, then kill in the middle of each thing that a selection does, and resume each time."""
    process = start(model_folder, completion_file, tmp_path / "run", *LONG)
    wait_for_trial(tmp_path / "run", process)
    process.signal(signal.SIGINT)
    status, err = process.end()
    assert status == 130
    assert "run the same command again to resume" in err
    arguments = build_select_arguments(model_folder, completion_file, tmp_path / "run", *LONG)
    finished: list[str] = []
    for kill in KILLS:
        status, err = run_forked(partial(run_and_kill, arguments, *kill), tmp_path / "log").end()
        assert status == -signal.SIGKILL, (kill, err)
        lines = [
            line for line in (tmp_path / "run/journal.jsonl").read_text().splitlines() if '"trial_finished"' in line
        ]
        assert lines[: len(finished)] == finished
        finished = [line for line in lines if line.endswith("}")]
    assert run(arguments, capsys)[0] == 0
    assert read_trial_values(tmp_path / "run") == read_trial_values(undisturbed)
    records = Journal(tmp_path / "run" / "journal.jsonl").read()
    events = [(type(record), record.trial_id) for record in records if isinstance(record, TrialStarted | TrialFinished)]
    for trial_id in {trial_id for _, trial_id in events}:
        assert [kind for kind, trial in events if trial == trial_id].index(TrialFinished) == [
            trial for _, trial in events
        ].count(trial_id) - 1
    for name in ("decision.json", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (undisturbed / name).read_bytes()
    assert not list((tmp_path / "run").rglob(".*.rightrank-*"))


def test_total_failure_is_exit_1(
    model_folder: Path, completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = build_select_arguments(
        model_folder, completion_file, tmp_path / "run", "--learning-rates", "1e30", "--max-steps", "12"
    )
    status, out, err = run(arguments, capsys)
    assert status == 1
    assert "none of 2 trials ended with a result" in err
    assert out == ""
