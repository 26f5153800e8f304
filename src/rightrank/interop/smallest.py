"""`SmallestAdapter`: the smallest adapter within the margin, at the end of a training with the Trainer of transformers or TRL.

    trainer.add_callback(SmallestAdapter(trainer.eval_dataset, margin=0.005))
    trainer.train()   # at the end: one sentence, and <output_dir>/rightrank/adapter

What cannot work is refused before the first step. At the end nothing raises: what fails is one line, and the training's own result is safe.
"""

from __future__ import annotations

import copy
import gc
import logging
import random
import re
import sys
import tempfile
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rightrank.adapters.live import LiveAdapter, as_it_came, require_end, trained_adapter
from rightrank.adapters.live_scores import (
    BETA,
    FAILURES,
    GROUP,
    Batch,
    batch_loss,
    is_partitioned,
    positions,
    process_index,
    read_batch,
    together,
)
from rightrank.data.token_store import IGNORED
from rightrank.hooks.report import Report
from rightrank.interop.end_run import (
    KEPT,
    Ending,
    Training,
    begin_run,
    finish_run,
    measure_again,
    peak_so_far,
    require_end_folder,
)
from rightrank.runs import plugins
from rightrank.runs.hook import Hook
from rightrank.schema.command import measure_command
from rightrank.schema.configs import stated_settings
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.errors import DataError, ModelError, RightrankError, SettingsError, first_line
from rightrank.schema.settings import SelectSettings
from rightrank.train.covariances import MOMENT_TOKENS

log = logging.getLogger("rightrank")

MIN_EXAMPLES = 30
FEWEST, MOST = 100, 1000  # examples that are scored where nothing else is asked for
MAX_SHARE = 0.1  # of the training's time, which the end may take where FEWEST examples allow it
MOMENT_BATCHES = 64  # of a loop of the user's own
MOMENT_SHARE = 0.02  # of the training's tokens, for second moments
COMPARED_ROWS = 100_000  # of the training set, in the search for held-out rows
# Columns that say nothing of what an example is: what follows from its tokens, what is asked of it, and numbers of rows.
NOT_CONTENT = re.compile(r"mask|labels?$|^(token_type|position)_ids$|^(idx|id|index|length|seq_lengths)$|_logps$")


@dataclass(eq=False, repr=False)
class SmallestAdapter(TrainerCallback):
    """Truncates the trained adapter at the end of `train()` and keeps the smallest one within the margin.

    Args:
        eval_dataset: Held-out rows as the trainer has them, tokenized. None: the trainer's own `eval_dataset`.
        margin: How much worse is still enough, in nats a token; None for the default: 0.005, half a point of accuracy, 0.02 for
            preference pairs, or 1% of the loss of a classifier.
        ranks: Candidates; None for the powers of two below the adapter's rank.
        metric: `loss`, or `accuracy` of a classifier.
        max_examples: Held-out examples to score at most. None: as many as a tenth of the training's time allows, from 100 to 1000.
        group: The column of `eval_dataset` that says which rows belong together, such as a document's; bounds are then over groups. None: rows
            with one prompt, which the labels leave out, belong together.
        measure: False: at the end keep what a fresh process needs, log its command, and leave the measurement to it.

    Attributes:
        result: The answer after `train()`; None before, and where it failed.

    Raises at the training's begin:
        DataError: no held-out rows, fewer than two that are not in the training set, or rows that give no loss by example.
        ModelError: an adapter that cannot be truncated, or beside which another one is active.
        SettingsError: a value that is not allowed, or a loss without a value by example.
    """

    _writes_run: ClassVar[bool] = True
    eval_dataset: Any = None
    _: KW_ONLY
    margin: float | None = None
    ranks: Sequence[int] | None = None
    metric: str = "loss"
    max_examples: int | None = None
    group: str | None = None
    measure: bool = True
    result: Ending | None = field(default=None, init=False)
    _loaders: Mapping[str, Any] = field(default_factory=dict, init=False)
    _trainer: Trainer | None = field(default=None, init=False)
    _held_out: Sequence[Mapping[str, Any]] = field(default=(), init=False)
    _is_training: bool = field(default=False, init=False)
    _started: float = field(default_factory=time.monotonic, init=False)
    _shared: str = field(default="", init=False)  # a line on rows that are held out and trained on

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot work at the end, by scoring two examples."""
        self._is_training = False
        if state.is_hyper_param_search:
            return  # a search ends many trainings, and none of them is the one to hand over
        self._loaders, self._shared = kwargs, ""
        self.result = None
        self._trainer = trainer = _trainer_of(self, control)
        if trainer is not None:  # trackers end their runs at the training's end: this callback comes before them
            callbacks = trainer.callback_handler.callbacks
            callbacks.remove(self)
            if any(isinstance(other, SmallestAdapter) for other in callbacks):
                raise SettingsError(
                    f"SmallestAdapter: the trainer has two, and both write to {args.output_dir}/rightrank; add one"
                )
            callbacks.insert(0, self)
        settings, model = checked(self.margin, self.ranks, self.metric), kwargs["model"]
        if self.max_examples is not None and not (isinstance(self.max_examples, int) and self.max_examples > 1):
            raise SettingsError(f"max_examples {self.max_examples!r}: give a whole number from 2")
        self.margin, self.ranks = settings.margin, settings.ranks if "ranks" in settings.model_fields_set else None
        name = require_end(model, self.ranks)
        evaluated, loader = getattr(trainer, "eval_dataset", None), kwargs["train_dataloader"]
        given = evaluated if self.eval_dataset is None else self.eval_dataset
        with as_it_came(model, name, given, loader.dataset, loader.collate_fn):
            self._held_out = self._rows_to_score(given, given is not evaluated)
            _groups(self._held_out, self.group)  # refuses a column that groups nothing
            self._require_scores(model, args)
        self._is_training = True
        self._started = time.monotonic()
        if state.is_world_process_zero:
            folder = Path(args.output_dir or ".")
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # a folder that can't be written fails here
            if self._writes_run:
                require_end_folder(folder / "rightrank")

    def _rows_to_score(self, rows: Any, is_own: bool) -> Sequence[Mapping[str, Any]]:
        """The held-out rows, without those of the training set.

        Args:
            is_own: whether this callback alone reads them.

        Raises:
            DataError: no rows; rows that can be read once, by the trainer; rows that are no mappings; or fewer than two are left.
        """
        if isinstance(rows, Mapping):
            raise DataError(f"SmallestAdapter: {len(rows)} held-out sets ({', '.join(rows)}); give one of them")
        count = self.max_examples or MOST
        held_out = some_rows(rows, count, is_own)
        if len(held_out) < 2:
            raise DataError(
                "SmallestAdapter has no held-out rows that can be read twice: give the trainer an eval_dataset with a length, or "
                "SmallestAdapter one"
            )
        if len(held_out) == count and not hasattr(rows, "__getitem__"):
            log.warning(
                "rightrank: of an iterable the first %d rows are scored; shuffle one that is in the order of its classes",
                count,
            )
        columns = _columns(self._loaders["train_dataloader"].dataset)
        train = some_rows(self._loaders["train_dataloader"].dataset, COMPARED_ROWS)
        if odd := next((row for row in [*held_out, *train[:1]] if not isinstance(row, Mapping)), None):
            raise DataError(
                f"SmallestAdapter: a row is a {type(odd).__name__}; give rows that are mappings, with input_ids and labels"
            )
        seen = {_content(row, columns) for row in train}
        unseen = [row for row in held_out if _content(row, columns) not in seen]
        if len(unseen) < len(held_out):
            self._shared = f"{len(held_out) - len(unseen)} of {len(held_out)} held-out rows are in the training set; they are left out"
            log.warning("rightrank: %s", self._shared)
        if len(unseen) < 2:
            raise DataError(
                "SmallestAdapter: the held-out rows are in the training set; give rows that it does not hold"
            )
        if len(unseen) < MIN_EXAMPLES:
            log.warning("rightrank: %d held-out examples can show little; give some hundred", len(unseen))
        return unseen

    def _require_scores(self, model: Any, args: TrainingArguments) -> None:
        """Score two examples in the way of the end.

        Raises:
            DataError: the collator's batches give no loss by example.
            SettingsError: the metric has no value by example.
        """
        if not self._held_out:
            return  # nothing is measured
        loader = self._loaders["train_dataloader"]
        try:
            batch = _batches(self._held_out[:2], loader, 2)[0]
            batches = _batches(self._held_out, loader, 8)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"SmallestAdapter: the trainer's collator does not take the held-out rows ({first_line(error)}); give "
                "trainer.eval_dataset, which the trainer has tokenized"
            ) from None
        beta = _beta(args, batch)
        # The passes of ZeRO-3 begin in DeepSpeed's engine; a fresh process measures.
        loss = None if is_partitioned(model) else batch_loss(model, batch, beta)
        if not any(count >= 2 for count in accumulate(read_batch(model, part).examples for part in batches)):
            raise DataError("SmallestAdapter: fewer than two held-out rows have a label; give rows with labels")
        if self.metric == "accuracy" and loss is not None and self.metric not in loss.example_metrics:
            raise SettingsError("metric 'accuracy': only a classifier's rows are right or wrong; leave the metric out")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, write `<output_dir>/rightrank/`, and log the sentence."""
        if not self._is_training:
            return  # refused, or a trial of a search
        self._is_training = False
        out, live = Path(args.output_dir or ".") / "rightrank", None
        try:
            live = self._live(kwargs["model"], args, state)
            self.result = _ended(live, out, self._training(live, args, state), self.measure)
        except FAILURES as error:
            # What lies there before the run has begun is of an earlier training.
            has_begun = live is not None and (out / "cache" / KEPT).is_file()
            again = f"; to measure again: {measure_command(str(out))}" if has_begun else ""
            log.warning("rightrank: no smaller adapter was looked for: %s%s", first_line(error), again)
        if self.result is not None and state.is_world_process_zero:
            self._report(self.result.answer)

    def _training(self, live: LiveAdapter, args: TrainingArguments, state: TrainerState) -> Training:
        is_best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        asked = copy.copy(args)
        asked.max_steps = state.max_steps  # also where epochs were asked for
        settings, notes = _stated(live, asked)
        return Training(
            settings,
            steps=state.global_step,
            seconds=time.monotonic() - self._started,
            peak_bytes=peak_so_far(),
            kept_step=state.best_global_step if is_best else None,
            notes=[*([self._shared] if self._shared else []), *notes],
        )

    def _live(self, model: Any, args: TrainingArguments, state: TrainerState) -> LiveAdapter:
        loader, name = self._loaders["train_dataloader"], trained_adapter(model)
        size = min(args.per_device_train_batch_size, args.per_device_eval_batch_size)
        # With the steps before a checkpoint from which it was resumed, so that its end is that of the whole training.
        trained = state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        with as_it_came(model, name, loader.dataset, loader.collate_fn):  # which may draw random numbers
            train_rows = some_rows(loader.dataset, 64 * size)
            random.Random(0).shuffle(train_rows)  # moments are read of the first ones
            # In evaluation mode no activation is recomputed, so a row at a time stays below the memory of checkpointed training.
            train = _batches(train_rows, loader, 1 if args.gradient_checkpointing else size)
            tokens = trained * sum(map(positions, train)) / max(1, len(train_rows))
            moment_tokens = max(1, min(MOMENT_TOKENS, int(MOMENT_SHARE * tokens)))
            rows, count = self._held_out, len(self._held_out)
            if self.max_examples is None and rows:
                sample = _batches(rows[:MIN_EXAMPLES], loader, size)
                passes = len(self.ranks) + 1 if self.ranks else model.peft_config[name].r.bit_length()
                cost = passes * sum(map(positions, sample)) / min(len(rows), MIN_EXAMPLES)
                # A step of the training is two passes, forward and backward.
                count = max(FEWEST, int(2 * (MAX_SHARE * tokens - moment_tokens) / cost))
            rows = some_rows(rows, count)
            groups = torch.tensor(_groups(rows, self.group))
            held_out = [
                {**batch, GROUP: groups[place * size : (place + 1) * size]}
                for place, batch in enumerate(_batches(rows, loader, size))
            ]
        beta = _beta(args, (held_out or train or [{}])[0])
        write = getattr(self._loaders.get("processing_class"), "save_pretrained", None)
        return LiveAdapter(
            model, held_out, train, self.margin, self.ranks, name, self.metric, beta, moment_tokens, write
        )

    def _report(self, answer: AdapterAnswer) -> None:
        """To the trainer's history and to its trackers, without what a trainer of TRL's adds."""
        bound = {} if answer.difference_high is None else {"rightrank/difference_high": answer.difference_high}
        try:
            if self._trainer is not None:
                Trainer.log(self._trainer, {"rightrank/rank": answer.rank} | bound)
        except FAILURES as error:
            log.warning("rightrank: a tracker did not take the values: %s", first_line(error))


def _ended(live: LiveAdapter, out: Path, training: Training, measures: bool = True) -> Ending | None:
    """Begin the run of an end and finish it; None where it is left to a fresh process. The first of several processes writes and speaks."""
    level = logging.DEBUG if process_index() else logging.WARNING
    with tempfile.TemporaryDirectory(prefix="rightrank-") as unused:
        with together():
            folder = begin_run(live, Path(unused) / "run" if process_index() else out, training)
        command = measure_command(str(out))
        if not measures or is_partitioned(live.model):
            log.log(level, "rightrank: kept what is measured with: %s", command)
            return None
        log.log(
            level, "rightrank: measuring truncations on %d batches; to measure again: %s", len(live.held_out), command
        )
        ending = finish_run(live, folder, training, _hooks())
    for note in ending.answer.notes:
        log.log(level, "rightrank: %s", note)
    log.log(level, "%s %s", ending.answer.sentence, out / "adapter")
    return ending


def _hooks() -> list[Hook]:
    """What renders a selection; for the first process."""
    return [] if process_index() else [Report(), *plugins.listed(lambda plugin: plugin.hooks())]


def keep_smallest(
    model: Any,
    held_out: Iterable[Batch],
    train: Iterable[Batch] = (),
    *,
    out: str | Path,
    margin: float | None = None,
    metric: str = "loss",
    seconds: float | None = None,
) -> Ending:
    """Write the smallest adapter within the margin to `out`, at the end of a loop of your own or accelerate's.

    Args:
        model: PEFT's model, as it is in memory; of accelerate, `accelerator.unwrap_model(model)`.
        held_out: Batches that the training did not see: dictionaries of tensors with `labels`, as the model takes them. A tensor `group` of a
            number for each row says which rows belong together.
        train: Batches of the training, of which the first are read for second moments.
        out: The run folder, new or with the result of an earlier training, which is moved to `earlier-N` in it, with its exports. Files that no
            run writes stay where they are.
        margin: How much worse is still enough, in nats a token or accuracy; None for the metric's default.
        metric: `loss`, or `accuracy` of a classifier.
        seconds: How long the training took, for the share that the end takes.

    Raises:
        DataError: no held-out batches.
        ModelError: an adapter that cannot be truncated, or parameters that ZeRO-3 holds.
        RunFolderError: `out` holds another kind of run or other files, which stay as they are, is in use, or cannot be written.
        RunError: the disk is full.
    """
    settings = checked(margin, None, metric)
    name, margin = require_end(model), settings.margin
    with as_it_came(model, name, held_out, train):  # a loader draws its order from the random state
        live = LiveAdapter(model, list(held_out), list(islice(train, MOMENT_BATCHES)), margin, name=name, metric=metric)
    if not live.held_out:
        raise DataError("there are no held-out batches; give some hundred examples that the training did not see")
    stated, notes = _stated(live, None)
    ending = _ended(live, Path(out), Training(stated, seconds=seconds, peak_bytes=peak_so_far(), notes=notes))
    if ending is None:
        raise ModelError(
            "ZeRO-3 holds parts of each parameter, which no truncation can be written into; measure in a fresh process"
        )
    return ending


def _trainer_of(callback: TrainerCallback, control: TrainerControl) -> Trainer | None:
    """The trainer that a callback was added to, which transformers does not hand to it; None for another caller of its events."""
    trainers = (item for item in gc.get_objects() if issubclass(type(item), Trainer))
    mine = (trainer for trainer in trainers if getattr(trainer, "control", None) is control)
    return next((trainer for trainer in mine if callback in trainer.callback_handler.callbacks), None)


def _beta(args: TrainingArguments, batch: Batch) -> float:
    """The `beta` of TRL's loss of preference pairs.

    Raises:
        SettingsError: another loss than `sigmoid`, or further terms.
    """
    given: Any = args
    if "completion_mask" not in batch or not hasattr(args, "beta"):
        return BETA
    others = [name for name in ("ld_alpha", "use_weighting", "sync_ref_model") if getattr(args, name, None)]
    others += (
        [] if str(getattr(given, "f_divergence_type", "reverse_kl")).endswith("reverse_kl") else ["f_divergence_type"]
    )
    others += [] if getattr(given, "loss_weights", None) in (None, [1], (1,)) else ["loss_weights"]
    if others or given.loss_type not in ("sigmoid", ["sigmoid"]):
        raise SettingsError(
            f"{others[0] if others else f'loss_type {given.loss_type}'}: pairs are measured by the loss sigmoid, without further terms; "
            "save the adapter and use rightrank resize --data"
        )
    return float(given.beta)


def checked(margin: float | None, ranks: Sequence[int] | int | None, metric: str) -> SelectSettings:
    """The settings of an end, those that are None as by default.

    Raises:
        SettingsError: a value that is not allowed.
    """
    if metric not in ("loss", "accuracy"):
        raise SettingsError(f"metric {metric!r}: the end of a training is measured by loss or accuracy")
    given = {"margin": margin, "ranks": ranks}
    return SelectSettings(metric=metric, **{name: value for name, value in given.items() if value is not None})


def _stated(live: LiveAdapter, args: TrainingArguments | None) -> tuple[dict[str, Any], list[str]]:
    """`(the settings of `select` that this training states, a note on what none says)`."""
    lengths = [batch["input_ids"].shape[1] for batch in (*live.train, *live.held_out) if "input_ids" in batch]
    further: dict[str, Any] = {"seq_len": max(lengths)} if lengths and not getattr(args, "max_length", None) else {}
    if args is not None:
        further["gradient_accumulation_steps"] = args.gradient_accumulation_steps * args.world_size
    stated, unsaid = stated_settings(live.model.peft_config[live.name], args, **further)
    unsaid += [] if args is not None else ["the learning rate", "the steps", "the batch size of your loop"]
    return stated, [f"the select command does not say {', '.join(unsaid)}"] if unsaid else []


def some_rows(rows: Any, count: int, is_own: bool = False) -> list[Any]:
    """Rows at even distances, since a data set may be in the order of its classes or topics; the first ones of an iterable.

    None of one that is read by another too, and can't be read again, as an iterable of `datasets` can.
    """
    if hasattr(rows, "__getitem__") and hasattr(rows, "__len__"):
        count = min(count, len(rows))
        return [rows[number * len(rows) // count] for number in range(count)]
    return list(islice(iter(rows), count)) if is_own or type(rows).__module__.partition(".")[0] == "datasets" else []


def _columns(train: Any) -> frozenset[str]:
    """The columns that reach the collator in training; empty where they are not known."""
    return frozenset(next((row for row in some_rows(train, 1) if isinstance(row, Mapping)), ()))


def _content(row: Mapping[str, Any], columns: frozenset[str]) -> int:
    """A hash of what makes two rows the same example: all bytes of its inputs."""
    names = [name for name in sorted(row) if not columns or name in columns]
    inputs = [name for name in names if not NOT_CONTENT.search(name)] or names
    return hash(tuple((name, _plain(row[name])) for name in inputs))


def _plain(value: Any) -> Hashable:
    """A value that differs wherever its bytes do: of numbers in lists, arrays, tensors and images alike."""
    if isinstance(value, Mapping):
        return tuple((name, _plain(value[name])) for name in sorted(value))
    if isinstance(value, list | tuple) and not all(isinstance(part, int | float) for part in value):
        return tuple(map(_plain, value))
    array = np.asarray(value.detach().cpu().double() if isinstance(value, torch.Tensor) else value)
    return (array.shape, array.astype(np.float64).tobytes()) if array.dtype.kind in "biuf" else repr(value)


def _batches(rows: Sequence[Mapping[str, Any]], loader: Any, size: int) -> list[Batch]:
    """Batches by the trainer's own collator, in the order of the rows."""
    columns = _columns(loader.dataset)
    kept = [{key: value for key, value in row.items() if not columns or key in columns} for row in rows]
    return [loader.collate_fn(kept[start : start + size]) for start in range(0, len(kept), size)]


def _groups(rows: Sequence[Mapping[str, Any]], column: str | None) -> list[int]:
    """A number for each row: those that share one belong together.

    Raises:
        DataError: a column that a row lacks, or that groups nothing.
    """
    keys: list[Any] = [row.get(column) if column else _prompt_of(row) for row in rows]
    if (
        column
        and (missing := next((row for row, key in zip(rows, keys, strict=True) if key is None), None)) is not None
    ):
        raise DataError(
            f"SmallestAdapter: a held-out row has no value in the column {column!r}; it has {', '.join(missing)}: give eval_dataset with the "
            "column, or leave group out"
        )
    places: dict[str, int] = {}
    numbers = [places.setdefault(f"row {at}" if key is None else repr(key), len(places)) for at, key in enumerate(keys)]
    if column and len(places) in (1, len(rows)):
        shared = "all held-out rows" if len(places) == 1 else "no two held-out rows"
        raise DataError(
            f"SmallestAdapter: {shared} share a value of the column {column!r}; give one with several values, each of several rows, or "
            "leave group out"
        )
    return numbers


def _prompt_of(row: Mapping[str, Any]) -> list[int] | None:
    """The tokens before the first one that counts; None where all count, where it is not known, and of packed rows."""
    for name in ("prompt_ids", "prompt_input_ids"):
        if name in row:
            return list(row[name])
    for name in ("completion_mask", "assistant_masks", "labels"):
        marks, ids = row.get(name), row.get("input_ids")
        if "seq_lengths" not in row and isinstance(marks, list) and isinstance(ids, list) and len(marks) == len(ids):
            skipped = IGNORED if name == "labels" else 0
            return ids[: next((at for at, mark in enumerate(marks) if mark != skipped), 0)] or None
    return None


def main(arguments: Sequence[str]) -> int:
    """`python -m rightrank.interop.smallest OUTPUT_DIR/rightrank`: measure again what an end left there."""
    try:
        if len(arguments) != 1:
            raise SettingsError("give one folder: the rightrank folder in the training's output folder")
        sys.stdout.write(measure_again(Path(arguments[0]), _hooks()) + "\n")
    except RightrankError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
