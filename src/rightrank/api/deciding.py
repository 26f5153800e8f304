"""Plan before any training, and decide on trainings that have finished."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from rightrank.runs.returns import Decided
from rightrank.schema.keywords import PlanKeywords
from rightrank.schema.plan_settings import PlanSettings, make_plan_settings
from rightrank.schema.results import Plan

if TYPE_CHECKING:
    from rightrank.plugins.judge.judging import JudgedRun


def plan(model: str, *, settings: PlanSettings | None = None, **keywords: Unpack[PlanKeywords]) -> Plan:
    """Predict parameters, memory and time of every rank, without weights and before any training.

    Args:
        model: a folder that holds at least `config.json`, a GGUF file, or a hub name.
        settings: see `PlanSettings`; None for the defaults. Without `memory_bytes` the budget is the memory of the
            CUDA device, if there is one.
        keywords: the command's options by name, such as `ranks=(8, 16), memory_bytes="24GiB"`; they override `settings`.

    Raises:
        InputError: the model, its modules, a rank or a length can't be used.
    """
    from rightrank.models.base_models import require_model

    given = {} if settings is None else settings.model_dump(include=settings.model_fields_set)
    settings = make_plan_settings(given | keywords)
    require_model(model)  # before what brings torch
    from rightrank.models.base_models import device_memory
    from rightrank.plugins.plan.planner import make_plan

    if settings.memory_bytes is None and settings.device == "cuda":
        settings = settings.model_copy(update={"memory_bytes": device_memory()})
    return make_plan(model, settings)


def decide(
    results: str | Path | Sequence[str | Path] | Iterable[Mapping[str, Any]],
    *,
    metric: str | None = None,
    higher_is_better: bool | None = None,
    margin: float | None = None,
    columns: Mapping[str, str] | None = None,
    horizon_steps: int | None = None,
) -> Decided:
    """Decide on trainings that have finished, whoever ran them.

    Args:
        results: a CSV or JSONL file, a run folder, another tool's results (see docs/how-to/decide.md), or mappings in memory
            with `rank`, `value` and, if there are any, `lr`, `seed`, `std`, `item`; or several run folders of one model
            and data, which are joined.
        metric: the column of the held-out number, or its name where the column is `value`.
        higher_is_better: None for that of a metric with a known name; any other needs it.
        margin: how much worse than the best is still enough, in the metric's unit; None for the metric's default.
        columns: canonical name → column, where a column has an unusual name.
        horizon_steps: the length of training to answer for.

    Raises:
        ResultsError: the table can't be used; the message names file and row.
    """
    from rightrank.api.tables import Question, decide_results

    return decide_results(results, Question(metric, higher_is_better, margin, columns or {}, horizon_steps))


def judge(
    run: str | Path,
    *,
    prompts: int = 50,
    ranks: Sequence[int] | None = None,
    command: str | None = None,
    collect: Sequence[str | Path] = (),
    judge_name: str | None = None,
    margin: float | None = None,
    seed: int = 0,
    timeout_seconds: float = 3600.0,
    notice: Callable[[str], None] = lambda _: None,
) -> JudgedRun:
    """Make blind pairs of the answers of a run's ranks, and decide on what people or a program chose.

    Args:
        run: a run folder whose data has `prompt` and `completion`.
        prompts: test prompts that every rank answers, when the pairs are made.
        ranks: to judge against the reference; None for all.
        command: a program that reads the pairs and prints `{"id": …, "outcome": "a"}`, `"b"` or `"tie"`, a line each.
        collect: files that the page saved.
        judge_name: in place of the name that the page saved, or of `command`.
        margin: how far below 1/2 a win rate may be; None for .05.
        seed: of the order of the pairs.
        timeout_seconds: for the program.
        notice: receives each line for a person.

    Raises:
        InputError: a run without two adapters or prompts, or choices that can't be used.
        RunError: the program failed.
    """
    from rightrank.plugins.judge.judging import JudgeRequest, judge_run

    files = [Path(file) for file in collect]
    request = JudgeRequest(Path(run), prompts, ranks, command, files, judge_name, margin, seed, timeout_seconds, notice)
    return judge_run(request)
