"""The language of the code: vague names, functions named `…_of` and docstrings without a verb are rare."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_VAGUE_NAMES = 4  # per 1,000 bindings
MAX_OF_NAMES = 4  # per 1,000 functions
MAX_VERBLESS_DOCSTRINGS = 50  # per 1,000 docstrings of functions

# Names that say nothing about the value they hold.
VAGUE = {
    "part", "place", "known", "whole", "given", "where", "further", "asked", "kept", "found", "one", "told", "said",
    "wanted", "taken", "made", "held", "left", "seen", "settled", "agreed", "alike", "apart", "together", "beside",
    "own", "before", "after", "other", "rest", "both", "much", "least", "most", "side", "way", "what",
}  # fmt: skip
# First words of a docstring that are not verbs.
OPENINGS = {
    "the", "a", "an", "what", "those", "that", "of", "whether", "how", "which", "where", "it", "its", "one", "all",
    "each", "every", "no", "none", "this", "these", "as", "in", "on", "for", "with", "by", "to", "from", "at", "is",
    "are", "there", "some", "any", "if", "only", "and", "or", "numbers", "names", "rows", "values", "ranks",
}  # fmt: skip


@dataclass(slots=True)
class Language:
    """The names and docstrings of a tree of Python files."""

    bindings: int = 0
    vague_names: list[str] = field(default_factory=list)
    functions: int = 0
    of_names: list[str] = field(default_factory=list)
    docstrings: int = 0
    verbless_docstrings: list[str] = field(default_factory=list)

    def add(self, node: ast.AST, path: str) -> None:
        """Count a node of a file's syntax tree."""
        if isinstance(node, ast.arg) or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)):
            name = node.arg if isinstance(node, ast.arg) else node.id
            self.bindings += 1
            if name in VAGUE:
                self.vague_names.append(f"{path}:{node.lineno} {name}")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            self.functions += 1
            stem = node.name.strip("_")
            if stem.startswith("test"):
                return
            if stem.endswith("_of") or stem.startswith(("of_", "what_")) or "_of_" in stem:
                self.of_names.append(f"{path}:{node.lineno} {node.name}")
            if docstring := ast.get_docstring(node):
                self.docstrings += 1
                opening = re.match(r"[^A-Za-z]*([A-Za-z]*)", docstring)
                if opening is not None and (not opening[1] or opening[1].lower() in OPENINGS):
                    self.verbless_docstrings.append(f"{path}:{node.lineno} {docstring.splitlines()[0]}")


def measure_language(tree: Path) -> Language:
    """Measure all Python files under a folder."""
    language = Language()
    for path in sorted(tree.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            language.add(node, str(path.relative_to(tree.parent)))
    return language


def test_the_measurement_counts_names_and_docstrings(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        'def loss_of(found):\n    """The loss."""\n    part = found\n    return part\n\n\n'
        'def compute_loss(rank):\n    """Compute the loss."""\n    return rank\n',
        encoding="utf-8",
    )
    language = measure_language(tmp_path)
    assert (language.bindings, language.functions, language.docstrings) == (3, 2, 2)
    assert [entry.split()[-1] for entry in language.vague_names] == ["found", "part"]
    assert [entry.split()[-1] for entry in language.of_names] == ["loss_of"]
    assert len(language.verbless_docstrings) == 1


@pytest.mark.parametrize("tree", ["src", "tests", "benchmarks", "examples"])
def test_code_is_written_in_standard_english(tree: str) -> None:
    language = measure_language(ROOT / tree)
    assert 1000 * len(language.vague_names) <= MAX_VAGUE_NAMES * language.bindings, language.vague_names
    assert 1000 * len(language.of_names) <= MAX_OF_NAMES * language.functions, language.of_names
    assert 1000 * len(language.verbless_docstrings) <= MAX_VERBLESS_DOCSTRINGS * language.docstrings, (
        language.verbless_docstrings
    )
