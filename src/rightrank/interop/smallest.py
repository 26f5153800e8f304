"""Find the smallest adapter within the margin after a training with the Trainer of transformers or TRL.

    trainer.add_callback(SmallestAdapter(trainer.eval_dataset, margin=0.005))
    trainer.train()   # ends with one sentence, and writes <output_dir>/rightrank/adapter

Problems that can be detected early raise before the first step. After the training no error is raised: a failure is logged in one line,
and the training's own result is unaffected.
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

from rightrank.adapters.batch_scores import (
    BETA,
    CUSTOM_EVALUATION_HINT,
    GROUP_KEY,
    Batch,
    compute_batch_loss,
    count_positions,
    read_batch,
)
from rightrank.adapters.distributed import (
    gather_objects,
    get_process_index,
    get_world_size,
    is_partitioned,
    log_failure,
    sync_errors,
)
from rightrank.adapters.in_memory import InMemoryAdapter, find_trained_adapter, validate_trained_adapter
from rightrank.adapters.preserved_state import copy_data_source, preserve_state
from rightrank.data.splits import sample_indices
from rightrank.hooks.report import Report
from rightrank.interop.trainer_rows import (
    MAX_MOMENT_BATCHES,
    MIN_EXAMPLES,
    RowReader,
    copy_batches,
    find_group_key,
    hash_inputs,
    is_indexable,
    iterate_rows,
    number_groups,
    read_moment_batches,
    require_mappings,
    sample_batches,
)
from rightrank.interop.truncation_run import (
    RESUME_FILE,
    TrainingSummary,
    TruncationResult,
    begin_run,
    finish_run,
    measure_peak_bytes,
    require_result_folder,
    resume_measurement,
)
from rightrank.runs import plugins
from rightrank.runs.hook import Hook
from rightrank.schema.command import build_measure_command
from rightrank.schema.configs import convert_configs
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.errors import DataError, ModelError, RightrankError, SettingsError
from rightrank.schema.settings import SelectSettings

log = logging.getLogger("rightrank")

MIN_SAMPLE_SIZE, MAX_SAMPLE_SIZE = 100, 1000  # limits of the number of scored examples if `max_examples` is None
MAX_TIME_FRACTION = (
    0.1  # of the training's time; the measurement stays below it unless `MIN_SAMPLE_SIZE` examples take longer
)
MAX_COMPARED_ROWS, MAX_COMPARISON_SECONDS = 100_000, 2.0  # limits of the search for held-out rows in the training set


@dataclass(eq=False, repr=False)
class SmallestAdapter(TrainerCallback):
    """Truncate the trained adapter at the end of `train()` and keep the smallest one within the margin.

    Args:
        eval_dataset: Held-out rows in the trainer's format, tokenized, with a length and access by index. None: the trainer's own `eval_dataset`.
        margin: The loss of quality that you accept, in nats per token. None for the default: 0.005, half a percentage point of accuracy, 0.02 for
            preference pairs, or 1% of the loss of a classifier.
        ranks: Candidate ranks; None for the powers of two below the adapter's rank.
        metric: `loss`, or `accuracy` for classifiers.
        max_examples: The maximum number of held-out examples to score, as a random sample. None: as many as fit in a tenth of the training's time,
            from 100 to 1000.
        group: The column of `eval_dataset` that identifies rows which belong together, such as the rows of a document. Bounds are then computed
            over groups. None: rows with the same prompt (the tokens without labels) form a group.
        measure: False: at the end, save what a fresh process needs and log the command that runs the measurement.

    Attributes:
        result: The result after `train()`; None before, and if the measurement failed.

    Raises at the beginning of the training:
        DataError: no held-out rows, a stream of rows, fewer than two rows that are not in the training set, or rows without a loss per example.
        ModelError: an adapter that cannot be truncated, or several active adapters.
        SettingsError: an invalid value, or a loss without a value per example.
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
    result: TruncationResult | None = field(default=None, init=False)
    reads_between_steps: ClassVar[bool] = False  # whether a subclass also reads rows between two steps
    _loaders: Mapping[str, Any] = field(default_factory=dict, init=False)
    _trainer: Trainer | None = field(default=None, init=False)
    _held_out: Subset[Any] = field(default_factory=lambda: Subset(cast(Any, ()), ()), init=False)
    _is_training: bool = field(default=False, init=False)
    _start_time: float = field(default_factory=time.monotonic, init=False)
    # Notes on held-out rows that are in the training set, and on rows that were not compared.
    _notes: list[str] = field(default_factory=list, init=False)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check everything that the end needs: read the held-out rows, compare training rows with them, and score two examples."""
        self._is_training = False
        if state.is_hyper_param_search:
            return  # A hyperparameter search ends many trainings, and none of their adapters is the final one.
        self._loaders, self._notes = kwargs, []
        self.result = None
        self._trainer = trainer = _find_trainer(self, control)
        if trainer is not None:  # Trackers close their runs in `on_train_end`, so this callback must come first.
            callbacks = trainer.callback_handler.callbacks
            callbacks.remove(self)
            if any(isinstance(callback, SmallestAdapter) for callback in callbacks):
                raise SettingsError(
                    f"SmallestAdapter: the trainer has two of these callbacks, which would both write to {args.output_dir}/rightrank; add one"
                )
            callbacks.insert(0, self)
        settings, model = build_settings(self.margin, self.ranks, self.metric), kwargs["model"]
        if any(
            kind.__module__.partition(".")[0] == "sentence_transformers"
            for kind in (*type(trainer).__mro__, *type(model).__mro__)
        ):
            raise SettingsError(
                f"SmallestAdapter cannot score rerankers and embedding models; {CUSTOM_EVALUATION_HINT}"
            )
        if self.max_examples is not None and not (isinstance(self.max_examples, int) and self.max_examples > 1):
            raise SettingsError(f"max_examples {self.max_examples!r}: give a whole number of 2 or more")
        self.margin, self.ranks = settings.margin, settings.ranks if "ranks" in settings.model_fields_set else None
        name = validate_trained_adapter(model, self.ranks)
        trainer_eval_dataset, loader = getattr(trainer, "eval_dataset", None), kwargs["train_dataloader"]
        rows = trainer_eval_dataset if self.eval_dataset is None else self.eval_dataset
        with preserve_state(model, name, rows, loader.dataset, loader.collate_fn):
            reader = RowReader.from_loader(loader)
            if reader.collate is None and self.reads_between_steps:
                raise DataError(
                    f"{type(self).__name__}: {reader.collate_unused_reason}; give the trainer a collator that copy.deepcopy copies"
                )
            self._held_out = self._select_held_out_rows(rows, rows is not trainer_eval_dataset, reader)
            self._require_example_losses(model, args, reader)
        self._is_training = True
        self._start_time = time.monotonic()
        if state.is_world_process_zero:
            folder = Path(args.output_dir or ".")
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # Raise here if the folder cannot be written.
            if self._writes_run:
                require_result_folder(folder / "rightrank")

    def _select_held_out_rows(self, rows: Any, is_separate: bool, reader: RowReader) -> Subset[Any]:
        """Return a random sample of the held-out rows that are not in the training set. Rows are read when they are used.

        Args:
            is_separate: whether the rows are not the trainer's own `eval_dataset`.

        Raises:
            DataError: no rows, rows without a length or access by index, rows that are not mappings, rows that `group` does not divide into groups,
                or fewer than two remaining rows.
        """
        if isinstance(rows, Mapping):
            raise DataError(
                f"SmallestAdapter: eval_dataset has {len(rows)} data sets ({', '.join(rows)}); give one of them"
            )
        if not is_indexable(rows):
            raise DataError(
                "SmallestAdapter has no held-out rows that it can sample, because sampling needs a length and access by index (a stream has neither): "
                "give the trainer such an eval_dataset, or give SmallestAdapter a list of a few hundred rows"
            )
        try:
            rows = copy_data_source(rows)
        except DataError as error:
            if not is_separate:
                raise DataError(
                    f"SmallestAdapter: the trainer's eval_dataset, {error}, and reading it may affect the training; give SmallestAdapter "
                    "separate held-out rows, such as a list"
                ) from None
        sample = Subset(rows, sample_indices(len(rows), self.max_examples or MAX_SAMPLE_SIZE))
        input_hashes, group_keys = [], []
        list(require_mappings(iterate_rows(reader.rows, 1)))
        for row in require_mappings(iterate_rows(sample)):
            input_hashes.append(hash_inputs(row, reader.columns))
            group_keys.append(find_group_key(row, self.group))
        shared_hashes = self._find_shared_inputs(input_hashes, reader)
        unseen_indices = [index for index, input_hash in enumerate(input_hashes) if input_hash not in shared_hashes]
        if len(unseen_indices) < len(input_hashes):
            self._add_note(
                f"{len(input_hashes) - len(unseen_indices)} of {len(input_hashes)} held-out rows are also in the training set; they are left out"
            )
        if len(unseen_indices) < 2:
            raise DataError(
                "SmallestAdapter: the held-out rows are in the training set; give rows that are not in it"
                if len(input_hashes) > 1
                else f"SmallestAdapter: {len(input_hashes)} held-out rows are too few; give a few hundred"
            )
        if len(unseen_indices) < MIN_EXAMPLES:
            log.warning(
                "rightrank: %d held-out examples are too few for a reliable result; give a few hundred",
                len(unseen_indices),
            )
        number_groups(
            [group_keys[index] for index in unseen_indices], self.group
        )  # raises if the column forms no groups
        return Subset(rows, [sample.indices[index] for index in unseen_indices])

    def _find_shared_inputs(self, input_hashes: Sequence[int], reader: RowReader) -> set[int]:
        """Return the input hashes that also occur in the training set, as far as it was read within `MAX_COMPARISON_SECONDS`.

        Each process compares its share of the rows, and all of them return the same set. A note states how many rows were compared.
        """
        if reader.rows_unread_reason:
            self._add_note(f"{reader.rows_unread_reason}; held-out rows were not looked for in it")
            return set()
        index_by_hash = {input_hash: index for index, input_hash in reversed(list(enumerate(input_hashes)))}
        sampled_indices = sample_indices(len(reader.rows), MAX_COMPARED_ROWS)[get_process_index() :: get_world_size()]
        deadline, num_compared, leaked_indices = time.monotonic() + MAX_COMPARISON_SECONDS, 0, set()
        with sync_errors():
            for index in sampled_indices:
                if time.monotonic() > deadline:
                    break
                leaked_index = index_by_hash.get(hash_inputs(reader.rows[index], reader.columns))
                leaked_indices |= set() if leaked_index is None else {leaked_index}
                num_compared += 1
        # Indices are exchanged instead of hashes, because each process hashes strings differently.
        by_process = gather_objects((num_compared, leaked_indices))
        total_compared = sum(count for count, _ in by_process)
        if total_compared < len(reader.rows):
            self._add_note(
                f"{total_compared:,} of {len(reader.rows):,} training rows (a random sample) were compared with the held-out rows within {MAX_COMPARISON_SECONDS:g} s; "
                "the others may contain held-out rows"
            )
        return {input_hashes[leaked_index] for _, shared in by_process for leaked_index in shared}

    def _add_note(self, text: str) -> None:
        self._notes.append(text)
        log.log(logging.DEBUG if get_process_index() else logging.WARNING, "rightrank: %s", text)

    def _require_example_losses(self, model: Any, args: TrainingArguments, reader: RowReader) -> None:
        """Score two examples in the same way as at the end of the training.

        Raises:
            DataError: the collator's batches give no loss per example.
            SettingsError: the metric has no value per example.
        """
        if not len(self._held_out):
            return  # Nothing is measured.
        if reader.collate is None:
            self._add_note(f"{reader.collate_unused_reason}; no example was scored before the first step")
            return
        batch = next(reader.read_batches(self._held_out, 2))
        beta = _read_dpo_beta(args, batch)
        # With ZeRO-3 only DeepSpeed's engine can run the model, so a fresh process measures.
        loss = None if is_partitioned(model) else compute_batch_loss(model, batch, beta)
        example_counts = (
            read_batch(model, small_batch).examples for small_batch in reader.read_batches(self._held_out, 8)
        )
        if not any(count >= 2 for count in accumulate(example_counts)):
            raise DataError("SmallestAdapter: fewer than two held-out rows have a label; give rows with labels")
        if self.metric == "accuracy" and loss is not None and self.metric not in loss.example_metrics:
            raise SettingsError("metric 'accuracy': accuracy is defined only for classifiers; leave the metric out")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate the truncations, write `<output_dir>/rightrank/`, and log the sentence."""
        if not self._is_training:
            return  # `on_train_begin` failed, or this is a trial of a hyperparameter search.
        self._is_training = False
        out, in_memory_adapter = Path(args.output_dir or ".") / "rightrank", None

        def advise() -> str:
            # Before the run has begun, the folder may contain files of an earlier training.
            has_begun = in_memory_adapter is not None and (out / "cache" / RESUME_FILE).is_file()
            return f"; to measure again: {build_measure_command(str(out))}" if has_begun else ""

        with log_failure("the search for a smaller adapter failed", advise):
            in_memory_adapter = self._build_in_memory_adapter(kwargs["model"], args, state)
            self.result = _measure_truncations(
                in_memory_adapter, out, self._summarize_training(in_memory_adapter, args, state), self.measure
            )
        if self.result is not None and state.is_world_process_zero:
            self._log_to_trackers(self.result.answer)

    def _summarize_training(
        self, in_memory_adapter: InMemoryAdapter, args: TrainingArguments, state: TrainerState
    ) -> TrainingSummary:
        is_best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        stated_args = copy.copy(args)
        stated_args.max_steps = state.max_steps  # `args` may state epochs instead
        settings, notes = _collect_stated_settings(in_memory_adapter, stated_args)
        return TrainingSummary(
            settings,
            steps=state.global_step,
            seconds=time.monotonic() - self._start_time,
            peak_bytes=measure_peak_bytes(),
            checkpoint_step=state.best_global_step if is_best else None,
            notes=[*self._notes, *notes],
        )

    def _build_in_memory_adapter(self, model: Any, args: TrainingArguments, state: TrainerState) -> InMemoryAdapter:
        loader, name = self._loaders["train_dataloader"], find_trained_adapter(model)
        size = min(args.per_device_train_batch_size, args.per_device_eval_batch_size)
        # The step count includes steps before a resume, so this covers the complete training.
        num_trained_rows = (
            state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        with preserve_state(model, name, loader.dataset, loader.collate_fn):  # Reading rows may draw random numbers.
            reader = RowReader.from_loader(loader)
            if not self._is_training:  # After the last step the originals may be read.
                reader = reader.with_originals(loader)
            # Evaluation mode does not recompute activations, so single rows keep it below the memory of a training with gradient checkpointing.
            train_rows = Subset(reader.rows, sample_indices(len(reader.rows), MAX_MOMENT_BATCHES * size))
            train, tokens, moment_tokens = read_moment_batches(
                reader, train_rows, 1 if args.gradient_checkpointing else size, num_trained_rows
            )
            rows = self._held_out
            if self.max_examples is None and len(rows):
                sample = list(reader.read_batches(Subset(rows, range(min(len(rows), MIN_EXAMPLES))), size))
                passes = len(self.ranks) + 1 if self.ranks else model.peft_config[name].r.bit_length()
                cost = passes * sum(map(count_positions, sample)) / min(len(rows), MIN_EXAMPLES)
                # A training step costs about two passes, forward and backward.
                count = max(MIN_SAMPLE_SIZE, int(2 * (MAX_TIME_FRACTION * tokens - moment_tokens) / cost))
                rows = Subset(rows.dataset, rows.indices[:count])  # in random order
            group_keys: list[Any] = []
            held_out = list(
                reader.read_batches(rows, size, lambda row: group_keys.append(find_group_key(row, self.group)))
            )
            groups = torch.tensor(number_groups(group_keys, self.group))
            held_out = [
                {**batch, GROUP_KEY: groups[index * size : (index + 1) * size]} for index, batch in enumerate(held_out)
            ]
        beta = _read_dpo_beta(args, (held_out or train or [{}])[0])
        save_processor = getattr(self._loaders.get("processing_class"), "save_pretrained", None)
        return InMemoryAdapter(
            model, held_out, train, self.margin, self.ranks, name, self.metric, beta, moment_tokens, save_processor
        )

    def _log_to_trackers(self, answer: AdapterAnswer) -> None:
        """Log the rank to the trainer's history and trackers. TRL's override of `log` is bypassed, because it adds other metrics."""
        values = {} if answer.difference_high is None else {"rightrank/difference_high": answer.difference_high}
        with log_failure("a tracker did not accept the values"):
            if self._trainer is not None:
                Trainer.log(self._trainer, {"rightrank/rank": answer.rank} | values)


def _measure_truncations(
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
        command = build_measure_command(str(out))
        if not measure_here or is_partitioned(in_memory_adapter.model):
            log.log(
                level, "rightrank: the adapter and the held-out rows are saved; to measure truncations: %s", command
            )
            return None
        log.log(
            level,
            "rightrank: measuring truncations on %d batches; to measure again: %s",
            len(in_memory_adapter.held_out),
            command,
        )
        result = finish_run(in_memory_adapter, folder, training, _load_hooks())
    for note in result.answer.notes:
        log.log(level, "rightrank: %s", note)
    log.log(level, "%s %s", result.answer.sentence, out / "adapter")
    return result


def _load_hooks() -> list[Hook]:
    """Return the hooks that report the result, or none in other processes than the first."""
    return [] if get_process_index() else [Report(), *plugins.collect_items(lambda plugin: plugin.hooks())]


def keep_smallest(
    model: Any,
    held_out: Iterable[Batch],
    train: Iterable[Batch] = (),
    *,
    out: str | Path,
    margin: float | None = None,
    metric: str = "loss",
    seconds: float | None = None,
) -> TruncationResult:
    """Write the smallest adapter within the margin to `out`, after a custom training loop or one with accelerate.

    Args:
        model: PEFT's model in memory. With accelerate, `accelerator.unwrap_model(model)`.
        held_out: Batches that were not used for training: dictionaries of tensors with `labels`, as the model takes them. A tensor `group` with a
            number for each row identifies rows that belong together.
        train: Training batches for second moments. A random sample of a list is read, or the first batches of a loader.
        out: The run folder. It may be new or contain the result of an earlier training, which is moved to the subfolder `earlier-N` together with
            its exports. Other files stay in place.
        margin: The loss of quality that you accept, in nats per token or in accuracy; None for the metric's default.
        metric: `loss`, or `accuracy` for classifiers.
        seconds: The duration of the training. The cost is then stated as a percentage of it.

    Raises:
        DataError: no held-out batches.
        ModelError: an adapter that cannot be truncated, or parameters that ZeRO-3 has partitioned.
        RunFolderError: `out` contains another kind of run or other files, is in use, or cannot be written. Existing files stay in place.
        RunError: the disk is full.
    """
    settings = build_settings(margin, None, metric)
    name, margin = validate_trained_adapter(model), settings.margin
    with preserve_state(model, name, held_out, train):  # A loader draws its order from the random state.
        batches = list(copy_batches(held_out)), sample_batches(train)
        in_memory_adapter = InMemoryAdapter(model, *batches, margin, name=name, metric=metric)
    if not in_memory_adapter.held_out:
        raise DataError("there are no held-out batches; give a few hundred examples that were not used for training")
    stated_settings, notes = _collect_stated_settings(in_memory_adapter, None)
    result = _measure_truncations(
        in_memory_adapter,
        Path(out),
        TrainingSummary(stated_settings, seconds=seconds, peak_bytes=measure_peak_bytes(), notes=notes),
    )
    if result is None:
        raise ModelError(
            "ZeRO-3 partitions each parameter, so truncations cannot be loaded into the model; measure in a fresh process"
        )
    return result


def _find_trainer(callback: TrainerCallback, control: TrainerControl) -> Trainer | None:
    """Return the trainer that a callback was added to. transformers does not pass it to callbacks.

    Return None if the events come from another caller.
    """
    trainers = (instance for instance in gc.get_objects() if issubclass(type(instance), Trainer))
    candidates = (trainer for trainer in trainers if getattr(trainer, "control", None) is control)
    return next((trainer for trainer in candidates if callback in trainer.callback_handler.callbacks), None)


def _read_dpo_beta(args: TrainingArguments, batch: Batch) -> float:
    """Return the `beta` of TRL's loss for preference pairs.

    Raises:
        SettingsError: a loss other than `sigmoid`, or additional loss terms.
    """
    dpo_args: Any = args
    if "completion_mask" not in batch or not hasattr(args, "beta"):
        return BETA
    unsupported_names = [name for name in ("ld_alpha", "use_weighting", "sync_ref_model") if getattr(args, name, None)]
    unsupported_names += (
        []
        if str(getattr(dpo_args, "f_divergence_type", "reverse_kl")).endswith("reverse_kl")
        else ["f_divergence_type"]
    )
    unsupported_names += [] if getattr(dpo_args, "loss_weights", None) in (None, [1], (1,)) else ["loss_weights"]
    if unsupported_names or dpo_args.loss_type not in ("sigmoid", ["sigmoid"]):
        raise SettingsError(
            f"{unsupported_names[0] if unsupported_names else f'loss_type {dpo_args.loss_type}'}: preference pairs are measured only by the loss sigmoid without additional terms; "
            "save the adapter and use rightrank resize --data"
        )
    return float(dpo_args.beta)


def build_settings(margin: float | None, ranks: Sequence[int] | int | None, metric: str) -> SelectSettings:
    """Build the settings of a truncation search. None selects the default.

    Raises:
        SettingsError: an invalid value.
    """
    if metric not in ("loss", "accuracy"):
        raise SettingsError(f"metric {metric!r}: allowed are loss and accuracy")
    values = {"margin": margin, "ranks": ranks}
    return SelectSettings(metric=metric, **{name: value for name, value in values.items() if value is not None})


def _collect_stated_settings(
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


def main(arguments: Sequence[str]) -> int:
    """Finish the measurement in a folder: `python -m rightrank.interop.smallest OUTPUT_DIR/rightrank`."""
    try:
        if len(arguments) != 1:
            raise SettingsError("give one folder: the rightrank folder in the training's output folder")
        sys.stdout.write(resume_measurement(Path(arguments[0]), _load_hooks()) + "\n")
    except RightrankError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
