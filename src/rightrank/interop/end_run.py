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

from rightrank.adapters.batch_scores import HeldOutBatches, is_of_classes, read_batch
from rightrank.adapters.in_memory import LiveAdapter, gather, put_in_place, save_trained
from rightrank.adapters.preserved_state import as_it_came
from rightrank.adapters.processes import gathered, is_partitioned, together
from rightrank.adapters.resize import candidate_ranks, capped, write_truncated
from rightrank.data.files import read_json_object, report_disk_errors, temporary_folder, write_text
from rightrank.decision.adapter import adapter_answer, probable_ranks
from rightrank.decision.records import Records, records_of
from rightrank.models.adapter_folders import BASE_FILE
from rightrank.models.adapter_reader import AdapterFolder, open_adapter
from rightrank.models.base_models import base_identity
from rightrank.runs.executor import Executor, PreparedSelection
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import AdapterProposal, Hook
from rightrank.runs.prepare import describe_environment
from rightrank.runs.run import select
from rightrank.schema.command import reproduce_command
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.errors import DataError, ModelError, NotFiniteError, RunFolderError, first_line
from rightrank.schema.events import DataSummary, JournalRecord, Listener, RunStarted
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, Trial, TrialFinished, TrialOutcome, TrialStarted, content_hash, trial_id
from rightrank.search.bracket import make_truncation_arm
from rightrank.search.history import Requests, Space, Trials, make_space
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

KEPT = "measure.json"  # in the run's cache
TRAINER = "its own trainer"  # the trainer by which the journal of such a run names its kind
# Of a `LiveAdapter`: in files of their own, or as by default.
ELSEWHERE = ("model", "held_out", "train", "name", "write_beside")


@dataclass(frozen=True, slots=True)
class Training:
    """What is known of the training whose end is measured."""

    settings: Mapping[str, Any]  # of `select`, as far as the training states them
    steps: int = 0  # 0: not known
    seconds: float | None = None  # without the end; None: not known
    read_peak_bytes: int = 0  # before the end; 0: not known
    kept_step: int | None = None  # of the best checkpoint, where that is measured; None: the last
    notes: Sequence[str] = ()

    @property
    def get_checkpoint_path(self) -> str:
        if self.kept_step is not None:
            return f"best (step {self.kept_step})"
        return f"last (step {self.steps})" if self.steps else "last"


@dataclass(frozen=True, slots=True)
class Ending:
    """The answer, whose last note says what it took."""

    answer: AdapterAnswer
    top: TrialFinished  # the adapter as it was trained
    folder: RunFolder
    notes: tuple[str, ...]  # on how truncations were made

    @property
    def examples(self) -> int:
        return len(self.top.example_losses)


def peak_so_far() -> int:
    return read_peak_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def begin_run(live: LiveAdapter, out: Path, training: Training) -> RunFolder:
    """Begin a run in `out` with everything that a fresh process needs, and move the result of an earlier training aside.

    Raises:
        ModelError: the model gives no logits.
        RunFolderError: the folder is in use, holds another kind of run or other files, or cannot be written.
    """
    folder = RunFolder(out)
    with folder.lock(), report_disk_errors(out):
        _require_end_run(folder)
        _require_logits(live)
        # A failure leaves neither a folder without a journal, which no later run could use, nor an earlier result aside.
        with temporary_folder(out / "begun") as temporary:
            begun = RunFolder(temporary)
            with gathered(live.model):
                adapter = save_trained(live.model, live.name, begun.get_trial_folder("trained"))
                identity = base_identity(live.model.get_base_model(), adapter.base_model or "")
            write_text(adapter.path / BASE_FILE, identity.content().decode())
            if live.write_beside is not None:
                live.write_beside(adapter.path)
            started = _started(live, training, adapter)
            adapter.path.rename(begun.get_trial_folder(_top(started, training.steps)))
            _keep(live, begun, training)
            begun.journal.append(started)
            if (aside := folder.move_aside()) is not None:
                log.warning("rightrank: the result of an earlier training was moved to %s", aside)
            folder.move_from(begun)
    return folder


def _require_logits(live: LiveAdapter) -> None:
    """Raise if the model is an encoder without a head, whose rows of one class have no scores."""
    batch = next(iter(live.held_out), {})
    if is_partitioned(live.model) or "labels" not in batch or not is_of_classes(batch):
        return
    with as_it_came(live.model, live.name), torch.no_grad():
        output = live.model(**read_batch(live.model, batch).inputs)
    if getattr(output, "logits", None) is None:
        name = type(live.model.get_base_model()).__name__
        raise ModelError(
            f"{name} gives no logits: an encoder without a head has no scores of classes; give a model with one, such as of "
            "AutoModelForSequenceClassification"
        )


def require_end_folder(out: Path) -> None:
    """Require that a training can put its result in `out`; nothing is written there.

    Raises:
        RunFolderError: the folder is in use, or holds another kind of run or other files.
    """
    folder = RunFolder(out)
    folder.require_usable()
    if folder.is_in_use():
        raise RunFolderError(f"{out}: another process is using this folder; wait for it, or give another folder")
    _require_end_run(folder)


def _require_end_run(folder: RunFolder) -> None:
    """Raise if the folder holds a run that no end of a training wrote; of another version, it is recognised too."""
    if not folder.journal.path.is_file():
        return
    with folder.journal.path.open("rb") as file:
        line = file.readline()
    try:
        first = json.loads(line)
    except ValueError:  # also bytes that are no text
        first = None
    settings = first.get("settings") if isinstance(first, dict) else None
    if not isinstance(settings, dict) or settings.get("trainer") != TRAINER:
        raise RunFolderError(
            f"{folder.path}: holds a run that is not the result of a training's end, and it stays as it is; give another folder"
        )


def finish_run(live: LiveAdapter, folder: RunFolder, training: Training, hooks: Sequence[Hook] = ()) -> Ending:
    """Walk down over the truncations of a live adapter until one loses more than the margin, and hand over.

    Raises:
        NotFiniteError: a held-out loss is NaN or infinite.
    """
    end = _End(live, training)
    with together(), folder.lock(), report_disk_errors(folder.path):
        select(end, folder, [end, *hooks])
    records = end.records
    answer = records.adapters[-1].answer
    return Ending(answer, records.by_id[answer.trained_id], folder, end.moments.notices)


def measure(live: LiveAdapter, out: Path) -> Ending:
    """Begin a run and finish it at once, without views."""
    training = Training({})
    return finish_run(live, begin_run(live, out, training), training)


class Downward(Strategy):
    """One training, and its truncations from the highest rank down until one does not hold."""

    name = "downward"

    def script(self, trials: Trials) -> Requests:
        space = self.space
        yield [space.arm(space.top, space.learning_rates[0])]
        parent = trials.whole(space.top, space.learning_rates[0])
        for rank in reversed(space.ranks[:-1] if parent is not None else ()):
            assert parent is not None
            yield [make_truncation_arm(parent, rank)]
            answer = adapter_answer(list(trials.outcomes.values()), space.criterion)
            if answer is None or answer.rank != rank:
                return


def _strategy(started: RunStarted, steps: int) -> Strategy:
    settings = started.select_settings
    space: Space = make_space(settings, steps, started.data.loss_kind)
    rates = settings.learning_rates if "learning_rates" in settings.model_fields_set else (0.0,)  # not known
    return Downward(replace(space, evaluates_base=False, learning_rates=rates))


def _top(started: RunStarted, steps: int) -> str:
    """The id of the training itself among the trials of the run."""
    (top,) = _strategy(started, steps).ask([])
    return trial_id(started.fingerprint, top)


def _started(live: LiveAdapter, training: Training, adapter: AdapterFolder) -> RunStarted:
    base = live.model.get_base_model()
    batch, classes = live.held_out[0], None
    form: Literal["preference", "classification", "own"] = "preference" if "completion_mask" in batch else "own"
    if form == "own" and is_of_classes(batch):
        form, classes = "classification", [str(name) for _, name in sorted(base.config.id2label.items())]
    ranks = candidate_ranks(adapter, live.ranks)
    given: dict[str, Any] = {"goal": "adapter", "metric": live.metric, "ranks": ranks}
    given |= {} if live.margin is None else {"margin": live.margin}
    settings = SelectSettings(**{**training.settings, **given})
    stated = {*training.settings, *given}
    values = {"trainer": TRAINER, **settings.model_dump(mode="json", include=stated)}
    values["model"] = adapter.base_model
    is_classifier = adapter.config["task_type"] == "SEQ_CLS"
    values["is_text"] = values["model"] is not None and (
        is_classifier if form == "classification" else base.can_generate()
    )
    return RunStarted(
        rightrank_version=__version__,
        fingerprint=content_hash({"settings": values, "steps": training.steps, "checkpoint": training.get_checkpoint_path}),
        settings=values,
        environment=describe_environment(str(next(live.model.parameters()).device)),
        data=DataSummary(form=form, splits={}, splits_given=True, duplicates_across_splits=0, classes=classes),
        evaluation_examples=[],
        metric=live.metric,
        higher_is_better=live.metric == "accuracy",
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


@dataclass(frozen=True, kw_only=True)
class _EndPlan(PreparedSelection):
    end: _End

    def open_executor(self, folder: RunFolder, listener: Listener, records: Records) -> AbstractContextManager[Executor]:
        return self.end.open_executor(folder, listener, records)


class _End(Hook):
    """The end of a training: the request for the run that `begin_run` has begun, its executor, which puts the truncations in the place of the
    trained adapter, and what a person should know of it, as notes of the answer."""

    def __init__(self, live: LiveAdapter, training: Training) -> None:
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
        strategy = _strategy(started, steps)
        return _EndPlan(end=self, started=started, settings=started.select_settings, steps=steps, strategy=strategy)

    def replace_settings(self, settings: SelectSettings) -> _End:
        return self

    @contextmanager
    def open_executor(self, folder: RunFolder, listener: Listener, records: Records) -> Iterator[_End]:
        """As `rightrank.runs.executor.Plan`."""
        self.folder, self.listener, self.records = folder, listener, records
        with as_it_came(self._live.model, self._live.name):
            self.moments = gather(self._live)  # of the adapter as it is in memory, which no truncation has replaced yet
            yield self

    def run(self, trials: Sequence[Trial], base_loss: float | None) -> Iterator[TrialOutcome]:
        for trial in trials:
            self.listener.on_event(TrialStarted(**trial.fields))
            yield self._outcome(trial, trial.arm, self.folder.get_trial_folder(trial.trial_id))

    def _outcome(self, trial: Trial, arm: Arm, target: Path) -> TrialFinished:
        training, begun, progress, moments = self._training, time.monotonic(), Progress(), self.moments.moments
        changes: dict[str, Any]
        if arm.truncate_from is not None:
            trained = open_adapter(self.folder.get_trial_folder(arm.truncate_from))
            with together():
                write_truncated(trained, target, capped(trained, arm.rank, moments), moments)
            put_in_place(self._live.model, self._live.name, open_adapter(target))
            changes = {"truncation": "kfac" if moments else "svd"}
        else:
            progress = Progress(step=training.steps, train_seconds=training.seconds or 0.0)
            size = sum(module.parameters for module in open_adapter(target).modules)
            changes = {"kept_step": training.kept_step, "trainable_parameters": size, "peak_bytes": training.peak_bytes}
        scores = self._held_out.scores()
        if not np.isfinite(scores.losses).all():
            raise NotFiniteError(f"rank {arm.rank}: a held-out loss is NaN or infinite; the training may have diverged")
        if len(scores.losses) < 2:
            raise DataError("fewer than two held-out examples have a label; give more")
        outcome = build_finished_trial(trial, self._live.metric, scores, MetricResults(), progress)
        return outcome.model_copy(update={"eval_seconds": time.monotonic() - begun, **changes})

    def on_adapter(self, answered: AdapterProposal) -> AdapterAnswer:
        """With the cost, and an estimate of the rank to train at."""
        training, answer, records = self._training, answered.answer, answered.records
        notes = [*training.notes, *answer.notes, *self.moments.notices]
        notes.append(next_training(answer, records.started))
        notes.append(self._cost(len(records.by_id[answer.trained_id].example_losses)))
        return answer.model_copy(update={"notes": notes})

    def _cost(self, examples: int) -> str:
        seconds, training = time.monotonic() - self._began, self._training
        share = f", {seconds / training.seconds:.1%} of the training's time" if training.seconds else ""
        more = peak_so_far() - training.peak_bytes if training.peak_bytes else 0
        above = f"{more / 2**20:.0f} MiB above" if more > 0 else "not above"
        known = f"; peak memory {above} the training's" if training.peak_bytes else ""
        where = f"the {training.get_checkpoint_path} weights"
        return f"Measured from {where} on {examples} held-out examples in {seconds:.1f} s{share}{known}."


def next_training(answer: AdapterAnswer, started: RunStarted) -> str:
    """An estimate of the rank to train at, with the command that would prove it."""
    low, high = probable_ranks(answer)
    where = f"{low}" if low == high else f"{low} to {high}"
    ranks = sorted({max(1, low // 2), low, high, answer.trained_rank})
    settings = started.select_settings.model_copy(update={"goal": "training-rank", "ranks": tuple(ranks)})
    command = reproduce_command(started.model_name or "MODEL", "DATA", settings)
    return (
        f"An estimate, not evidence: the rank to train at next time probably is {where}. "
        f"With the file of your rows for DATA, this would prove it: {command}"
    )


def _keep(live: LiveAdapter, folder: RunFolder, training: Training) -> None:
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
    asked = {
        "base_class": type(base).__name__,
        "dtype": str(next(iter(base.parameters())).dtype).removeprefix("torch."),
        "live": {field.name: getattr(live, field.name) for field in fields(live) if field.name not in ELSEWHERE},
        "training": asdict(training),
    }
    write_text(folder.cache / KEPT, json.dumps(asked, indent=2, default=list))


def measure_again(out: Path, hooks: Sequence[Hook] = ()) -> str:
    """Finish a run that `begin_run` began in another process, and return its sentences.

    Raises:
        ModelError: the folder is not whole, or the base cannot be loaded or is another one.
        RunFolderError: there is no run that is not finished.
    """
    folder = RunFolder.open_existing(out)
    if not (folder.cache / KEPT).is_file():
        raise RunFolderError(
            f"{out}: there is no cache/{KEPT}; the measurement ended, or the training did not reach its end"
        )
    asked = read_json_object(folder.cache / KEPT)
    # The peak memory of the training is that of another process.
    training = Training(**asked["training"] | {"peak_bytes": 0})
    started = records_of(folder.journal.read(), str(out)).started
    adapter = open_adapter(folder.get_trial_folder(_top(started, training.steps)))
    base = _base(started.model_name or "", folder, asked, adapter)
    with suppress_peft_warnings():
        model: Any = PeftModel.from_pretrained(base, str(adapter.path))
    splits: dict[str, dict[int, dict[str, torch.Tensor]]] = {"held_out": {}, "train": {}}
    for name, tensor in load_file(folder.cache / "batches.safetensors").items():
        split, number, key = name.split(".", 2)
        splits[split].setdefault(int(number), {})[key] = tensor
    held_out, train = ([batches[number] for number in sorted(batches)] for batches in splits.values())
    live = LiveAdapter(model, held_out, train, **asked["live"])
    ending = finish_run(live, folder, training, hooks)
    return f"{ending.answer.sentence} {folder.adapter}\n{ending.answer.notes[-1]}"


def _base(name: str, folder: RunFolder, asked: Mapping[str, Any], adapter: AdapterFolder) -> Any:
    if not name:
        raise ModelError("the base model has no name that it could be loaded by; the training made it in memory")
    try:
        config = transformers.AutoConfig.from_pretrained(folder.cache / "base")
        base_class = getattr(transformers, asked["base_class"])
        base = base_class.from_pretrained(name, config=config, dtype=getattr(torch, asked["dtype"]))
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise ModelError(f"{name}: the base model cannot be loaded ({first_line(error)})") from None
    difference = read_identity(adapter.path / BASE_FILE).difference(base_identity(base, name))
    if difference is not None:
        raise ModelError(f"{name}: this is not the base that was trained on ({difference})")
    return base
