"""Check the vocabulary, the layout and the length of pages and code: `python -m tests.lint` prints what to change."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TREES = ("src", "tests", "benchmarks", "examples")
MAX_README_WORDS, MAX_DOCS_WORDS, MAX_RECIPE_WORDS = 600, 17_000, 300
MAX_SHARES = {"vague names": 4, "functions named …_of": 4, "docstrings without a verb": 50}  # per 1,000
AUDIENCES = ["train now", "have trained", "serve", "do research", "do reinforcement learning"]
# Names that say nothing about the value they hold.
VAGUE = re.findall(
    r"\w+",
    "part place known whole given where further asked kept found one told said wanted taken made held left seen settled agreed "
    "alike apart together beside own before after other rest both much least most side way what",
)
# First words of a docstring that are not verbs.
OPENINGS = re.findall(
    r"\w+",
    "the a an what those that of whether how which where it its one all each every no none this these as in on for with by to "
    "from at is are there some any if only and or numbers names rows values ranks",
)
AVOIDED = re.compile(
    r"\b(octaves?|tally|go(es|ing)? on|dear(er|est)?|(left|lost) on the way|(is|are|was|were) told|for want of"
    r"|los(es?|ing) nothing|selection split|within a rank)\b",
    re.IGNORECASE,
)
# A test waits for an event (`tests.watch.wait_until`), or for GENEROUS_SECONDS.
SHORT_WAIT = re.compile(r"\b(?:sleep|wait|join)\((?:timeout=)?\d{1,2}(?:\.\d+)?\)|\btimeout(?:_s|_seconds)?=\d{1,2}\b")
TEST_FOLDERS = {"docs", "benchmarks", "safety"}  # without a folder in the package


def find_words() -> Iterator[str]:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("*.py")]:
        if path.name != "CHANGELOG.md":
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if match := AVOIDED.search(line):
                    yield f"{path.relative_to(ROOT)}:{number}: {match[0]!r} is not a term of docs/glossary.md"


def find_long_pages() -> Iterator[str]:
    words = {page: len(page.read_text(encoding="utf-8").split()) for page in (ROOT / "docs").rglob("*.md")}
    readme = len((ROOT / "README.md").read_text(encoding="utf-8").split())
    if readme > MAX_README_WORDS or sum(words.values()) > MAX_DOCS_WORDS:
        yield f"README.md has {readme} words and docs/ {sum(words.values())}: at most {MAX_README_WORDS} and {MAX_DOCS_WORDS}"
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    yield from (f"{page.name} is not in the navigation of mkdocs.yml" for page in words if page.name not in navigation)
    recipes = (ROOT / "docs" / "start.md").read_text(encoding="utf-8").split("\n## ")[1:]
    if [recipe.partition("\n")[0] for recipe in recipes] != [f"You {audience}" for audience in AUDIENCES]:
        yield f"docs/start.md has a recipe for each of those who {', '.join(AUDIENCES)}"
    if any(len(recipe.split()) >= MAX_RECIPE_WORDS or "```" not in recipe for recipe in recipes):
        yield f"a recipe in docs/start.md has a command and fewer than {MAX_RECIPE_WORDS} words"


def find_language(tree: str) -> Iterator[str]:
    """Find names and docstrings that are not standard English, if there are too many of them."""
    findings: dict[str, list[str]] = {name: [] for name in MAX_SHARES}
    bindings = functions = docstrings = 0
    for path, node in iterate_nodes(tree):
        if isinstance(node, ast.arg) or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)):
            bindings += 1
            if (name := node.arg if isinstance(node, ast.arg) else node.id) in VAGUE:
                findings["vague names"].append(f"{path}:{node.lineno}: {name}")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            functions += 1
            if re.search(r"^(?!test).*_of(_|$)|^(of|what)_", node.name.strip("_")):
                findings["functions named …_of"].append(f"{path}:{node.lineno}: {node.name}")
            docstring = ast.get_docstring(node) or ""
            docstrings += bool(docstring)
            if re.sub(r"\W*(\w*)(.|\n)*", r"\1", docstring).lower() in OPENINGS:
                findings["docstrings without a verb"].append(f"{path}:{node.lineno}: {docstring.splitlines()[0]}")
    for (kind, lines), total in zip(findings.items(), (bindings, functions, docstrings), strict=True):
        if 1000 * len(lines) > MAX_SHARES[kind] * total:
            yield from (f"{line}: {kind}" for line in lines)


def iterate_nodes(tree: str) -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted((ROOT / tree).rglob("*.py")):
        relative = path.relative_to(ROOT)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield relative, node


def find_layout() -> Iterator[str]:
    package = {path.name for path in (ROOT / "src" / "rightrank").iterdir()}
    for folder in (ROOT / "tests").iterdir():
        if folder.is_dir() and not folder.name.startswith("_") and folder.name not in package | TEST_FOLDERS:
            yield f"tests/{folder.name} has no folder in src/rightrank"
    for tree in TREES[1:]:
        for path, node in iterate_nodes(tree):
            module = node.module if isinstance(node, ast.ImportFrom) and node.module else ""
            if module.startswith("tests.") and (tree != "tests" or ".test_" in module):
                yield f"{path}: imports {module}"
            if module.startswith("benchmarks") and tree == "tests" and path.parts[1] != "benchmarks":
                yield f"{path}: imports {module}"
    for path in (ROOT / "tests").rglob("test_*.py"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if SHORT_WAIT.search(line):
                yield f"{path.relative_to(ROOT)}:{number}: a wait of few seconds fails on a busy machine"


def main() -> int:
    faults = [
        *find_words(),
        *find_long_pages(),
        *find_layout(),
        *(line for tree in TREES for line in find_language(tree)),
    ]
    print("\n".join(faults), end="\n" if faults else "")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
