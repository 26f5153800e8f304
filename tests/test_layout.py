"""The tests mirror the source, and no test imports another."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "rightrank"
SOURCES = sorted(SOURCE.rglob("*.py"))
# Folders of tests without a folder in the package: pages and examples, benchmarks, and safety.
ELSEWHERE = {"docs", "benchmarks", "safety"}


def test_every_folder_of_tests_is_one_of_the_source() -> None:
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert folders - ELSEWHERE <= {path.name for path in SOURCE.iterdir()} | {"selection"}


def test_no_test_imports_another() -> None:
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tests"):
                assert not node.module.rsplit(".", 1)[-1].startswith("test_"), f"{path}: {node.module}"


def imported_by(path: Path) -> set[str]:
    """Return the packages that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_tests_and_benchmarks_do_not_import_each_other() -> None:
    """Allow `tests/benchmarks` to import the benchmarks, which it tests."""
    root = TESTS.parent
    benchmarks, examples = sorted((root / "benchmarks").rglob("*.py")), sorted((root / "examples").glob("*.py"))
    assert benchmarks
    assert [path for path in (*benchmarks, *examples) if "tests" in imported_by(path)] == []
    tests = [path for path in TESTS.rglob("*.py") if TESTS / "benchmarks" not in path.parents]
    assert [path for path in tests if "benchmarks" in imported_by(path)] == []


def test_what_is_sampled_is_there() -> None:
    from tests.conftest import SAMPLED

    root = Path(__file__).parent.parent
    assert all((root / name).exists() for name in SAMPLED)
    assert "make test-all" in (root / ".ci" / "run").read_text(encoding="utf-8")


def test_a_file_name_says_where_one_is() -> None:
    names = Counter(path.name for path in SOURCES if path.name != "__init__.py")
    assert {name for name, count in names.items() if count > 1} <= {"metrics.py", "terminal.py"}
