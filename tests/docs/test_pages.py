"""Check that links and paths in pages and comments exist, that shown commands parse, and that reference pages list what exists."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import get_args

import click
import yaml

from rightrank.cli import cli
from rightrank.schema.events import AnyJournalRecord
from rightrank.schema.results import Basis, Decision, Verdict
from rightrank.schema.settings import PEFT_OPTIONS, PlanSettings, SelectSettings
from tests.commands import COMMANDS
from tests.docs.pages import FRONT, GUIDES, PAGES, ROOT, iterate_shown_commands, list_shell_commands

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OF_OTHERS = re.findall(  # options of other programs that pages name
    r"\S+",
    "--max-lora-rank --head --address --ntasks --gpus --exact --branch --depth --out --base --outfile --outtype --lora --help --version "
    "--no-deps --grids --from --extra-index-url --external_plugins --callbacks --val_dataset --hf-path --dequantize --mlx-path",
)
PLACES = (ROOT, ROOT / "src" / "rightrank", ROOT / "tests", ROOT / "docs")
NAMED = re.compile(r"(?<![\w./:@-])((?:[\w-]+/)+[\w-]+\.(?:py|md|json|jsonl|toml|yml|yaml|html|ini))(?![\w/])")
FOLDER = re.compile(
    r"`((?:src|tests|benchmarks|docs|examples|data|decision|bases|training|search|report|runs|adapters|trainers|tables|exports|planning|atlas|cluster|api|cli|schema)/(?:[\w-]+/)*)`"
)
# Of other packages, of what a command writes, and of a reader's own files.
PATHS_OF_OTHERS = re.compile(
    r"^(vllm|transformers|peft|torch|aten|bitsandbytes|integrations|trl|autograd|backends|llama\.cpp|docs/features|run|my-run|data-model|study|exports|trials|path|adapter|tasks|"
    r"work|checkpoint|model|checkpoints|raw|files|tokenizer|OUT|RUN|released|merged|gguf|new|rightrank)/"
)


def find_missing_links(page: Path) -> list[str]:
    missing = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://", "mailto:")):
            target, _, anchor = link.partition("#")
            path = (page.parent / target).resolve() if target else page
            if not path.exists() or (anchor and path.suffix == ".md" and anchor not in list_anchors(path)):
                missing.append(f"{page}: {link}")
    return missing


def list_anchors(page: Path) -> set[str]:
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def find_missing_paths(path: Path) -> list[str]:
    """Find the paths that a page, or the comments and docstrings of code, name and that do not exist."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = "\n".join([*re.findall(r'"""(.*?)"""', text, re.DOTALL), *re.findall(r"#(.*)", text)])
    names = {name for name in [*NAMED.findall(text), *FOLDER.findall(text)] if not PATHS_OF_OTHERS.match(name)}
    if path.is_relative_to(ROOT / "benchmarks"):
        names = {name for name in names if not name.endswith(".json")}  # which it writes
    return [f"{path}: {name}" for name in names if not any((place / name).exists() for place in (*PLACES, path.parent))]


def test_every_link_and_path_exists() -> None:
    files = [ROOT / name for name in ("pyproject.toml", "Makefile", ".ci/run", ".importlinter")]
    code = [path for name in ("src", "tests", "benchmarks", "examples") for path in (ROOT / name).rglob("*.py")]
    missing = [link for page in PAGES for link in find_missing_links(page)]
    missing += [name for path in (*FRONT, *files, *code) for name in find_missing_paths(path)]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [line for page in PAGES for line in list_shell_commands(page) if line.startswith("make ")]
    missing += [line for line in targets if not re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE)]
    assert missing == []


def test_every_shown_command_option_and_setting_exists() -> None:
    """Parse each command with its options and values; nothing runs."""
    for page in PAGES:
        for name, *options in iterate_shown_commands(page):
            if not name.startswith("-"):
                with click.Context(cli) as parent, suppress(click.MissingParameter):  # a command that is only named
                    COMMANDS[name].make_context(name, options, parent=parent)
    parameters = [parameter for command in (cli, *COMMANDS.values()) for parameter in command.params]
    known = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)} | {
        *OF_OTHERS
    }
    settings = {*SelectSettings.model_fields, *PlanSettings.model_fields, *PEFT_OPTIONS, "name"}
    for page in (*FRONT, *GUIDES):
        text = page.read_text(encoding="utf-8").partition("<!-- made by")[0]
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) <= known, page
        assert set(re.findall(r"--set (\w+)=", text)) <= settings, page


def test_reference_pages_list_what_exists() -> None:
    commands, decision, formats = (
        (ROOT / "docs" / "reference" / f"{name}.md").read_text(encoding="utf-8")
        for name in ("commands", "decision", "file-formats")
    )
    assert {name for name in COMMANDS if not re.search(rf"^\| `{name}|, `{name}", commands, re.MULTILINE)} == set()
    fields = {name for name in Decision.model_fields if f"`{name}`" not in decision}
    values = {
        value for value in (*get_args(Basis), *get_args(Verdict)) if not re.search(rf"^\| `?{value}", decision, re.M)
    }
    assert fields | values == set()
    table = formats.split("| type | written when |")[1].split("\n\n")[0]
    types = {record.model_fields["type"].default for record in get_args(AnyJournalRecord)}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == types


def test_the_skill_has_the_front_matter_that_agents_load_and_five_commands() -> None:
    page = ROOT / "skills" / "lora-rank" / "SKILL.md"
    front_matter = yaml.safe_load(page.read_text(encoding="utf-8").split("---\n")[1])
    assert front_matter.keys() == {"name", "description"}
    assert front_matter["name"] == page.parent.name
    assert "Use " in front_matter["description"]
    commands = list_shell_commands(page)
    assert [command.split()[1] for command in commands] == ["expect", "select", "status", "resize", "compare"]
    assert all("--json" in command for command in commands)
