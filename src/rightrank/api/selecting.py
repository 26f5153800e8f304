"""Select a rank: `select_rank`, its preflight and its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

from rightrank.runs import plugins
from rightrank.runs.hook import Hook, Hooks
from rightrank.runs.returns import Selected
from rightrank.schema.configs import settings_of_configs
from rightrank.schema.errors import InterruptedRun
from rightrank.schema.keywords import SelectKeywords
from rightrank.schema.results import Preflight
from rightrank.schema.settings import Goal, ProfileName, SelectSettings, make_settings

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from rightrank.runs.calls import EvaluateFunction, TrainFunction
    from rightrank.runs.own_trainer import Judgements
    from rightrank.runs.prepare import Rows


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
    """Train a range of ranks on `data`, decide which is enough, and hand over its adapter.

    Args:
        model: a model folder, a GGUF file, a hub name, or a transformers model in memory. A model in memory is frozen
            and moved to the device; its weights stay as they are.
        data: a file, a folder, an in-memory `datasets` object, an iterable of mappings, or a mapping of splits.
        out: the run folder. A second call with the same arguments resumes an unfinished run.
        tokenizer: the tokenizer of a model in memory.
        settings: see `SelectSettings`; None for the defaults.
        callbacks: what watches the selection or takes part in it; see `rightrank.hooks.Hook`.
        progress: show the progress on stderr, or in the cell of a notebook.
        peft_config: the adapter that you train now. Its values override `settings`; the ranks replace `r`, and what a selection
            cannot honour is refused by its name.
        args: the training that you run now, of transformers or TRL (`SFTConfig`); as `peft_config`.
        keywords: the command's options by name, such as `ranks=(4, 16, 64), margin=0.01`; they override all others.

    Raises:
        InputError: model, data, settings or folder can't be used; nothing was started.
        RunError: the selection started and could not finish.
        InterruptedRun: `should_stop` of a callback returned True.
        KeyboardInterrupt: Ctrl-C; the step ended and checkpoints were written. The same call resumes.
    """
    from rightrank.data.files import report_disk_errors
    from rightrank.hooks.interrupts import Interrupts
    from rightrank.runs.folder import RunFolder
    from rightrank.runs.request import require_request, require_same_scalars

    settings = _overridden(settings, keywords, peft_config, args)
    require_request(model, data, settings)
    folder = RunFolder(Path(out))
    with folder.locked(), report_disk_errors(folder.path), ExitStack() as opened:
        hooks = Hooks([*_views(progress, opened), *plugins.hooks(), *callbacks])
        stop = opened.enter_context(Interrupts(hooks.notice))
        require_same_scalars(folder, settings)
        # These imports bring torch, so they follow the lock: a folder that can't be used is refused at once.
        from rightrank.runs.prepare import Request
        from rightrank.runs.run import select

        try:
            return select(Request(model, tokenizer, data, settings), folder, Hooks([hooks, stop]))
        except InterruptedRun as stopped:
            if not stop.requested:
                raise
            raise KeyboardInterrupt(f"{stopped}; the same call resumes the run") from None


def _views(progress: bool, opened: ExitStack) -> list[Hook]:
    """The view on stderr or in the notebook's cell, where that is asked for."""
    if not progress:
        return []
    from rich.console import Console

    from rightrank.hooks.terminal import make_view

    return [opened.enter_context(make_view(Console(stderr=True), quiet=False))]


def preflight(
    model: str | PreTrainedModel,
    data: str | Path | Rows | Mapping[str, Rows],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: SelectSettings | None = None,
    price_per_hour: float | None = None,
    **keywords: Unpack[SelectKeywords],
) -> Preflight:
    """Say what `select_rank` with the same arguments will do, cost and be able to show; nothing is trained or written.

    Args:
        model: as in `select_rank`, and so are `data`, `tokenizer`, `settings` and `keywords`.
        price_per_hour: of this device, for the price.

    Raises:
        InputError: model, data or settings can't be used.
    """
    from rightrank.runs.request import require_request

    settings = _overridden(settings, keywords)
    require_request(model, data, settings)  # before what brings torch
    from rightrank.hooks.outlook import preflight as prepare_only
    from rightrank.runs.prepare import Request

    return prepare_only(Request(model, tokenizer, data, settings), price_per_hour)


def _overridden(
    settings: SelectSettings | None,
    keywords: SelectKeywords,
    peft_config: LoraConfig | None = None,
    args: TrainingArguments | None = None,
) -> SelectSettings:
    given = {} if settings is None else settings.model_dump(include=settings.model_fields_set)
    return make_settings(given | settings_of_configs(peft_config, args) | dict(keywords))


def select_rank_with(
    train: TrainFunction,
    out: str | Path,
    *,
    profile: ProfileName | None = None,
    evaluate: EvaluateFunction | None = None,
    goal: Goal = "training-rank",
    ranks: Sequence[int] | int = (1, 4, 16, 64),
    learning_rates: Sequence[float] | float = (3e-4, 1e-3, 3e-3),
    seeds: Sequence[int] | int | None = None,
    lora_alpha: float = 32.0,
    steps: int = 0,
    metric: str | None = None,
    higher_is_better: bool | None = None,
    margin: float | None = None,
    strategy: str | None = None,
    with_base: bool = False,
    where: Literal["here", "threads", "process", "ray"] = "here",
    workers: int = 1,
    timeout_seconds: float | None = None,
    version: str = "",
    report_to: Sequence[str] = (),
    judgements: Judgements | None = None,
    judged_margin: float | None = None,
    progress: bool = False,
    callbacks: Sequence[Hook] = (),
) -> Selected:
    """Find the rank with your own training function: DPO, RL, diffusion, vision, any script.

    Args:
        train: called with a `TrialTask`; returns a mapping of held-out metrics or a `TrialResult`. With
            `item_scores` in it (the same examples in every trial) ranks are compared example by example, which
            resolves far smaller differences. `task.report(step, value, item_scores)` reports values along the way. All
            randomness must come from `task.seed`, so that ranks differ in nothing else.
        out: the run folder. A second call with the same arguments resumes; trials that failed run again.
        profile: "rl" for reinforcement learning: strategy "upward", metric "reward", seeds 0, 1 and 2, a margin of 0.02 where
            none is given; a training whose held-out value falls far below its own best has collapsed and has no result; the
            smallest rank is the answer where no difference between ranks can be shown.
        evaluate: called with a PEFT adapter folder and a `TrialTask`; returns the same as `train`. With it the adapter that
            `train` saved for the largest rank is truncated to every lower rank, and the smallest that loses nothing is
            handed over (the first question).
        goal: "adapter" stops there and needs `evaluate`; "training-rank" continues to the rank to train at.
        steps: passed to `train` in the task; 0 leaves the length to it.
        seeds: None for seed 0, or those of the profile.
        metric: the name of the metric that decides; None for "loss", or that of the profile.
        higher_is_better: None for that of a metric with a known name (`accuracy`, `f1`, `reward`, `loss`, `error`, …); any
            other metric needs it.
        margin: how much worse than the best is still enough; None for the metric's default, or that of the profile.
        strategy: None for "grid", or that of the profile.
        with_base: also call `train` with rank 0, to evaluate the base without training.
        where: "here"; "threads" of this process, for functions that wait for a service; or each call in a new process,
            on this machine ("process") or on a Ray cluster ("ray": the one that RAY_ADDRESS names, or one on this machine;
            `out` must be on a disk that its nodes share).
        workers: concurrent calls; above 1 only with "threads", "process" or "ray".
        timeout_seconds: end a training that takes longer; needs `where="process"`.
        version: change this when `train` changes, so that old trials are not reused.
        report_to: trackers that log every trial: trackio, wandb, mlflow, tensorboard.
        judgements: rows `prompt, rank_a, rank_b, outcome[, judge]` that decide in place of the metric: mappings, a file, or a function
            that is called once all trainings have ended, with the folder of each rank's best adapter, and returns the mappings.
        judged_margin: with judgements: how far below 1/2 a win rate may be; None for .05.
        progress: show the progress on stderr, or in the output of a notebook's cell.
        callbacks: what watches the selection or takes part in it; see `rightrank.hooks.Hook`.

    Raises:
        SettingsError: an argument that is not allowed, a metric without a known direction, or a function that
            can't be sent to a process.
        MissingExtraError: a tracker that is not installed.
        RunFolderError: a folder made with other settings.
        AllTrialsFailedError: fewer than two ranks ended with a result.
        InterruptedRun: `should_stop` of a callback returned True.
    """
    from rightrank.hooks.trackers import require_trackers
    from rightrank.runs import own_trainer as custom
    from rightrank.runs.folder import RunFolder

    chosen: dict[str, object] = {
        "goal": goal,
        "ranks": ranks,
        "learning_rates": learning_rates,
        "seeds": seeds,
        "lora_alpha": lora_alpha,
        "margin": margin,
        "strategy": strategy or None,
    }
    settings = custom.settings_of(chosen, profile)
    metric, higher = custom.metric_of(metric, higher_is_better, profile)
    request = custom.CustomRequest(
        settings=settings,
        steps=steps,
        metric=metric,
        higher_is_better=higher,
        with_base=with_base,
        version=version,
        report_to=require_trackers(report_to),
        profile=profile,
        judgements=judgements,
        judged_margin=judged_margin,
    )
    trainer = custom.make_trainer(train, goal, where, timeout_seconds, workers, evaluate)
    with ExitStack() as opened:
        hooks = Hooks([*_views(progress, opened), *plugins.hooks(), *callbacks])
        return custom.select_custom(request, trainer, RunFolder(Path(out)), hooks)
