"""Stored results and grids on disk, plain or compressed by xz."""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def store(result: Mapping[str, Any], out: Path | None) -> None:
    """Write it to `out`, where one was given; called along the way, a program that is stopped leaves what it has."""
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, decompressed where its name ends with `.xz`."""
    content = path.read_bytes()
    return lzma.decompress(content) if path.suffix == ".xz" else content


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, which may be compressed (`.json.xz`)."""
    return json.loads(read_bytes(path))
