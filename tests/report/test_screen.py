"""Test the final screen of a selection: at most eighteen lines for every goal and outcome, with commands that can be pasted."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from rich.cells import cell_len

from rightrank import Selected
from rightrank.cli import cli
from rightrank.decision.run_answers import (
    build_criterion,
    build_trained_answer,
    decide_if_possible,
)
from rightrank.report.answer import MAX_LINES, Answers, build_answers, format_screen
from rightrank.runs.run import SelectedRank
from rightrank.schema.events import Records
from rightrank.schema.results import Decision
from rightrank.schema.settings import Goal
from tests.commands import COMMANDS
from tests.report.runs import make_adapter_without_gain, make_answered_run, make_run

Case = Callable[[], tuple[Records, Goal]]


def make_adapter_run() -> tuple[Records, Goal]:
    return make_answered_run(), "adapter"


def make_best_adapter_run() -> tuple[Records, Goal]:
    return make_answered_run(), "best-adapter"


def make_training_rank_run() -> tuple[Records, Goal]:
    return make_answered_run(direct=(4, 16)), "training-rank"


def make_edge_run() -> tuple[Records, Goal]:
    """Make a run whose best learning rate is the highest one tried."""
    records = make_answered_run()
    top = next(trial for trial in records.list_finished() if trial.rank == 64)
    records.outcomes += [
        top.model_copy(update={"trial_id": str(rate), "learning_rate": rate, "stop_at": 5}) for rate in (3e-4, 1e-3)
    ]
    return set_settings(records, learning_rates=[3e-4, 1e-3, 3e-3]), "adapter"


def make_no_gain_run() -> tuple[Records, Goal]:
    """Make a run whose base model is as good as its adapters."""
    records = make_answered_run(direct=(4, 16))
    (base,) = [trial for trial in records.list_finished() if trial.rank == 0]
    (top,) = [trial for trial in records.list_finished() if trial.rank == 64]
    copied = base.model_copy(update={name: getattr(top, name) for name in ("value", "metrics", "example_losses")})
    records.outcomes[records.outcomes.index(base)] = copied
    return records, "training-rank"


def make_undecided_run() -> tuple[Records, Goal]:
    """Make a run whose margin its examples cannot resolve."""
    return set_settings(make_run((512, 1024), (1e-3,)), margin=0.0001), "training-rank"


def make_run_beyond_its_budget() -> tuple[Records, Goal]:
    """Make a run whose budget ended before any truncation."""
    records = make_run((64,), (3e-3,))
    (trial,) = [trial for trial in records.list_finished() if trial.rank]
    (answered,) = make_answered_run().adapters
    answer = build_trained_answer(trial, build_criterion(records), outcomes=records.outcomes)
    exported = answered.handed_over.model_copy(update={"rank": 64, "method": "trained"})
    records.adapters.append(answered.model_copy(update={"answer": answer, "handed_over": exported}))
    return set_settings(records, budget_trainings=1.5), "adapter"


def make_custom_run() -> tuple[Records, Goal]:
    """Make a run of a custom trainer that saved no files."""
    records = make_run()
    settings = {name: value for name, value in records.started.settings.items() if name not in ("model", "data")}
    records.started = records.started.model_copy(
        update={"kind": "custom_trainer", "settings": settings | {"trainer": "train"}, "metric": "loss"}
    )
    return records, "training-rank"


def set_settings(records: Records, **changes: object) -> Records:
    records.started = records.started.model_copy(update={"settings": records.started.settings | changes})
    return records


CASES: list[Case] = [
    make_adapter_run,
    make_best_adapter_run,
    make_training_rank_run,
    make_edge_run,
    make_no_gain_run,
    make_adapter_without_gain,
    make_undecided_run,
    make_run_beyond_its_budget,
    make_custom_run,
]


def finish(case: Case, run: Path) -> tuple[Answers, Path, Path | None, Path]:
    """Return what the screen of a run shows: its answers, its folder, the adapter's folder and the report."""
    records, goal = case()
    decision: Decision | None = decide_if_possible(records) if goal == "training-rank" else None
    adapter = run / "adapter" if records.adapters else None
    return build_answers(records, decision, goal, str(run)), run, adapter, run / "report.html"


def list_screen_commands(screen: str) -> list[list[str]]:
    return [shlex.split(text)[1:] for text in re.findall(r"(?m)(?:: | {9})(rightrank .*)$", screen)]


def test_the_screen_has_at_most_eighteen_lines() -> None:
    """Count the lines of the terminal, in which a long line takes several."""
    for case in CASES:
        finished = finish(case, Path("data-model"))
        for width in [60, 80, 120]:
            screen = format_screen(*finished, width)
            assert sum(-(-cell_len(line) // width) for line in screen.splitlines()) <= MAX_LINES


def test_commands_and_paths_stay_whole_in_any_terminal() -> None:
    for case in CASES:
        for run in ["data-model", "my run's folder/it", "daten-größe", "数据-模型"]:
            finished = finish(case, Path(run))
            for width in [20, 40, 80]:
                adapter, screen = finished[2], format_screen(*finished, width)
                assert len(screen.splitlines()) <= MAX_LINES
                commands = list_screen_commands(screen)
                assert ["status", run] in commands
                for name, *arguments in commands:
                    with click.Context(cli) as parent:
                        COMMANDS[name].make_context(name, arguments, parent=parent)
                if adapter is not None:
                    assert f"adapter: {adapter}\n" in screen
                for loading in re.findall(r"(?m)^load: +(peft.*)$", screen):
                    assert [node.value for node in ast.walk(ast.parse(loading)) if isinstance(node, ast.Constant)] == [
                        str(adapter)
                    ]


@pytest.mark.parametrize(
    ("case", "texts"),
    [
        (make_adapter_run, ["Rank 8 keeps 98", "% of what rank 64 gained (at least 98", "%, 95% confidence). 90%: rank 4. It took 1 training.",
                            "per_device_train_batch_size=8, ", "next:    twice the steps:\n         rightrank select --out"]),
        (make_best_adapter_run, ["Rank 8 keeps ", "train:   r=64, lora_alpha=32, learning_rate=0.003, target_modules='all-linear'",
                                 "next:    serve it:\n         rightrank export data-model --to vllm"]),
        (make_training_rank_run, ["Training rank: 16 (over 99% likely). Rank 8 keeps ", "Rank 8 keeps ",
                                  "next:    more seeds:\n         rightrank select --out data-model --seeds 0,1"]),
        (make_edge_run, ["next:    another learning rate:\n         rightrank select --out data-model --learning-rates"]),
        (make_no_gain_run, ["No gain shown: rank 64 gained +0 over the base", "next:    another learning rate:"]),
        (make_adapter_without_gain, ["No gain shown: rank 64 gained +0 over the base (90% interval ", "Try learning rates beyond those tried, then more steps, then more data."]),
        (make_undecided_run, ["Undecided: no rank is "]),
        (make_run_beyond_its_budget, ["The adapter is the one trained at rank 64; no truncation was compared.",
                                  "next:    a larger budget:\n         rightrank select --out data-model --set budget_trainings=3"]),
        (make_custom_run, ["adapter: the trainer saved none", "next:    "]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_the_screen_has_the_answer_and_the_next_step(case: Case, texts: list[str]) -> None:
    screen = format_screen(*finish(case, Path("data-model")), 200)
    assert [text for text in texts if text not in screen] == []


@pytest.mark.parametrize("case", [make_adapter_run, make_best_adapter_run, make_training_rank_run])
def test_each_goal_shows_its_curve_and_its_adapter_in_eighty_columns(case: Case) -> None:
    lines = format_screen(*finish(case, Path("data-model")), 80).splitlines()
    assert sum("┤" in line for line in lines) == 2
    assert any(line.startswith("held-out loss, nats (lower is better); ● trained, ○ truncated") for line in lines)
    assert "load:    peft.AutoPeftModelForCausalLM.from_pretrained('data-model/adapter')" in lines
    assert "details: data-model/report.html and: rightrank status data-model" in lines
    assert lines[-1].startswith("         rightrank ")
    assert max(map(len, lines)) <= 80


def test_the_next_command_of_a_run_with_a_budget_raises_it() -> None:
    records, goal = make_edge_run()
    set_settings(records, budget_trainings=2.0, budget_hours=0.5)
    answers, *_ = finish(lambda: (records, goal), Path("data-model"))
    (command,) = [command for command in answers.next_commands if command is not None]
    assert command.endswith("--set budget_trainings=3 --time 1h")
    records, goal = make_adapter_run()
    set_settings(records, budget_hours=2.0)
    screen = format_screen(*finish(lambda: (records, goal), Path("data-model")), 200)
    assert "rightrank select --out data-model --goal best-adapter --time 4h" in screen


def test_a_result_prints_its_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    answers, run, adapter, report = finish(make_adapter_run, Path("data-model"))
    selected = Selected(run, SelectedRank(8, "", adapter), None, report, answers)
    assert str(selected) == format_screen(answers, run, adapter, report, 80)
