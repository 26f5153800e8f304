"""The sites where the attempts of `faults` run: processes, or actors on a Ray cluster that all attempts share."""

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
from rightrank.plugins.cluster.on_ray import RayBackend
from rightrank.plugins.cluster.pool import WorkerBackend, WorkerPool
from rightrank.plugins.cluster.processes import ProcessBackend
from rightrank.plugins.cluster.worker import WorkerSetup, collect_versions
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import Hooks, SelectionEnd
from rightrank.runs.run import decide_training_rank, open_run, run_trials, start_run
from rightrank.runs.selection import PreparedSelection, SelectionRequest
from rightrank.runs.values import Selected, collect_answers
from rightrank.schema.events import DataSummary, Event, RunStarted
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import TrialFinished
from rightrank.search import make_strategy
from rightrank.search.history import build_space
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
        """Kill a node that has workers, if there is one."""
        hosts = {worker.ppid() for worker in _list_workers("ray")}
        at_work = [cores for cores, node in self._nodes.items() if hosts & _list_raylets(node)]
        self._cluster.remove_node(self._nodes.pop(random.choice(at_work or list(self._nodes))), allow_graceful=False)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@dataclass(slots=True)
class Site:
    """One try's run folder, and where its workers are."""

    executor: str
    folder: Path
    nodes: Nodes | None = None
    address: str | None = None
    busy: Callable[[], list[int]] | None = None  # process ids of workers at work, where they are known
    notices: list[str] = field(default_factory=list)
    is_hit: bool = False  # the fault has come


def find_busy_worker(site: Site) -> psutil.Process:
    """Return a worker that is training a trial if that can be determined, otherwise any worker."""
    until = time.monotonic() + GENEROUS_SECONDS
    while time.monotonic() < until:
        workers = list(map(psutil.Process, site.busy())) if site.busy is not None else _list_workers(site.executor)
        if workers:
            return random.choice(workers)
        time.sleep(POLL_SECONDS)
    raise RuntimeError("no worker was there to be hit")


def _list_raylets(node: Any) -> set[int]:
    """Process ids of what starts a Ray node's workers."""
    return {raylet.process.pid for raylet in node.all_processes.get("raylet", [])}


def _list_workers(executor: str) -> list[psutil.Process]:
    workers = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            is_actor = line.startswith("ray::") and "RayWorker" in line
            if is_actor if executor == "ray" else "-m rightrank.plugins.cluster.worker" in line:
                workers.append(process)
    return workers


def kill_worker(site: Site) -> None:
    find_busy_worker(site).kill()


def pause_worker(site: Site) -> None:
    """Stop a worker for a while, then continue it. It must not be replaced, and nothing may be counted twice."""
    worker = find_busy_worker(site)
    worker.suspend()
    Timer(PAUSE_SECONDS, worker.resume).start()


def kill_driver(_place: Site) -> None:
    """Kill the driver; the same command is then run again."""
    os.kill(os.getpid(), signal.SIGKILL)


Fault = Callable[[Site], None]


def _open_backend(site: Site) -> WorkerBackend:
    (site.folder / "journal.jsonl").touch()  # which workers look for
    request = SelectionRequest("", None, "", SelectSettings())
    setup = WorkerSetup(request, fingerprint="", folder=site.folder, working_folder=Path.cwd())
    if site.executor == "ray":
        os.environ["RAY_ADDRESS"] = site.address or ""
        return RayBackend(setup, None, on_cuda=False, actor=StubRayWorker)
    return ProcessBackend(setup, site.folder / "workers", kind=StubWorker)


def drive(site: Site, strike: Callable[[], None], num_outcomes: int, hang_seconds: float = 600.0) -> None:
    """Run one selection over sleeping workers, and strike within a trial's time after so many outcomes of this drive."""
    folder = site.folder
    settings = SelectSettings(strategy="grid", ranks=(1, 2, 4, 8), learning_rates=(1e-3, 3e-3, 1e-2))
    started = RunStarted(
        rightrank_version="benchmark",
        fingerprint="benchmark",
        settings={"model": "none", "data": "none", **settings.model_dump(mode="json")},
        environment={},
        data=DataSummary(form="text", splits={}, splits_given=False, duplicates_across_splits=0),
        evaluation_examples=["a", "b", "c", "d"],
        metric="loss",
        higher_is_better=False,
        started_at="",
    )
    num_finished = 0

    def listen(event: Event) -> None:
        nonlocal num_finished
        num_finished += isinstance(event, TrialFinished)
        if isinstance(event, TrialFinished) and num_finished == num_outcomes:
            Timer(random.uniform(0, STEPS / 1000), strike).start()

    run_folder, until = RunFolder(folder), time.monotonic() + LIMIT_SECONDS
    observer = Watch(on_event=listen, notice=site.notices.append, should_stop=lambda: time.monotonic() > until)
    with run_folder.lock():
        report, strategy = Report(), make_strategy(settings.strategy, build_space(settings, STEPS))
        hooks = Hooks([observer, report])
        plan = PreparedSelection(started=started, settings=settings, steps=STEPS, strategy=strategy)
        run = open_run(lambda *_: plan, run_folder, hooks)
        backend = _open_backend(site)
        pool = WorkerPool(backend, WORKERS, collect_versions(), run, hang_seconds=hang_seconds)
        if isinstance(backend, ProcessBackend):
            site.busy = lambda: [backend._running[name].pid for name in pool.list_busy_workers()]
        try:
            start_run(run)
            run_trials(run, pool)
        finally:
            pool.close()
        selected = Selected(
            folder,
            None,
            None,
            run_folder.report,
            collect_answers(run.records, decide_training_rank(run), settings.goal),
        )
        report.on_end(SelectionEnd(selected, run_folder, run.records))


def kill_and_resume(site: Site, num_outcomes: int) -> list[int]:
    """Return the exit statuses of two forked drives, of which the first kills itself after so many outcomes."""
    address = [] if site.address is None else [site.address]
    module = [sys.executable, "-m", "tests.plugins.cluster.faults"]
    command = [*module, site.executor, str(site.folder), str(num_outcomes), *address]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=2 * LIMIT_SECONDS).stdout
    statuses: list[int] = json.loads(output.splitlines()[-1])
    return statuses


def drive_forked(site: Site, num_outcomes: int) -> int:
    """Drive in a forked process that kills itself after so many outcomes; 0 for never."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            drive(site, lambda: kill_driver(site), num_outcomes)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
