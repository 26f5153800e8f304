"""Run benchmarks/fuzz in a short form: every reader with some hundred damaged inputs, and every stored finding."""

from __future__ import annotations

import base64
import itertools
import json
import random
import zlib
from pathlib import Path

import pytest
from benchmarks.fuzz import run
from benchmarks.fuzz.guard import check_read
from benchmarks.fuzz.mutate import mutate
from benchmarks.fuzz.targets import TARGETS

from rightrank.schema.errors import ResultsError

INPUTS = {"model": 12, "journal": 25}  # these take a tenth of a second each
USUAL_INPUTS = 150
CASES = json.loads((Path(run.__file__).parent / "cases.json").read_text(encoding="utf-8"))

# warnings are of numbers that overflow, which are then refused
pytestmark = [pytest.mark.trains, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_inputs_are_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    generator = random.Random(1)
    for number in range(INPUTS.get(name, USUAL_INPUTS)):
        data, folder = mutate(seeds, generator), tmp_path / str(number)
        folder.mkdir()
        find = check_read(target.read, data, folder)
        assert find is None, f"{find}: {base64.b64encode(data[:3000]).decode()}"


@pytest.mark.parametrize("case", CASES, ids=[f"{case['target']} {case['found']}" for case in CASES])
def test_what_was_found_stays_mended(case: dict[str, str], tmp_path: Path) -> None:
    assert check_read(TARGETS[case["target"]].read, zlib.decompress(base64.b64decode(case["input"])), tmp_path) is None


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (lambda: [].append(1) or [][1], "traceback"),
        (lambda: sum(1 for _ in itertools.count()), "hang"),
        (lambda: bytearray(3 * 2**30), "memory"),
    ],
)
def test_the_guard_finds_what_it_is_for(
    read: object, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.fuzz.guard.SECONDS", 0.2)
    find = check_read(lambda _data, _folder: read(), b"", tmp_path)  # type: ignore[operator]
    assert find.kind == kind


def test_the_guard_lets_a_refusal_pass_and_no_endless_one(tmp_path: Path) -> None:
    def refuse(data: bytes, _folder: Path) -> None:
        raise ResultsError(data.decode())

    assert check_read(refuse, b"no", tmp_path) is None
    silent = check_read(refuse, b"", tmp_path)
    assert silent.kind == "complaint"


def test_the_stored_run_found_nothing_that_is_not_mended() -> None:
    stored = json.loads((Path(run.__file__).parent / "run.json").read_text(encoding="utf-8"))
    assert set(stored["targets"]) <= set(TARGETS)
    assert sum(target["reads"] for target in stored["targets"].values()) > 10_000
    assert run.replay(Path(run.__file__).parent / "run.json") == {}
