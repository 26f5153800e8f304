"""Select a rank: `select_rank`, its preflight and its plan."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from rightrank.runs import plugins
from rightrank.runs.hook import Hook, Hooks
from rightrank.runs.values import Selected
from rightrank.schema.configs import settings_of_configs
from rightrank.schema.errors import InterruptedRun
from rightrank.schema.keywords import SelectKeywords
from rightrank.schema.results import Preflight
from rightrank.schema.setting_table import given_values
from rightrank.schema.settings import SelectSettings

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from rightrank.runs.calls import EvaluateFunction, TrainFunction
    from rightrank.runs.own_trainer import TrainerSettings
    from rightrank.runs.values import Rows


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
        progress: show the progress on stderr.
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
    from rightrank.hooks.process import Interrupts
    from rightrank.hooks.trackers import Trackers
    from rightrank.runs.folder import RunFolder
    from rightrank.runs.values import Request, check

    request = Request(model, tokenizer, data, _overridden(settings, keywords, peft_config, args))
    check(request)
    trackers, folder = Trackers(request.settings.report_to, Path(out)), RunFolder(Path(out))
    with folder.locked(), report_disk_errors(folder.path), ExitStack() as opened:
        views = _views(progress, opened)
        stop = opened.enter_context(Interrupts(Hooks([*views, *callbacks]).notice))
        # These imports bring torch, so they follow the lock: a folder that can't be used is refused at once.
        from rightrank.hooks.preflight import Outlook
        from rightrank.hooks.report import Report
        from rightrank.runs.prepare import Preparation
        from rightrank.runs.run import select

        added = plugins.listed(lambda plugin: plugin.hooks())
        hooks = [*views, stop, Outlook(), trackers, Report(), *added, *callbacks]
        try:
            return select(Preparation(request), folder, hooks)
        except InterruptedRun as stopped:
            if not stop.requested:
                raise
            raise KeyboardInterrupt(f"{stopped}; the same call resumes the run") from None


def _views(progress: bool, opened: ExitStack) -> list[Hook]:
    """The view on stderr, where that is asked for."""
    if not progress:
        return []
    from rightrank.hooks.terminal import make_view

    return [opened.enter_context(make_view(quiet=False))]


def preflight(
    model: str | PreTrainedModel,
    data: str | Path | Rows | Mapping[str, Rows],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: SelectSettings | None = None,
    peft_config: LoraConfig | None = None,
    args: TrainingArguments | None = None,
    **keywords: Unpack[SelectKeywords],
) -> Preflight:
    """Say what `select_rank` with the same arguments will do, cost and be able to show; nothing is trained or written.

    Args:
        model: as in `select_rank`, and so are all other arguments.

    Raises:
        InputError: model, data or settings can't be used.
    """
    from rightrank.hooks.trackers import require_trackers
    from rightrank.runs.values import Request, check

    request = Request(model, tokenizer, data, _overridden(settings, keywords, peft_config, args))
    check(request)  # before what brings torch
    require_trackers(request.settings.report_to)
    from rightrank.hooks.preflight import outlook_of
    from rightrank.runs.prepare import prepare

    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="rightrank-") as folder:
        outlook = outlook_of(prepare(request, Path(folder) / "cache", notes.append))
    return outlook.model_copy(update={"notes": [*notes, *outlook.notes]})


def _overridden(
    settings: SelectSettings | None,
    keywords: SelectKeywords,
    peft_config: LoraConfig | None,
    args: TrainingArguments | None,
) -> SelectSettings:
    return SelectSettings(**given_values(settings) | settings_of_configs(peft_config, args) | dict(keywords))


def select_rank_with(
    train: TrainFunction,
    out: str | Path,
    *,
    ranks: Sequence[int] | int = (0, 1, 4, 16, 64),
    learning_rates: Sequence[float] | float = (3e-4, 1e-3, 3e-3),
    seeds: Sequence[int] | int | None = None,
    metric: str | None = None,
    margin: float | None = None,
    evaluate: EvaluateFunction | None = None,
    callbacks: Sequence[Hook] = (),
    **settings: Unpack[TrainerSettings],
) -> Selected:
    """Find the rank with your own training function: DPO, RL, diffusion, vision, any script.

    Args:
        train: called with a `TrialTask`, also for the base where 0 is among the ranks, as by default; returns a mapping of held-out
            metrics or a `TrialResult`. Where it raises for rank 0, the answer says that the base was not measured. With `item_scores` in it (the same examples in every trial) ranks are compared example by
            example, which resolves far smaller differences. `task.report(step, value, item_scores)` reports values along the way. All
            randomness must come from `task.seed`, so that ranks differ in nothing else.
        out: the run folder. A second call with the same arguments resumes; trials that failed run again.
        seeds: None for seed 0, or those of the profile.
        metric: the name of the metric that decides, after `max:` or `min:` where its direction is not known from it (`accuracy`,
            `reward`, `loss`, … are); None for "loss", or that of the profile.
        margin: how much worse than the best is still enough; None for the metric's default, or that of the profile.
        evaluate: called with a PEFT adapter folder and a `TrialTask`; returns the same as `train`. With it the adapter that
            `train` saved for the largest rank is truncated to every lower rank, and the smallest within the margin is
            handed over (the first question).
        callbacks: what watches the selection or takes part in it, such as `rightrank.hooks.trackers.Trackers`.
        settings: see `TrainerSettings`: goal, profile, strategy, lora_alpha, max_steps, workers, progress.

    Raises:
        InputError: an argument that is not allowed, a metric without a known direction, or a folder made with other settings.
        AllTrialsFailedError: fewer than two ranks ended with a result.
        InterruptedRun: `should_stop` of a callback returned True.
    """
    from rightrank.data.files import report_disk_errors
    from rightrank.hooks.report import Report
    from rightrank.runs.folder import RunFolder
    from rightrank.runs.own_trainer import own_request
    from rightrank.runs.run import select

    compared = {"ranks": ranks, "learning_rates": learning_rates, "seeds": seeds}
    request = own_request(train, evaluate, metric, compared | {"margin": margin}, settings)
    folder = RunFolder(Path(out))
    with folder.locked(), report_disk_errors(folder.path), ExitStack() as opened:
        views = _views(settings.get("progress", False), opened)
        added = plugins.listed(lambda plugin: plugin.hooks())
        return select(request, folder, [*views, Report(), *added, *callbacks])
