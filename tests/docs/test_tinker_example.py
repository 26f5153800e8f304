"""Run `examples/tinker_service.py` with the stand-in of `tests/docs/tinker_standin.py`, and test its refusals."""

from __future__ import annotations

import itertools
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.docs import tinker_standin

pytestmark = pytest.mark.trains
EXAMPLES = Path(__file__).parents[2] / "examples"
NUMBERS = itertools.count()


@pytest.fixture
def run(
    model_folder: Path, completion_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Path]:
    def example() -> Path:
        out = tmp_path / "run"
        arguments = ["--model", str(model_folder), "--data", str(completion_file), "--out", str(out)]
        monkeypatch.setitem(sys.modules, "tinker", tinker_standin)
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", ["tinker_service.py", *arguments, "--steps", "4", "--held-out", "10"])
        runpy.run_path(str(EXAMPLES / "tinker_service.py"), run_name="__main__")
        return out

    return example


def test_it_probes_trains_in_threads_and_writes_the_modules(
    run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = run()
    printed = capsys.readouterr().out
    assert printed.startswith("alpha 32 at every rank; at most 18 trainings: ")
    assert json.loads((out / "decision.json").read_text())["sentence"] in printed
    journal = list(map(json.loads, (out / "journal.jsonl").read_text().splitlines()))
    assert {len(line["points"]) for line in journal if line["type"] == "trial_finished"} == {4}
    assert len([line for line in journal if line["type"] == "trial_evaluated"]) >= 4 * 6
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    with safe_open(out / "adapter" / "adapter_model.safetensors", "pt") as file:
        modules = {name.split(".lora_")[0].split(".")[-1] for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert set(config["target_modules"]) == modules
    assert len(modules) == 7


@pytest.mark.parametrize(
    ("quirk", "value", "refusal"),
    [
        ("alpha", lambda rank: 2 * rank, "refused: alpha differs by rank ({1: 2, 16: 32})"),
        ("seed", lambda _: next(NUMBERS), "the service ignores seeds"),
        ("seed", lambda _: 7, "two seeds give the same matrices A"),
    ],
)
def test_it_refuses_a_service_whose_trainings_can_not_be_compared(
    run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quirk: str, value: object, refusal: str
) -> None:
    monkeypatch.setitem(tinker_standin.QUIRKS, quirk, value)
    monkeypatch.setitem(tinker_standin.QUIRKS, "archives", quirk == "alpha")  # both ways to download an adapter
    with pytest.raises(SystemExit) as ended:
        run()
    assert refusal in str(ended.value)
    assert not (tmp_path / "run").exists()
