"""What every script of this study prints first, and where its results go."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def circumstances() -> dict[str, Any]:
    """The machine and the versions."""
    import numpy
    import peft
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {memory / 2**30:.0f} GiB",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "numpy": numpy.__version__,
        "threads": torch.get_num_threads(),
        "load": [round(value, 1) for value in os.getloadavg()],
    }


def store(name: str, result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"circumstances": circumstances()} | result, indent=1) + "\n")
    print(f"stored {path}")
