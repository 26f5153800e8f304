"""Run the truncation search after a training: a run folder whose executor evaluates truncations of the model in memory.

`begin_run` writes the first journal record, the trained adapter, and the files that a fresh process needs (in `cache/`). `finish_run`
evaluates the truncations, in this process or a fresh one. The hooks of a selection report the result, and an interrupted run resumes.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from rightrank.adapters.adapter_folders import BASE_FILE
from rightrank.adapters.adapter_reader import AdapterFolder, open_adapter
from rightrank.adapters.resizing import cap_ranks, list_candidate_ranks, write_resized_adapter
from rightrank.bases.base_models import compute_base_identity, read_identity
from rightrank.data.files import create_temporary_folder, read_json_object, report_disk_errors, write_text
from rightrank.decision.adapter import estimate_training_ranks
from rightrank.decision.records import Records, read_records
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import AdapterProposal, Hook
from rightrank.runs.selection import Executor, PreparedSelection
from rightrank.schema.command import build_reproduce_command, build_resume_command
from rightrank.schema.configs import convert_configs
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.errors import DataError, ModelError, NotFiniteError, RunFolderError, SettingsError, get_first_line
from rightrank.schema.events import DataSummary, JournalRecord, Listener, RunKind, RunStarted
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import (
    Arm,
    Trial,
    TrialFinished,
    TrialOutcome,
    TrialStarted,
    compute_trial_id,
)
from rightrank.search.history import Requests, Space, Trials, build_space, make_truncation_arm
from rightrank.search.protocol import Strategy
from rightrank.search.truncations import choose_adapter
from rightrank.trainers.batch_scores import HeldOutBatches, has_class_labels, read_batch
from rightrank.trainers.distributed import gather_parameters, get_process_index, is_partitioned, sync_errors
from rightrank.trainers.in_memory import InMemoryAdapter, copy_factors, gather_adapter_moments, save_trained_adapter
from rightrank.trainers.preserved_state import preserve_state
from rightrank.training.device import describe_environment, read_peak_bytes
from rightrank.training.evaluation import MetricResults, Progress, build_finished_trial
from rightrank.training.moments import GatheredMoments
from rightrank.training.targets import suppress_peft_warnings

if TYPE_CHECKING:
    from rightrank.runs.values import Selected

log = logging.getLogger("rightrank")

RESUME_FILE = "measure.json"  # in the run's cache
TRAINER_NAME = "its own trainer"  # identifies the kind of run in its journal
# Fields of `InMemoryAdapter` that are saved in separate files or have their default values.
EXCLUDED_FIELDS = ("model", "held_out", "train", "name", "write_tokenizer", "trainer_loss")


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """What the callback knows about the training whose adapter is truncated."""

    settings: Mapping[str, Any]  # settings of `select` that the training states
    steps: int = 0  # 0 if unknown
    seconds: float | None = None  # without the truncation search; None if unknown
    peak_bytes: int = 0  # before the truncation search; 0 if unknown
    checkpoint_step: int | None = None  # step of the best checkpoint if it is measured; None for the last one
    notes: Sequence[str] = ()

    @property
    def checkpoint(self) -> str:
        if self.checkpoint_step is not None:
            return f"best (step {self.checkpoint_step})"
        return f"last (step {self.steps})" if self.steps else "last"


@dataclass(frozen=True, slots=True)
class TruncationResult:
    """The result of a truncation search. The last note of the answer states the cost."""

    answer: AdapterAnswer
    trained_trial: TrialFinished  # evaluation of the adapter before truncation
    folder: RunFolder
    notes: tuple[str, ...]  # on how the truncations were computed

    @property
    def num_examples(self) -> int:
        return len(self.trained_trial.example_losses)


def measure_peak_bytes() -> int:
    """Return the peak memory of this process on the GPU, or on the CPU if there is no GPU."""
    return read_peak_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def begin_run(in_memory_adapter: InMemoryAdapter, out: Path, training: TrainingSummary) -> RunFolder:
    """Begin a run in `out` with everything that a fresh process needs. The result of an earlier training is moved aside.

    Raises:
        ModelError: the model returns no logits.
        RunFolderError: the folder is in use, contains another kind of run or other files, or cannot be written.
    """
    folder = RunFolder(out)
    with folder.lock(), report_disk_errors(out):
        _require_truncation_run(folder)
        _require_logits(in_memory_adapter)
        # If something fails, no folder without a journal remains and an earlier result stays in place.
        with create_temporary_folder(out / "begun") as temporary:
            temporary_run = RunFolder(temporary)
            with gather_parameters(in_memory_adapter.model):
                adapter = save_trained_adapter(
                    in_memory_adapter.model, in_memory_adapter.name, temporary_run.get_trial_folder("trained")
                )
                identity = compute_base_identity(in_memory_adapter.model.get_base_model(), adapter.base_model or "")
            write_text(adapter.path / BASE_FILE, identity.to_json().decode())
            if in_memory_adapter.write_tokenizer is not None:
                in_memory_adapter.write_tokenizer(adapter.path)
            started = _build_run_started(in_memory_adapter, training, adapter)
            adapter.path.rename(temporary_run.get_trial_folder(_compute_training_id(started, training.steps)))
            if in_memory_adapter.trainer_loss is None:  # which another process does not have
                _write_resume_files(in_memory_adapter, temporary_run, training)
            temporary_run.journal.append(started)
            if (earlier_folder := folder.move_aside()) is not None:
                log.warning("rightrank: the result of an earlier training was moved to %s", earlier_folder)
            folder.move_from(temporary_run)
    return folder


def _require_logits(in_memory_adapter: InMemoryAdapter) -> None:
    """Raise if the model is an encoder without a classification head. Its rows have no scores."""
    batch = next(iter(in_memory_adapter.held_out), {})
    if is_partitioned(in_memory_adapter.model) or "labels" not in batch or not has_class_labels(batch):
        return
    with preserve_state(in_memory_adapter.model, in_memory_adapter.name), torch.no_grad():
        output = in_memory_adapter.model(**read_batch(in_memory_adapter.model, batch).inputs)
    if getattr(output, "logits", None) is None:
        name = type(in_memory_adapter.model.get_base_model()).__name__
        raise ModelError(
            f"{name} returns no logits: an encoder without a head cannot score classes; give a model with a classification head, such as one "
            "of AutoModelForSequenceClassification"
        )


def require_result_folder(out: Path) -> None:
    """Raise if a training cannot write its result to `out`. Nothing is written.

    Raises:
        RunFolderError: the folder is in use, or contains another kind of run or other files.
    """
    folder = RunFolder(out)
    folder.require_usable()
    if folder.is_in_use():
        raise RunFolderError(f"{out}: another process is using this folder; wait for it, or give another folder")
    _require_truncation_run(folder)


def _require_truncation_run(folder: RunFolder) -> None:
    """Raise if the folder contains a run of another kind. Runs of other versions are recognized too."""
    if not folder.journal.path.is_file():
        return
    with folder.journal.path.open("rb") as file:
        line = file.readline()
    try:
        first_record = json.loads(line)
    except ValueError:  # also raised for bytes that are not text
        first_record = None
    settings = first_record.get("settings") if isinstance(first_record, dict) else None
    if not isinstance(settings, dict) or settings.get("trainer") != TRAINER_NAME:
        raise RunFolderError(
            f"{folder.path}: this folder contains a run of another kind, which is left unchanged; give another folder"
        )


def finish_run(
    in_memory_adapter: InMemoryAdapter, folder: RunFolder, training: TrainingSummary, hooks: Sequence[Hook] = ()
) -> tuple[TruncationResult, Selected]:
    """Evaluate truncations from the highest rank down until one loses more than the margin, and export the smallest one within it.

    Raises:
        NotFiniteError: a held-out loss is NaN or infinite.
    """
    from rightrank.runs.run import select

    executor = CallbackExecutor(in_memory_adapter, training)
    with sync_errors(), folder.lock(), report_disk_errors(folder.path):
        selected = select(executor.prepare, folder, [executor, *hooks])
    records = executor.records
    answer = records.adapters[-1].answer
    return TruncationResult(answer, records.by_id[answer.trained_id], folder, executor.moments.notices), selected


def measure_truncations(in_memory_adapter: InMemoryAdapter, out: Path) -> TruncationResult:
    """Begin a run and finish it immediately, without reports."""
    training = TrainingSummary({})
    return finish_run(in_memory_adapter, begin_run(in_memory_adapter, out, training), training)[0]


class DescendingStrategy(Strategy):
    """A strategy with one training. Its truncations are evaluated from the highest rank down until one loses more than the margin."""

    name = "downward"

    def script(self, trials: Trials) -> Requests:
        space = self.space
        yield [space.make_arm(space.top, space.learning_rates[0])]
        parent = trials.get_training(space.top, space.learning_rates[0])
        for rank in reversed(space.ranks[:-1] if parent is not None else ()):
            assert parent is not None
            yield [make_truncation_arm(parent, rank)]
            answer = choose_adapter(list(trials.outcomes.values()), space.criterion)
            if answer is None or answer.rank != rank:
                return


def _build_strategy(started: RunStarted, steps: int) -> Strategy:
    settings = started.select_settings
    space: Space = build_space(settings, steps, started.data.loss_kind)
    rates = settings.learning_rates if "learning_rates" in settings.model_fields_set else (0.0,)  # unknown
    return DescendingStrategy(replace(space, evaluates_base=False, learning_rates=rates))


def _compute_training_id(started: RunStarted, steps: int) -> str:
    """Return the id that the training has among the trials of the run."""
    (training,) = _build_strategy(started, steps).ask([])
    return compute_trial_id(started.fingerprint, training)


def _build_run_started(
    in_memory_adapter: InMemoryAdapter, training: TrainingSummary, adapter: AdapterFolder
) -> RunStarted:
    base = in_memory_adapter.model.get_base_model()
    batch, classes = in_memory_adapter.held_out[0], None
    form: Literal["preference", "classification", "ranking", "custom"] = "custom"
    if in_memory_adapter.trainer_loss is not None:
        form = "ranking"
    elif "completion_mask" in batch:
        form = "preference"
    elif has_class_labels(batch):
        form, classes = "classification", [str(name) for _, name in sorted(base.config.id2label.items())]
    ranks = list_candidate_ranks(adapter, in_memory_adapter.ranks)
    overrides: dict[str, Any] = {"goal": "adapter", "metric": in_memory_adapter.metric, "ranks": ranks}
    overrides |= {} if in_memory_adapter.margin is None else {"margin": in_memory_adapter.margin}
    settings = SelectSettings(**{**training.settings, **overrides})
    stated_names = {*training.settings, *overrides}
    values = {"trainer": TRAINER_NAME, **settings.model_dump(mode="json", include=stated_names)}
    values["model"] = adapter.base_model
    is_classifier = adapter.config["task_type"] == "SEQ_CLS"
    values["is_text"] = values["model"] is not None and (
        is_classifier if form == "classification" else base.can_generate()
    )
    return RunStarted.build(
        RunKind.CALLBACK,
        values,
        {"settings": values, "steps": training.steps, "checkpoint": training.checkpoint},
        environment=describe_environment(str(next(in_memory_adapter.model.parameters()).device)),
        data=DataSummary(form=form, splits={}, splits_given=True, duplicates_across_splits=0, classes=classes),
        evaluation_examples=[],
        metric=in_memory_adapter.metric,
        higher_is_better=in_memory_adapter.metric == "accuracy",
    )


@dataclass(frozen=True, kw_only=True)
class PreparedTruncations(PreparedSelection):
    """A prepared truncation search, whose executor holds the model in memory."""

    executor: CallbackExecutor

    def open_executor(
        self, folder: RunFolder, listener: Listener, records: Records
    ) -> AbstractContextManager[Executor]:
        return self.executor.open_executor(folder, listener, records)


class CallbackExecutor(Hook):
    """The executor of a truncation search. It loads each truncation into the model in memory and evaluates it.

    It also prepares the search for `select`, and is a hook that adds notes to the answer.
    """

    def __init__(self, in_memory_adapter: InMemoryAdapter, training: TrainingSummary) -> None:
        self._in_memory_adapter, self._training = in_memory_adapter, training
        self._start_time = time.monotonic()
        self._held_out = HeldOutBatches(
            in_memory_adapter.model, in_memory_adapter.held_out, in_memory_adapter.beta, in_memory_adapter.trainer_loss
        )
        self.moments = GatheredMoments({}, 0, 0)  # filled by `open_executor`
        self.folder: RunFolder
        self.listener: Listener
        self.records: Records

    def prepare(self, folder: RunFolder, journal: Sequence[JournalRecord]) -> PreparedSelection:
        """Return the prepared search for the run in `folder`."""
        started, steps = read_records(journal, str(folder.path)).started, self._training.steps
        strategy = _build_strategy(started, steps)
        return PreparedTruncations(
            executor=self, started=started, settings=started.select_settings, steps=steps, strategy=strategy
        )

    @contextmanager
    def open_executor(self, folder: RunFolder, listener: Listener, records: Records) -> Iterator[CallbackExecutor]:
        """Yield the executor, and restore the state of the model after the block."""
        self.folder, self.listener, self.records = folder, listener, records
        with preserve_state(self._in_memory_adapter.model, self._in_memory_adapter.name):
            # The model still holds the trained factors here. Later each truncation replaces them.
            self.moments = gather_adapter_moments(self._in_memory_adapter)
            yield self

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        for trial in trials:
            self.listener.on_event(TrialStarted(**trial.fields))
            yield self._evaluate_trial(trial, trial.arm, self.folder.get_trial_folder(trial.trial_id))

    def _evaluate_trial(self, trial: Trial, arm: Arm, target: Path) -> TrialFinished:
        training, start_time, progress, moments = self._training, time.monotonic(), Progress(), self.moments.moments
        changes: dict[str, Any]
        if arm.truncate_from is not None:
            trained = open_adapter(self.folder.get_trial_folder(arm.truncate_from))
            with sync_errors():
                write_resized_adapter(trained, target, cap_ranks(trained, arm.rank, moments), moments)
            copy_factors(self._in_memory_adapter.model, self._in_memory_adapter.name, open_adapter(target))
            changes = {"truncation": "kfac" if moments else "svd"}
        else:
            progress = Progress(step=training.steps, train_seconds=training.seconds or 0.0)
            size = sum(module.parameters for module in open_adapter(target).modules)
            changes = {
                "checkpoint_step": training.checkpoint_step,
                "trainable_parameters": size,
                "peak_bytes": training.peak_bytes,
            }
        scores = self._held_out.score()
        if not np.isfinite(scores.losses).all():
            raise NotFiniteError(f"rank {arm.rank}: a held-out loss is NaN or infinite; the training may have diverged")
        if len(scores.losses) < 2:
            raise DataError("fewer than two held-out examples have a label; give more examples")
        outcome = build_finished_trial(trial, self._in_memory_adapter.metric, scores, MetricResults(), progress)
        return outcome.model_copy(update={"eval_seconds": time.monotonic() - start_time, **changes})

    def on_adapter(self, proposal: AdapterProposal) -> AdapterAnswer:
        """Add the cost and an estimate of the rank to train at to the notes of the answer."""
        training, answer, records = self._training, proposal.answer, proposal.records
        notes = [*training.notes, *answer.notes, *self.moments.notices]
        if self._in_memory_adapter.trainer_loss is None:  # `select` trains no rerankers and embedding models
            notes.append(format_training_rank_estimate(answer, records.started))
        notes.append(self._format_cost(len(records.by_id[answer.trained_id].example_losses)))
        return answer.model_copy(update={"notes": notes})

    def _format_cost(self, examples: int) -> str:
        seconds, training = time.monotonic() - self._start_time, self._training
        time_share = f", {seconds / training.seconds:.1%} of the training's time" if training.seconds else ""
        extra_bytes = measure_peak_bytes() - training.peak_bytes if training.peak_bytes else 0
        peak_comparison = f"{extra_bytes / 2**20:.0f} MiB above" if extra_bytes > 0 else "not above"
        memory_note = f"; peak memory was {peak_comparison} that of the training" if training.peak_bytes else ""
        return f"Measured on the {training.checkpoint} weights with {examples} held-out examples in {seconds:.1f} s{time_share}{memory_note}."


def format_training_rank_estimate(answer: AdapterAnswer, started: RunStarted) -> str:
    """Return a sentence with the estimated rank to train at, and the command that would verify it."""
    low, high = estimate_training_ranks(answer)
    rank_range = f"{low}" if low == high else f"{low} to {high}"
    ranks = sorted({max(1, low // 2), low, high, answer.trained_rank})
    settings = started.select_settings.model_copy(update={"goal": "training-rank", "ranks": tuple(ranks)})
    command = build_reproduce_command(started.model_name or "MODEL", "DATA", settings)
    return (
        f"An estimate, not evidence: next time the rank to train at is probably {rank_range}. "
        f"To verify it, replace DATA by your data file and run: {command}"
    )


def _write_resume_files(in_memory_adapter: InMemoryAdapter, folder: RunFolder, training: TrainingSummary) -> None:
    base = in_memory_adapter.model.get_base_model()
    base.config.save_pretrained(folder.cache / "base")
    tensors = {
        f"{split}.{number}.{key}": value.detach().cpu().contiguous().clone()
        for split, batches in (("held_out", in_memory_adapter.held_out), ("train", in_memory_adapter.train))
        for number, batch in enumerate(batches)
        for key, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    save_file(tensors, folder.cache / "batches.safetensors")
    resume_values = {
        "base_class": type(base).__name__,
        "dtype": str(next(iter(base.parameters())).dtype).removeprefix("torch."),
        "in_memory_adapter": {
            field.name: getattr(in_memory_adapter, field.name)
            for field in fields(in_memory_adapter)
            if field.name not in EXCLUDED_FIELDS
        },
        "training": asdict(training),
    }
    write_text(folder.cache / RESUME_FILE, json.dumps(resume_values, indent=2, default=list))


def find_smallest_adapter(
    in_memory_adapter: InMemoryAdapter, out: Path, training: TrainingSummary, measure_here: bool = True
) -> TruncationResult | None:
    """Begin the run and finish it. Return None if a fresh process has to finish it.

    If there are several processes, only the first one writes files and logs warnings.
    """
    level = logging.DEBUG if get_process_index() else logging.WARNING
    with tempfile.TemporaryDirectory(prefix="rightrank-") as scratch_folder:
        with sync_errors():
            folder = begin_run(
                in_memory_adapter, Path(scratch_folder) / "run" if get_process_index() else out, training
            )
        command = build_resume_command(str(out))
        if not measure_here or is_partitioned(in_memory_adapter.model):
            log.log(
                level, "rightrank: the adapter and the held-out rows are saved; to measure truncations: %s", command
            )
            return None
        advice = "" if in_memory_adapter.trainer_loss is not None else f"; to measure again: {command}"
        log.log(level, "rightrank: measuring truncations on %d batches%s", len(in_memory_adapter.held_out), advice)
        result, _ = finish_run(in_memory_adapter, folder, training, _load_hooks())
    for note in result.answer.notes:
        log.log(level, "rightrank: %s", note)
    log.log(level, "%s %s", result.answer.sentence, out / "adapter")
    return result


def _load_hooks() -> list[Hook]:
    """Return the hooks that report the result, or none in other processes than the first."""
    from rightrank.runs.views import Report  # not needed before the training has ended, as `select` in `finish_run`

    return [] if get_process_index() else [Report()]


def resume_measurement(out: Path, hooks: Sequence[Hook] = ()) -> Selected:
    """Finish a run that `begin_run` began in another process.

    Raises:
        ModelError: the folder is incomplete, or the base model cannot be loaded or differs from the one in training.
        RunFolderError: there is no unfinished run.
    """
    folder = RunFolder.open_existing(out)
    if not (folder.cache / RESUME_FILE).is_file():
        raise RunFolderError(
            f"{out}: there is no cache/{RESUME_FILE}; either the measurement is finished, or the training did not reach its end"
        )
    resume_values = read_json_object(folder.cache / RESUME_FILE)
    # The training's peak memory was measured in another process and cannot be compared.
    training = TrainingSummary(**resume_values["training"] | {"peak_bytes": 0})
    started = read_records(folder.journal.read(), str(out)).started
    adapter = open_adapter(folder.get_trial_folder(_compute_training_id(started, training.steps)))
    base = _load_base(started.model_name or "", folder, resume_values, adapter)
    with suppress_peft_warnings():
        model: Any = PeftModel.from_pretrained(base, str(adapter.path))
    splits: dict[str, dict[int, dict[str, torch.Tensor]]] = {"held_out": {}, "train": {}}
    for name, tensor in load_file(folder.cache / "batches.safetensors").items():
        split, number, key = name.split(".", 2)
        splits[split].setdefault(int(number), {})[key] = tensor
    held_out, train = ([batches[number] for number in sorted(batches)] for batches in splits.values())
    in_memory_adapter = InMemoryAdapter(model, held_out, train, **resume_values["in_memory_adapter"])
    _, selected = finish_run(in_memory_adapter, folder, training, [*hooks, *_load_hooks()])
    return selected


def _load_base(name: str, folder: RunFolder, resume_values: Mapping[str, Any], adapter: AdapterFolder) -> Any:
    if not name:
        raise ModelError("the base model cannot be loaded, because it has no name: the training created it in memory")
    try:
        config = transformers.AutoConfig.from_pretrained(folder.cache / "base")
        base_class = getattr(transformers, resume_values["base_class"])
        base = base_class.from_pretrained(name, config=config, dtype=getattr(torch, resume_values["dtype"]))
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise ModelError(f"{name}: the base model cannot be loaded ({get_first_line(error)})") from None
    difference = read_identity(adapter.path / BASE_FILE).find_difference(compute_base_identity(base, name))
    if difference is not None:
        raise ModelError(f"{name}: this is not the base model of the training ({difference})")
    return base


def build_settings(margin: float | None, ranks: Sequence[int] | int | None, metric: str | None) -> SelectSettings:
    """Build the settings of a truncation search. None selects the default.

    Raises:
        SettingsError: an invalid value.
    """
    if metric not in (None, "loss", "accuracy"):
        raise SettingsError(f"metric {metric!r}: allowed are loss and accuracy")
    values = {"margin": margin, "ranks": ranks, "metric": metric}
    return SelectSettings(**{name: value for name, value in values.items() if value is not None})


def collect_stated_settings(
    in_memory_adapter: InMemoryAdapter, args: TrainingArguments | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of `select` that the training states, and a note that lists missing ones."""
    lengths = [
        batch["input_ids"].shape[1]
        for batch in (*in_memory_adapter.train, *in_memory_adapter.held_out)
        if "input_ids" in batch
    ]
    extra_kwargs: dict[str, Any] = (
        {"seq_len": max(lengths)} if lengths and not getattr(args, "max_length", None) else {}
    )
    if args is not None:
        extra_kwargs["gradient_accumulation_steps"] = args.gradient_accumulation_steps * args.world_size
    settings, unstated = convert_configs(
        in_memory_adapter.model.peft_config[in_memory_adapter.name], args, **extra_kwargs
    )
    unstated += [] if args is not None else ["the learning rate", "the steps", "the batch size of your loop"]
    return settings, [f"the select command does not include {', '.join(unstated)}"] if unstated else []
