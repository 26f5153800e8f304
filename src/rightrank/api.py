"""The Python API: one function for each verb, records in and records out, nothing printed.

The command line is a thin layer over it. Every function imports what it needs when it is called, so that importing
this module costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from rightrank.errors import SettingsError
from rightrank.records import Decision, EvalPoint, TrialResult, TrialTask
from rightrank.records.compare import AdapterComparison
from rightrank.records.doctor import Doctor
from rightrank.records.fleet import Fleet
from rightrank.records.observer import Observer
from rightrank.records.plan import Plan
from rightrank.records.preflight import Preflight
from rightrank.records.probe import Allocation, AllocationTrial, Inspection, Resized, ResizedTogether
from rightrank.returns import Decided, Selected
from rightrank.settings import Goal, PlanSettings, SelectKeywords, SelectSettings, make_plan_settings, make_settings
from rightrank.settings.profiles import ProfileName, profile_named
from rightrank.settings.resize import ResizeOptions, ResizeRule
from rightrank.settings.select import renamed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rightrank.executors.calls import TrainFunction
    from rightrank.executors.custom import EvaluateFunction
    from rightrank.exports.targets import Exported
    from rightrank.io.journal import Repaired
    from rightrank.io.matrix import MatrixConfig
    from rightrank.preparation import Rows
    from rightrank.report.status_text import RunStatus
    from rightrank.selection.custom import Judgements
    from rightrank.selection.judging import JudgedRun
    from rightrank.selection.many import MatrixSelected

__all__ = [
    "AdapterComparison",
    "Decided",
    "Decision",
    "EvalPoint",
    "Fleet",
    "Inspection",
    "Observer",
    "Plan",
    "PlanSettings",
    "Preflight",
    "ResizeOptions",
    "Resized",
    "SelectSettings",
    "Selected",
    "TrialResult",
    "TrialTask",
    "Watching",
    "allocate",
    "compare",
    "decide",
    "doctor",
    "export",
    "extract",
    "fleet",
    "inspect",
    "inspect_gradient",
    "judge",
    "make_plan_settings",
    "make_settings",
    "plan",
    "preflight",
    "repair",
    "resize",
    "resize_together",
    "select_matrix",
    "select_rank",
    "select_rank_with",
    "status",
    "write_report",
    "write_side_by_side",
]

Watching = Observer  # the name until 0.2; both stay


def select_rank(
    model: str | PreTrainedModel,
    data: str | Path | Rows | Mapping[str, Rows],
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: SelectSettings | None = None,
    watching: Observer | None = None,
    progress: bool = False,
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
        watching: callbacks; see `Observer`.
        progress: show the progress on stderr, or in the cell of a notebook.
        keywords: the command's options by name, such as `ranks=(4, 16, 64), margin=0.01`; they override `settings`.

    Raises:
        InputError: model, data, settings or folder can't be used; nothing was started.
        RunError: the selection started and could not finish.
        InterruptedRun: `watching.should_stop` returned True.
        KeyboardInterrupt: Ctrl-C; the step ended and checkpoints were written. The same call resumes.
    """
    from rightrank.io.files import report_disk_errors
    from rightrank.io.run_folder import RunFolder
    from rightrank.report.interrupts import checkpointed
    from rightrank.report.watching import shown
    from rightrank.selection.early import require_request

    given = settings.model_dump(include=settings.model_fields_set) if settings is not None else {}
    settings = make_settings(given | renamed(keywords))
    require_request(model, data, settings)
    folder = RunFolder(Path(out))
    with (
        folder.locked(),
        report_disk_errors(folder.path),
        shown(watching or Observer(), progress) as seen,
        checkpointed(seen) as observer,
    ):
        # These imports bring torch, so they follow the lock: a folder that can't be used is refused at once.
        from rightrank.preparation import Request
        from rightrank.selection.select import select

        return select(Request(model, tokenizer, data, settings), folder, observer)


def begun_as(run: str | Path) -> dict[str, object]:
    """Return the model, the data and the settings of a run, with which `select_rank` resumes or continues it.

    Raises:
        RunFolderError: no run there, or one of another version that has settings this one does not know.
    """
    from rightrank.runs import begun_as as read

    return read(run)


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
    given = settings.model_dump(include=settings.model_fields_set) if settings is not None else {}
    settings = make_settings(given | renamed(keywords))
    from rightrank.selection.early import require_request

    require_request(model, data, settings)
    from rightrank.preparation import Request
    from rightrank.selection.preflight import preflight as prepare_only

    return prepare_only(Request(model, tokenizer, data, settings), price_per_hour)


def select_matrix(
    matrix: MatrixConfig, out: str | Path, further: Mapping[str, object], watching: Observer | None = None
) -> MatrixSelected:
    """Select a rank for every data set of a matrix, over one base.

    Args:
        matrix: the model and the data sets; see `rightrank.io.matrix.read_matrix`.
        out: a folder that receives one run folder for each job. A second call resumes.
        further: settings that override those of the file.
        watching: callbacks; outcomes reach `notice`, with the name of their job.

    Raises:
        InputError: a setting, the model or one of the data sets can't be used; nothing was started.
        InterruptedRun: `watching.should_stop` returned True.
    """
    from rightrank.selection.many import select_many

    return select_many(matrix, Path(out), further, watching or Observer())


def select_rank_with(
    train: TrainFunction,
    out: str | Path,
    *,
    profile: ProfileName | None = None,
    evaluate: EvaluateFunction | None = None,
    goal: Goal = "training-rank",
    ranks: Sequence[int] = (1, 4, 16, 64),
    learning_rates: Sequence[float] = (3e-4, 1e-3, 3e-3),
    seeds: Sequence[int] | None = None,
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
    watching: Observer | None = None,
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
        higher_is_better: None for the direction that the metric's name implies (accuracy, f1 and reward are better
            when higher, losses and errors when lower).
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
        watching: callbacks; see `Observer`.

    Raises:
        SettingsError: an argument that is not allowed, a metric whose name implies no direction, or a function that
            can't be sent to a process.
        MissingExtraError: a tracker that is not installed.
        RunFolderError: a folder made with other settings.
        AllTrialsFailedError: fewer than two ranks ended with a result.
        InterruptedRun: `watching.should_stop` returned True.
    """
    from rightrank.io.run_folder import RunFolder
    from rightrank.selection import custom
    from rightrank.trackers import require_trackers

    if goal == "adapter" and evaluate is None:
        raise SettingsError(
            "goal 'adapter' needs evaluate=, a function of an adapter folder and a TrialTask that returns held-out scores; "
            "give it, or goal 'training-rank'"
        )
    defaults = profile_named(profile)
    metric = defaults.metric if metric is None else metric
    values = {
        "goal": goal,
        "ranks": tuple(ranks),
        "learning_rates": tuple(learning_rates),
        "seeds": defaults.seeds if seeds is None else tuple(seeds),
        "lora_alpha": lora_alpha,
        "margin": defaults.margin if margin is None else margin,
        "strategy": strategy or defaults.strategy,
    }
    request = custom.CustomRequest(
        settings=custom.checked_settings(values),
        steps=steps,
        metric=metric,
        higher_is_better=custom.direction_of(metric, higher_is_better),
        with_base=with_base,
        version=version,
        report_to=require_trackers(report_to),
        profile=profile,
        judgements=judgements,
        judged_margin=judged_margin,
    )
    trainer = custom.make_trainer(train, where, timeout_seconds, workers, evaluate)
    return custom.select_custom(request, trainer, RunFolder(Path(out)), watching or Observer())


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
    from rightrank.selection.judging import JudgeRequest, judge_run

    files = [Path(file) for file in collect]
    request = JudgeRequest(Path(run), prompts, ranks, command, files, judge_name, margin, seed, timeout_seconds, notice)
    return judge_run(request)


def plan(model: str, *, settings: PlanSettings | None = None) -> Plan:
    """Predict parameters, memory and time of every rank, without weights and before any training.

    Args:
        model: a folder that holds at least `config.json`, a GGUF file, or a hub name.
        settings: see `PlanSettings`; None for the defaults. Without `memory_bytes` the budget is the memory of the
            CUDA device, if there is one.

    Raises:
        InputError: the model, its modules, a rank or a length can't be used.
    """
    from rightrank.io.models import device_memory
    from rightrank.planning.planner import make_plan

    settings = settings or make_plan_settings({})
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
        higher_is_better: None for the direction that the metric's name implies.
        margin: how much worse than the best is still enough, in the metric's unit; None for the metric's default.
        columns: canonical name → column, where a column has an unusual name.
        horizon_steps: the length of training to answer for.

    Raises:
        ResultsError: the table can't be used; the message names file and row.
    """
    from rightrank.deciding import Question, decide_results

    return decide_results(results, Question(metric, higher_is_better, margin, columns or {}, horizon_steps))


def inspect(
    adapter: str | Path | None = None, *, base: str | Path | None = None, finetuned: str | Path | None = None
) -> Inspection:
    """Compute the singular spectra of an adapter, or of what full fine-tuning changed.

    Args:
        adapter: a PEFT adapter folder.
        base: with `adapter`, the base model's folder, for the norms of the weights that the adapter changes.
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
    """Compute the singular spectra of the loss's gradient to each weight that the settings adapt, before any training.

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
    """Write the adapter at another rank to `out`, and report the truncation error.

    Exactly one of `rank`, `energy`, `noise` and `data` chooses the rank; with `data` it is the smallest whose held-out
    loss is not worse by `options.settings.margin`.

    Raises:
        InputError: the adapter, the rule, the data or `out` can't be used; nothing was written.
        RunError: recovery started and could not finish.
    """
    from rightrank.probe.resize import resize_adapter

    rule = ResizeRule(rank, energy, noise, None if data is None else Path(data))
    return resize_adapter(Path(adapter), Path(out), rule, options or ResizeOptions())


def resize_together(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    noise: bool = False,
    options: ResizeOptions | None = None,
) -> ResizedTogether:
    """Write several adapters at one common rank, each to a folder of its own name under `out`.

    Exactly one of `rank`, `energy` and `noise` chooses the rank: the one given, or the largest that any module needs.

    Raises:
        InputError: one of the adapters can't be used, or two have the same name; nothing was written.
    """
    from rightrank.probe.resize import resize_together as resize_all

    rule = ResizeRule(rank, energy, noise)
    return resize_all([Path(adapter) for adapter in adapters], Path(out), rule, options or ResizeOptions())


def fleet(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    model: str,
    data: str | Path | Sequence[str | Path],
    settings: SelectSettings | None = None,
    ranks: Sequence[int] | None = None,
    pad: bool = False,
    recover_steps: int = 0,
    learning_rate: float | None = None,
    merge: Sequence[float] | None = None,
    ignore_base_name: bool = False,
    notice: Callable[[str], None] = lambda _: None,
) -> Fleet:
    """Bring several adapters of one server to the smallest rank at which none loses more than the margin.

    Args:
        adapters: two adapter folders or more, of one base.
        out: the folder to write, which must not exist: one folder for each adapter.
        model: the base.
        data: held-out rows for all adapters, or one file for each in their order.
        settings: of evaluation and margin; see `SelectSettings`.
        ranks: to measure; None for the powers of two.
        pad: write every adapter at the one rank that vLLM serves, with one scale.
        recover_steps: of training after each truncation, at `learning_rate`.
        merge: weights of the exact sum of the adapters, which is then truncated too, into `out/merged`; None for no sum.
        ignore_base_name: accept adapters that name another base, if their shapes fit.
        notice: receives each line for a person.

    Raises:
        InputError: an adapter of another base, data that can't be used, adapters without a common module; nothing was written.
        RunError: recovery diverged.
    """
    from rightrank.probe.fleet import FleetRequest, run_fleet

    files = [data] if isinstance(data, str | Path) else list(data)
    request = FleetRequest(
        [Path(adapter) for adapter in adapters],
        model,
        [Path(file) for file in files],
        Path(out),
        settings or make_settings({}),
        ranks,
        pad,
        recover_steps,
        learning_rate,
        merge,
        ignore_base_name,
        notice,
    )
    return run_fleet(request)


def extract(
    base: str | Path,
    finetuned: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    noise: bool = False,
    data: str | Path | None = None,
    max_rank: int = 128,
    options: ResizeOptions | None = None,
) -> Resized:
    """Write an adapter on `base` to `out` that approximates the full fine-tune `finetuned`.

    Exactly one of `rank`, `energy`, `noise` and `data` chooses the rank, as in `resize`; `max_rank` bounds the
    singular values that are computed.

    Raises:
        InputError: two checkpoints that don't belong together, a rule that can't be used, or an `out` that exists.
    """
    from rightrank.probe.extract import ExtractOptions
    from rightrank.probe.extract import extract as extract_adapter

    rule = ResizeRule(rank, energy, noise, None if data is None else Path(data))
    chosen = ExtractOptions(max_rank, options or ResizeOptions(dtype="float32"))
    return extract_adapter(Path(base), Path(finetuned), Path(out), rule, chosen)


def allocate(
    adapter: str | Path,
    data: str | Path,
    *,
    rank: int,
    learning_rate: float,
    max_steps: int,
    by: str = "sensitivity",
    pattern: str | Path | None = None,
    groups: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1),
    base: str | None = None,
    settings: SelectSettings | None = None,
    on_trial: Callable[[AllocationTrial], None] = lambda _: None,
) -> Allocation:
    """Propose a rank for each module where trained evidence supports it; otherwise answer uniform.

    Args:
        adapter: a trained PEFT adapter folder, which the pattern is made from.
        data: the data to train and test on.
        rank: the rank of the uniform adapter that sets the number of parameters.
        learning_rate: the learning rate of every training.
        max_steps: the optimizer steps of every training.
        by: the measure of a module's importance: sensitivity, spectra, gradient or eva.
        pattern: a JSON file of {module: rank}, or {group: rank}, to test instead of one made by a measure.
        groups: such as `attention=q_proj+v_proj`: one rank for all modules with one of these parts in their names.
        seeds: one training of each pattern for each seed.
        base: the base model; None for the one that the adapter names.
        settings: see `SelectSettings`; None for the defaults.
        on_trial: receives each training that has ended.

    Raises:
        InputError: the adapter, data, measure or pattern can't be used.
        RunError: a training diverged.
    """
    from rightrank.probe.allocate import AllocateOptions
    from rightrank.probe.allocate import allocate as allocate_ranks

    options = AllocateOptions(
        rank,
        learning_rate,
        max_steps,
        by,
        None if pattern is None else Path(pattern),
        tuple(groups),
        tuple(seeds),
        base,
        settings or make_settings({}),
        on_trial,
    )
    return allocate_ranks(Path(adapter), Path(data), options)


def compare(
    a: str | Path,
    b: str | Path,
    *,
    model: str,
    data: str | Path | Sequence[str | Path],
    settings: SelectSettings | None = None,
) -> AdapterComparison:
    """Whether adapter `b` is no worse than adapter `a`, paired over all examples of `data`.

    Args:
        a: an adapter folder that PEFT loads, a model folder, or "base".
        b: the same.
        model: the base model of the adapters.
        data: a file or a folder, or several. A folder with given splits is read at its test split.
        settings: `margin`, `metric`, `metrics`, `seq_len` and how models are loaded; None for the defaults.

    Raises:
        InputError: a side, the model, the data or a metric can't be used.
        MetricError: a metric gave no score.
    """
    from rightrank.probe.compare import CompareRequest, compare_adapters

    files = [data] if isinstance(data, str | Path) else list(data)
    request = CompareRequest(str(a), str(b), model, [Path(file) for file in files], settings or make_settings({}))
    return compare_adapters(request)


def write_report(run: str | Path) -> Path:
    """Write `report.html` and the figures of a run again, from its journal alone.

    Raises:
        RunFolderError: no run there.
    """
    from rightrank import runs

    return runs.write_report(run)


def write_side_by_side(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write one page to the file `out` that shows several runs beside each other, and the settings that differ.

    Raises:
        RunFolderError: no run in one of the folders.
    """
    from rightrank import runs as verbs

    return verbs.write_side_by_side(runs, out)


def doctor() -> Doctor:
    """Look at this machine: versions, device, memory, disk, extras and writable places."""
    from rightrank.io.system import examine

    return examine()


def export(
    run: str | Path, to: str, out: str | Path | None = None, *, pad: bool = False, push_to_hub: str | None = None
) -> Exported:
    """Write what another program needs to train or serve the run's adapter.

    Args:
        run: a run folder whose selection has ended.
        to: peft, trl, axolotl, llamafactory, unsloth, ms-swift, vllm, sglang, llama.cpp, ollama, diffusers or kohya; or optuna, which
            gives a study of the trials, of an unfinished run too.
        out: the folder to write, which must not exist; None for `exports/<to>` in the run folder, replaced whole.
        pad: for a server: also write the adapter at one rank that it serves and one scale, the same function.
        push_to_hub: with `to="peft"`, `owner/name` of a repository to upload the adapter, its card and its plot to.

    Raises:
        SettingsError: an unknown target.
        RunFolderError: no run there, one without a decision or an adapter, or `out` exists.
        ResultsError: a rank that the server does not serve.
        ModelError: an adapter that can't be padded.
        RunError: the hub could not be reached or refused; the files are written all the same.
    """
    from rightrank import runs

    return runs.export(run, to, out, pad=pad, push_to_hub=push_to_hub)


def repair(run: str | Path) -> Repaired:
    """Keep the whole records of a damaged journal and set the damaged lines aside in a file of their own.

    Raises:
        RunFolderError: no run there, a process at work in it, or a run whose start is damaged.
    """
    from rightrank import runs

    return runs.repair(run)


def status(run: str | Path) -> RunStatus:
    """Report where a run stands, from its files; nothing in the folder is written.

    Raises:
        RunFolderError: no run there.
    """
    from rightrank import runs

    return runs.status(run)
