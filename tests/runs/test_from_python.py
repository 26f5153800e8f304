"""Test selections that are called from Python: progress, Ctrl-C, objects in memory, strategies, and refusals that leave the folder unchanged."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rightrank import SelectSettings, preflight, select_rank
from rightrank.report.screen import MAX_LINES
from rightrank.report.terminal import format_plan
from rightrank.runs.journal import Journal
from rightrank.schema.errors import InputError, InterruptedRun, ModelError, RunFolderError, SettingsError
from rightrank.schema.events import Event, RunStarted, StepDone, TestEvaluated
from rightrank.schema.trials import TrialFinished, TrialStarted
from tests.commands import read_journal_records
from tests.tiny import build_small_settings, generate_sentences, write_jsonl
from tests.watch import Watch


def test_progress_and_a_result_on_one_screen(
    model_folder: Path, completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[str] = []
    selected = select_rank(
        str(model_folder),
        completion_file,
        tmp_path / "run",
        settings=build_small_settings(max_steps=2),
        callbacks=[Watch(notice=events.append)],
        progress=True,
    )
    captured = capsys.readouterr()
    assert "base model" in captured.err
    assert all(line in captured.err for line in events)  # both the user's observer and the view receive the lines
    assert captured.out == ""
    lines = str(selected).splitlines()
    assert len(lines) <= MAX_LINES
    assert lines[-1].startswith(f"details: {selected.report} and: rightrank status ")


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
        ("not a model", ModelError, "got a dict; give a transformers model"),
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


@pytest.mark.parametrize(
    ("config_values", "message"),
    [
        ({"task_type": "SEQ_CLS"}, "task_type: got 'SEQ_CLS', and this is 'CAUSAL_LM'"),
        ({"task_type": "FEATURE_EXTRACTION"}, "task_type: got 'FEATURE_EXTRACTION', and this is 'CAUSAL_LM'"),
        ({"base_model_name_or_path": "org/other"}, "base_model_name_or_path: got 'org/other', but the model is"),
    ],
)
@pytest.mark.parametrize("by", ["config", "settings", "keyword", "in memory"])
def test_lora_config_must_agree_with_the_run(
    model_folder: Path, completion_file: Path, tmp_path: Path, config_values: dict[str, Any], message: str, by: str
) -> None:
    from peft import LoraConfig

    model, tokenizer = load_model(model_folder) if by == "in memory" else (str(model_folder), None)
    keywords: dict[str, Any] = {"peft_config": LoraConfig(**config_values), "settings": build_small_settings()}
    if by in ("settings", "keyword"):
        keywords = {"settings": build_small_settings(**config_values)} if by == "settings" else config_values
    with pytest.raises(ModelError, match=message):
        select_rank(model, completion_file, tmp_path / "run", tokenizer=tokenizer, **keywords)


def test_lora_config_of_a_classifier(model_folder: Path, class_file: Path) -> None:
    config_values = {"task_type": "SEQ_CLS", "base_model_name_or_path": f"elsewhere/{model_folder.name}"}
    assert preflight(str(model_folder), class_file, settings=build_small_settings(**config_values)).metric == "loss"
    with pytest.raises(ModelError, match="task_type: got 'CAUSAL_LM', and this is 'SEQ_CLS'"):
        preflight(str(model_folder), class_file, settings=build_small_settings(task_type="CAUSAL_LM"))


def test_questions_and_answers_without_a_test_split(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"question": text, "answer": text.upper()} for text in generate_sentences(120)]
    data = write_jsonl(tmp_path / "data.jsonl", [*rows, rows[0]])
    settings = build_small_settings(max_steps=2, ranks=(1, 2), test_fraction=0.0, goal="adapter", max_eval_examples=4)
    selected = select_rank(str(model_folder), data, tmp_path / "run", settings=settings)
    assert selected.adapter.path.exists()
    records = Journal(tmp_path / "run" / "journal.jsonl").read()
    assert not [record for record in records if isinstance(record, TestEvaluated)]
    started = next(record for record in records if isinstance(record, RunStarted))
    line = format_plan(started, 2)
    assert line.startswith("121 rows; examples: ")
    assert "held-out rows not evaluated, beyond --max-eval-examples" in line
    assert "form: prompt_completion (from question → prompt, answer → completion)" in line


@pytest.mark.trains
def test_adapters_that_learned_nothing_end_in_no_gain(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    settings = build_small_settings(learning_rates=(1e-9,), max_steps=2, margin=0.005)
    decision = select_rank(str(model_folder), completion_file, tmp_path / "run", settings=settings).decision
    assert (decision.rank, decision.verdict) == (None, "no_gain")


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
def test_a_refused_selection_does_not_block_its_folder(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    """Use ranks that no matrix of the model supports; they are refused after the data has been encoded in the folder."""
    out = tmp_path / "run"
    with pytest.raises(InputError):
        select_in(model_folder, completion_file, out, build_small_settings(ranks=(1, 4096)))
    assert not out.exists()
    select_in(
        model_folder, completion_file, out, build_small_settings(max_steps=2, num_evaluations=1, max_eval_examples=8)
    )
    assert (out / "report.html").is_file()


@pytest.mark.trains
def test_a_folder_with_other_files_is_refused_and_gets_none(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mine").write_text("mine")
    with pytest.raises(RunFolderError, match="holds files but no journal"):
        select_in(model_folder, completion_file, tmp_path, build_small_settings())
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["cache", "cache/mine"]


STAGED = {"ranks": (1, 2, 4), "learning_rates": (3e-3, 1e-2, 3e-2), "num_evaluations": 4, "margin": 0.05}


@pytest.mark.parametrize("strategy", ["bracket"])
def test_a_strategy_trains_in_stages_and_resumes(
    model_folder: Path, completion_file: Path, tmp_path: Path, strategy: str
) -> None:
    settings = build_small_settings(strategy=strategy, **STAGED)
    notices: list[str] = []
    uninterrupted = select_rank(
        str(model_folder),
        completion_file,
        tmp_path / "whole",
        settings=settings,
        callbacks=[Watch(notice=notices.append)],
    )
    assert any(notice.startswith("cost: about ") for notice in notices)
    assert any(trial.stop_at for trial in read_journal_records(tmp_path / "whole", TrialFinished))
    assert any(trial.truncate_from for trial in read_journal_records(tmp_path / "whole", TrialFinished))
    assert (uninterrupted.adapter.path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "whole" / "checkpoints").exists()

    ended = 0

    def count(event: Event) -> None:
        nonlocal ended
        ended += isinstance(event, TrialFinished)

    watching = Watch(on_event=count, should_stop=lambda: ended >= 4)
    with pytest.raises(InterruptedRun):
        select_rank(str(model_folder), completion_file, tmp_path / "cut", settings=settings, callbacks=[watching])
    resumed = select_rank(str(model_folder), completion_file, tmp_path / "cut", settings=settings)
    assert resumed.decision == uninterrupted.decision
    values = [
        {trial.trial_id: trial.value for trial in read_journal_records(tmp_path / name, TrialFinished)}
        for name in ("whole", "cut")
    ]
    assert values[0] == values[1]


def test_a_budget_holds_on_real_trainings(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    settings = build_small_settings(strategy="bracket", budget_trainings=3.5, **STAGED)
    select_rank(str(model_folder), completion_file, tmp_path / "run", settings=settings)
    trials = read_journal_records(tmp_path / "run", TrialFinished)
    stages = {trial.trial_id: trial.stop_at or 0 for trial in trials}
    steps = sum((trial.stop_at or trial.steps) - stages.get(trial.continue_from or "", 0) for trial in trials)
    assert steps <= 3.5 * 8
