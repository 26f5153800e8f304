"""Select a rank: `select_rank`, its preflight, and `select_rank_with` for a custom trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from rightrank.cluster import open_pool
from rightrank.runs.hook import Hook, Hooks
from rightrank.runs.values import Selected
from rightrank.schema.configs import read_configs
from rightrank.schema.errors import InterruptedRun
from rightrank.schema.events import Notice
from rightrank.schema.keywords import SelectKeywords
from rightrank.schema.metrics import Margin
from rightrank.schema.results import Preflight
from rightrank.schema.setting_table import get_explicit_values
from rightrank.schema.settings import Goal, SelectSettings

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from rightrank.runs.selection import Rows
    from rightrank.trainers.custom_trainer import EvaluateFunction, TrainFunction


def select_rank(
    model: str | PreTrainedModel,
    data: str | Path | Rows | Mapping[str, Rows],
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: SelectSettings | None = None,
    callbacks: Sequence[Hook] = (),
    progress: bool = False,
    peft_config: LoraConfig | None = None,
    args: TrainingArguments | None = None,
    **keywords: Unpack[SelectKeywords],
) -> Selected:
    """Train a range of ranks on `data`, decide which is enough, and export its adapter.

    Args:
        model: a model folder, a GGUF file, a hub name, or a transformers model in memory. A model in memory is frozen
            and moved to the device; its weights stay as they are.
        data: a file, a folder, an in-memory `datasets` object, an iterable of mappings, or a mapping of splits.
        out: the run folder. A second call with the same arguments resumes an unfinished run.
        tokenizer: the tokenizer of a model in memory.
        settings: see `SelectSettings`; None for the defaults.
        callbacks: hooks that watch the selection or take part in it; see `rightrank.runs.hook.Hook`.
        progress: show the progress on stderr.
        peft_config: the configuration of your current adapter. Its values override `settings`. The ranks replace `r`; values that
            a selection can't honour are refused by name.
        args: the arguments of your current training, of transformers or TRL (`SFTConfig`); used like `peft_config`.
        keywords: the command's options by name, such as `ranks=(4, 16, 64), margin=0.01`; they override all others.

    Raises:
        InputError: model, data, settings or folder can't be used; nothing was started.
        RunError: the selection started and could not finish.
        InterruptedRun: `should_stop` of a callback returned True.
        KeyboardInterrupt: Ctrl-C; the step ended and checkpoints were written. The same call resumes.
    """
    from rightrank.data.files import report_disk_errors
    from rightrank.runs.folder import RunFolder
    from rightrank.runs.process import SignalHandler
    from rightrank.runs.selection import SelectionRequest, validate_request
    from rightrank.runs.trackers import Trackers

    request = SelectionRequest(model, tokenizer, data, _merge_settings(settings, keywords, peft_config, args))
    validate_request(request)
    trackers, folder = Trackers(request.settings.report_to), RunFolder(Path(out))
    with folder.lock(), report_disk_errors(folder.path), ExitStack() as stack:
        views = _open_views(progress, stack)
        stop = stack.enter_context(SignalHandler(Hooks([*views, *callbacks]).send_notice))
        # These imports bring torch. They follow the lock, so that an unusable folder is refused at once.
        from rightrank.runs.preflight import PreflightHook
        from rightrank.runs.prepare import prepare_run
        from rightrank.runs.run import select
        from rightrank.runs.views import Report

        hooks = [*views, stop, PreflightHook(), trackers, Report(), *callbacks]
        open_workers = open_pool if request.settings.has_workers else None
        try:
            prepare = partial(prepare_run, request, open_workers=open_workers, announce=Hooks(hooks).send_notice)
            return select(prepare, folder, hooks)
        except InterruptedRun as interruption:
            if not stop.requested:
                raise
            raise KeyboardInterrupt(f"{interruption}; the same call resumes the run") from None


def _open_views(progress: bool, stack: ExitStack) -> list[Hook]:
    """Open the view on stderr if `progress` asks for it."""
    if not progress:
        return []
    from rightrank.runs.terminal_view import make_view

    return [stack.enter_context(make_view(quiet=False))]


def preflight(
    model: str | PreTrainedModel,
    data: str | Path | Rows | Mapping[str, Rows],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: SelectSettings | None = None,
    peft_config: LoraConfig | None = None,
    args: TrainingArguments | None = None,
    on_event: Callable[[Notice], None] = lambda _: None,
    **keywords: Unpack[SelectKeywords],
) -> Preflight:
    """Report what `select_rank` with the same arguments will do, cost and be able to show. Train and write nothing.

    Args:
        model: as in `select_rank`, like all other arguments.
        on_event: receives what is being done, before each step that takes long.

    Raises:
        InputError: model, data or settings can't be used.
    """
    from rightrank.runs.selection import SelectionRequest, validate_request
    from rightrank.runs.trackers import resolve_trackers

    request = SelectionRequest(model, tokenizer, data, _merge_settings(settings, keywords, peft_config, args))
    validate_request(request)  # before the imports that bring torch
    resolve_trackers(request.settings.report_to)
    from rightrank.runs.preflight import run_preflight
    from rightrank.runs.prepare import prepare_selection

    def announce(text: str) -> None:
        on_event(Notice(text=text))

    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="rightrank-") as folder:
        prepared = prepare_selection(request, Path(folder) / "cache", notes.append, announce=announce)
        estimate = run_preflight(prepared, announce)
    return estimate.model_copy(update={"notes": [*notes, *estimate.notes]})


def _merge_settings(
    settings: SelectSettings | None,
    keywords: SelectKeywords,
    peft_config: LoraConfig | None,
    args: TrainingArguments | None,
) -> SelectSettings:
    return SelectSettings(**get_explicit_values(settings) | read_configs(peft_config, args) | dict(keywords))


def select_rank_with(
    train: TrainFunction,
    out: str | Path,
    *,
    ranks: Sequence[int] | int = (0, 1, 4, 16, 64),
    learning_rates: Sequence[float] | float = (3e-4, 1e-3, 3e-3, 1e-2),
    seeds: Sequence[int] | int = (0,),
    metric: str = "loss",
    margin: Margin | None = None,
    evaluate: EvaluateFunction | None = None,
    goal: Goal = "training-rank",
    strategy: str = "grid",
    lora_alpha: float = 32.0,
    max_steps: int | None = None,
    workers: int = 1,
    callbacks: Sequence[Hook] = (),
    progress: bool = False,
) -> Selected:
    """Find the rank with your own training function: DPO, RL, diffusion, vision, any script.

    Args:
        train: called with a `TrialTask`; returns a mapping of held-out metrics or a `TrialResult`. It is also called for the base
            if 0 is among the ranks, as by default; if it raises an error for rank 0, the result says that the base was not measured.
            With `example_scores` in the result (the same examples in every trial) ranks are compared example by example, which
            resolves far smaller differences. `task.report(step, value, example_scores)` reports values during the training. All
            randomness must come from `task.seed`, so that trainings differ only in their rank.
        out: the run folder. A second call with the same arguments resumes; failed trials run again.
        seeds: the seeds of the trainings.
        metric: the name of the deciding metric, after `max:` or `min:` if its direction is not known from the name
            (`accuracy`, `reward`, `loss`, … are known).
        margin: the loss of quality that you accept: a share of the gain over rank 0 such as "2%", or a number in the metric's unit;
            None for 1% of the gain.
        evaluate: called with a PEFT adapter folder and a `TrialTask`; returns the same as `train`. With it, the adapter that
            `train` saved for the largest rank is truncated to every lower rank, and the smallest one within the margin is
            exported (the deployment rank).
        goal: "adapter" stops at the deployment rank and needs `evaluate`; "training-rank" continues to the training rank.
        lora_alpha: passed to `train` in the task, and recorded for the adapters.
        max_steps: passed to `train` in the task as `steps`; None lets the function choose the length.
        workers: the number of parallel calls, in threads of this process; more than 1 for functions that wait for a service.
        callbacks: hooks that watch the selection or take part in it, such as `rightrank.runs.trackers.Trackers`.
        progress: show the progress on stderr.

    Raises:
        InputError: an argument that is not allowed, a metric without a known direction, or a folder made with other settings.
        AllTrialsFailedError: fewer than two ranks have a result.
        InterruptedRun: `should_stop` of a callback returned True.
    """
    from rightrank.data.files import report_disk_errors
    from rightrank.runs.folder import RunFolder
    from rightrank.runs.run import select
    from rightrank.runs.views import Report
    from rightrank.trainers.custom_trainer import build_custom_request

    values = {"ranks": ranks, "learning_rates": learning_rates, "seeds": seeds, "margin": margin, "goal": goal}
    values |= {"strategy": strategy, "lora_alpha": lora_alpha, "max_steps": max_steps}
    request = build_custom_request(train, evaluate, metric, workers, values)
    folder = RunFolder(Path(out))
    with folder.lock(), report_disk_errors(folder.path), ExitStack() as stack:
        views = _open_views(progress, stack)
        return select(request.prepare, folder, [*views, Report(), *callbacks])
