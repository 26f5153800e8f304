"""Read and write stored results and grids, plain or compressed by xz."""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def store_result(result: Mapping[str, Any], out: Path | None) -> None:
    """Write the result to `out` if it is given. Programs call this repeatedly, so that a stopped run keeps its results."""
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, decompressed if its name ends with `.xz`."""
    content = path.read_bytes()
    return lzma.decompress(content) if path.suffix == ".xz" else content


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, which may be compressed (`.json.xz`)."""
    return json.loads(read_bytes(path))
