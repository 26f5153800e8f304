"""The map in CONTRIBUTING.md has a line for every file."""

from __future__ import annotations

import re

from tests.docs.source_map import PAGE, SLOT, source_map

FILE = re.compile(r"^\| (`[^`]+`) \|", re.MULTILINE)


def test_the_map_has_every_file() -> None:
    found = SLOT.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    assert FILE.findall(found[0]) == FILE.findall(source_map()), "run `python -m tests.docs.source_map`"
