"""Faults of several hosts, and what they lose: selections over namespaces that share a disk.

Host 0 has the driver and Ray's head, hosts 1 and 2 the workers (`namespaces` makes them). With `processes`, host 0 has driver and
workers. Run folder, model and data are on the shared disk. A run takes several faults, one after the other, at moments drawn from the seed while trainings are under way.
A driver that ends with an error is started again by the same command. Afterwards the decision, the value of every trial and the bytes
of every adapter must be those of a run without faults; a trial may neither be missing nor have ended twice.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.plugins.cluster.namespaces import Host, Network
from tests.watch import GENEROUS_SECONDS

PORT = 6379
POLL_SECONDS = 0.3  # between two checks of what a process has done
OFF_SECONDS = 1.0  # for which a killed node or head is gone
CORES = 2  # of each host with workers
LIMIT_SECONDS = 420.0  # without a new trial: the run counts as hung
LONGEST = 60.0  # seconds that a fault lasts, at most; at least 1
PAUSE = (0.5, 5.0)  # seconds between two faults
STARTS = 12  # of a driver in one run, at most
RAY = {  # less to start, and a lost node is noticed after 15 s
    "RAY_worker_niceness": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
SHORT = ["--set", "checkpoint_seconds=0.5", "--device", "cpu", "--set", "eval_points=1", "--dtype", "fp32"]


@dataclass(frozen=True)
class Work:
    """A selection: a model, its data, and options."""

    name: str
    model: Path
    data: Path
    options: tuple[str, ...]

    def put_on(self, shared: Path) -> None:
        """Copy the data, and a model that is small; a large one is read where it is."""
        shutil.copy(self.data, shared / "data.jsonl")
        if self.name.startswith("tiny"):
            shutil.copytree(self.model, shared / "model", dirs_exist_ok=True)

    def command(self, out: str, *more: str) -> list[str]:
        model = "/tmp/shared/model" if self.name.startswith("tiny") else str(self.model)
        where = [model, "/tmp/shared/data.jsonl", "--out", f"/tmp/shared/{out}"]
        return [sys.executable, "-m", "rightrank", "select", *where, *self.options, *SHORT, *more]


@dataclass
class Hit:
    """A fault that came, and what the run printed afterwards."""

    kind: str
    host: int  # of those with workers, if it hits one
    after: int  # outcomes in the journal when it came
    seconds: float  # for which it lasted
    line: str = ""


@dataclass
class Field:
    """The hosts, and what runs on them."""

    network: Network
    random: random.Random
    work: Work
    executor: str
    folder: Path  # of this machine, for logs
    workers_wanted: int = 2
    nodes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)  # host → its Ray

    @property
    def hosts(self) -> list[Host]:
        return self.network.hosts

    @property
    def with_workers(self) -> list[Host]:
        return self.hosts[1:] if self.executor == "ray" else self.hosts[:1]

    def start(self, host: Host, command: Sequence[str], log: str, **more: str) -> subprocess.Popen[bytes]:
        return host.start(command, self.folder / log, **RAY, **more)

    def keep_nodes(self) -> None:
        """Start what is missing of the Ray cluster, as a supervisor does."""
        if self.executor != "ray":
            return
        for hosts in (self.hosts[:1], self.hosts[1:]):  # the head first, then one with workers
            begun = [(host, self._begin(host)) for host in hosts if self._is_missing(host)]
            if len(begun) == len(hosts):
                self._await(*begun[0])

    def _is_missing(self, host: Host) -> bool:
        running = self.nodes.get(host.number)
        return bool(host.init) and not host.link.is_cut and (running is None or running.poll() is not None)

    def _begin(self, host: Host) -> int:
        """Start a node; where in its log that begins."""
        self._clear(host)
        log = self._node_log(host)
        begin = len(log.read_text(errors="replace")) if log.exists() else 0
        self.nodes[host.number] = self.start(host, self._node_command(host), log.name)
        return begin

    def _node_command(self, host: Host) -> list[str]:
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        own = [f"--node-ip-address={host.address}", f"--object-store-memory={80 * 2**20}"]
        if host.number == 0:
            return [*ray, *own, "--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false"]
        return [*ray, *own, f"--address={self.hosts[0].address}:{PORT}", f"--num-cpus={CORES}", "--num-gpus=0"]

    def _clear(self, host: Host) -> None:
        for process in host.matching("raylet", "gcs_server", "ray/dashboard", "ray::", "default_worker", "ray start"):
            with suppress(psutil.Error):
                process.kill()
        shutil.rmtree(host.disk / "tmp/ray", ignore_errors=True)

    def _await(self, host: Host, begin: int) -> None:
        """Until a node has joined the cluster, or has failed."""
        until = time.monotonic() + GENEROUS_SECONDS
        while self.nodes[host.number].poll() is None and time.monotonic() < until:
            if "Ray runtime started" in self._node_log(host).read_text(errors="replace")[begin:]:
                return
            time.sleep(POLL_SECONDS)

    def _node_log(self, host: Host) -> Path:
        return self.folder / f"ray-{host.number}.log"

    def workers(self) -> list[psutil.Process]:
        """Worker processes."""
        words = ("ray::RayWorker",) if self.executor == "ray" else ("rightrank.plugins.cluster.worker",)
        return [process for host in self.with_workers for process in host.matching(*words)]

    def reboot(self, host: Host, off_seconds: float) -> None:
        """Kill a host, and bring one with the same name and an empty disk."""
        host.kill()
        time.sleep(off_seconds)
        host.boot()
        host.link.is_cut = False

    def heal(self) -> None:
        for host in self.hosts:
            host.link.is_cut, host.link.delay = False, 0.0
            if host.init:
                (host.disk / "ballast").unlink(missing_ok=True)


@dataclass
class Run:
    """One selection with faults, from its first command to its answer."""

    field: Field
    name: str
    hits: list[Hit] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)  # the last line of each driver that failed
    driver: subprocess.Popen[bytes] | None = None
    read: int = 0  # characters of the log that were read
    begun: int = 0  # progress when the driver was last started
    seen: int = 0  # progress when something was last killed
    over: threading.Event = field(default_factory=threading.Event)
    lasting: list[threading.Thread] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.field.network.shared / self.name

    @property
    def log(self) -> Path:
        return self.field.folder / f"{self.name}.log"

    def start(self) -> None:
        self.begun = self.progress()
        head = f"{self.field.hosts[0].address}:{PORT}"
        self.driver = self.field.start(self.field.hosts[0], self.command(), self.log.name, RAY_ADDRESS=head)

    def command(self) -> list[str]:
        return self.field.work.command(self.name, *options_of(self.field))

    def records(self, kind: str) -> list[dict[str, Any]]:
        journal = self.folder / "journal.jsonl"
        if not journal.exists():
            return []
        lines = [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")]
        return [line for line in lines if line["type"] == kind]

    def outcomes(self) -> int:
        return len(self.records("trial_finished"))

    def go(self, kinds: Sequence[str]) -> list[str]:
        """Faults of these kinds until the selection has ended, once a training has begun. Returns the kinds that were not tried."""
        self.field.keep_nodes()
        self.start()
        waiting, progress, last, next_at = list(kinds), 0, time.monotonic(), 0.0
        try:
            while not self.has_ended():
                self.field.keep_nodes()
                if self.progress() != progress:
                    progress, last = self.progress(), time.monotonic()
                if time.monotonic() > last + LIMIT_SECONDS:
                    raise TimeoutError(f"no new trial for {LIMIT_SECONDS:.0f} s: hung")
                if waiting and progress and time.monotonic() > next_at:
                    kind = waiting.pop(0)
                    if self.can_take(kind, progress):
                        self.strike(kind)
                        next_at, last = time.monotonic() + self.field.random.uniform(*PAUSE), time.monotonic()
                    else:
                        waiting.append(kind)
                time.sleep(POLL_SECONDS)
        finally:
            self.over.set()
            for thread in self.lasting:
                thread.join()
            self.field.heal()
        self.note_line()
        return waiting

    def can_take(self, kind: str, progress: int) -> bool:
        """Whether the driver has begun a training, and after a fault that starts things anew whether one began since."""
        if progress <= self.begun or not self.field.workers():
            return False
        if kind not in CHEAP:
            if progress <= self.seen:
                return False
            self.seen = progress
        return True

    def progress(self) -> int:
        """How many trainings have begun or ended."""
        return len(self.records("trial_started")) + self.outcomes()

    def has_ended(self) -> bool:
        """Whether the answer is there; a driver that failed is started again."""
        assert self.driver is not None
        status = self.driver.poll()
        if status:
            lines = self.log.read_text(errors="replace").strip().splitlines()
            own = [line for line in lines if line.startswith("rightrank:")]  # Ray's lines may come after it
            self.ends.append(f"exit status {status}: {(own or lines or [''])[-1]}")
            if len(self.ends) > STARTS:
                raise RuntimeError(f"the driver failed {STARTS} times: {self.ends}")
            self.field.keep_nodes()
            self.start()
        return status == 0

    def strike(self, kind: str) -> None:
        self.note_line()
        seconds = LONGEST ** self.field.random.random() if kind in LASTING else 0.0
        host = self.field.random.choice(self.field.with_workers)
        self.hits.append(Hit(kind, host.number, self.outcomes(), round(seconds, 1)))
        print(f"  {self.name} {kind} at {host.number} for {seconds:.1f} s after {self.outcomes()}", flush=True)
        thread = threading.Thread(target=FAULTS[kind], args=(self, host, seconds))
        thread.start()
        if kind in LASTING:
            self.lasting.append(thread)
        else:
            thread.join()

    def note_line(self) -> None:
        """The last notice since the fault before."""
        text = self.log.read_text(errors="replace")[self.read :] if self.log.exists() else ""
        self.read += len(text)
        told = [line for line in re.split(r"[\r\n]+", text) if TOLD.search(line)]
        if self.hits:
            self.hits[-1].line = told[-1].strip()[:300] if told else "nothing: no training noticed"


TOLD = re.compile(r"was lost|no message|can.t |no Ray|resuming|stopped|refused|left it|space")


def options_of(place: Field) -> list[str]:
    return ["--executor", place.executor, "--workers", str(place.workers_wanted)]


def kill_worker(run: Run, _host: Host, _seconds: float) -> None:
    if workers := run.field.workers():
        run.field.random.choice(workers).kill()


def pause_worker(run: Run, _host: Host, seconds: float) -> None:
    if workers := run.field.workers():
        worker = run.field.random.choice(workers)
        with suppress(psutil.Error):
            worker.suspend()
            run.over.wait(seconds)
            worker.resume()


def kill_node(run: Run, host: Host, _seconds: float) -> None:
    run.field.reboot(host, OFF_SECONDS)


def kill_head(run: Run, _host: Host, _seconds: float) -> None:
    for process in run.field.hosts[0].matching("gcs_server", "raylet", "ray start"):
        with suppress(psutil.Error):
            process.kill()
    time.sleep(OFF_SECONDS)


def partition(run: Run, host: Host, seconds: float) -> None:
    host.link.is_cut = True
    run.over.wait(seconds)
    host.link.is_cut = False


def slow_link(run: Run, host: Host, seconds: float) -> None:
    host.link.bytes_per_second, host.link.delay = 1e6 / 8, 0.3
    run.over.wait(seconds)
    host.link.delay = 0.0


def fill_disk(run: Run, host: Host, seconds: float) -> None:
    ballast = host.fill_disk()
    run.over.wait(seconds)
    ballast.unlink(missing_ok=True)


def shift_clock(run: Run, host: Host, _seconds: float) -> None:
    host.set_clock(run.field.random.choice([3600, -3600]) if not host.clock else 0)


LASTING = {  # kinds that end by themselves, after 1 to 60 s
    "worker stopped, continued",
    "partition, healed",
    "link of 1 Mbit and 300 ms",
    "disk full",
}
CHEAP = LASTING | {"clock off by an hour"}  # after them nothing starts anew
FAULTS: dict[str, Callable[[Run, Host, float], None]] = {
    "worker killed": kill_worker,
    "worker stopped, continued": pause_worker,
    "node killed": kill_node,
    "head killed, restarted": kill_head,
    "partition, healed": partition,
    "link of 1 Mbit and 300 ms": slow_link,
    "disk full": fill_disk,
    "clock off by an hour": shift_clock,
}


@dataclass(frozen=True)
class Found:
    """What a run came to, and the files of its adapters."""

    decision: dict[str, Any]
    values: dict[str, float]
    trials: Counter[str]  # outcomes of each
    adapter: str  # its checksum
    adapters: dict[str, str]  # trial → checksum of its adapter

    def against(self, right: Found) -> dict[str, Any]:
        stored = {trial: found for trial, found in right.adapters.items() if self.adapters.get(trial, found) != found}
        return {
            "right_decision": self.decision == right.decision and self.values == right.values,
            "right_adapters": self.adapter == right.adapter and not stored,
            "adapters_compared": len(set(self.adapters) & set(right.adapters)),
            "lost": len(set(right.trials) - set(self.trials)),
            "twice": sum(count - 1 for count in self.trials.values()),
        }


def found_in(folder: Path) -> Found:
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    ended = [line for line in lines if line["type"] in ("trial_finished", "trial_failed", "trial_diverged")]
    decision = json.loads((folder / "decision.json").read_text())
    return Found(
        {name: value for name, value in decision.items() if name not in ("next_run", "next_runs")},
        {line["trial_id"]: line["value"] for line in ended if line["type"] == "trial_finished"},
        Counter(line["trial_id"] for line in ended),
        checksum(folder / "adapter/adapter_model.safetensors"),
        {path.parent.name: checksum(path) for path in folder.glob("trials/*/adapter_model.safetensors")},
    )


def checksum(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() if path.exists() else "none"


def reference_of(place: Field) -> Found:
    """The selection in one process, without a fault; kept for the next time."""
    folder = place.folder / f"reference-{place.work.name}"
    if not folder.exists():
        log = place.folder / f"{folder.name}.log"
        if place.start(place.hosts[0], place.work.command("reference"), log.name).wait():
            raise RuntimeError(log.read_text()[-2000:])
        shutil.copytree(place.network.shared / "reference", folder)
    return found_in(folder)


def one_run(place: Field, name: str, kinds: Sequence[str], right: Found) -> tuple[dict[str, Any], list[str]]:
    """A run, what came of it against the one without a fault, and the kinds of fault for which it was too short."""
    run, begun, left = Run(place, name), time.monotonic(), list(kinds)
    try:
        left = run.go(kinds)
        found = found_in(run.folder).against(right)
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        shutil.copytree(run.folder, place.folder / f"{name}-run", dirs_exist_ok=True, ignore_dangling_symlinks=True)
        found = {"right_decision": False, "right_adapters": False, "lost": -1, "twice": -1, "error": str(error)}
    faults = [vars(hit) for hit in run.hits]
    seconds = round(time.monotonic() - begun, 1)
    row = {"model": place.work.name, "executor": place.executor, **found, "seconds": seconds, "ends": run.ends}
    return row | {"faults": faults}, left


def is_right(row: dict[str, Any]) -> bool:
    return bool(row["right_decision"] and row["right_adapters"]) and row["lost"] == row["twice"] == 0
