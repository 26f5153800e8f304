"""Parse the pages: code blocks, commands and links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "docs").rglob("*.md"))
FRONT = [ROOT / f"{name}.md" for name in ("README", "SECURITY", "CONTRIBUTING", "AGENTS")]
# The changelog names what is gone, so its commands and options are not checked.
PAGES = [*FRONT, *GUIDES, *(page for name in ("benchmarks", "skills") for page in sorted((ROOT / name).rglob("*.md")))]
SHELL = ("sh", "bash", "console")
NOT_RUN = "<!-- not run:"  # in the line above a block, with the reason
_FENCE = re.compile(
    r"(?m:^|(?<=```))(?P<above>[^\n]*)\n+[ ]*```(?P<language>[\w-]*)\n(?P<text>.*?)\n[ ]*```", re.DOTALL
)
_INLINE = re.compile(r"`(rightrank [^`]+)`")


class Block(NamedTuple):
    language: str
    text: str
    runs: bool
    follows_block: bool  # without a line between them


def get_page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def iterate_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            match["language"],
            match["text"],
            runs=not match["above"].strip().startswith(NOT_RUN),
            follows_block=not match["above"].strip(),
        )
        for match in _FENCE.finditer(text)
    ]


def list_shell_commands(page: Path) -> list[str]:
    """Return every command of a shell block; the tests run these."""
    return [line for block in iterate_blocks(page) if block.language in SHELL for line in list_commands(block.text)]


def iterate_shown_commands(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of every complete `rightrank` command on the page, including those that are not run."""
    text = page.read_text(encoding="utf-8")
    indented = re.findall(r"(?m)^ {4,}(?:\$ )?(rightrank (?:\\\n|.)*)$", text)
    lines = [
        line
        for block in iterate_blocks(page)
        if block.language in ("text", *SHELL)
        for line in list_commands(block.text)
    ]
    for command in [*indented, *lines, *_INLINE.findall(text)]:
        if command.startswith("rightrank ") and not re.search(r"…|\[|\.\.\.|COMMAND|SHELL", command):
            yield shlex.split(command.replace("\\\n", " "))[1:]


def list_commands(text: str) -> list[str]:
    """Return the commands of a block, without comments and prompts."""
    lines = [line.strip().removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line and not line.startswith("#")]
