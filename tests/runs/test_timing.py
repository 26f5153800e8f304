"""Test the time estimate before the first training, and that the measured steps change no result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rightrank.api.selecting import select_rank
from rightrank.report.progress import format_time_estimate
from rightrank.runs import preflight as planned
from rightrank.runs.run import Selected
from rightrank.schema.events import Event
from rightrank.schema.trials import Arm, TrialFinished, TrialStarted
from rightrank.training.pace import Pace, measure_pace
from tests.commands import read_journal_records
from tests.helpers import make_runtime
from tests.tiny import build_small_settings
from tests.watch import Watch


class Log:
    """The calls that a hook receives, in order."""

    def __init__(self) -> None:
        self.entries: list[Any] = []
        self.hook = Watch(on_event=self._event, notice=self.entries.append)

    def _event(self, event: Event) -> None:
        if isinstance(event, TrialStarted):
            self.entries.append(event.rank)

    def position(self, text: str) -> int:
        return next(
            index for index, entry in enumerate(self.entries) if isinstance(entry, str) and entry.startswith(text)
        )


def read_outcomes(selected: Selected) -> list[dict[str, Any]]:
    """Return all fields of every finished trial except its times and its memory."""
    records = read_journal_records(selected.run, TrialFinished)
    changing = {"train_seconds", "eval_seconds", "peak_bytes", "ended_at"}
    return [record.model_dump(exclude=changing) for record in records]


@pytest.fixture
def measured_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "MIN_MEASURED_STEPS", 1)


def test_measured_steps_change_no_result(
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured_always: None,
) -> None:
    """Check with the cached prefix and with dropout that every loss, value and adapter is the same to the last bit."""
    settings = build_small_settings(layers_to_transform=(2,), lora_dropout=0.2, gradient_accumulation_steps=2)
    log = Log()
    with_time = select_rank(
        str(model_folder), completion_file, tmp_path / "with", settings=settings, callbacks=[log.hook]
    )
    assert " s, at most " in log.entries[log.position("cost: ")]
    assert log.position("cost: ") < log.entries.index(0) < log.entries.index(4)  # before the base and before rank 4
    assert log.position("Your 12 held-out rows can tell about ") > log.entries.index(
        4
    )  # the gain of the first training
    monkeypatch.setattr(planned, "_measure_top_pace", lambda *_, **__: None)
    without = select_rank(str(model_folder), completion_file, tmp_path / "without", settings=settings)
    assert read_outcomes(with_time) == read_outcomes(without)
    for entry in sorted((tmp_path / "with").rglob("adapter_model.safetensors")):
        twin = tmp_path / "without" / entry.relative_to(tmp_path / "with")
        assert entry.read_bytes() == twin.read_bytes()


def test_short_trainings_are_not_measured(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    log = Log()
    select_rank(
        str(model_folder), completion_file, tmp_path / "run", settings=build_small_settings(), callbacks=[log.hook]
    )
    assert not any(isinstance(entry, str) and " min" in entry and entry.startswith("cost") for entry in log.entries)


ARM = Arm(rank=4, learning_rate=1e-2, lora_alpha=32.0, seed=0, steps=8)


def test_cached_blocks_have_their_own_pace(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    settings = build_small_settings(layers_to_transform=(2,))
    runtime = make_runtime(model_folder, completion_file, settings, tmp_path)
    result = measure_pace(runtime, ARM)
    assert result.cache_seconds > 0
    again = measure_pace(runtime, ARM)
    assert again.cache_seconds == 0  # kept for the trainings


def test_a_pace_gives_the_time_of_a_selection() -> None:
    pace = Pace(8, [[0]], 100.0, 10.0, 0.5, 5.0)
    assert pace.predict_seconds(2.0, 4, 3) == 200.0 + 10 * (2 * (1 + 0.5 * 2) + 1 + 4) + 5.0


@pytest.mark.parametrize(
    ("hours", "message"),
    [
        (None, "about 20 min, at most 60 min"),
        (2.0, "about 20 min, at most 60 min"),
        (0.5, "about 20 min, at most 30 min"),
        (0.25, "about 15 min, at most 15 min, without the time budget about 20 min"),
    ],
)
def test_a_budget_of_time_bounds_the_time(hours: float | None, message: str) -> None:
    assert format_time_estimate(1200.0, 3600.0, hours) == message
