"""Hosts out of namespaces on this machine, and the network between them.

A host has an address, a name, processes, `/tmp`, `/dev/shm` and a clock of its own. All share a disk at `/tmp/shared`, as of a file server
that no fault reaches; the rest of this machine's disk is there to be read only.
The hosts' network cards are TAP devices. Their frames pass through a `Switch` in this process, which delays, limits and drops
them: the kernel's `netem` is not needed. All of it needs root.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.watch import GENEROUS_SECONDS

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
MTU = 9000
POLL_SECONDS = 0.02  # between two checks whether a host is up
QUEUE_SECONDS = 4.0  # frames that would wait longer at a slow link are dropped
NETWORK = "10.77.0."
ROOT = Path(__file__).resolve().parents[2]  # of the code, which all hosts share
DISK_MIB = 256  # of a host's own disk, where HOME and TMPDIR are
CLOCK_SHIM = '''"""The host's clock: the machine's, and the seconds in /tmp/clock, which may change at any time."""
import mmap, struct, time
_file = open("/tmp/clock", "rb")
_offset, _real, _real_ns = mmap.mmap(_file.fileno(), 8, prot=mmap.PROT_READ), time.time, time.time_ns
time.time = lambda: _real() + struct.unpack("q", _offset[:8])[0]
time.time_ns = lambda: _real_ns() + struct.unpack("q", _offset[:8])[0] * 10**9
'''
SET_UP = """
set -e
mount --make-rprivate /
mount --bind {shared} /mnt
mount -t tmpfs -o size=1g shm /dev/shm
mount -t tmpfs -o size=1g tmp /tmp
mkdir -p /tmp/disk /tmp/shim /tmp/shared
mount --move /mnt /tmp/shared
mount -t tmpfs -o size={mib}m disk /tmp/disk
mkdir -p /tmp/disk/home /tmp/disk/tmp
hostname {name}
mount -o remount,bind,ro / || mount --bind / / && mount -o remount,bind,ro /
head -c 8 /dev/zero > /tmp/clock
touch /tmp/is-up
exec bash -c 'while :; do sleep 1000 & wait $!; done'
"""


@dataclass(slots=True)
class Link:
    """A host's cable: whether it carries anything, and how fast."""

    is_cut: bool = False
    delay: float = 0.0  # seconds, each way
    bytes_per_second: float = float("inf")
    free_at: float = 0.0  # on the monotonic clock, when the last frame is through


class Switch(threading.Thread):
    """Passes frames between TAP devices. Links may change at any time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.links: dict[int, Link] = {}  # device → its cable
        self._places: dict[bytes, int] = {}  # hardware address → device
        self._waiting: list[tuple[float, int, int, bytes]] = []  # when it arrives, a number, device, frame
        self._frames = 0
        self.is_closed = False

    def run(self) -> None:
        while not self.is_closed:
            now = time.monotonic()
            while self._waiting and self._waiting[0][0] <= now:
                _, _, device, frame = heapq.heappop(self._waiting)
                if not self.links[device].is_cut:
                    with suppress(OSError):  # the host's queue is full
                        os.write(device, frame)
            left = min(0.2, self._waiting[0][0] - now) if self._waiting else 0.2
            for device in select.select(list(self.links), [], [], max(0.0, left))[0]:
                self._take(device, os.read(device, MTU + 64))

    def _take(self, source: int, frame: bytes) -> None:
        """Learn where the sender is, and queue the frame for its receiver, or for all."""
        self._places[frame[6:12]] = source
        target = self._places.get(frame[:6])
        for device in self.links if target is None else [target]:
            if device != source and not self.links[source].is_cut:
                arrival = self._through(
                    self.links[device], self._through(self.links[source], time.monotonic(), frame), frame
                )
                if arrival < time.monotonic() + QUEUE_SECONDS:
                    self._frames += 1
                    heapq.heappush(self._waiting, (arrival, self._frames, device, frame))

    def _through(self, link: Link, now: float, frame: bytes) -> float:
        """When the frame is at the other end of the cable."""
        if link.delay == 0.0:
            return now
        if max(now, link.free_at) > now + QUEUE_SECONDS:
            return float("inf")
        link.free_at = max(now, link.free_at) + len(frame) / link.bytes_per_second
        return link.free_at + link.delay


@dataclass
class Host:
    """A place with an address of its own. `root` is its file system, seen from here."""

    number: int
    prefix: str
    switch: Switch
    shared: Path  # on this machine; `/tmp/shared` for its processes
    device: int = -1
    holder: subprocess.Popen[bytes] | None = None
    init: int = 0  # the process that the host's processes live and die with
    clock: int = 0  # seconds off
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{NETWORK}{self.number + 1}"

    @property
    def name(self) -> str:
        return f"{self.prefix}{self.number}"

    @property
    def root(self) -> Path:
        return Path(f"/proc/{self.init}/root")

    @property
    def disk(self) -> Path:
        """Its own disk, `/tmp/disk` for its processes."""
        return self.root / "tmp/disk"

    @property
    def link(self) -> Link:
        return self.switch.links[self.device]

    def plug_in(self) -> None:
        """Make the network namespace and its card."""
        run(f"ip netns add {self.name}")
        try:
            self.device = _tap_in(f"/run/netns/{self.name}")
            run(f"ip -n {self.name} link set lo up")
            run(f"ip -n {self.name} addr add {self.address}/24 dev eth0")
            run(f"ip -n {self.name} link set eth0 mtu {MTU} up")
        except BaseException:
            run(f"ip netns del {self.name}")
            raise
        self.switch.links[self.device] = Link()

    def boot(self) -> None:
        """Start the host with an empty disk."""
        script = SET_UP.format(mib=DISK_MIB, name=self.name, shared=shlex.quote(str(self.shared)))
        kinds = ["--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["ip", "netns", "exec", self.name, "unshare", *kinds, "bash", "-c", script]
        self.holder = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        until = time.monotonic() + GENEROUS_SECONDS
        while time.monotonic() < until and self.holder.poll() is None:
            children = psutil.Process(self.holder.pid).children()
            if children and Path(f"/proc/{children[0].pid}/root/tmp/is-up").exists():
                self.init = children[0].pid
                (self.root / "tmp/shim/sitecustomize.py").write_text(CLOCK_SHIM)
                self.set_clock(self.clock)
                return
            time.sleep(POLL_SECONDS)
        raise RuntimeError(f"host {self.name} did not start")

    def set_clock(self, seconds: int) -> None:
        """Put its clock off by so much; a booted host keeps that."""
        self.clock = seconds
        with (self.root / "tmp/clock").open("r+b") as file:
            file.write(struct.pack("q", seconds))

    def start(self, command: Sequence[str], output: Path | None = None, **more: str) -> subprocess.Popen[bytes]:
        """Start a process on this host. `output` is a file of this machine."""
        enter = ["nsenter", "-t", str(self.init), "-n", "-m", "-u", "-i", "-p", f"--wd={ROOT}"]
        with Path(os.devnull if output is None else output).open("ab") as out:
            process = subprocess.Popen(
                [*enter, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.environment(more),
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "VIRTUAL_ENV")}
        own = {"HOME": "/tmp/disk/home", "TMPDIR": "/tmp/disk/tmp", "HF_HOME": "/tmp/disk/home/hf"}
        code = {
            "PYTHONPATH": f"/tmp/shim:{ROOT / 'src'}:{ROOT}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        return kept | own | code | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | more

    def processes(self) -> Iterator[psutil.Process]:
        """All processes of this host."""
        mine = Path(f"/proc/{self.init}/ns/pid").readlink()
        for process in psutil.process_iter():
            with suppress(OSError):
                if Path(f"/proc/{process.pid}/ns/pid").readlink() == mine:
                    yield process

    def matching(self, *words: str) -> list[psutil.Process]:
        """Its processes with one of the words in their command line."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if process.pid != self.init and any(word in line for word in words):
                    found.append(process)
        return found

    def fill_disk(self) -> Path:
        """Leave no byte free; what is returned is to be deleted."""
        ballast = self.disk / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 2**16)
        return ballast

    def free_mib(self) -> float:
        return shutil.disk_usage(self.disk).free / 2**20

    def kill(self) -> None:
        """The power goes: no process says goodbye, and the disk is lost."""
        self.link.is_cut = True
        if self.init:
            with suppress(ProcessLookupError):
                os.kill(self.init, signal.SIGKILL)
        if self.holder is not None:
            self.holder.wait()
        for process in self.started:
            process.wait()
        self.started.clear()
        self.init = 0

    def unplug(self) -> None:
        self.switch.links.pop(self.device, None)
        os.close(self.device)
        run(f"ip netns del {self.name}")


class Network:
    """So many booted hosts at one switch, with a disk that they share; a context."""

    def __init__(self, hosts: int) -> None:
        self.switch = Switch()
        self.shared = Path(tempfile.mkdtemp(prefix="shared-"))
        prefix = f"rr{os.getpid() % 100000}h"
        self.hosts = [Host(number, prefix, self.switch, self.shared) for number in range(hosts)]

    def __enter__(self) -> Network:
        try:
            for host in self.hosts:
                host.plug_in()
                host.boot()
        except BaseException:
            self.__exit__()
            raise
        self.switch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            if host.device in self.switch.links:
                host.kill()
        self.switch.is_closed = True
        if self.switch.is_alive():
            self.switch.join()
        for host in self.hosts:
            if host.device in self.switch.links:
                host.unplug()
        shutil.rmtree(self.shared, ignore_errors=True)


def why_impossible() -> str | None:
    """Why there can be no hosts here, in one line; None if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts out of namespaces need Linux and root"
    missing = [name for name in ("ip", "unshare", "nsenter", "mount", "bash") if shutil.which(name) is None]
    if missing:
        return f"hosts out of namespaces need the programs {', '.join(missing)}"
    try:
        with Network(1):
            return None
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        return f"this system allows no namespaces: {error}"


def run(command: str) -> None:
    subprocess.run(shlex.split(command), check=True, capture_output=True)


def _tap_in(namespace: str) -> int:
    """A TAP device `eth0` of a network namespace; it exists as long as the descriptor."""
    found: list[int] = []

    def enter_and_open() -> None:  # a namespace belongs to a thread
        with suppress(OSError), Path(namespace).open("rb") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000) == 0:
                device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
                fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TAP | IFF_NO_PI))
                found.append(device)

    thread = threading.Thread(target=enter_and_open)
    thread.start()
    thread.join()
    if not found:
        raise RuntimeError("no network card for a namespace (/dev/net/tun)")
    return found[0]
