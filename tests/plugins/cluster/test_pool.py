"""The pool in simulated time: whatever happens to its workers, each trial ends once."""

from __future__ import annotations

import os
from collections import Counter
from unittest.mock import MagicMock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rightrank.plugins.cluster import on_ray
from rightrank.plugins.cluster.pool import (
    MAX_LOSSES,
    Pool,
)
from rightrank.plugins.cluster.worker import Ready, Refused, Stop, Task, WorkerLost, WorkerMessage
from rightrank.schema.errors import InputError, InterruptedRun, RunError
from rightrank.schema.events import Listener
from rightrank.schema.trials import Trial, TrialFailed, TrialFinished
from tests.plugins.cluster.runs import trials
from tests.plugins.cluster.simulated import VERSIONS, Pace, SimulatedCrew, result_of, step_of
from tests.watch import Watch


def make_pool(crew: SimulatedCrew, workers: int = 2, observer: Listener | None = None, task_trials: int = 1) -> Pool:
    return Pool(crew, workers, VERSIONS, observer, task_trials=task_trials, hang_seconds=100.0, clock=crew.clock)


def ended(pool: Pool, wanted: list[Trial]) -> list[str]:
    return [outcome.trial_id for outcome in pool.run(wanted, None)]


def test_work_is_shared_and_the_longest_comes_first() -> None:
    crew = SimulatedCrew(Pace(trial=lambda _, trial: float(trial.arm.steps)))
    order = ended(make_pool(crew), trials(4))  # 10, 11, 12, 13 seconds
    assert crew.trained == ["trial-003", "trial-002", "trial-001", "trial-000"]
    assert order == ["trial-002", "trial-003", "trial-001", "trial-000"]  # at 12, 13, 23 and 23 seconds
    assert crew.now == pytest.approx(23.0)  # 13 + 10 beside 12 + 11


def test_a_task_holds_as_many_trials_as_its_share() -> None:
    crew = SimulatedCrew(Pace(trial=lambda *_: 1.0))
    tasks: list[int] = []
    send = crew.send

    def sent(worker: str, command: Task | Stop) -> None:
        assert isinstance(command, Task)
        tasks.append(len(command.trials))
        send(worker, command)

    crew.send = sent  # type: ignore[method-assign]
    assert len(ended(make_pool(crew, workers=2, task_trials=16), trials(5))) == 5
    assert tasks == [3, 2]


def test_a_lost_worker_s_trials_go_to_others() -> None:
    notices: list[str] = []
    crew = SimulatedCrew(Pace(trial=lambda *_: 10.0), ends_at=lambda worker: 5.0 if worker == "worker-1" else None)
    found = ended(make_pool(crew, observer=Watch(notice=notices.append)), trials(6))
    assert sorted(found) == [trial.trial_id for trial in trials(6)]
    assert notices == ["worker-1 was lost: killed by signal 9"]
    assert Counter(crew.trained)[crew.trained[0]] == 2


def test_a_trial_that_loses_every_worker_fails_and_the_others_continue() -> None:
    class Poisoned(SimulatedCrew):
        def send(self, worker: str, command: Task | Stop) -> None:
            super().send(worker, command)
            if isinstance(command, Task) and command.trials[0].trial_id == "trial-001":
                self._plan(self.now + 1.0, worker, WorkerLost("killed by signal 9", killed=True))

    crew = Poisoned(Pace(trial=lambda *_: 10.0))
    outcomes = list(make_pool(crew).run(trials(4), None))
    failed = [outcome for outcome in outcomes if isinstance(outcome, TrialFailed)]
    assert [outcome.trial_id for outcome in failed] == ["trial-001"]
    assert failed[0].error == "out_of_memory"
    assert f"lost {MAX_LOSSES} workers" in failed[0].reason
    assert len(outcomes) == 4


@pytest.mark.parametrize("why", ["the trial gets further each time", "the machine was lost each time"])
def test_losses_that_are_not_the_trial_s_do_not_fail_it(why: str) -> None:
    """A cluster of nodes that come and go may lose more workers than `MAX_LOSSES` in one long training."""

    class Unlucky(SimulatedCrew):
        lost = 0

        def send(self, worker: str, command: Task | Stop) -> None:
            self.lost += 1
            if self.lost > 2 * MAX_LOSSES:
                return super().send(worker, command)
            assert isinstance(command, Task)
            if why.startswith("the trial"):
                step = step_of(command.trials[0]).model_copy(update={"step": self.lost})
                self._plan(self.now + 1.0, worker, step)
            self._plan(self.now + 2.0, worker, WorkerLost("lost", with_machine=why.startswith("the machine")))
            return None

    crew = Unlucky(Pace(trial=lambda *_: 10.0))
    assert [type(outcome) for outcome in make_pool(crew).run(trials(1), None)] == [TrialFinished]
    assert crew.lost == 2 * MAX_LOSSES + 1


def test_a_hung_worker_is_replaced_and_its_late_messages_are_ignored() -> None:
    slow = SimulatedCrew(
        Pace(trial=lambda worker, _: 5000.0 if worker == "worker-1" else 10.0, step=1e9), is_deaf=True
    )  # it answers long after it was replaced
    found = ended(make_pool(slow), trials(700))
    assert sorted(found) == [trial.trial_id for trial in trials(700)]
    assert max(Counter(found).values()) == 1
    assert slow.now < 5000


def test_a_slow_worker_that_shows_progress_is_left_alone() -> None:
    crew = SimulatedCrew(Pace(trial=lambda worker, _: 5000.0 if worker == "worker-1" else 10.0))
    assert len(ended(make_pool(crew), trials(3))) == 3
    assert Counter(crew.trained).most_common(1)[0][1] == 1


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

    crew = SimulatedCrew(
        Pace(trial=lambda _, trial: 3.0 * trial.arm.steps, start=2.0),
        ends_at=lambda worker: at(deaths, worker),
        hangs_at=lambda worker: at(hangs, worker),
        is_deaf=is_deaf,
    )
    wanted = trials(12)
    try:
        found = list(make_pool(crew, workers, task_trials=task_trials).run(wanted, None))
    except RunError as error:
        assert "no worker could start" in str(error)  # noqa: PT017 - only where the first all died before a word
        return
    assert sorted(outcome.trial_id for outcome in found) == [trial.trial_id for trial in wanted]
    assert all(
        outcome == result_of(Trial(trial_id=outcome.trial_id, arm=outcome.arm))
        for outcome in found
        if isinstance(outcome, TrialFinished)
    )


def test_a_stop_request_ends_the_workers_and_keeps_what_ends_meanwhile() -> None:
    crew = SimulatedCrew(Pace(trial=lambda *_: 10.0))
    pool = make_pool(crew, observer=Watch(should_stop=lambda: crew.now > 15))
    found: list[str] = []
    with pytest.raises(InterruptedRun, match="stopped with 4 trainings to do"):
        found.extend(outcome.trial_id for outcome in pool.run(trials(6), None))
    crew_is_free = ended(make_pool(SimulatedCrew(Pace(trial=lambda *_: 1.0))), trials(2))
    assert len(crew_is_free) == 2


def test_closed_early_it_can_be_used_again() -> None:
    crew = SimulatedCrew(Pace(trial=lambda *_: 10.0))
    executor = make_pool(crew)
    running = executor.run(trials(6), None)
    first = next(running)
    running.close()  # type: ignore[attr-defined]
    rest = [trial for trial in trials(6) if trial.trial_id != first.trial_id]
    assert len(list(executor.run(rest, None))) == 5


def test_closed_after_an_outcome_it_handles_the_other_messages_next_time() -> None:
    class Gathering(SimulatedCrew):
        """Delivers all messages of one moment together, as a pipe does."""

        def messages(self, seconds: float) -> list[tuple[str, WorkerMessage | WorkerLost]]:
            found = super().messages(seconds)
            while self._events and self._events[0][0] <= self.now:
                found += super().messages(0.0)
            return found

    crew = Gathering(Pace(trial=lambda *_: 1.0, start=1.0))
    executor = make_pool(crew, workers=1)
    first = executor.run(trials(1), None)
    next(first)
    first.close()  # type: ignore[attr-defined]
    assert len(list(executor.run(trials(2)[1:], None))) == 1
    assert crew.now < 10  # and not only when the worker counts as hung


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (Ready(versions={"rightrank": "0.1"}, sees_folder=True), "worker-1 has rightrank 0.1, this process simulated"),
        (Ready(versions={}, sees_folder=True), "has rightrank of unknown version"),
        (Ready(versions=VERSIONS, sees_folder=False), "does not see the run folder that this process writes to"),
        (Refused(reason="./model: no such folder", exit_status=2), "no such folder"),
    ],
)
def test_incompatible_workers_are_refused_in_one_line(first: Ready | Refused, message: str) -> None:
    class Incompatible(SimulatedCrew):
        def start(self, worker: str) -> None:
            self._plan(self.now, worker, first)

    crew = Incompatible(Pace(trial=lambda *_: 1.0))
    with pytest.raises(InputError, match=message) as caught:
        ended(make_pool(crew), trials(2))
    assert "\n" not in str(caught.value)


def test_workers_that_never_start_end_the_run() -> None:
    class NeverReady(SimulatedCrew):
        def start(self, worker: str) -> None:
            self._plan(self.now, worker, WorkerLost("exit status 1: no such module"))

    with pytest.raises(RunError, match=r"no worker could start .*no such module"):
        ended(make_pool(NeverReady(Pace(trial=lambda *_: 1.0))), trials(2))


def test_workers_of_a_cluster_get_four_variables_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray head shows the environment of its actors to whoever reaches its dashboard."""
    ray, setup = MagicMock(), MagicMock()
    ray.nodes.return_value = [{"Alive": True, "Resources": {"CPU": 8.0, "memory": 2.0**36}}]
    monkeypatch.setattr(on_ray, "connected", lambda: ray)
    crew = on_ray.RayCrew(setup, None, on_cuda=False)
    monkeypatch.setattr(
        os, "environ", {"HF_TOKEN": "hf_secret", "AWS_SECRET_ACCESS_KEY": "secret", "PYTHONPATH": "src"}
    )
    crew.start("worker-0")
    assert ray.remote.return_value.options.call_args.kwargs["runtime_env"] == {"env_vars": {"PYTHONPATH": "src"}}
    ray.remote.return_value.options.return_value.remote.assert_called_once_with(setup)
