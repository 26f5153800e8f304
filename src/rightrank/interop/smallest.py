"""`SmallestAdapter`: the smallest adapter within the margin, at the end of a training with the Trainer of transformers or TRL.

    trainer.add_callback(SmallestAdapter(trainer.eval_dataset, margin=0.005))
    trainer.train()   # at the end: one sentence, and <output_dir>/rightrank/adapter

What cannot work is refused before the first step. At the end nothing raises: what fails is one line, and the training's own result is safe.
"""

from __future__ import annotations

import copy
import gc
import logging
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rightrank.adapters.batch_scores import BETA, GROUP, OWN_EVALUATION, Batch, batch_loss, positions, read_batch
from rightrank.adapters.in_memory import LiveAdapter, require_end, trained_adapter
from rightrank.adapters.preserved_state import as_it_came, copy_reader
from rightrank.adapters.processes import FAILURES, gather_objects, is_partitioned, process_index, together, world_size
from rightrank.data.splits import sample_indices
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
from rightrank.interop.trainer_rows import (
    MIN_EXAMPLES,
    MOMENT_BATCHES,
    Reader,
    find_group_key,
    hash_inputs,
    is_indexed,
    number_groups,
    read_moment_batches,
    read_rows,
    readable_copy,
    require_mappings,
    sample_batches,
)
from rightrank.runs import plugins
from rightrank.runs.hook import Hook
from rightrank.schema.command import measure_command
from rightrank.schema.configs import stated_settings
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.errors import DataError, ModelError, RightrankError, SettingsError, first_line
from rightrank.schema.settings import SelectSettings

log = logging.getLogger("rightrank")

FEWEST, MOST = 100, 1000  # examples that are scored where nothing else is asked for
MAX_SHARE = 0.1  # of the training's time, which the end may take where FEWEST examples allow it
COMPARED_ROWS, COMPARED_SECONDS = 100_000, 2.0  # of the training set, to find held-out rows in it


@dataclass(eq=False, repr=False)
class SmallestAdapter(TrainerCallback):
    """Truncates the trained adapter at the end of `train()` and keeps the smallest one within the margin.

    Args:
        eval_dataset: Held-out rows as the trainer has them, tokenized, with a length and numbers. None: the trainer's own `eval_dataset`.
        margin: How much worse is still enough, in nats a token; None for the default: 0.005, half a point of accuracy, 0.02 for
            preference pairs, or 1% of the loss of a classifier.
        ranks: Candidates; None for the powers of two below the adapter's rank.
        metric: `loss`, or `accuracy` of a classifier.
        max_examples: Held-out examples to score at most, a random sample. None: as many as a tenth of the training's time allows, from 100 to 1000.
        group: The column of `eval_dataset` that says which rows belong together, such as a document's; bounds are then over groups. None: rows
            with one prompt, which the labels leave out, belong together.
        measure: False: at the end keep what a fresh process needs, log its command, and leave the measurement to it.

    Attributes:
        result: The answer after `train()`; None before, and where it failed.

    Raises at the training's begin:
        DataError: no held-out rows, a stream of them, fewer than two that are not in the training set, or rows that give no loss by example.
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
    reads_between_steps: ClassVar[bool] = False  # whether rows are read between two steps too
    _loaders: Mapping[str, Any] = field(default_factory=dict, init=False)
    _trainer: Trainer | None = field(default=None, init=False)
    _held_out: Subset[Any] = field(default_factory=lambda: Subset(cast(Any, ()), ()), init=False)
    _is_training: bool = field(default=False, init=False)
    _started: float = field(default_factory=time.monotonic, init=False)
    # On rows that are held out and trained on, or were not compared.
    _notes: list[str] = field(default_factory=list, init=False)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot work at the end: read the held-out rows, compare training rows with them, and score two examples."""
        self._is_training = False
        if state.is_hyper_param_search:
            return  # a search ends many trainings, and none of them is the one to hand over
        self._loaders, self._notes = kwargs, []
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
        if any(
            kind.__module__.partition(".")[0] == "sentence_transformers"
            for kind in (*type(trainer).__mro__, *type(model).__mro__)
        ):
            raise SettingsError(
                f"SmallestAdapter: the losses of rerankers and embedding models have no scores here; {OWN_EVALUATION}"
            )
        if self.max_examples is not None and not (isinstance(self.max_examples, int) and self.max_examples > 1):
            raise SettingsError(f"max_examples {self.max_examples!r}: give a whole number from 2")
        self.margin, self.ranks = settings.margin, settings.ranks if "ranks" in settings.model_fields_set else None
        name = require_end(model, self.ranks)
        evaluated, loader = getattr(trainer, "eval_dataset", None), kwargs["train_dataloader"]
        rows = evaluated if self.eval_dataset is None else self.eval_dataset
        with as_it_came(model, name, rows, loader.dataset, loader.collate_fn):
            reader = Reader.copied(loader)
            if reader.collate is None and self.reads_between_steps:
                raise DataError(
                    f"{type(self).__name__}: {reader.reason}; give the trainer a collator that copy.deepcopy copies"
                )
            self._held_out = self._rows_to_score(rows, rows is not evaluated, reader)
            self._require_scores(model, args, reader)
        self._is_training = True
        self._started = time.monotonic()
        if state.is_world_process_zero:
            folder = Path(args.output_dir or ".")
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # a folder that can't be written fails here
            if self._writes_run:
                require_end_folder(folder / "rightrank")

    def _rows_to_score(self, rows: Any, is_own: bool, reader: Reader) -> Subset[Any]:
        """Return a random sample of the held-out rows, without those that are found in the training set. The rows are read when they are used.

        Args:
            is_own: whether this callback alone reads them.

        Raises:
            DataError: no rows; rows without a length and numbers; rows that are no mappings, or that `group` does not group; or fewer than two
                are left.
        """
        if isinstance(rows, Mapping):
            raise DataError(f"SmallestAdapter: {len(rows)} held-out sets ({', '.join(rows)}); give one of them")
        if not is_indexed(rows):
            raise DataError(
                "SmallestAdapter has no held-out rows to draw a random sample of, which takes a length and row numbers (a stream has none): give "
                "the trainer an eval_dataset with them, or SmallestAdapter a list of some hundred rows"
            )
        try:
            rows = copy_reader(rows)
        except DataError as error:
            if not is_own:
                raise DataError(
                    f"SmallestAdapter: the trainer's eval_dataset, {error}, and reading it may change the training; give SmallestAdapter "
                    "held-out rows of its own, such as a list"
                ) from None
        sample = Subset(rows, sample_indices(len(rows), self.max_examples or MOST))
        contents, keys = [], []
        list(require_mappings(read_rows(reader.rows, 1)))
        for row in require_mappings(read_rows(sample)):
            contents.append(hash_inputs(row, reader.columns))
            keys.append(find_group_key(row, self.group))
        shared = self._shared_contents(contents, reader)
        unseen = [at for at, content in enumerate(contents) if content not in shared]
        if len(unseen) < len(contents):
            self._note(
                f"{len(contents) - len(unseen)} of {len(contents)} held-out rows are in the training set; they are left out"
            )
        if len(unseen) < 2:
            raise DataError(
                "SmallestAdapter: the held-out rows are in the training set; give rows that it does not hold"
                if len(contents) > 1
                else f"SmallestAdapter: {len(contents)} held-out rows; give some hundred"
            )
        if len(unseen) < MIN_EXAMPLES:
            log.warning("rightrank: %d held-out examples can show little; give some hundred", len(unseen))
        number_groups([keys[at] for at in unseen], self.group)  # refuses a column that groups nothing
        return Subset(rows, [sample.indices[at] for at in unseen])

    def _shared_contents(self, contents: Sequence[int], reader: Reader) -> set[int]:
        """Return the contents that are found in the training set in `COMPARED_SECONDS`; a note says what was not compared.

        Of several processes each compares its share, and all of them return the same.
        """
        if reader.rows_reason:
            self._note(f"{reader.rows_reason}; whether held-out rows are in it was not checked")
            return set()
        numbers = {content: at for at, content in reversed(list(enumerate(contents)))}
        order = sample_indices(len(reader.rows), COMPARED_ROWS)[process_index() :: world_size()]
        end, compared, leaked = time.monotonic() + COMPARED_SECONDS, 0, set()
        with together():
            for index in order:
                if time.monotonic() > end:
                    break
                number = numbers.get(hash_inputs(reader.rows[index], reader.columns))
                leaked |= set() if number is None else {number}
                compared += 1
        by_process = gather_objects((compared, leaked))  # numbers of rows: processes have other hashes of strings
        total = sum(count for count, _ in by_process)
        if total < len(reader.rows):
            self._note(
                f"{total:,} of {len(reader.rows):,} training rows, a random sample, were compared with the held-out rows, in {COMPARED_SECONDS:g} s at "
                "most; whether held-out rows are among the others was not checked"
            )
        return {contents[number] for _, shared in by_process for number in shared}

    def _note(self, text: str) -> None:
        self._notes.append(text)
        log.log(logging.DEBUG if process_index() else logging.WARNING, "rightrank: %s", text)

    def _require_scores(self, model: Any, args: TrainingArguments, reader: Reader) -> None:
        """Score two examples in the way of the end.

        Raises:
            DataError: the collator's batches give no loss by example.
            SettingsError: the metric has no value by example.
        """
        if not len(self._held_out):
            return  # nothing is measured
        if reader.collate is None:
            self._note(f"{reader.reason}; no example was scored before the first step")
            return
        batch = next(reader.batches(self._held_out, 2))
        beta = _beta(args, batch)
        # The passes of ZeRO-3 begin in DeepSpeed's engine; a fresh process measures.
        loss = None if is_partitioned(model) else batch_loss(model, batch, beta)
        examples = (read_batch(model, part).examples for part in reader.batches(self._held_out, 8))
        if not any(count >= 2 for count in accumulate(examples)):
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
            notes=[*self._notes, *notes],
        )

    def _live(self, model: Any, args: TrainingArguments, state: TrainerState) -> LiveAdapter:
        loader, name = self._loaders["train_dataloader"], trained_adapter(model)
        size = min(args.per_device_train_batch_size, args.per_device_eval_batch_size)
        # With the steps before a checkpoint from which it was resumed, so that its end is that of the whole training.
        trained = state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        with as_it_came(model, name, loader.dataset, loader.collate_fn):  # which may draw random numbers
            reader = Reader.copied(loader)
            if not self._is_training:  # the last step was made: what cannot be copied is read as it is
                reader = reader.completed(loader)
            # In evaluation mode no activation is recomputed, so a row at a time stays below the memory of checkpointed training.
            train_rows = Subset(reader.rows, sample_indices(len(reader.rows), MOMENT_BATCHES * size))
            train, tokens, moment_tokens = read_moment_batches(
                reader, train_rows, 1 if args.gradient_checkpointing else size, trained
            )
            rows = self._held_out
            if self.max_examples is None and len(rows):
                sample = list(reader.batches(Subset(rows, range(min(len(rows), MIN_EXAMPLES))), size))
                passes = len(self.ranks) + 1 if self.ranks else model.peft_config[name].r.bit_length()
                cost = passes * sum(map(positions, sample)) / min(len(rows), MIN_EXAMPLES)
                # A step of the training is two passes, forward and backward.
                count = max(FEWEST, int(2 * (MAX_SHARE * tokens - moment_tokens) / cost))
                rows = Subset(rows.dataset, rows.indices[:count])  # in random order
            keys: list[Any] = []
            held_out = list(reader.batches(rows, size, lambda row: keys.append(find_group_key(row, self.group))))
            groups = torch.tensor(number_groups(keys, self.group))
            held_out = [{**batch, GROUP: groups[at * size : (at + 1) * size]} for at, batch in enumerate(held_out)]
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
    return [] if process_index() else [Report(), *plugins.collect_items(lambda plugin: plugin.hooks())]


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
        train: Batches of the training for second moments: of a list a random sample is read, of a loader the first ones.
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
        batches = list(readable_copy(held_out)), sample_batches(train)
        live = LiveAdapter(model, *batches, margin, name=name, metric=metric)
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
