"""The end of a training as a run: the folder of a selection, whose executor scores truncations of the model as it is in memory.

`begin_run` writes the journal's first record, the trained adapter, and in `cache/` what a fresh process needs. `finish_run` walks down over the
truncations, here or in a fresh process; the hooks of a selection render it, and a run that was cut off continues where it stopped.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from rightrank.adapters.batch_scores import HeldOutBatches, has_class_labels, read_batch
from rightrank.adapters.in_memory import InMemoryAdapter, copy_factors, gather_adapter_moments, save_trained_adapter
from rightrank.adapters.preserved_state import preserve_state
from rightrank.adapters.processes import gather_parameters, is_partitioned, sync_errors
from rightrank.adapters.resize import cap_ranks, list_candidate_ranks, write_resized_adapter
from rightrank.data.files import create_temporary_folder, read_json_object, report_disk_errors, write_text
from rightrank.decision.adapter import adapter_answer, probable_ranks
from rightrank.decision.records import Records, records_of
from rightrank.models.adapter_folders import BASE_FILE
from rightrank.models.adapter_reader import AdapterFolder, open_adapter
from rightrank.models.base_models import compute_base_identity
from rightrank.runs.executor import Executor, PreparedSelection
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import AdapterProposal, Hook
from rightrank.runs.prepare import describe_environment
from rightrank.runs.run import select
from rightrank.schema.command import build_reproduce_command
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.errors import DataError, ModelError, NotFiniteError, RunFolderError, get_first_line
from rightrank.schema.events import DataSummary, JournalRecord, Listener, RunStarted
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, Trial, TrialFinished, TrialOutcome, TrialStarted, hash_content, trial_id
from rightrank.search.bracket import make_truncation_arm
from rightrank.search.history import Requests, Space, Trials, build_space
from rightrank.search.protocol import Strategy
from rightrank.train.adapter_runtime import read_identity
from rightrank.train.covariances import GatheredMoments
from rightrank.train.device import read_peak_bytes
from rightrank.train.evaluation import MetricResults
from rightrank.train.optimizer import Progress
from rightrank.train.targets import suppress_peft_warnings
from rightrank.train.trial import build_finished_trial
from rightrank.version import __version__

log = logging.getLogger("rightrank")

RESUME_FILE = "measure.json"  # in the run's cache
TRAINER = "its own trainer"  # the trainer by which the journal of such a run names its kind
# Of a `InMemoryAdapter`: in files of their own, or as by default.
EXCLUDED_FIELDS = ("model", "held_out", "train", "name", "write_beside")


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """What is known of the training whose end is measured."""

    settings: Mapping[str, Any]  # of `select`, as far as the training states them
    steps: int = 0  # 0: not known
    seconds: float | None = None  # without the end; None: not known
    read_peak_bytes: int = 0  # before the end; 0: not known
    checkpoint_step: int | None = None  # of the best checkpoint, where that is measured; None: the last
    notes: Sequence[str] = ()

    @property
    def checkpoint(self) -> str:
        if self.checkpoint_step is not None:
            return f"best (step {self.checkpoint_step})"
        return f"last (step {self.steps})" if self.steps else "last"


@dataclass(frozen=True, slots=True)
class TruncationResult:
    """The answer, whose last note says what it took."""

    answer: AdapterAnswer
    trained_trial: TrialFinished  # the adapter as it was trained
    folder: RunFolder
    notes: tuple[str, ...]  # on how truncations were made

    @property
    def examples(self) -> int:
        return len(self.trained_trial.example_losses)


def measure_peak_bytes() -> int:
    return read_peak_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def begin_run(live: InMemoryAdapter, out: Path, training: TrainingSummary) -> RunFolder:
    """Begin a run in `out` with everything that a fresh process needs, and move the result of an earlier training aside.

    Raises:
        ModelError: the model gives no logits.
        RunFolderError: the folder is in use, holds another kind of run or other files, or cannot be written.
    """
    folder = RunFolder(out)
    with folder.lock(), report_disk_errors(out):
        _require_truncation_run(folder)
        _require_logits(live)
        # A failure leaves neither a folder without a journal, which no later run could use, nor an earlier result aside.
        with create_temporary_folder(out / "begun") as temporary:
            temporary_run = RunFolder(temporary)
            with gather_parameters(live.model):
                adapter = save_trained_adapter(live.model, live.name, temporary_run.get_trial_folder("trained"))
                identity = compute_base_identity(live.model.get_base_model(), adapter.base_model or "")
            write_text(adapter.path / BASE_FILE, identity.content().decode())
            if live.write_beside is not None:
                live.write_beside(adapter.path)
            started = _build_run_started(live, training, adapter)
            adapter.path.rename(temporary_run.get_trial_folder(_compute_training_id(started, training.steps)))
            _write_resume_files(live, temporary_run, training)
            temporary_run.journal.append(started)
            if (earlier_folder := folder.move_aside()) is not None:
                log.warning("rightrank: the result of an earlier training was moved to %s", earlier_folder)
            folder.move_from(temporary_run)
    return folder


def _require_logits(live: InMemoryAdapter) -> None:
    """Raise if the model is an encoder without a head, whose rows of one class have no scores."""
    batch = next(iter(live.held_out), {})
    if is_partitioned(live.model) or "labels" not in batch or not has_class_labels(batch):
        return
    with preserve_state(live.model, live.name), torch.no_grad():
        output = live.model(**read_batch(live.model, batch).inputs)
    if getattr(output, "logits", None) is None:
        name = type(live.model.get_base_model()).__name__
        raise ModelError(
            f"{name} gives no logits: an encoder without a head has no scores of classes; give a model with one, such as of "
            "AutoModelForSequenceClassification"
        )


def require_result_folder(out: Path) -> None:
    """Require that a training can put its result in `out`; nothing is written there.

    Raises:
        RunFolderError: the folder is in use, or holds another kind of run or other files.
    """
    folder = RunFolder(out)
    folder.require_usable()
    if folder.is_in_use():
        raise RunFolderError(f"{out}: another process is using this folder; wait for it, or give another folder")
    _require_truncation_run(folder)


def _require_truncation_run(folder: RunFolder) -> None:
    """Raise if the folder holds a run that no end of a training wrote; of another version, it is recognised too."""
    if not folder.journal.path.is_file():
        return
    with folder.journal.path.open("rb") as file:
        line = file.readline()
    try:
        first_record = json.loads(line)
    except ValueError:  # also bytes that are no text
        first_record = None
    settings = first_record.get("settings") if isinstance(first_record, dict) else None
    if not isinstance(settings, dict) or settings.get("trainer") != TRAINER:
        raise RunFolderError(
            f"{folder.path}: holds a run that is not the result of a training's end, and it stays as it is; give another folder"
        )


def finish_run(
    live: InMemoryAdapter, folder: RunFolder, training: TrainingSummary, hooks: Sequence[Hook] = ()
) -> TruncationResult:
    """Walk down over the truncations of a live adapter until one loses more than the margin, and hand over.

    Raises:
        NotFiniteError: a held-out loss is NaN or infinite.
    """
    executor = CallbackExecutor(live, training)
    with sync_errors(), folder.lock(), report_disk_errors(folder.path):
        select(executor, folder, [executor, *hooks])
    records = executor.records
    answer = records.adapters[-1].answer
    return TruncationResult(answer, records.by_id[answer.trained_id], folder, executor.moments.notices)


def measure_truncations(live: InMemoryAdapter, out: Path) -> TruncationResult:
    """Begin a run and finish it at once, without views."""
    training = TrainingSummary({})
    return finish_run(live, begin_run(live, out, training), training)


class DescendingStrategy(Strategy):
    """One training, and its truncations from the highest rank down until one does not hold."""

    name = "downward"

    def script(self, trials: Trials) -> Requests:
        space = self.space
        yield [space.make_arm(space.trained_trial, space.learning_rates[0])]
        parent = trials.get_training(space.trained_trial, space.learning_rates[0])
        for rank in reversed(space.ranks[:-1] if parent is not None else ()):
            assert parent is not None
            yield [make_truncation_arm(parent, rank)]
            answer = adapter_answer(list(trials.outcomes.values()), space.criterion)
            if answer is None or answer.rank != rank:
                return


def _build_strategy(started: RunStarted, steps: int) -> Strategy:
    settings = started.select_settings
    space: Space = build_space(settings, steps, started.data.loss_kind)
    rates = settings.learning_rates if "learning_rates" in settings.model_fields_set else (0.0,)  # not known
    return DescendingStrategy(replace(space, evaluates_base=False, learning_rates=rates))


def _compute_training_id(started: RunStarted, steps: int) -> str:
    """The id of the training itself among the trials of the run."""
    (top,) = _build_strategy(started, steps).ask([])
    return trial_id(started.fingerprint, top)


def _build_run_started(live: InMemoryAdapter, training: TrainingSummary, adapter: AdapterFolder) -> RunStarted:
    base = live.model.get_base_model()
    batch, classes = live.held_out[0], None
    form: Literal["preference", "classification", "own"] = "preference" if "completion_mask" in batch else "own"
    if form == "own" and has_class_labels(batch):
        form, classes = "classification", [str(name) for _, name in sorted(base.config.id2label.items())]
    ranks = list_candidate_ranks(adapter, live.ranks)
    overrides: dict[str, Any] = {"goal": "adapter", "metric": live.metric, "ranks": ranks}
    overrides |= {} if live.margin is None else {"margin": live.margin}
    settings = SelectSettings(**{**training.settings, **overrides})
    stated_names = {*training.settings, *overrides}
    values = {"trainer": TRAINER, **settings.model_dump(mode="json", include=stated_names)}
    values["model"] = adapter.base_model
    is_classifier = adapter.config["task_type"] == "SEQ_CLS"
    values["is_text"] = values["model"] is not None and (
        is_classifier if form == "classification" else base.can_generate()
    )
    return RunStarted(
        rightrank_version=__version__,
        fingerprint=hash_content({"settings": values, "steps": training.steps, "checkpoint": training.checkpoint}),
        settings=values,
        environment=describe_environment(str(next(live.model.parameters()).device)),
        data=DataSummary(form=form, splits={}, splits_given=True, duplicates_across_splits=0, classes=classes),
        evaluation_examples=[],
        metric=live.metric,
        higher_is_better=live.metric == "accuracy",
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


@dataclass(frozen=True, kw_only=True)
class PreparedTruncations(PreparedSelection):
    end: CallbackExecutor

    def open_executor(
        self, folder: RunFolder, listener: Listener, records: Records
    ) -> AbstractContextManager[Executor]:
        return self.end.open_executor(folder, listener, records)


class CallbackExecutor(Hook):
    """The end of a training: the request for the run that `begin_run` has begun, its executor, which puts the truncations in the place of the
    trained adapter, and what a person should know of it, as notes of the answer."""

    def __init__(self, live: InMemoryAdapter, training: TrainingSummary) -> None:
        self._live, self._training = live, training
        self._began = time.monotonic()
        self._held_out = HeldOutBatches(live.model, live.held_out, live.beta)
        self.moments = GatheredMoments({}, 0, 0)  # before the first truncation
        self.folder: RunFolder
        self.listener: Listener
        self.records: Records

    def prepare(
        self, folder: RunFolder, journal: Sequence[JournalRecord], before: PreparedSelection | None = None
    ) -> PreparedSelection:
        """As `rightrank.runs.executor.Asked`."""
        started, steps = records_of(journal, str(folder.path)).started, self._training.steps
        strategy = _build_strategy(started, steps)
        return PreparedTruncations(
            end=self, started=started, settings=started.select_settings, steps=steps, strategy=strategy
        )

    def replace_settings(self, settings: SelectSettings) -> CallbackExecutor:
        return self

    @contextmanager
    def open_executor(self, folder: RunFolder, listener: Listener, records: Records) -> Iterator[CallbackExecutor]:
        """As `rightrank.runs.executor.Plan`."""
        self.folder, self.listener, self.records = folder, listener, records
        with preserve_state(self._live.model, self._live.name):
            self.moments = gather_adapter_moments(
                self._live
            )  # of the adapter as it is in memory, which no truncation has replaced yet
            yield self

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        for trial in trials:
            self.listener.on_event(TrialStarted(**trial.fields))
            yield self._evaluate_trial(trial, trial.arm, self.folder.get_trial_folder(trial.trial_id))

    def _evaluate_trial(self, trial: Trial, arm: Arm, target: Path) -> TrialFinished:
        training, begun, progress, moments = self._training, time.monotonic(), Progress(), self.moments.moments
        changes: dict[str, Any]
        if arm.truncate_from is not None:
            trained = open_adapter(self.folder.get_trial_folder(arm.truncate_from))
            with sync_errors():
                write_resized_adapter(trained, target, cap_ranks(trained, arm.rank, moments), moments)
            copy_factors(self._live.model, self._live.name, open_adapter(target))
            changes = {"truncation": "kfac" if moments else "svd"}
        else:
            progress = Progress(step=training.steps, train_seconds=training.seconds or 0.0)
            size = sum(module.parameters for module in open_adapter(target).modules)
            changes = {
                "checkpoint_step": training.checkpoint_step,
                "trainable_parameters": size,
                "peak_bytes": training.peak_bytes,
            }
        scores = self._held_out.scores()
        if not np.isfinite(scores.losses).all():
            raise NotFiniteError(f"rank {arm.rank}: a held-out loss is NaN or infinite; the training may have diverged")
        if len(scores.losses) < 2:
            raise DataError("fewer than two held-out examples have a label; give more")
        outcome = build_finished_trial(trial, self._live.metric, scores, MetricResults(), progress)
        return outcome.model_copy(update={"eval_seconds": time.monotonic() - begun, **changes})

    def on_adapter(self, proposal: AdapterProposal) -> AdapterAnswer:
        """With the cost, and an estimate of the rank to train at."""
        training, answer, records = self._training, proposal.answer, proposal.records
        notes = [*training.notes, *answer.notes, *self.moments.notices]
        notes.append(format_training_rank_estimate(answer, records.started))
        notes.append(self._format_cost(len(records.by_id[answer.trained_id].example_losses)))
        return answer.model_copy(update={"notes": notes})

    def _format_cost(self, examples: int) -> str:
        seconds, training = time.monotonic() - self._began, self._training
        time_share = f", {seconds / training.seconds:.1%} of the training's time" if training.seconds else ""
        extra_bytes = measure_peak_bytes() - training.peak_bytes if training.peak_bytes else 0
        peak_comparison = f"{extra_bytes / 2**20:.0f} MiB above" if extra_bytes > 0 else "not above"
        memory_note = f"; peak memory {peak_comparison} the training's" if training.peak_bytes else ""
        weights = f"the {training.checkpoint} weights"
        return f"Measured from {weights} on {examples} held-out examples in {seconds:.1f} s{time_share}{memory_note}."


def format_training_rank_estimate(answer: AdapterAnswer, started: RunStarted) -> str:
    """An estimate of the rank to train at, with the command that would prove it."""
    low, high = probable_ranks(answer)
    rank_range = f"{low}" if low == high else f"{low} to {high}"
    ranks = sorted({max(1, low // 2), low, high, answer.trained_rank})
    settings = started.select_settings.model_copy(update={"goal": "training-rank", "ranks": tuple(ranks)})
    command = build_reproduce_command(started.model_name or "MODEL", "DATA", settings)
    return (
        f"An estimate, not evidence: the rank to train at next time probably is {rank_range}. "
        f"With the file of your rows for DATA, this would prove it: {command}"
    )


def _write_resume_files(live: InMemoryAdapter, folder: RunFolder, training: TrainingSummary) -> None:
    base = live.model.get_base_model()
    base.config.save_pretrained(folder.cache / "base")
    tensors = {
        f"{split}.{number}.{key}": value.detach().cpu().contiguous().clone()
        for split, batches in (("held_out", live.held_out), ("train", live.train))
        for number, batch in enumerate(batches)
        for key, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    save_file(tensors, folder.cache / "batches.safetensors")
    resume_values = {
        "base_class": type(base).__name__,
        "dtype": str(next(iter(base.parameters())).dtype).removeprefix("torch."),
        "live": {field.name: getattr(live, field.name) for field in fields(live) if field.name not in EXCLUDED_FIELDS},
        "training": asdict(training),
    }
    write_text(folder.cache / RESUME_FILE, json.dumps(resume_values, indent=2, default=list))


def resume_measurement(out: Path, hooks: Sequence[Hook] = ()) -> str:
    """Finish a run that `begin_run` began in another process, and return its sentences.

    Raises:
        ModelError: the folder is not whole, or the base cannot be loaded or is another one.
        RunFolderError: there is no run that is not finished.
    """
    folder = RunFolder.open_existing(out)
    if not (folder.cache / RESUME_FILE).is_file():
        raise RunFolderError(
            f"{out}: there is no cache/{RESUME_FILE}; the measurement ended, or the training did not reach its end"
        )
    resume_values = read_json_object(folder.cache / RESUME_FILE)
    # The peak memory of the training is that of another process.
    training = TrainingSummary(**resume_values["training"] | {"peak_bytes": 0})
    started = records_of(folder.journal.read(), str(out)).started
    adapter = open_adapter(folder.get_trial_folder(_compute_training_id(started, training.steps)))
    base = _load_base(started.model_name or "", folder, resume_values, adapter)
    with suppress_peft_warnings():
        model: Any = PeftModel.from_pretrained(base, str(adapter.path))
    splits: dict[str, dict[int, dict[str, torch.Tensor]]] = {"held_out": {}, "train": {}}
    for name, tensor in load_file(folder.cache / "batches.safetensors").items():
        split, number, key = name.split(".", 2)
        splits[split].setdefault(int(number), {})[key] = tensor
    held_out, train = ([batches[number] for number in sorted(batches)] for batches in splits.values())
    live = InMemoryAdapter(model, held_out, train, **resume_values["live"])
    result = finish_run(live, folder, training, hooks)
    return f"{result.answer.sentence} {folder.adapter}\n{result.answer.notes[-1]}"


def _load_base(name: str, folder: RunFolder, resume_values: Mapping[str, Any], adapter: AdapterFolder) -> Any:
    if not name:
        raise ModelError("the base model has no name that it could be loaded by; the training made it in memory")
    try:
        config = transformers.AutoConfig.from_pretrained(folder.cache / "base")
        base_class = getattr(transformers, resume_values["base_class"])
        base = base_class.from_pretrained(name, config=config, dtype=getattr(torch, resume_values["dtype"]))
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise ModelError(f"{name}: the base model cannot be loaded ({get_first_line(error)})") from None
    difference = read_identity(adapter.path / BASE_FILE).difference(compute_base_identity(base, name))
    if difference is not None:
        raise ModelError(f"{name}: this is not the base that was trained on ({difference})")
    return base
