"""No test fails by load: what it waits for is an event, and the end of every wait is generous."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.watch import GENEROUS_SECONDS

TESTS = Path(__file__).parent
EXCEPTIONS = (
    TESTS / "watch.py",
    Path(__file__),
)  # the only file in which a test sleeps between two checks, and the examples here
LIMITS = {"timeout", "timeout_s", "timeout_seconds", "limit_seconds"}  # arguments that end something
WAITS = {"sleep", "wait", "join", "communicate", "get", "poll", "acquire"}  # calls whose first number is one of seconds
CLOCKS = {"monotonic", "perf_counter", "time", "process_time"}
IN_TEXT = re.compile(
    r"\bsleep\W{1,4}(\d+(?:\.\d+)?)|\btimeout\W{1,2}(\d+(?:\.\d+)?)\b(?! s)"
)  # programs that a test writes


def read_number(node: ast.AST) -> float | None:
    value = node.value if isinstance(node, ast.Constant) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def read_name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def reads_clock(node: ast.AST) -> bool:
    return any(isinstance(child, ast.Call) and read_name(child) in CLOCKS for child in ast.walk(node))


def find_seconds(tree: ast.AST) -> Iterator[tuple[int, float]]:
    """(line, seconds) of every wait, limit and comparison with a clock that is a number."""
    for node in ast.walk(tree):
        nodes: list[ast.AST] = []
        if isinstance(node, ast.Call):
            nodes += [keyword.value for keyword in node.keywords if keyword.arg in LIMITS]
            nodes += node.args[:1] if read_name(node) in WAITS and isinstance(node.func, ast.Attribute) else []
        elif isinstance(node, ast.Compare | ast.BinOp) and reads_clock(node):
            nodes += [*node.comparators, node.left] if isinstance(node, ast.Compare) else [node.left, node.right]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts = (quantity or fallback for quantity, fallback in IN_TEXT.findall(node.value))
            yield from ((node.lineno, float(text)) for text in texts)
        for each in nodes:
            number = read_number(each)
            if number is not None:
                yield each.lineno, number  # type: ignore[attr-defined]


def find_short_waits(text: str) -> list[tuple[int, float]]:
    return [(line, number) for line, number in find_seconds(ast.parse(text)) if 0 < number < GENEROUS_SECONDS]


def test_no_test_waits_for_a_small_number_of_seconds() -> None:
    waits = {
        f"{path.relative_to(TESTS)}:{line}: {number:g} s"
        for path in sorted(TESTS.rglob("*.py"))
        if path not in EXCEPTIONS
        for line, number in find_short_waits(path.read_text(encoding="utf-8"))
    }
    assert not waits, f"wait for an event (`tests.watch.wait_until`), or for GENEROUS_SECONDS: {sorted(waits)}"


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
    assert len(find_short_waits(line)) == 1


def test_an_event_and_a_generous_end_pass() -> None:
    lines = [
        "wait_until(lambda: file.exists(), 'it is there')",
        "event.wait(timeout=GENEROUS_SECONDS)",
        "time.sleep(600)",
    ]
    assert find_short_waits("\n".join([*lines, "', '.join(names)", "values.get('a')", "process.join()"])) == []
