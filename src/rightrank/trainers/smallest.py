"""Find the smallest adapter within the margin after a training with the Trainer of transformers or TRL.

    trainer.add_callback(SmallestAdapter(trainer, margin="1%"))
    trainer.train()   # ends with one sentence, and writes <output_dir>/rightrank/adapter

Problems that can be detected early raise before the first step. After the training no error is raised: a failure is logged in one line,
and the training's own result is unaffected.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rightrank.data.rows import sample_indices
from rightrank.schema.errors import DataError, SettingsError
from rightrank.schema.metrics import Margin
from rightrank.schema.settings import SelectSettings
from rightrank.trainers.in_memory import (
    find_trained_adapter,
    log_failure,
    preserve_state,
    validate_trained_adapter,
)
from rightrank.trainers.measurement import (
    TRAINED_FOLDER,
    InMemoryAdapter,
    SmallestAdapterResult,
    TrainingSummary,
    build_resize_command,
    build_settings,
    find_smallest_adapter,
    require_result_folder,
)
from rightrank.trainers.trainer_batches import (
    BETA,
    CUSTOM_EVALUATION_HINT,
    GROUP_KEY,
    MAX_MOMENT_BATCHES,
    MIN_EXAMPLES,
    REFERENCE_KEYS,
    Batch,
    RowReader,
    TrainerLoss,
    compute_batch_loss,
    count_positions,
    find_adapted_model,
    is_sentence_transformers,
    iterate_rows,
    number_groups,
    read_moment_batches,
    select_held_out_rows,
)

log = logging.getLogger("rightrank")

MIN_SAMPLE_SIZE, MAX_SAMPLE_SIZE = 100, 1000  # limits of the number of scored examples
# The fraction of the training's time that the measurement takes at most, unless `MIN_SAMPLE_SIZE` examples, or `MIN_EXAMPLES` that are batches, take longer.
MAX_TIME_FRACTION = 0.1


@dataclass(eq=False, repr=False)
class SmallestAdapter(TrainerCallback):
    """Truncate the trained adapter at the end of `train()` and keep the smallest one within the margin.

    Args:
        trainer: The trainer that the callback is added to. Rows, collator and loss are its own.
        eval_dataset: Other held-out rows than the trainer's `eval_dataset`, in its format: tokenized, with a length and access by index. As many
            of them are scored, as a random sample, as fit in a tenth of the training's time, from 100 to 1000.
        margin: The loss of quality that you accept: a share of what the training gained over the base such as "2%", or a number in the
            metric's unit. None for 1% of the gain.
        ranks: Candidate ranks; None for the powers of two below the adapter's rank.
        metric: `loss`, or `accuracy` for classifiers. None: `accuracy` if the trainer selects a classifier's best checkpoint by it, else `loss`.
        group: The column of the held-out rows that identifies rows which belong together, such as the rows of a document. Bounds are then computed
            over groups. None: rows with the same prompt (the tokens without labels) form a group.

    Attributes:
        result: The result after `train()`; None before, and if the measurement failed.

    Raises at the beginning of the training:
        DataError: no held-out rows, a stream of rows, fewer than two rows that are not in the training set, or rows without a loss per example.
        ModelError: an adapter that cannot be truncated, or several active adapters.
        SettingsError: an invalid value, a loss without a value per example, or another trainer.
    """

    trainer: Trainer
    _: KW_ONLY
    eval_dataset: Any = None
    margin: Margin | None = None
    ranks: Sequence[int] | None = None
    metric: str | None = None
    group: str | None = None
    result: SmallestAdapterResult | None = field(default=None, init=False)
    _loader: Any = field(default=None, init=False)
    _trainer_loss: TrainerLoss | None = field(default=None, init=False)  # of rerankers and embedding models
    _held_out: Subset[Any] = field(default_factory=lambda: Subset(cast(Any, ()), ()), init=False)
    _start_time: float = field(default_factory=time.monotonic, init=False)
    # Notes on held-out rows that are in the training set, and on rows that were not compared.
    _notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.trainer, Trainer):
            raise SettingsError(
                f"SmallestAdapter: the first argument is a {type(self.trainer).__name__}, not a Trainer of transformers; write "
                "trainer.add_callback(SmallestAdapter(trainer)), and give other held-out rows as eval_dataset="
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check everything that the end needs: read the held-out rows, compare training rows with them, and score two examples."""
        self.result = None
        self._require_own_trainer(args)
        settings, model = build_settings(self.margin, self.ranks, self.metric), kwargs["model"]
        self._trainer_loss = TrainerLoss(self.trainer) if is_sentence_transformers(self.trainer) else None
        if self._trainer_loss is not None:
            model = find_adapted_model(model)
            if self.metric == "accuracy":
                raise SettingsError(
                    "SmallestAdapter: rerankers and embedding models are measured by their trainer's loss; leave metric out, or "
                    f"{CUSTOM_EVALUATION_HINT}"
                )
        self.margin, self.ranks = settings.margin, settings.ranks if "ranks" in settings.model_fields_set else None
        name = validate_trained_adapter(model, self.ranks)
        self._loader = kwargs["train_dataloader"]
        with preserve_state(model, name, self._loader, self._get_held_out_rows(), self.trainer.data_collator):
            reader = self._make_reader()
            rows = self._get_held_out_rows()
            self._held_out, self._notes = select_held_out_rows(rows, reader, MAX_SAMPLE_SIZE, self.group)
            for note in self._notes:
                log.log(logging.WARNING if state.is_world_process_zero else logging.DEBUG, "rightrank: %s", note)
            self._require_example_losses(model, args, reader)
        self._start_time = time.monotonic()
        if state.is_world_process_zero:
            folder = Path(args.output_dir or ".")
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # Raise here if the folder cannot be written.
            require_result_folder(folder / "rightrank")

    def _require_own_trainer(self, args: TrainingArguments) -> None:
        """Raise if the events come from another trainer, and move this callback to the front.

        Trackers close their runs in `on_train_end`, so the callback that logs to them must come first.
        """
        callbacks = self.trainer.callback_handler.callbacks
        if self not in callbacks or args is not self.trainer.args:
            raise SettingsError(
                "SmallestAdapter: it was created for another trainer than the one that trains; create one for each trainer"
            )
        callbacks.remove(self)
        callbacks.insert(0, self)

    def _make_reader(self) -> RowReader:
        # The first column of a reranker or an embedding model has the queries.
        return RowReader.from_loader(self._loader, has_queries=self._trainer_loss is not None)

    def _get_held_out_rows(self) -> Any:
        return getattr(self.trainer, "eval_dataset", None) if self.eval_dataset is None else self.eval_dataset

    def _require_example_losses(self, model: Any, args: TrainingArguments, reader: RowReader) -> None:
        """Score two examples in the same way as at the end of the training.

        Raises:
            DataError: the collator's batches give no loss per example.
            SettingsError: the metric has no value per example.
        """
        if self._trainer_loss is not None:
            self._set_example_unit(args, reader, self._trainer_loss)
            return
        count, beta = 0, _read_dpo_beta(self.trainer, next(reader.read_batches(self._held_out, 2)))
        for batch in reader.read_batches(self._held_out, 2):
            loss = compute_batch_loss(model, batch, beta)
            count += int((loss.example_tokens > 0).sum())
            if count >= 2:
                break
        else:
            raise DataError("SmallestAdapter: fewer than two held-out rows have a label; give rows with labels")
        has_accuracy = "accuracy" in loss.example_metrics
        if self.metric is None and has_accuracy and str(args.metric_for_best_model).removeprefix("eval_") == "accuracy":
            self.metric = "accuracy"
        if self.metric == "accuracy" and not has_accuracy:
            raise SettingsError("metric 'accuracy': accuracy is defined only for classifiers; leave the metric out")

    def _set_example_unit(self, args: TrainingArguments, reader: RowReader, loss: TrainerLoss) -> None:
        """Find out whether an example is a row or a batch. Of rows with one query, batches contain the first.

        Raises:
            DataError: the loss cannot be computed, or there are fewer than two batches.
        """
        rows = self._held_out
        first_rows = Subset(rows, range(min(4, len(rows))))
        batch, row_batches = next(reader.read_batches(first_rows, 4)), list(reader.read_batches(first_rows, 1))
        self._trainer_loss = loss = loss.compare_rows(batch, row_batches)
        if loss.is_pointwise:
            return
        size, by_query = _get_batch_size(args), dict[Any, int]()
        for index, row in zip(rows.indices, iterate_rows(rows), strict=True):
            by_query.setdefault(reader.find_group_key(row, self.group), index)
        count = len(by_query) // size
        if count < 2:
            raise DataError(
                f"SmallestAdapter: the loss compares the rows of a batch, so each batch of {size} is one example, and {len(by_query)} held-out "
                f"queries give {count}; give more rows, or a smaller per_device_eval_batch_size"
            )
        self._held_out = Subset(rows.dataset, list(by_query.values())[: count * size])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate the truncations, write `<output_dir>/rightrank/`, and log the sentence."""
        out, metric = Path(args.output_dir or ".") / "rightrank", self.metric or "loss"

        if state.is_world_process_zero:
            shutil.rmtree(out / TRAINED_FOLDER, ignore_errors=True)  # of an earlier training

        def advise() -> str:
            if self._trainer_loss is not None or not (out / TRAINED_FOLDER).is_dir():
                return ""
            return f"; to measure the saved adapter: {build_resize_command(out, self.margin, metric)}"

        with log_failure("the search for a smaller adapter failed", advise):
            self.result = find_smallest_adapter(
                self._build_in_memory_adapter(kwargs["model"], args, state),
                out,
                self._summarize_training(args, state),
                margin=self.margin,
                ranks=self.ranks,
                metric=metric,
                write_tokenizer=getattr(self.trainer.processing_class, "save_pretrained", None),
            )
        if self.result is not None and state.is_world_process_zero:
            with log_failure("a tracker did not accept the values"):
                answer = self.result.answer
                values = {} if answer.difference_high is None else {"rightrank/difference_high": answer.difference_high}
                # TRL's override of `log` is bypassed, because it adds other metrics.
                Trainer.log(self.trainer, {"rightrank/rank": answer.rank} | values)

    def _summarize_training(self, args: TrainingArguments, state: TrainerState) -> TrainingSummary:
        is_best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        return TrainingSummary(
            steps=state.global_step,
            weights=f"best (step {state.best_global_step})" if is_best else f"last (step {state.global_step})",
            seconds=time.monotonic() - self._start_time,
            learning_rate=args.learning_rate,
            batch_size=args.per_device_train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            notes=self._notes,
        )

    def _build_in_memory_adapter(self, model: Any, args: TrainingArguments, state: TrainerState) -> InMemoryAdapter:
        model = model if self._trainer_loss is None else find_adapted_model(model)
        name, size = find_trained_adapter(model), _get_batch_size(args)
        is_batched = self._trainer_loss is not None and not self._trainer_loss.is_pointwise
        # The step count includes steps before a resume, so this covers the complete training.
        num_trained_rows = (
            state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        with preserve_state(model, name, self._loader):  # Reading rows may draw random numbers.
            reader = self._make_reader()
            # Evaluation mode does not recompute activations, so single rows keep it below the memory of a training with gradient checkpointing.
            train_rows = Subset(reader.rows, sample_indices(len(reader.rows), MAX_MOMENT_BATCHES * size))
            train, tokens, moment_tokens = read_moment_batches(
                reader, train_rows, size if is_batched or not args.gradient_checkpointing else 1, num_trained_rows
            )
            size = 1 if self._trainer_loss is not None and not is_batched else size
            rows = self._held_out
            sample = list(reader.read_batches(Subset(rows, range(min(len(rows), MIN_EXAMPLES))), size))
            passes = len(self.ranks) + 1 if self.ranks else model.peft_config[name].r.bit_length()
            cost = passes * sum(map(count_positions, sample)) / min(len(rows), MIN_EXAMPLES)
            # A training step costs about two passes, forward and backward.
            min_count = MIN_EXAMPLES * size if is_batched else MIN_SAMPLE_SIZE
            count = max(min_count, int(2 * (MAX_TIME_FRACTION * tokens - moment_tokens) / cost))
            count = max(2, count // size) * size if is_batched else count
            rows = Subset(rows.dataset, rows.indices[:count])  # in random order
            group_keys: list[Any] = []
            held_out = list(
                reader.read_batches(rows, size, lambda row: group_keys.append(reader.find_group_key(row, self.group)))
            )
            groups = torch.tensor(number_groups(group_keys, self.group))
            if not is_batched:
                held_out = [
                    {**batch, GROUP_KEY: groups[index * size : (index + 1) * size]}
                    for index, batch in enumerate(held_out)
                ]
        beta = _read_dpo_beta(self.trainer, held_out[0])
        return InMemoryAdapter(model, held_out, train, name, beta, moment_tokens, self._trainer_loss)


def _get_batch_size(args: TrainingArguments) -> int:
    return min(args.per_device_train_batch_size, args.per_device_eval_batch_size)


def keep_smallest(
    model: Any,
    held_out: Iterable[Batch],
    train: Iterable[Batch] = (),
    *,
    out: str | Path,
    margin: Margin | None = None,
    metric: str = "loss",
    seconds: float | None = None,
) -> SmallestAdapterResult:
    """Write the smallest adapter within the margin to `out`, after a custom training loop or one with accelerate.

    Args:
        model: PEFT's model in memory. With accelerate, `accelerator.unwrap_model(model)`.
        held_out: Batches that were not used for training: dictionaries of tensors with `labels`, as the model takes them. A tensor `group` with a
            number for each row identifies rows that belong together.
        train: Training batches in random order, of which the first ones are read for second moments.
        out: The folder of the result. The result of an earlier training is replaced; other files stay in place.
        margin: The loss of quality that you accept, in nats per token or in accuracy; None for the metric's default.
        metric: `loss`, or `accuracy` for classifiers.
        seconds: The duration of the training. The cost is then stated as a percentage of it.

    Raises:
        DataError: no held-out batches, or batches without a loss per example.
        ModelError: an adapter that cannot be truncated.
        RunFolderError: `out` holds another run or files of another program.
        OSError: `out` cannot be written.
    """
    in_memory_adapter, settings = prepare_adapter(model, held_out, train, margin, metric)
    training = TrainingSummary(seconds=seconds)
    return find_smallest_adapter(in_memory_adapter, Path(out), training, margin=settings.margin, metric=metric)


def prepare_adapter(
    model: Any, held_out: Iterable[Batch], train: Iterable[Batch], margin: Margin | None, metric: str
) -> tuple[InMemoryAdapter, SelectSettings]:
    """Read the batches of a measurement, and check everything that needs no further evaluation; see `keep_smallest`."""
    settings = build_settings(margin, None, metric)
    name = validate_trained_adapter(model)
    with preserve_state(model, name, held_out, train):  # A loader draws its order from the random state.
        batches = list(held_out)
        if not batches:
            raise DataError(
                "there are no held-out batches; give a few hundred examples that were not used for training"
            )
        compute_batch_loss(model, batches[0])  # raises if they cannot be scored
        return InMemoryAdapter(model, batches, list(islice(train, MAX_MOMENT_BATCHES)), name), settings


def _read_dpo_beta(trainer: Trainer, batch: Batch) -> float:
    """Return the `beta` of TRL's loss for preference pairs.

    Raises:
        SettingsError: a loss other than `sigmoid`, or additional loss terms.
    """
    dpo_args: Any = trainer.args
    if "completion_mask" not in batch or not hasattr(dpo_args, "beta"):
        return BETA
    if getattr(trainer, "ref_model", None) is not None and REFERENCE_KEYS[0] not in batch:
        raise SettingsError("ref_model: a separate reference is not evaluated here; set precompute_ref_log_probs=True")
    supported_values = {
        "loss_type": ("sigmoid", ["sigmoid"]),
        "loss_weights": (None, [1]),
        "ld_alpha": (None,),
        "f_divergence_type": ("reverse_kl",),
        "use_weighting": (False,),
        "sync_ref_model": (False,),
    }
    for name, values in supported_values.items():
        if (value := getattr(dpo_args, name, values[0])) not in values:
            raise SettingsError(
                f"{name} {value}: preference pairs are measured only by the loss sigmoid without additional terms; save the adapter and use "
                "rightrank resize --data"
            )
    return float(dpo_args.beta)
