"""Where this study's results go, with what they depend on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

RESULTS = Path(__file__).parent / "results"


def store(name: str, result: dict[str, Any]) -> None:
    """Write a result beside the machine, the versions and how busy the machine was."""
    import torch

    circumstances = machine() | {"threads": str(torch.get_num_threads()), "load": f"{os.getloadavg()[0]:.1f}"}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"circumstances": circumstances} | result, indent=1) + "\n")
    print(f"{circumstances}\nstored {path.name}")
