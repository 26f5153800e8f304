"""Items on disk: what is held is sixteen bytes an item, however long their texts are."""

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
    """One example: the columns of its form, and an identity that is a hash of them."""

    item_id: str  # 16 hexadecimal digits
    content: Mapping[str, Any]  # of JSON values
    where: str


class ExampleStore(StoredSequence[Example]):
    """Items in the order in which they were added, in a file without a name that is gone with the process."""

    def __init__(self, folder: Path | None) -> None:
        """The file is in `folder`; None: where the system keeps temporary files."""
        self.ids = array("Q")
        self._begins = array("q")
        self._end = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed when this goes
        weakref.finalize(self, self._file.close)
        self._is_at_end = True

    def append(self, item: Example) -> None:
        line = json.dumps([item.where, dict(item.content)], default=str).encode() + b"\n"
        self.ids.append(int(item.item_id, 16))
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
