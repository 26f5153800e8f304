"""Check that every path in a contributors' page or a comment exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.commands import mark_for_every_plug_in

ROOT = Path(__file__).parents[2]
PLACES = (ROOT, ROOT / "src" / "rightrank", ROOT / "tests", ROOT / "docs")
NAMED = re.compile(r"(?<![\w./:@-])((?:[\w-]+/)+[\w-]+\.(?:py|md|json|jsonl|toml|yml|yaml|html|ini))(?![\w/])")
FOLDER = re.compile(
    r"`((?:src|tests|benchmarks|docs|examples|data|decision|models|train|search|report|runs|adapters|interop|hooks|api|cli|plugins|schema)/(?:[\w-]+/)*)`"
)
# Of other packages, of what a command writes, and of a reader's own files.
OF_OTHERS = re.compile(
    r"^(vllm|transformers|peft|torch|aten|bitsandbytes|integrations|trl|autograd|backends|llama\.cpp|docs/features|run|my-run|study|exports|trials|path|adapter|tasks|"
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


@mark_for_every_plug_in
@pytest.mark.parametrize(("source", "text"), list_texts(), ids=lambda value: value[:60] if "\n" not in value else "")
def test_every_path_exists(source: str, text: str) -> None:
    source_folder = (ROOT / source).parent
    for name in [*NAMED.findall(text), *FOLDER.findall(text)]:
        if (
            OF_OTHERS.match(name)
            or name.startswith("rightrank/")
            or (source.startswith("benchmarks") and name.endswith(".json"))
        ):  # which it writes
            continue
        assert any((folder / name).exists() for folder in (*PLACES, source_folder)), f"{source}: {name}"
