"""Run benchmarks/fuzz in a short form: every reader with some hundred damaged inputs, and every stored finding."""

from __future__ import annotations

import base64
import json
import random
import zlib
from pathlib import Path

import pytest
from benchmarks.fuzz import run
from benchmarks.fuzz.guard import check_read
from benchmarks.fuzz.mutate import mutate
from benchmarks.fuzz.targets import TARGETS

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


def test_what_was_found_stays_mended(tmp_path: Path) -> None:
    for number, case in enumerate(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        data = zlib.decompress(base64.b64decode(case["input"]))
        assert check_read(TARGETS[case["target"]].read, data, folder) is None, (case["target"], case["found"])
