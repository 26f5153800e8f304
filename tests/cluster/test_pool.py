"""Test the pool with workers that follow a script: whatever happens to them, each trial ends once."""

from __future__ import annotations

import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightrank.cluster import pool as pools
from rightrank.cluster.pool import (
    MAX_LOSSES,
    STOP_FILE,
    Backend,
    RemoteWorker,
    StartedWorker,
    WorkerMessage,
    WorkerPool,
)
from rightrank.schema.errors import InputError, InterruptedRun, RightrankError
from rightrank.schema.events import Listener, Notice, StepDone
from rightrank.schema.trials import Trial, TrialFailed, TrialFinished
from tests.cluster.runs import make_result, make_trials
from tests.examples import limit_examples

TaskFuture = Future[RightrankError | None]
Act = Callable[["ScriptedWorker", list[Trial], TaskFuture], None]


class ScriptedWorker(RemoteWorker):
    """A worker that acts as the script says, without a process."""

    def __init__(self, path: Path, act: Act) -> None:
        self._path, self._act = path, act
        self.is_ended = False

    def submit(self, trials: list[Trial], base_loss: float | None) -> TaskFuture:
        future: TaskFuture = Future()
        self._act(self, trials, future)
        return future

    def send(self, message: WorkerMessage) -> None:
        with self._path.open("ab") as file:
            file.write(message.model_dump_json().encode() + b"\n")

    def end(self, *, is_idle: bool) -> None:
        self.is_ended = True


class ScriptedBackend(Backend):
    def __init__(self, folder: Path, size: int, act: Act) -> None:
        self.size, self._folder, self._act = size, folder, act
        self.workers: list[ScriptedWorker] = []

    def start(self, name: str, slot: int) -> ScriptedWorker:
        assert sum(not worker.is_ended for worker in self.workers) < self.size
        assert 0 <= slot < self.size
        self.workers.append(ScriptedWorker(self._folder / f"{name}.jsonl", self._act))
        return self.workers[-1]


class Recorder(Listener):
    def __init__(self) -> None:
        self.notices: list[str] = []
        self.is_stopping = False

    def on_event(self, event: object) -> None:
        self.notices += [event.text] if isinstance(event, Notice) else []

    def should_stop(self) -> bool:
        return self.is_stopping


@contextmanager
def open_scripted_pool(
    act: Act, size: int = 2, listener: Listener | None = None, task_trials: int = 1
) -> Iterator[tuple[WorkerPool, ScriptedBackend]]:
    with tempfile.TemporaryDirectory() as folder:
        backend = ScriptedBackend(Path(folder), size, act)
        yield WorkerPool(backend, Path(folder), listener or Listener(), task_trials=task_trials), backend


def finish(worker: ScriptedWorker, trials: list[Trial], future: TaskFuture) -> None:
    for trial in trials:
        worker.send(make_result(trial))
    future.set_result(None)


def make_step(trial: Trial, step: int) -> StepDone:
    return StepDone(trial_id=trial.trial_id, step=step, steps=trial.arm.steps, loss=1.0, seconds=1.0)


@given(
    st.lists(st.lists(st.sampled_from(["lost", "progress", "finished"]), max_size=5), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(1, 3),
)
@limit_examples(60)
def test_each_trial_ends_once_and_fails_only_after_losses_without_progress(
    faults: list[list[str]], size: int, task_trials: int
) -> None:
    """Lose a worker in each attempt that has a fault: at once, after more steps than ever before, or after the last outcome."""
    trials, attempts = make_trials(len(faults)), Counter[str]()
    script = {trial.trial_id: trial_faults for trial, trial_faults in zip(trials, faults, strict=True)}

    def act(worker: ScriptedWorker, trials: list[Trial], future: TaskFuture) -> None:
        for trial in trials:
            attempt = attempts[trial.trial_id]
            attempts[trial.trial_id] += 1
            fault = script[trial.trial_id][attempt] if attempt < len(script[trial.trial_id]) else ""
            if fault == "progress":
                worker.send(make_step(trial, 1000 * (1 + sum(attempts.values()))))
            if fault in ("", "finished"):
                worker.send(make_result(trial))
            if fault:
                future.set_exception(RuntimeError("the worker is gone"))
                return
        future.set_result(None)

    with open_scripted_pool(act, size, task_trials=task_trials) as (pool, _):
        outcomes = list(pool.run(trials, None))
    assert sorted(outcome.trial_id for outcome in outcomes) == [trial.trial_id for trial in trials]
    for outcome in outcomes:
        trial_faults = script[outcome.trial_id]
        if isinstance(outcome, TrialFailed):
            assert "lost 3 workers (the last: RuntimeError: the worker is gone)" in outcome.reason
        elif task_trials == 1:
            assert trial_faults[: MAX_LOSSES + 1] != ["lost"] * (MAX_LOSSES + 1)
        if "finished" not in trial_faults and trial_faults[:MAX_LOSSES] == ["lost"] * MAX_LOSSES:
            assert isinstance(outcome, TrialFailed)
        if "lost" not in trial_faults and task_trials == 1:
            assert isinstance(outcome, TrialFinished)


def test_the_longest_trials_come_first_in_even_shares() -> None:
    tasks: list[list[int]] = []

    def act(worker: ScriptedWorker, trials: list[Trial], future: TaskFuture) -> None:
        tasks.append([trial.arm.steps for trial in trials])
        finish(worker, trials, future)

    with open_scripted_pool(act, task_trials=4) as (pool, backend):
        list(pool.run(make_trials(6), None))
        list(pool.run(make_trials(2), None))
    assert tasks == [[15, 14, 13], [12, 11, 10], [11], [10]]
    assert len(backend.workers) == 2  # which stay


def test_an_error_of_the_selection_ends_the_run() -> None:
    def refuse(_worker: ScriptedWorker, _trials: list[Trial], future: TaskFuture) -> None:
        future.set_result(InputError("another version"))

    with open_scripted_pool(refuse) as (pool, _), pytest.raises(InputError, match="another version"):
        list(pool.run(make_trials(3), None))


@pytest.mark.parametrize("stops", [True, False])
def test_a_stop_keeps_what_ends_meanwhile_ends_the_others_and_leaves_a_usable_pool(
    stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(pools, "GRACE_SECONDS", 0.5)
    recorder = Recorder()
    recorder.is_stopping = True

    def act(worker: ScriptedWorker, trials: list[Trial], future: TaskFuture) -> None:
        if not recorder.is_stopping:
            finish(worker, trials, future)
        elif trials[0].arm.rank == 2:  # it ends while the pool waits
            threading.Timer(0.1, finish, (worker, trials, future)).start()
        elif stops:
            threading.Timer(0.1, future.set_result, (None,)).start()

    with open_scripted_pool(act, 2, recorder) as (pool, backend):
        outcomes: list[str] = []
        with pytest.raises(InterruptedRun, match="stopped; 2 trainings are not finished"):
            outcomes.extend(outcome.trial_id for outcome in pool.run(make_trials(3)[:3], None))
        assert outcomes == ["trial-001"]
        assert sorted(worker.is_ended for worker in backend.workers) == [False, not stops]
        recorder.is_stopping = False
        assert len(list(pool.run(make_trials(3), None))) == 3


def test_a_caller_that_leaves_early_can_run_again() -> None:
    with open_scripted_pool(finish) as (pool, _):
        iterator = pool.run(make_trials(4), None)
        next(iterator)
        iterator.close()  # type: ignore[attr-defined]
        assert len(list(pool.run(make_trials(4), None))) == 4


def test_messages_are_read_once_and_an_unfinished_line_waits(tmp_path: Path) -> None:
    notices = [Notice(text=str(number)) for number in range(4)]
    lines = [notice.model_dump_json().encode() + b"\n" for notice in notices]
    path = tmp_path / "w.jsonl"
    file = StartedWorker("w", ScriptedWorker(path, finish), path)
    assert list(file.read_new_messages()) == []
    path.write_bytes(lines[0] + lines[1] + lines[2][:9])
    assert next(file.read_new_messages()) == notices[0]
    assert list(file.read_new_messages()) == [notices[1]]
    path.write_bytes(b"".join(lines))
    assert list(file.read_new_messages()) == notices[2:]
    assert not (tmp_path / STOP_FILE).exists()
