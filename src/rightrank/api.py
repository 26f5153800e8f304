"""The Python API: records in, records out, nothing printed. The command line is a thin layer over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from rightrank.errors import ResultsError, SettingsError
from rightrank.io.files import report_disk_errors
from rightrank.io.run_folder import RunFolder
from rightrank.records import Decision, RunEvent, RunStarted, Sample, SweepRow, TrialOutcome
from rightrank.records.plan import Plan, SelectionCost
from rightrank.records.probe import Inspection, Resized
from rightrank.settings import PlanSettings, SelectKeywords, SelectSettings, make_plan_settings, make_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rightrank.preparation import Bases, Prepared, Request, Rows
    from rightrank.probe.resizing import ResizeOptions
    from rightrank.selection import Selection, Terms
    from rightrank.strategies import Strategy
    from rightrank.trackers import Trackers


@dataclass(frozen=True, slots=True)
class Watching:
    """Who looks on while a selection runs: what is planned, every event, what is worth a notice, and whether to stop."""

    on_event: Callable[[RunEvent], None] = lambda _: None
    on_plan: Callable[[RunStarted, int, int], None] = lambda _started, _arms, _steps: None
    on_resume: Callable[[Sequence[TrialOutcome]], None] = lambda _: None  # what ended before this process began
    notice: Callable[[str], None] = lambda _: None
    should_stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class Selected:
    """What a selection leaves: the decision, where the run is, where the adapter is."""

    decision: Decision
    run: Path
    adapter: Path | None  # None: a trainer of one's own that saved none
    report: Path
    samples: list[Sample] = field(default_factory=list)
    sweep: list[SweepRow] = field(default_factory=list)
    trainings: int = 0  # trials of ranks above 0, stages of one counted each

    def _repr_html_(self) -> str:
        return _decision_html(self.decision)


def select_rank(
    model: str | PreTrainedModel,
    data: str | Path | Rows | Mapping[str, Rows],
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: SelectSettings | None = None,
    watching: Watching | None = None,
    **keywords: Unpack[SelectKeywords],
) -> Selected:
    """Train a range of ranks on `data`, decide which is enough, and hand over its adapter.

    Args:
        model: a model folder, a GGUF file, a hub name, or a transformers model in memory (frozen and moved to the
            device; its weights stay as they are).
        data: a file, a folder, an in-memory `datasets` object, or an iterable of mappings, or a mapping of splits.
        out: the run folder. Called again with the same arguments, an unfinished run is resumed.
        tokenizer: of a model in memory.
        settings: see `SelectSettings`; None for the defaults.
        watching: callbacks.
        keywords: the command's options by name, such as `ranks=(4, 16, 64), margin=0.01`; they go before `settings`.

    Raises:
        InputError: model, data, settings or folder can't be used; nothing was started.
        RunError: it began and could not finish.
        InterruptedRun: `watching.should_stop` said so.
    """
    given = settings.model_dump(include=settings.model_fields_set) if settings is not None else {}
    settings = make_settings(given | keywords)
    folder = RunFolder(Path(out))
    with folder.locked(), report_disk_errors(folder.path):
        from rightrank.preparation import Request  # brings torch: a folder that can't be used is told before

        request = Request(model, tokenizer, data, settings)
        return _select(request, folder, watching or Watching())


def plan(model: str, *, settings: PlanSettings | None = None) -> Plan:
    """What every rank takes and which fit, before any training and without weights.

    Args:
        model: a folder that holds at least `config.json`, a GGUF file, or a hub name.
        settings: see `PlanSettings`; None for the defaults. Without `memory_bytes`, the memory of the CUDA device that
            is there is the budget, if one is.

    Raises:
        InputError: the model, its modules, a rank or a length can't be used.
    """
    from rightrank.io.models import device_memory
    from rightrank.planning.planner import make_plan

    settings = settings or make_plan_settings({})
    if settings.memory_bytes is None and settings.device == "cuda":
        settings = settings.model_copy(update={"memory_bytes": device_memory()})
    return make_plan(model, settings)


@dataclass(frozen=True, slots=True)
class Begun:
    """A selection that is ready to run: data and base loaded, the journal opened."""

    request: Request
    prepared: Prepared
    selection: Selection
    estimate: SelectionCost | None  # None: nothing was measured on this device before
    trackers: Trackers


def _select(request: Request, folder: RunFolder, watching: Watching) -> Selected:
    return run_begun(begin(request, folder, watching), watching)


def run_begun(begun: Begun, watching: Watching) -> Selected:
    """Train what the strategy asks for, decide, and hand over."""
    # Heavy imports: only who runs a selection pays for them.
    from rightrank.engine.arm_training import Watcher
    from rightrank.placing import executor_of

    watcher = Watcher(on_step=watching.on_event, on_prepare=watching.on_event, should_stop=watching.should_stop)
    with executor_of(begun.request, begun.prepared, begun.selection, watcher, watching.notice) as executor:
        decision = begun.selection.run(executor)
    return finish(begun, decision, watching)


def begin(request: Request, folder: RunFolder, watching: Watching, bases: Bases | None = None) -> Begun:
    """Load, plan and open the journal; say what it will cost. `bases` holds what other selections loaded."""
    from rightrank.engine.scoring import end_metrics
    from rightrank.io.store import run_store
    from rightrank.placing import require_placeable
    from rightrank.preparation import estimate, prepare, resuming
    from rightrank.report.plan_table import selection_lines
    from rightrank.selection import Terms
    from rightrank.strategies import make_strategy
    from rightrank.trackers import require_trackers

    make_strategy(request.settings, request.settings.max_steps or 1)  # a wrong name is told before anything is loaded
    require_placeable(request)
    require_trackers(request.settings.report_to)
    request = resuming(request, folder.journal.read(watching.notice))
    prepared = prepare(request, folder.cache, watching.notice, bases)
    if request.settings.store:
        folder.store = run_store(request.settings.store, prepared.started.fingerprint)
    strategy = make_strategy(prepared.settings, prepared.steps, token_loss=prepared.is_token_loss)
    cost = estimate(prepared, strategy)
    terms = Terms(peak_of=prepared.planned.peak_of) if prepared.planned else Terms()
    report_to = request.settings.report_to
    selection, trackers = opened(folder, prepared.started, prepared.steps, strategy, terms, report_to, watching)
    for line in selection_lines(cost) if cost else [cost_line(strategy, prepared.steps)]:
        watching.notice(line)
    if end_metrics(prepared.settings):
        watching.notice(answers_line(prepared.settings, prepared.started))
    return Begun(request, prepared, selection, cost, trackers)


def opened(
    folder: RunFolder,
    started: RunStarted,
    steps: int,
    strategy: Strategy,
    terms: Terms,
    report_to: Sequence[str],
    watching: Watching,
) -> tuple[Selection, Trackers]:
    """The journal opened, and whoever looks on told of the plan and of what ended before."""
    from rightrank.selection import Selection
    from rightrank.trackers import Trackers

    trackers = Trackers(report_to, folder.path, started, watching.notice)
    selection = Selection(folder, started, strategy, trackers.beside(watching.on_event), terms)
    trackers.catch_up(selection.records.outcomes)
    folder.write_config(started.settings)
    watching.on_plan(started, strategy.expected_arms() - (not terms.with_base), steps)
    if selection.records.outcomes:
        watching.on_resume(selection.records.outcomes)
    return selection, trackers


def finish(begun: Begun, decision: Decision, watching: Watching) -> Selected:
    """Hand over what was decided."""
    from rightrank.engine.arm_training import Watcher
    from rightrank.handover import certify_selection, hand_over_trained
    from rightrank.strategies.sweep import sweep_rows

    selection, bench = begun.selection, begun.prepared.bench
    if begun.estimate is not None:
        watching.notice(selection.beside_estimate(begun.estimate))
    hand_over_trained(selection, bench, decision)
    begun.trackers.decided(decision)
    if begun.request.settings.certify:
        watcher = Watcher(on_step=watching.on_event, should_stop=watching.should_stop)
        watching.notice(certify_selection(selection, bench, decision, watcher).sentence())
    records, folder = selection.records, selection.folder
    return Selected(
        decision,
        folder.path,
        folder.adapter,
        folder.report,
        records.samples,
        sweep_rows(begun.prepared.started, records.outcomes),
        sum(outcome.rank > 0 for outcome in records.outcomes),
    )


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision on results that were there already, and what was understood of them."""

    decision: Decision
    understood: list[str]

    def _repr_html_(self) -> str:
        return _decision_html(self.decision)


def decide(
    results: str | Path | Iterable[Mapping[str, Any]],
    *,
    metric: str | None = None,
    higher_is_better: bool | None = None,
    margin: float | None = None,
    columns: Mapping[str, str] | None = None,
    horizon_steps: int | None = None,
) -> Decided:
    """Decide on finished trainings, whoever ran them.

    Args:
        results: a CSV or JSONL file, a run folder, another tool's results (see docs/decide.md), or mappings in memory
            with `rank`, `value` and, if there are any, `lr`, `seed`, `std`, `item`.
        metric: the column with the held-out number, or its name where the column is `value`.
        higher_is_better: None to tell from the metric's name.
        margin: how much worse than the best is still enough, in the metric's unit; None for the metric's default.
        columns: canonical name → column, where a column has an unusual name.
        horizon_steps: the length of training that the answer is wanted for.

    Raises:
        ResultsError: the table can't be used; the message names file and row.
    """
    from rightrank.decision import decide as decide_table
    from rightrank.decision import table_of_results
    from rightrank.decision.metrics import direction
    from rightrank.io.results import TableOptions, read_results, results_of_rows, rows_of_mappings

    if isinstance(results, str | Path):
        folder = RunFolder(Path(results))
        if folder.journal.path.is_file():
            return _decide_run(folder, metric, margin, horizon_steps)
    asked = TableOptions(metric, higher_is_better, columns or {})
    if isinstance(results, str | Path):
        read = read_results(Path(results), asked, direction)
    else:
        read = results_of_rows(rows_of_mappings(results), asked, direction, "results")
    return Decided(decide_table(table_of_results(read), margin, horizon_steps=horizon_steps), read.understood)


def _decide_run(folder: RunFolder, metric: str | None, margin: float | None, horizon_steps: int | None) -> Decided:
    """A run folder of our own, at its own metric and margin unless others are asked for."""
    from rightrank.decision.run import comparable, decide_on, metrics_of, records_of

    records = records_of(folder.journal.read(), str(folder.path))
    started = records.started
    direct = [outcome for outcome in records.outcomes if outcome.arm.is_direct]
    name = metric or started.metric
    known = metrics_of(records)
    own = started.settings.get("margin") if name == started.metric else None
    if name not in known or (started.data.form == "own" and name != started.metric):
        raise ResultsError(f"{folder.path}: the run has no metric {name!r}; it has {', '.join(known)}")
    outcomes = comparable(records) if name == started.metric else direct
    decision = decide_on(records, outcomes, name, own if margin is None else margin, horizon_steps=horizon_steps)
    return Decided(decision, [f"{len(direct)} trainings of a run folder"])


def inspect(
    adapter: str | Path | None = None, *, base: str | Path | None = None, finetuned: str | Path | None = None
) -> Inspection:
    """The singular spectra of an adapter, or of what full fine-tuning changed.

    Args:
        adapter: a PEFT adapter folder.
        base: with `adapter`, the base model's folder, for the norms of the weights that are changed.
        finetuned: instead of `adapter`: a checkpoint folder to compare with `base`.

    Raises:
        InputError: not a readable adapter or checkpoint, or two that don't belong together.
    """
    if adapter is not None and finetuned is None:
        from rightrank.probe.adapter_spectra import inspect_adapter

        return inspect_adapter(Path(adapter), None if base is None else Path(base))
    if adapter is None and base is not None and finetuned is not None:
        from rightrank.probe.checkpoint_spectra import inspect_checkpoints

        return inspect_checkpoints(Path(base), Path(finetuned))
    raise SettingsError("give an adapter folder, or two checkpoints as base and finetuned (--base A --finetuned B)")


def inspect_gradient(model: str, data: str | Path, *, settings: SelectSettings | None = None) -> Inspection:
    """The singular spectra of the loss's gradient to each weight that the settings adapt, before any training.

    Raises:
        InputError: the model, the data or a module name can't be used.
    """
    from rightrank.probe.checkpoint_spectra import SKETCH_RANK
    from rightrank.probe.gradient_spectra import inspect_gradient as spectra_of_gradient

    return spectra_of_gradient(model, Path(data), settings or make_settings({}), SKETCH_RANK)


def resize(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    noise: bool = False,
    data: str | Path | None = None,
    options: ResizeOptions | None = None,
) -> Resized:
    """Write the adapter at another rank to `out`, with the error that the truncation makes.

    Exactly one of `rank`, `energy`, `noise` and `data` chooses the rank; with `data` it is the smallest whose held-out
    loss is not worse by `options.settings.margin`.

    Raises:
        InputError: the adapter, the rule, the data or `out` can't be used; nothing was written.
        RunError: recovery began and could not finish.
    """
    from rightrank.probe.resizing import ResizeOptions, ResizeRule, resize_adapter

    rule = ResizeRule(rank, energy, noise, None if data is None else Path(data))
    return resize_adapter(Path(adapter), Path(out), rule, options or ResizeOptions())


def answers_line(settings: SelectSettings, started: RunStarted) -> str:
    """What metrics beside the loss will cost, for a person."""
    names = [spec.name for spec in settings.metric_specs if not spec.is_measured_along]
    when = "at the end of each training" if settings.answers_at == "end" else f"{settings.eval_points} times a training"
    items = started.data.splits["selection"].items
    return (
        f"{', '.join(names)}: measured on the base, {when}, and on the test split: "
        f"{items} items, at most {settings.max_new_tokens} new tokens each where the model writes; how long that takes is said after the base"
    )


def cost_line(strategy: Strategy, steps: int) -> str:
    """What a selection will cost, for a person."""
    cost = strategy.cost()
    if cost.expected == cost.most:
        return f"strategy {strategy.name}: {cost.most:.3g} trainings of {steps} steps"
    return (
        f"strategy {strategy.name}: about {cost.expected:.3g} trainings of {steps} steps, {cost.most:.3g} at most "
        "(one stopped early counts for its part)"
    )


def _decision_html(decision: Decision) -> str:
    """The answer with its plot, for a notebook."""
    from rightrank.report.notebook import decision_html  # brings matplotlib

    return decision_html(decision)
