"""Test the pool in simulated time: whatever happens to its workers, each trial ends once."""

from __future__ import annotations

import os
import random
from collections import Counter
from unittest.mock import MagicMock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rightrank.cluster import on_ray
from rightrank.cluster.pool import (
    MAX_LOSSES,
    WorkerPool,
)
from rightrank.cluster.worker import SelectionRefused, StopTask, Task, WorkerLost, WorkerMessage, WorkerReady
from rightrank.schema.errors import InputError, InterruptedRun, RunError
from rightrank.schema.events import Listener
from rightrank.schema.trials import Trial, TrialFailed, TrialFinished
from tests.cluster.simulated import VERSIONS, Pace, SimulatedBackend, make_result, make_step, make_trials
from tests.watch import Watch


def make_pool(
    backend: SimulatedBackend, workers: int = 2, observer: Listener | None = None, task_trials: int = 1
) -> WorkerPool:
    return WorkerPool(
        backend, workers, VERSIONS, observer, task_trials=task_trials, hang_seconds=100.0, clock=backend.clock
    )


def run_to_end(pool: WorkerPool, trials: list[Trial]) -> list[str]:
    return [outcome.trial_id for outcome in pool.run(trials, None)]


def test_work_is_shared_and_the_longest_comes_first() -> None:
    backend = SimulatedBackend(Pace(trial=lambda _, trial: float(trial.arm.steps)))
    order = run_to_end(make_pool(backend), make_trials(4))  # 10, 11, 12, 13 seconds
    assert backend.trained == ["trial-003", "trial-002", "trial-001", "trial-000"]
    assert order == ["trial-002", "trial-003", "trial-001", "trial-000"]  # at 12, 13, 23 and 23 seconds
    assert backend.now == pytest.approx(23.0)  # 13 + 10 beside 12 + 11


def test_a_task_holds_as_many_trials_as_its_share() -> None:
    backend = SimulatedBackend(Pace(trial=lambda *_: 1.0))
    tasks: list[int] = []
    send = backend.send

    def sent(worker: str, command: Task | StopTask) -> None:
        assert isinstance(command, Task)
        tasks.append(len(command.trials))
        send(worker, command)

    backend.send = sent  # type: ignore[method-assign]
    assert len(run_to_end(make_pool(backend, workers=2, task_trials=16), make_trials(5))) == 5
    assert tasks == [3, 2]


def test_a_lost_worker_s_trials_go_to_others() -> None:
    notices: list[str] = []
    backend = SimulatedBackend(
        Pace(trial=lambda *_: 10.0), ends_at=lambda worker: 5.0 if worker == "worker-1" else None
    )
    ended_ids = run_to_end(make_pool(backend, observer=Watch(notice=notices.append)), make_trials(6))
    assert sorted(ended_ids) == [trial.trial_id for trial in make_trials(6)]
    assert notices == ["worker-1 was lost: killed by signal 9"]
    assert Counter(backend.trained)[backend.trained[0]] == 2


def test_a_trial_that_loses_every_worker_fails_and_the_others_continue() -> None:
    class Poisoned(SimulatedBackend):
        def send(self, worker: str, command: Task | StopTask) -> None:
            super().send(worker, command)
            if isinstance(command, Task) and command.trials[0].trial_id == "trial-001":
                self._plan(self.now + 1.0, worker, WorkerLost("killed by signal 9", was_killed=True))

    backend = Poisoned(Pace(trial=lambda *_: 10.0))
    outcomes = list(make_pool(backend).run(make_trials(4), None))
    failed = [outcome for outcome in outcomes if isinstance(outcome, TrialFailed)]
    assert [outcome.trial_id for outcome in failed] == ["trial-001"]
    assert failed[0].error == "out_of_memory"
    assert f"lost {MAX_LOSSES} workers" in failed[0].reason
    assert len(outcomes) == 4


@pytest.mark.parametrize("why", ["the trial gets further each time", "the machine was lost each time"])
def test_losses_that_are_not_the_trial_s_do_not_fail_it(why: str) -> None:
    """Lose more than `MAX_LOSSES` workers in one long training, as a cluster whose nodes come and go does."""

    class Unlucky(SimulatedBackend):
        lost = 0

        def send(self, worker: str, command: Task | StopTask) -> None:
            self.lost += 1
            if self.lost > 2 * MAX_LOSSES:
                return super().send(worker, command)
            assert isinstance(command, Task)
            if why.startswith("the trial"):
                step = make_step(command.trials[0]).model_copy(update={"step": self.lost})
                self._plan(self.now + 1.0, worker, step)
            self._plan(self.now + 2.0, worker, WorkerLost("lost", is_machine_lost=why.startswith("the machine")))
            return None

    backend = Unlucky(Pace(trial=lambda *_: 10.0))
    assert [type(outcome) for outcome in make_pool(backend).run(make_trials(1), None)] == [TrialFinished]
    assert backend.lost == 2 * MAX_LOSSES + 1


def test_a_hung_worker_is_replaced_and_its_late_messages_are_ignored() -> None:
    slow = SimulatedBackend(
        Pace(trial=lambda worker, _: 5000.0 if worker == "worker-1" else 10.0, step=1e9), is_deaf=True
    )  # it answers long after it was replaced
    ended_ids = run_to_end(make_pool(slow), make_trials(700))
    assert sorted(ended_ids) == [trial.trial_id for trial in make_trials(700)]
    assert max(Counter(ended_ids).values()) == 1
    assert slow.now < 5000


def test_a_slow_worker_that_shows_progress_is_left_alone() -> None:
    backend = SimulatedBackend(Pace(trial=lambda worker, _: 5000.0 if worker == "worker-1" else 10.0))
    assert len(run_to_end(make_pool(backend), make_trials(3))) == 3
    assert Counter(backend.trained).most_common(1)[0][1] == 1


@given(
    deaths=st.lists(st.one_of(st.none(), st.floats(0.0, 200.0)), min_size=30, max_size=30),
    hangs=st.lists(st.one_of(st.none(), st.floats(0.0, 500.0)), min_size=30, max_size=30),
    workers=st.integers(1, 5),
    task_trials=st.integers(1, 4),
    is_deaf=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_each_trial_ends_once_whatever_happens(
    deaths: list[float | None], hangs: list[float | None], workers: int, task_trials: int, is_deaf: bool
) -> None:
    def at(times: list[float | None], worker: str) -> float | None:
        number = int(worker.split("-")[1])
        return times[number] if number < len(times) else None

    backend = SimulatedBackend(
        Pace(trial=lambda _, trial: 3.0 * trial.arm.steps, start=2.0),
        ends_at=lambda worker: at(deaths, worker),
        hangs_at=lambda worker: at(hangs, worker),
        is_deaf=is_deaf,
    )
    trials_to_run = make_trials(12)
    try:
        outcomes = list(make_pool(backend, workers, task_trials=task_trials).run(trials_to_run, None))
    except RunError as error:
        assert "no worker could start" in str(error)  # noqa: PT017 - only where the first all died before a word
        return
    assert sorted(outcome.trial_id for outcome in outcomes) == [trial.trial_id for trial in trials_to_run]
    assert all(
        outcome == make_result(Trial(trial_id=outcome.trial_id, arm=outcome.arm))
        for outcome in outcomes
        if isinstance(outcome, TrialFinished)
    )


def test_a_stop_request_ends_the_workers_and_keeps_what_ends_meanwhile() -> None:
    backend = SimulatedBackend(Pace(trial=lambda *_: 10.0))
    pool = make_pool(backend, observer=Watch(should_stop=lambda: backend.now > 15))
    ended_ids: list[str] = []
    with pytest.raises(InterruptedRun, match="stopped; 4 trainings are not finished"):
        ended_ids.extend(outcome.trial_id for outcome in pool.run(make_trials(6), None))
    crew_is_free = run_to_end(make_pool(SimulatedBackend(Pace(trial=lambda *_: 1.0))), make_trials(2))
    assert len(crew_is_free) == 2


def test_closed_early_it_can_be_used_again() -> None:
    backend = SimulatedBackend(Pace(trial=lambda *_: 10.0))
    executor = make_pool(backend)
    running = executor.run(make_trials(6), None)
    first = next(running)
    running.close()  # type: ignore[attr-defined]
    remaining_trials = [trial for trial in make_trials(6) if trial.trial_id != first.trial_id]
    assert len(list(executor.run(remaining_trials, None))) == 5


def test_closed_after_an_outcome_it_handles_the_other_messages_next_time() -> None:
    class Gathering(SimulatedBackend):
        """Delivers all messages of one moment together, as a pipe does."""

        def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]:
            messages = super().messages(seconds)
            while self._events and self._events[0][0] <= self.now:
                messages += super().messages(0.0)
            return messages

    backend = Gathering(Pace(trial=lambda *_: 1.0, start=1.0))
    executor = make_pool(backend, workers=1)
    first = executor.run(make_trials(1), None)
    next(first)
    first.close()  # type: ignore[attr-defined]
    assert len(list(executor.run(make_trials(2)[1:], None))) == 1
    assert backend.now < 10  # and not only when the worker counts as hung


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (
            WorkerReady(versions={"rightrank": "0.1"}, sees_folder=True),
            "worker-1 has rightrank 0.1, but this process has simulated",
        ),
        (WorkerReady(versions={}, sees_folder=True), "has rightrank of unknown version"),
        (WorkerReady(versions=VERSIONS, sees_folder=False), "cannot read the run folder that this process writes to"),
        (SelectionRefused(reason="./model: no such folder", exit_status=2), "no such folder"),
    ],
)
def test_incompatible_workers_are_refused_in_one_line(first: WorkerReady | SelectionRefused, message: str) -> None:
    class Incompatible(SimulatedBackend):
        def start(self, worker: str) -> None:
            self._plan(self.now, worker, first)

    backend = Incompatible(Pace(trial=lambda *_: 1.0))
    with pytest.raises(InputError, match=message) as caught:
        run_to_end(make_pool(backend), make_trials(2))
    assert "\n" not in str(caught.value)


def test_workers_that_never_start_end_the_run() -> None:
    class NeverReady(SimulatedBackend):
        def start(self, worker: str) -> None:
            self._plan(self.now, worker, WorkerLost("exit status 1: no such module"))

    with pytest.raises(RunError, match=r"no worker could start .*no such module"):
        run_to_end(make_pool(NeverReady(Pace(trial=lambda *_: 1.0))), make_trials(2))


def test_workers_of_a_cluster_get_four_variables_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the inherited environment, because a Ray dashboard shows it to everyone who can reach it."""
    ray, setup = MagicMock(), MagicMock()
    ray.nodes.return_value = [{"Alive": True, "Resources": {"CPU": 8.0, "memory": 2.0**36}}]
    monkeypatch.setattr(on_ray, "connect", lambda: ray)
    backend = on_ray.RayBackend(setup, None, on_cuda=False)
    monkeypatch.setattr(
        os, "environ", {"HF_TOKEN": "hf_secret", "AWS_SECRET_ACCESS_KEY": "secret", "PYTHONPATH": "src"}
    )
    backend.start("worker-0")
    assert ray.remote.return_value.options.call_args.kwargs["runtime_env"] == {"env_vars": {"PYTHONPATH": "src"}}
    ray.remote.return_value.options.return_value.remote.assert_called_once_with(setup)


def test_many_trials_take_little_longer_than_the_lower_bound() -> None:
    """Use trainings of 100 to 2,000 steps on 40 workers, whose pace varies by a fifth that the pool does not know."""
    draw = random.Random(0)
    trials = [
        Trial(trial_id=f"t{number}", arm=trial.arm.model_copy(update={"steps": round(100 * 20 ** draw.random())}))
        for number, trial in enumerate(make_trials(400))
    ]
    seconds = {trial.trial_id: trial.arm.steps * draw.lognormvariate(0, 0.2) for trial in trials}
    backend = SimulatedBackend(Pace(trial=lambda _, trial: seconds[trial.trial_id]))
    assert len(run_to_end(make_pool(backend, workers=40), trials)) == 400
    assert backend.now <= 1.1 * max(sum(seconds.values()) / 40, *seconds.values())
