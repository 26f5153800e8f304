"""Describe the machine that a benchmark runs on; every benchmark prints it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path


def describe_machine() -> dict[str, str]:
    """Return cores, memory, system and versions, without names."""
    memory = next(
        (line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")), "0"
    )
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "memory_gib": f"{int(memory) / 2**20:.0f}",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def format_machine(facts: Mapping[str, str]) -> str:
    """Format the facts of `describe_machine` as one line of a page."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())
