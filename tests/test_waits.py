"""No test fails by load: what it waits for is an event, and the end of every wait is generous."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.watch import GENEROUS_SECONDS

TESTS = Path(__file__).parent
APART = (TESTS / "watch.py", Path(__file__))  # the one place where a test sleeps between two looks, and these examples
LIMITS = {"timeout", "timeout_s", "timeout_seconds", "limit_seconds"}  # arguments that end something
WAITS = {"sleep", "wait", "join", "communicate", "get", "poll", "acquire"}  # calls whose first number is one of seconds
CLOCKS = {"monotonic", "perf_counter", "time", "process_time"}
IN_TEXT = re.compile(
    r"\bsleep\W{1,4}(\d+(?:\.\d+)?)|\btimeout\W{1,2}(\d+(?:\.\d+)?)\b(?! s)"
)  # programs that a test writes


def _number(node: ast.AST) -> float | None:
    found = node.value if isinstance(node, ast.Constant) else None
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _asks_the_time(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Call) and _name(part) in CLOCKS for part in ast.walk(node))


def _seconds(tree: ast.AST) -> Iterator[tuple[int, float]]:
    """(line, seconds) of every wait, limit and comparison with a clock that is a number."""
    for node in ast.walk(tree):
        found: list[ast.AST] = []
        if isinstance(node, ast.Call):
            found += [given.value for given in node.keywords if given.arg in LIMITS]
            found += node.args[:1] if _name(node) in WAITS and isinstance(node.func, ast.Attribute) else []
        elif isinstance(node, ast.Compare | ast.BinOp) and _asks_the_time(node):
            found += [*node.comparators, node.left] if isinstance(node, ast.Compare) else [node.left, node.right]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts = (one or other for one, other in IN_TEXT.findall(node.value))
            yield from ((node.lineno, float(text)) for text in texts)
        for each in found:
            number = _number(each)
            if number is not None:
                yield each.lineno, number  # type: ignore[attr-defined]


def short_waits(text: str) -> list[tuple[int, float]]:
    return [(line, number) for line, number in _seconds(ast.parse(text)) if 0 < number < GENEROUS_SECONDS]


def test_no_test_waits_for_a_small_number_of_seconds() -> None:
    found = {
        f"{path.relative_to(TESTS)}:{line}: {number:g} s"
        for path in sorted(TESTS.rglob("*.py"))
        if path not in APART
        for line, number in short_waits(path.read_text(encoding="utf-8"))
    }
    assert not found, f"wait for an event (`tests.watch.wait_until`), or for GENEROUS_SECONDS: {sorted(found)}"


@pytest.mark.parametrize(
    "line",
    [
        "time.sleep(0.3)",
        "process.communicate(timeout=60)",
        "select(train, timeout_seconds=12)",
        "event.wait(5)",
        "assert time.monotonic() - begun < 30",
        "end = time.perf_counter() + 120",
        "code = 'import time; time.sleep(3)'",
        "command = 'sleep 3; touch late'",
    ],
)
def test_a_small_number_of_seconds_is_found(line: str) -> None:
    assert len(short_waits(line)) == 1


def test_an_event_and_a_generous_end_pass() -> None:
    lines = [
        "wait_until(lambda: file.exists(), 'it is there')",
        "event.wait(timeout=GENEROUS_SECONDS)",
        "time.sleep(600)",
    ]
    assert short_waits("\n".join([*lines, "', '.join(names)", "values.get('a')", "process.join()"])) == []
