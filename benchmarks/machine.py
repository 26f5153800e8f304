"""What a benchmark's figures depend on: printed by every one of them."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path


def machine() -> dict[str, str]:
    """Cores, memory, system and versions; no names."""
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


def machine_text(facts: Mapping[str, str]) -> str:
    """The facts of `machine()` in one line of a page."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())
