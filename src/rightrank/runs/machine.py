"""The machine, from its own files and the metadata of what is installed; torch is imported only where an accelerator is."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from rightrank.report.format import size, visible
from rightrank.schema.trials import Record, Whole
from rightrank.version import __version__


class DoctorExtra(Record):
    """An optional dependency."""

    extra: str
    needs: list[str]  # distributions
    installed: bool


class DoctorPlace(Record):
    """A folder that a selection writes to or reads models from."""

    purpose: str
    path: str
    writable: bool
    free_bytes: Whole | None  # None: the folder can't be reached


class Doctor(Record):
    """Versions, device, memory, disk, extras and writable places."""

    versions: dict[str, str | None]  # None: not installed
    system: str
    cores: Whole  # that this process may use
    device: str
    device_memory_bytes: Whole | None  # of the accelerator; None without one
    memory_bytes: Whole | None  # of the machine, or of the container's limit
    available_bytes: Whole | None
    extras: list[DoctorExtra]
    places: list[DoctorPlace]
    problems: list[str]  # each with what to do; empty: a selection can run here


NEEDED = ("torch", "transformers", "peft", "safetensors", "datasets", "tokenizers", "numpy", "scipy")
INNER_EXTRAS = ("bench", "docs", "dev")  # for people who work on rightrank itself
MIN_FREE_BYTES = 2 * 2**30
MIN_MEMORY_BYTES = 2 * 2**30
NVIDIA = Path("/proc/driver/nvidia/version")
MEMORY_FILE, CONTAINER_LIMIT = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")


def examine() -> Doctor:
    """Look at this machine; nothing is written that stays."""
    versions: dict[str, str | None] = {"rightrank": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in NEEDED}
    device, device_memory = _device()
    memory, available = _memory()
    places = list(_places())
    return Doctor(
        versions=versions,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        device=device,
        device_memory_bytes=device_memory,
        memory_bytes=memory,
        available_bytes=available,
        extras=list(_extras()),
        places=places,
        problems=list(_problems(versions, available, places)),
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device() -> tuple[str, int | None]:
    """The device that `--device auto` takes, and its memory."""
    has_accelerator = NVIDIA.exists() or sys.platform == "darwin" or shutil.which("nvidia-smi") is not None
    if not has_accelerator or _version("torch") is None:
        return "cpu", None
    import torch

    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        return f"cuda ({found.name}{f', {count} of them' if count > 1 else ''})", found.total_memory
    if torch.backends.mps.is_available():
        return "mps", None
    return "cpu (an NVIDIA driver is there, and this torch can't use it)" if NVIDIA.exists() else "cpu", None


def _memory() -> tuple[int | None, int | None]:
    """`(whole, available)` bytes."""
    try:
        lines = dict(line.split(":", 1) for line in MEMORY_FILE.read_text(encoding="ascii").splitlines())
    except OSError:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
        return pages, None
    whole, available = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    try:
        limit = CONTAINER_LIMIT.read_text(encoding="ascii").strip()
    except OSError:
        limit = "max"
    if limit.isdecimal() and int(limit) < whole:
        return int(limit), min(available, int(limit))
    return whole, available


def _extras() -> Iterator[DoctorExtra]:
    try:
        given = requires("rightrank") or []
    except PackageNotFoundError:
        return
    found: dict[str, list[str]] = {}
    for line in given:
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if name and extra and extra[1] not in INNER_EXTRAS:
            found.setdefault(extra[1], []).append(name[0])
    for extra_name, needs in found.items():
        yield DoctorExtra(extra=extra_name, needs=needs, installed=all(_version(one) is not None for one in needs))


def _places() -> Iterator[DoctorPlace]:
    hub = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    for purpose, path in (
        ("run folders (the present folder)", Path.cwd()),
        ("temporary files", Path(tempfile.gettempdir())),
        ("models of the hub", Path(hub)),
    ):
        there = next((one for one in (path, *path.parents) if one.exists()), path)
        try:
            free: int | None = shutil.disk_usage(there).free
        except OSError:
            free = None
        yield DoctorPlace(purpose=purpose, path=str(path), writable=_is_writable(there), free_bytes=free)


def _is_writable(folder: Path) -> bool:
    """Whether a file can be made there: permission bits alone do not tell on a read-only mount."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _problems(versions: dict[str, str | None], available: int | None, places: list[DoctorPlace]) -> Iterator[str]:
    for name, found in versions.items():
        if found is None:
            yield f"{name} is not installed: pip install {name}"
    if available is not None and available < MIN_MEMORY_BYTES:
        yield f"{available / 2**30:.1f} GiB of memory are available: a selection on a small model needs about 2 GiB"
    for place in places:
        if not place.writable:
            yield f"{place.path} ({place.purpose}) can't be written: give another place, or its permissions"
        elif place.free_bytes is not None and place.free_bytes < MIN_FREE_BYTES:
            yield f"{place.path} ({place.purpose}) has {place.free_bytes / 2**30:.1f} GiB free: a selection may need more"


def doctor_text(found: Doctor) -> str:
    """One screen of plain lines."""
    versions = [f"{name} {number or 'missing'}" for name, number in found.versions.items()]
    memory = "" if found.device_memory_bytes is None else f", {size(found.device_memory_bytes)}"
    known = "unknown" if found.memory_bytes is None else size(found.memory_bytes)
    free = "" if found.available_bytes is None else f", {size(found.available_bytes)} available"
    lines = [
        f"versions  {', '.join(versions[:5])}",
        f"          {', '.join(versions[5:])}",
        f"system    {found.system}, {found.cores} cores",
        f"device    {found.device}{memory}",
        f"memory    {known}{free}",
        "places",
    ]
    for place in found.places:
        room = "unreachable" if place.free_bytes is None else f"{size(place.free_bytes)} free"
        lines.append(
            f"  {place.purpose:34s}{'writable' if place.writable else 'NOT WRITABLE'}, {room}: {visible(place.path)}"
        )
    there = [one.extra for one in found.extras if one.installed]
    missing = [one.extra for one in found.extras if not one.installed]
    lines.append(f"extras    installed: {', '.join(there) or 'none'}")
    if missing:
        lines.append(f"          not installed: {', '.join(missing)} (pip install 'rightrank[NAME]')")
    lines += [f"problem   {visible(problem)}" for problem in found.problems]
    return "\n".join([*lines] if found.problems else [*lines, "no problem found"])
