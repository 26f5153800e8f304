"""Check that the pages, the code and its messages use the glossary's terms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import FRONT, GUIDES, ROOT, get_page_name

SOURCES = sorted((ROOT / "src" / "rightrank").rglob("*.py"))
AVOIDED = re.compile(
    r"\b(octaves?|tally|go(es|ing)? on|dear(er|est)?|(left|lost) on the way|(is|are|was|were) told|for want of"
    r"|los(es?|ing) nothing|selection split|within a rank)\b",
    re.IGNORECASE,
)


@pytest.mark.parametrize("path", [*FRONT, *GUIDES, *SOURCES], ids=get_page_name)
def test_terms_of_the_glossary_are_used(path: Path) -> None:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if AVOIDED.search(line)]
    assert lines == []
