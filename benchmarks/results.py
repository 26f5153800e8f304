"""A benchmark's result on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def store(result: Mapping[str, Any], out: Path | None) -> None:
    """Write it to `out`, where one was given; called along the way, a program that is stopped leaves what it has."""
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
