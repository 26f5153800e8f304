"""Where the tries of `faults` run: workers that are processes, or actors on a Ray cluster that all tries share."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any

import psutil

from rightrank.hooks.report import Report
from rightrank.plugins.cluster.on_ray import RayCrew
from rightrank.plugins.cluster.pool import Crew, Pool
from rightrank.plugins.cluster.processes import ProcessCrew
from rightrank.plugins.cluster.worker import Setup, versions
from rightrank.runs.executor import Plan
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import Finished, Hooks
from rightrank.runs.run import begin, final_decision, loop, opened
from rightrank.runs.values import Request, Selected, answers
from rightrank.schema.events import DataSummary, Event, JournalRecord, RunStarted
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import TrialFinished
from rightrank.search import make_strategy
from rightrank.search.history import space_of
from tests.plugins.cluster.stub_worker import StubRayWorker, StubWorker
from tests.watch import GENEROUS_SECONDS, Watch

WORKERS = 3
STEPS = 700  # of a sleeping trial: milliseconds
HANG_SECONDS = 15.0  # where a worker is made to hang; elsewhere the default
POLL_SECONDS = 0.01  # between two checks whether a worker is at work
PAUSE_SECONDS = 4.0  # of a slow worker
LIMIT_SECONDS = 240.0  # for a try, on a machine with other work
STORE = {"object_store_memory": 80 * 2**20}


class Nodes:
    """A Ray cluster of a head without cores, and nodes of so many cores, all on this machine."""

    def __init__(self, sizes: Sequence[int] = (2, 4)) -> None:
        from ray.cluster_utils import Cluster

        self._sizes = sizes

        os.environ.setdefault(
            "RAY_worker_niceness", "0"
        )  # 15 otherwise: on a busy machine its workers then stand still
        os.environ.setdefault("RAY_enable_worker_prestart", "0")  # workers that nobody asks for
        head = {"num_cpus": 0, "include_dashboard": False, **STORE}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: dict[int, Any] = {}
        self.make_whole()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def make_whole(self) -> None:
        """Put back what was taken away."""
        for cores in self._sizes:
            if cores not in self._nodes:
                self._nodes[cores] = self._cluster.add_node(num_cpus=cores, **STORE)

    def kill_one_at_work(self) -> None:
        """A node that has workers, if any does."""
        hosts = {worker.ppid() for worker in _workers_below("ray")}
        at_work = [cores for cores, node in self._nodes.items() if hosts & _raylets_of(node)]
        self._cluster.remove_node(self._nodes.pop(random.choice(at_work or list(self._nodes))), allow_graceful=False)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@dataclass(slots=True)
class Place:
    """One try's run folder, and where its workers are."""

    executor: str
    folder: Path
    nodes: Nodes | None = None
    address: str | None = None
    busy: Callable[[], list[int]] | None = None  # process ids of workers at work, where they are known
    notices: list[str] = field(default_factory=list)
    is_hit: bool = False  # the fault has come


def worker_at_work(place: Place) -> psutil.Process:
    """A worker that has a trial under way, where that can be told; else any."""
    until = time.monotonic() + GENEROUS_SECONDS
    while time.monotonic() < until:
        found = list(map(psutil.Process, place.busy())) if place.busy is not None else _workers_below(place.executor)
        if found:
            return random.choice(found)
        time.sleep(POLL_SECONDS)
    raise RuntimeError("no worker was there to be hit")


def _raylets_of(node: Any) -> set[int]:
    """Process ids of what starts a Ray node's workers."""
    return {one.process.pid for one in node.all_processes.get("raylet", [])}


def _workers_below(executor: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            is_actor = line.startswith("ray::") and "RayWorker" in line
            if is_actor if executor == "ray" else "-m rightrank.plugins.cluster.worker" in line:
                found.append(process)
    return found


def kill_worker(place: Place) -> None:
    worker_at_work(place).kill()


def slow_worker(place: Place) -> None:
    """Stopped for a while, then continued: not replaced, and nothing is counted twice."""
    worker = worker_at_work(place)
    worker.suspend()
    Timer(PAUSE_SECONDS, worker.resume).start()


def kill_driver(_place: Place) -> None:
    """The same command is then given again."""
    os.kill(os.getpid(), signal.SIGKILL)


Fault = Callable[[Place], None]


def _crew_at(place: Place) -> Crew:
    (place.folder / "journal.jsonl").touch()  # which workers look for
    request = Request("", None, "", SelectSettings())
    setup = Setup(request, fingerprint="", folder=place.folder, working_folder=Path.cwd())
    if place.executor == "ray":
        os.environ["RAY_ADDRESS"] = place.address or ""
        return RayCrew(setup, None, on_cuda=False, actor=StubRayWorker)
    return ProcessCrew(setup, place.folder / "workers", kind=StubWorker)


@dataclass(frozen=True)
class _Planned:
    """A request whose plan is known."""

    planned: Plan

    def plan(self, _folder: RunFolder, _journal: Sequence[JournalRecord], _before: Plan | None) -> Plan:
        return self.planned

    def extended(self, _settings: SelectSettings) -> _Planned:
        return self


def drive(place: Place, strike: Callable[[], None], after: int, hang_seconds: float = 600.0) -> None:
    """One selection over sleeping workers; the fault within a trial's time after so many outcomes of this drive."""
    folder = place.folder
    settings = SelectSettings(strategy="grid", ranks=(1, 2, 4, 8), learning_rates=(1e-3, 3e-3, 1e-2))
    started = RunStarted(
        rightrank_version="benchmark",
        fingerprint="benchmark",
        settings={"model": "none", "data": "none", **settings.model_dump(mode="json")},
        environment={},
        data=DataSummary(form="text", splits={}, splits_given=False, duplicates_across_splits=0),
        evaluation_items=["a", "b", "c", "d"],
        metric="loss",
        higher_is_better=False,
        started_at="",
    )
    seen = 0

    def listen(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, TrialFinished)
        if isinstance(event, TrialFinished) and seen == after:
            Timer(random.uniform(0, STEPS / 1000), strike).start()

    run_folder, until = RunFolder(folder), time.monotonic() + LIMIT_SECONDS
    observer = Watch(on_event=listen, notice=place.notices.append, should_stop=lambda: time.monotonic() > until)
    with run_folder.locked():
        report, strategy = Report(), make_strategy(settings.strategy, space_of(settings, STEPS))
        hooks = Hooks([observer, report])
        plan = Plan(started=started, settings=settings, steps=STEPS, strategy=strategy)
        run = opened(_Planned(plan), run_folder, hooks)
        crew = _crew_at(place)
        pool = Pool(crew, WORKERS, versions(), run, hang_seconds=hang_seconds)
        if isinstance(crew, ProcessCrew):
            place.busy = lambda: [crew._running[name].pid for name in pool.busy()]
        try:
            begin(run)
            loop(run, pool)
        finally:
            pool.close()
        selected = Selected(
            folder, None, None, run_folder.report, answers(run.records, final_decision(run), settings.goal)
        )
        report.on_end(Finished(selected, run_folder, run.records))


def killed_and_resumed(place: Place, after: int) -> list[int]:
    """Exit statuses of two drives, forked from one process: the first kills itself after so many outcomes."""
    address = [] if place.address is None else [place.address]
    module = [sys.executable, "-m", "tests.plugins.cluster.faults"]
    command = [*module, place.executor, str(place.folder), str(after), *address]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=2 * LIMIT_SECONDS).stdout
    statuses: list[int] = json.loads(told.splitlines()[-1])
    return statuses


def drive_forked(place: Place, after: int) -> int:
    """A drive in a process forked from this one, which kills itself after so many outcomes; 0 for never."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            drive(place, lambda: kill_driver(place), after)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
