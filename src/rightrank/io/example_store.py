"""Examples on disk. Memory holds sixteen bytes per example, however long its text is."""

from __future__ import annotations

import json
import tempfile
import weakref
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rightrank.io.stored_sequence import StoredSequence


@dataclass(frozen=True, slots=True)
class Example:
    """One example: the columns of its form, and a hash of them as its identity."""

    item_id: str  # 16 hexadecimal digits
    content: Mapping[str, Any]  # of JSON values
    where: str  # file and row


class ExampleStore(StoredSequence[Example]):
    """Examples in the order in which they were added, in an unnamed temporary file."""

    def __init__(self, folder: Path | None) -> None:
        """Create the file in `folder`; None: in the system's folder for temporary files."""
        self.ids = array("Q")
        self._begins = array("q")
        self._end = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by the finalizer
        weakref.finalize(self, self._file.close)
        self._is_at_end = True

    def append(self, example: Example) -> None:
        line = json.dumps([example.where, dict(example.content)], default=str).encode() + b"\n"
        self.ids.append(int(example.item_id, 16))
        self._begins.append(self._end)
        if not self._is_at_end:
            self._file.seek(self._end)
            self._is_at_end = True
        self._file.write(line)
        self._end += len(line)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, number: int) -> Example:
        self._is_at_end = False
        self._file.seek(self._begins[number])
        where, content = json.loads(self._file.readline())
        return Example(f"{self.ids[number]:016x}", content, where)
