"""Links resolve, shown commands parse, and what the reference pages list is what there is."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import get_args

import click
import pytest

from rightrank.cli import cli
from rightrank.schema.decision import Basis, Decision, Verdict
from rightrank.schema.events import Journaled
from rightrank.schema.plan_settings import PlanSettings
from rightrank.schema.settings import PEFT_OPTIONS, SelectSettings
from tests.commands import COMMANDS, of_every_plug_in
from tests.docs.pages import FRONT, GUIDES, PAGES, ROOT, name_of, shell_commands, shown_commands

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OF_OTHERS = {  # options of other programs that pages name
    *("--max-lora-rank", "--head", "--address", "--ntasks", "--gpus", "--exact", "--branch", "--depth", "--out"),
    *(
        "--base",
        "--outfile",
        "--outtype",
        "--lora",
        "--help",
        "--version",
        "--no-deps",
        "--grids",
        "--from",
        "--extra-index-url",
        "--external_plugins",
        "--callbacks",
        "--val_dataset",
        "--hf-path",
        "--mlx-path",
    ),
}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        place = (page.parent / target).resolve() if target else page
        assert place.exists(), f"{page.name}: {link}"
        if anchor and place.suffix == ".md":
            assert anchor in _anchors(place), f"{page.name}: {link}"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@of_every_plug_in
@pytest.mark.parametrize("page", [page for page in PAGES if list(shown_commands(page))], ids=name_of)
def test_shown_commands_parse(page: Path) -> None:
    """Each names a command, options and values that exist; nothing runs."""
    for arguments in shown_commands(page):
        name, *rest = arguments
        if name.startswith("-") or name == "chat-test":  # the plug-in that a page builds
            continue
        assert name in COMMANDS, arguments
        with click.Context(cli) as parent, suppress(click.MissingParameter):  # a command that is only named
            COMMANDS[name].make_context(name, rest, parent=parent)


@of_every_plug_in
@pytest.mark.parametrize("page", [*FRONT, *GUIDES], ids=name_of)
def test_options_and_settings_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8").partition("<!-- made by")[0]
    options = {
        option
        for command in (cli, *COMMANDS.values())
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) <= options | OF_OTHERS
    settings = {*SelectSettings.model_fields, *PlanSettings.model_fields, *PEFT_OPTIONS}
    assert set(re.findall(r"--set (\w+)=", text)) <= settings | {"name"}


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_a_page_can_be_read_in_one_sitting(page: Path) -> None:
    """Tables are looked up, not read."""
    lines = page.read_text(encoding="utf-8").partition("<!-- made by")[0].splitlines()
    assert sum(len(line.split()) for line in lines if not line.startswith("|")) < 1500


def test_the_glossary_fits_a_screen() -> None:
    assert len((ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()) <= 40


def test_make_targets_in_the_docs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for command in shell_commands(page):
            if command.startswith("make "):
                assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command


def test_every_command_is_described() -> None:
    text = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    assert {name for name in COMMANDS if not re.search(rf"^\| `{name}|, `{name}", text, re.MULTILINE)} == set()


def test_the_decision_is_described_whole() -> None:
    text = (ROOT / "docs" / "reference" / "decision.md").read_text(encoding="utf-8")
    fields = {name for name in Decision.model_fields if f"`{name}`" not in text}
    values = {value for value in (*get_args(Basis), *get_args(Verdict)) if not re.search(rf"^\| `?{value}", text, re.M)}
    assert fields | values == set()


def test_the_page_of_file_formats_names_every_record_of_a_journal() -> None:
    page = (ROOT / "docs" / "reference" / "file-formats.md").read_text(encoding="utf-8")
    table = page.split("| type | written when |")[1].split("\n\n")[0]
    types = {record.model_fields["type"].default for record in get_args(Journaled)}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == types
