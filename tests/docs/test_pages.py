"""Check that links and paths resolve, shown commands parse, reference pages list what exists, and the glossary's terms are used."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import get_args

import click
import pytest
import yaml

from rightrank.cli import cli
from rightrank.schema.decision import Basis, Decision, Verdict
from rightrank.schema.events import AnyJournalRecord
from rightrank.schema.plan_settings import PlanSettings
from rightrank.schema.settings import PEFT_OPTIONS, SelectSettings
from tests.commands import COMMANDS
from tests.docs.pages import FRONT, GUIDES, PAGES, ROOT, get_page_name, iterate_shown_commands, list_shell_commands

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
        "--dequantize",
        "--mlx-path",
    ),
}


@pytest.mark.parametrize("page", PAGES, ids=get_page_name)
def test_links_resolve(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name}: {link}"
        if anchor and path.suffix == ".md":
            assert anchor in _list_anchors(path), f"{page.name}: {link}"


def _list_anchors(page: Path) -> set[str]:
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if list(iterate_shown_commands(page))], ids=get_page_name)
def test_shown_commands_parse(page: Path) -> None:
    """Check that each names an existing command, options and values; nothing runs."""
    for arguments in iterate_shown_commands(page):
        name, *options = arguments
        if name.startswith("-"):
            continue
        assert name in COMMANDS, arguments
        with click.Context(cli) as parent, suppress(click.MissingParameter):  # a command that is only named
            COMMANDS[name].make_context(name, options, parent=parent)


@pytest.mark.parametrize("page", [*FRONT, *GUIDES], ids=get_page_name)
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


def test_make_targets_in_the_docs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for command in list_shell_commands(page):
            if command.startswith("make "):
                assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command


def test_pages_stay_short() -> None:
    words = {page: len(page.read_text(encoding="utf-8").split()) for page in (ROOT / "README.md", *GUIDES)}
    assert words[ROOT / "README.md"] <= 600
    assert sum(words[page] for page in GUIDES) <= 25_000


def test_there_is_a_short_recipe_for_each_of_five_audiences() -> None:
    recipes = (ROOT / "docs" / "start.md").read_text(encoding="utf-8").split("\n## ")[1:]
    titles = [recipe.partition("\n")[0] for recipe in recipes]
    audiences = ["train now", "have trained", "serve", "do research", "do reinforcement learning"]
    assert titles == [f"You {audience}" for audience in audiences]
    assert all(len(recipe.split()) < 300 for recipe in recipes)
    assert all("```" in recipe for recipe in recipes)


def test_every_command_is_described() -> None:
    text = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    assert {name for name in COMMANDS if not re.search(rf"^\| `{name}|, `{name}", text, re.MULTILINE)} == set()


def test_the_skill_has_the_front_matter_that_agents_load_and_five_commands() -> None:
    page = ROOT / "skills" / "lora-rank" / "SKILL.md"
    front_matter = yaml.safe_load(page.read_text(encoding="utf-8").split("---\n")[1])
    assert front_matter.keys() == {"name", "description"}
    assert front_matter["name"] == page.parent.name
    assert "Use " in front_matter["description"]
    commands = list_shell_commands(page)
    assert [command.split()[1] for command in commands] == ["expect", "select", "status", "resize", "compare"]
    assert all("--json" in command for command in commands)


def test_the_decision_is_described_whole() -> None:
    text = (ROOT / "docs" / "reference" / "decision.md").read_text(encoding="utf-8")
    fields = {name for name in Decision.model_fields if f"`{name}`" not in text}
    values = {value for value in (*get_args(Basis), *get_args(Verdict)) if not re.search(rf"^\| `?{value}", text, re.M)}
    assert fields | values == set()


def test_the_page_of_file_formats_names_every_record_of_a_journal() -> None:
    page = (ROOT / "docs" / "reference" / "file-formats.md").read_text(encoding="utf-8")
    table = page.split("| type | written when |")[1].split("\n\n")[0]
    types = {record.model_fields["type"].default for record in get_args(AnyJournalRecord)}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == types


PLACES = (ROOT, ROOT / "src" / "rightrank", ROOT / "tests", ROOT / "docs")
NAMED = re.compile(r"(?<![\w./:@-])((?:[\w-]+/)+[\w-]+\.(?:py|md|json|jsonl|toml|yml|yaml|html|ini))(?![\w/])")
FOLDER = re.compile(
    r"`((?:src|tests|benchmarks|docs|examples|data|decision|bases|training|search|report|runs|adapters|trainers|tables|exports|planning|atlas|cluster|api|cli|schema)/(?:[\w-]+/)*)`"
)
# Of other packages, of what a command writes, and of a reader's own files.
PATHS_OF_OTHERS = re.compile(
    r"^(vllm|transformers|peft|torch|aten|bitsandbytes|integrations|trl|autograd|backends|llama\.cpp|docs/features|run|my-run|data-model|study|exports|trials|path|adapter|tasks|"
    r"work|checkpoint|model|checkpoints|raw|files|tokenizer|OUT|RUN|released|merged|gguf|new)/"
)


def list_texts() -> list[tuple[str, str]]:
    """Return each page for contributors, and each comment and docstring of the code, with its file."""
    pages = [
        ROOT / name
        for name in (
            "CONTRIBUTING.md",
            "AGENTS.md",
            "README.md",
            "pyproject.toml",
            "Makefile",
            ".ci/run",
            ".importlinter",
        )
    ]
    code = [path for folder in ("src", "tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    texts = [(str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")) for page in pages if page.exists()]
    for path in code:
        text = path.read_text(encoding="utf-8")
        comments = [*re.findall(r'"""(.*?)"""', text, re.DOTALL), *re.findall(r"#(.*)", text)]
        texts.append((str(path.relative_to(ROOT)), "\n".join(comments)))
    return texts


@pytest.mark.parametrize(("source", "text"), list_texts(), ids=lambda value: value[:60] if "\n" not in value else "")
def test_every_path_exists(source: str, text: str) -> None:
    source_folder = (ROOT / source).parent
    for name in [*NAMED.findall(text), *FOLDER.findall(text)]:
        if (
            PATHS_OF_OTHERS.match(name)
            or name.startswith("rightrank/")
            or (source.startswith("benchmarks") and name.endswith(".json"))
        ):  # which it writes
            continue
        assert any((folder / name).exists() for folder in (*PLACES, source_folder)), f"{source}: {name}"


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
