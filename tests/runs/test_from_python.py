"""Test selections that are called from Python: progress, Ctrl-C, objects in memory, strategies, and refusals that leave the folder unchanged."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rightrank import SelectSettings, select_rank
from rightrank.runs.folder import Journal
from rightrank.schema.errors import InputError, ModelError, RunFolderError, SettingsError
from rightrank.schema.events import Event, StepDone
from rightrank.schema.trials import TrialFinished, TrialStarted
from tests.tiny import build_small_settings
from tests.watch import Watch


@pytest.fixture
def default_interrupt() -> Iterator[None]:
    """Install Python's handler of Ctrl-C, which a process in the background lacks."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("default_interrupt")
def test_ctrl_c_ends_the_step_writes_a_checkpoint_and_the_same_call_resumes(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    steps: list[int] = []

    def interrupt(event: Event) -> None:
        if isinstance(event, StepDone):
            steps.append(event.step)
            if len(steps) == 3:
                signal.raise_signal(signal.SIGINT)

    settings = build_small_settings(max_steps=6, ranks=(1, 2), adapters_per_pass=1)
    arguments: Any = (str(model_folder), completion_file, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt, match="the same call resumes the run"):
        select_rank(*arguments, settings=settings, callbacks=[Watch(on_event=interrupt)])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert list((tmp_path / "run").rglob("*checkpoint*"))
    later: list[int] = []
    watching = Watch(on_event=lambda event: later.append(event.step) if isinstance(event, StepDone) else None)
    select_rank(*arguments, settings=settings, callbacks=[watching])
    assert later[0] == 4  # not step 1
    uninterrupted = select_rank(str(model_folder), completion_file, tmp_path / "whole", settings=settings)
    assert values(tmp_path / "run") == values(uninterrupted.run)


def values(run: Path) -> dict[int, float]:
    records = Journal(run / "journal.jsonl").read()
    assert any(isinstance(record, TrialStarted) for record in records)
    return {
        outcome.rank: outcome.value
        for outcome in records
        if isinstance(outcome, TrialFinished) and outcome.arm.is_direct
    }


def load_model(folder: Path, classes: int | None = None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if classes is None:
        return AutoModelForCausalLM.from_pretrained(folder), tokenizer
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes), tokenizer


def test_objects_in_memory_give_the_same_run_as_folders(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    from datasets import load_dataset

    settings = build_small_settings(max_steps=3, num_evaluations=1)
    model, tokenizer = load_model(model_folder)
    rows = load_dataset("json", data_files=str(completion_file), split="train", cache_dir=str(tmp_path / "cache"))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    mine = select_rank(model, rows, tmp_path / "mine", tokenizer=tokenizer, settings=settings)
    base_settings = build_small_settings(num_evaluations=1)  # without the keyword, 8 steps
    by_name = select_rank(str(model_folder), completion_file, tmp_path / "named", settings=base_settings, max_steps=3)
    assert [e.value for e in mine.decision.ranks] == [e.value for e in by_name.decision.ranks]
    assert all((model.state_dict()[name] == value).all() for name, value in weights.items())
    assert set(model.state_dict()) == set(weights)
    assert "objects in memory" in mine.report.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ("no tokenizer", ModelError, "it is in memory and has no tokenizer"),
        ("not a model", ModelError, "got dict; give a transformers model"),
        ("named", SettingsError, "a model that is given by name has its own"),
        ("wrong head", ModelError, "a head of 5 labels for data of 2 classes"),
    ],
)
def test_bad_objects_are_one_line(
    model_folder: Path,
    completion_file: Path,
    class_file: Path,
    tmp_path: Path,
    argument: str,
    error: type[Exception],
    message: str,
) -> None:
    model, tokenizer = load_model(model_folder, 5 if argument == "wrong head" else None)
    arguments: dict[str, Any] = {"model": model, "data": completion_file, "tokenizer": tokenizer}
    arguments |= {
        "no tokenizer": {"tokenizer": None},
        "not a model": {"model": {}},
        "named": {"model": str(model_folder)},
        "wrong head": {"data": class_file},
    }[argument]
    with pytest.raises(error, match=message):
        select_rank(out=tmp_path / "run", settings=build_small_settings(), **arguments)


def select_in(model: Path, data: Path, out: Path, settings: SelectSettings) -> None:
    select_rank(str(model), data, out, settings=settings)


@pytest.mark.trains
@pytest.mark.parametrize("metric", ["accuracy", "reward_margin"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_metric_that_the_data_cannot_have_leaves_the_folder_as_it_was(
    metric: str, exists: bool, model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    if exists:
        out.mkdir()
    with pytest.raises(InputError, match="give metric 'loss'"):
        select_in(model_folder, completion_file, out, build_small_settings(metric=metric))
    assert out.exists() == exists
    assert not exists or {path.name for path in out.iterdir()} <= {".lock"}


@pytest.mark.trains
def test_a_folder_with_other_files_is_refused_and_gets_none(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mine").write_text("mine")
    with pytest.raises(RunFolderError, match="holds files but no journal"):
        select_in(model_folder, completion_file, tmp_path, build_small_settings())
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["cache", "cache/mine"]
