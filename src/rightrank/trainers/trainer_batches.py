"""Read the rows and batches of another trainer without affecting the training, and score their examples.

A batch is the output of the trainer's own collator. Its tensors show its form: `completion_mask` for TRL's preference pairs, one label per
row for classification, else one label per token. The losses are those of `evaluation/loss.py`. Labels are never passed to the model, because
fused losses then return no logits.

Rerankers and embedding models of sentence-transformers are scored by the loss of their trainer. If the loss of a batch is the mean of the
losses of its rows, each row is an example. Otherwise, as with in-batch negatives, the rows of a batch are compared with each other, and
each batch is one example.
"""

from __future__ import annotations

import inspect
import math
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch.utils.data import IterableDataset, Subset

from rightrank.adapters.adapter_folders import PEFT_PREFIX, WEIGHTS_FILE
from rightrank.data.rows import are_instructions, sample_indices
from rightrank.data.token_store import IGNORED
from rightrank.evaluation.loss import (
    BatchLoss,
    Likelihood,
    PreferenceLoss,
    classification_loss,
    compute_native_pass_losses,
    get_base_model,
)
from rightrank.evaluation.peft_models import MOMENT_TOKENS, use_adapter
from rightrank.schema.errors import DataError, ModelError, RightrankError, describe_error, get_first_line, log_traceback
from rightrank.trainers.in_memory import gather_objects, get_process_index, get_world_size, sync_errors

Batch: TypeAlias = Mapping[str, Any]  # as the trainer's collator makes it
BETA = 0.1  # of the loss of preference pairs, TRL's default
POINTWISE_TOLERANCE = 1e-3  # relative, between the loss of a batch and the mean of the losses of its rows
GROUP_KEY = "group"  # the key of a batch's groups: rows with equal numbers belong together
REFERENCE_KEYS = "ref_chosen_logps", "ref_rejected_logps"  # keys in TRL's batches of pairs
# Advice if examples cannot be scored here; see docs/how-to/own-trainers.md.
CUSTOM_EVALUATION_HINT = (
    'score adapters with your own function: rightrank.select_rank_with(train, "run", evaluate=evaluate, goal="adapter")'
)
NON_MODEL_KEYS = (GROUP_KEY, "labels", "num_items_in_batch", "completion_mask", *REFERENCE_KEYS)
LIKELIHOOD = Likelihood(compute_native_pass_losses)


@dataclass(frozen=True, slots=True)
class TrainerBatch:
    """A batch of another trainer in the form of a `LabelledBatch`, which the losses read."""

    inputs: Mapping[str, Any]
    labels: torch.Tensor
    numbers: torch.Tensor  # [rows, n]
    rows: torch.Tensor  # [s]: of each sequence
    is_pairs: bool
    reference: torch.Tensor | None = None  # [s], of pairs

    @property
    def sequences(self) -> int:
        return len(self.rows)

    def sequence_numbers(self) -> torch.Tensor:
        return self.numbers

    def split_pairs(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split values into those of chosen and rejected answers. TRL's collator puts all chosen answers first."""
        chosen, rejected = values.chunk(2)
        return chosen, rejected

    def get_example_groups(self, groups: list[int], example_numbers: torch.Tensor) -> list[int]:
        """Return the groups of the examples with these numbers from the groups of rows or of examples; empty if they are of neither."""
        if len(groups) == len(self.numbers):
            return [groups[row] for row in self.rows[example_numbers.to(self.rows.device)].tolist()]
        return groups if len(groups) == len(example_numbers) else []

    def compute_loss(self, model: Any, beta: float) -> BatchLoss:
        if self.is_pairs:
            return PreferenceLoss(compute_native_pass_losses, beta)(model, self, 1.0)
        return (classification_loss if self.labels.dim() == 1 else LIKELIHOOD)(model, self, 1.0)


def read_batch(model: Any, batch: Batch) -> TrainerBatch:
    """Convert a trainer's batch to the inputs and labels of the losses, on the device of PEFT's model.

    Raises:
        DataError: The labels are neither one class per row nor one token per position, the model does not predict them, or an input is a
            container of tensors.
    """
    nested = next(
        (key for key, value in batch.items() if not isinstance(value, torch.Tensor) and _contains_tensor(value)), None
    )
    if nested is not None:
        raise DataError(
            f"the batches have {nested} as a {type(batch[nested]).__name__} of tensors, which can't be passed to the model; give a "
            f"collator that returns one tensor, or {CUSTOM_EVALUATION_HINT}"
        )
    base, device = get_base_model(model), next(model.parameters()).device
    tensors = {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
    inputs: dict[str, Any] = {key: value for key, value in tensors.items() if key not in NON_MODEL_KEYS}
    if "use_cache" in inspect.signature(base.forward).parameters:
        inputs["use_cache"] = False
    is_pairs, labels, position_ids = "completion_mask" in batch, tensors.get("labels"), tensors.get("position_ids")
    if is_pairs:
        labels, position_ids = tensors["input_ids"].masked_fill(tensors["completion_mask"] == 0, IGNORED), None
    has_classes = not is_pairs and labels is not None and has_class_labels(batch)
    if labels is None or labels.is_floating_point() or labels.dim() > 2 or not _predicts_labels(base, has_classes):
        raise DataError(
            f"{type(base).__name__}: only causal language models with one label per token and classifiers with one class per row are scored "
            f"here, and no regression, reranker, contrastive or custom loss: {CUSTOM_EVALUATION_HINT}"
        )
    if has_classes:
        rows = torch.arange(len(labels), device=device)
        return TrainerBatch(inputs, labels.flatten(), rows[:, None], rows, False)
    # Examples that are packed into one row begin where `position_ids` is 0. Of left-padded rows the padding has position 0 too, or 1: it
    # holds no label and makes no example.
    starts = torch.zeros_like(labels, dtype=torch.bool)
    starts[:, 0] = True
    if position_ids is not None and position_ids.dim() == 2:
        starts |= position_ids.expand(len(labels), -1) == 0
    labels = labels.masked_fill(starts, IGNORED)  # no example predicts the first token of the next one
    numbers = (starts.flatten().cumsum(0) - 1).view(labels.shape)
    reference = torch.cat([batch[name] for name in REFERENCE_KEYS]) if REFERENCE_KEYS[0] in batch else None
    return TrainerBatch(inputs, labels, numbers, starts.nonzero()[:, 0], is_pairs, reference)


def _predicts_labels(base: Any, has_classes: bool) -> bool:
    predicts_tokens = hasattr(base, "can_generate") and base.can_generate()
    if has_classes:
        # One output is that of a regression or a reranker. Its cross-entropy would be 0 at every rank.
        return not predicts_tokens and getattr(base.config, "num_labels", 2) > 1
    return predicts_tokens and not base.config.is_encoder_decoder


def _contains_tensor(value: Any) -> bool:
    members = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, torch.Tensor) or any(map(_contains_tensor, members))


def compute_batch_loss(model: Any, batch: Batch, beta: float = BETA) -> BatchLoss:
    """Compute the losses of one batch; `beta` belongs to the loss of preference pairs, TRL's `sigmoid`.

    Raises:
        DataError: The model and the batch give no loss per example.
    """
    try:
        return read_batch(model, add_reference(model, batch)).compute_loss(model, beta)
    except RightrankError:
        raise
    except (AttributeError, ValueError) as error:
        raise DataError(
            f"{type(get_base_model(model)).__name__}: no loss per example can be computed from these batches ({describe_error(error)}); {CUSTOM_EVALUATION_HINT}"
        ) from error


@torch.no_grad()
def add_reference(model: Any, batch: Batch) -> Batch:
    """Add log-probabilities under the reference to preference pairs: the precomputed ones, or those of the adapter `ref` or of the base model."""
    if "completion_mask" not in batch or REFERENCE_KEYS[0] in batch:
        return batch
    with use_adapter(model, "ref" if "ref" in model.peft_config else None):
        losses = LIKELIHOOD(model, read_batch(model, batch), 1.0).example_losses
    return {**batch, **dict(zip(REFERENCE_KEYS, (-losses).chunk(2), strict=True))}


def has_class_labels(batch: Batch) -> bool:
    labels = batch["labels"]
    return bool(labels.dim() == 1 or labels.shape[1] == 1)


def count_rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def count_positions(batch: Batch) -> int:
    """Count the positions that a pass computes: tokens with padding, or rows if there are no tokens."""
    tokens = [value for key, value in batch.items() if key.endswith("input_ids") and isinstance(value, torch.Tensor)]
    return sum(value.numel() for value in tokens) or count_rows(batch)


def is_sentence_transformers(trainer: Any) -> bool:
    """Return whether a trainer is one of sentence-transformers, which computes its own loss."""
    return any(kind.__module__.partition(".")[0] == "sentence_transformers" for kind in type(trainer).__mro__)


class AdaptedModel(torch.nn.Module):
    """PEFT's interface of the adapter inside a model of sentence-transformers."""

    def __init__(self, complete: Any, base: Any) -> None:
        super().__init__()
        self.complete, self._base = complete, [base]  # a list, because no module is registered twice
        self.peft_config, self.config = base.peft_config, base.config

    @property
    def model(self) -> Any:
        return self._base[0]

    @property
    def base_model(self) -> Any:
        return self

    def get_base_model(self) -> Any:
        return self.model

    def save_pretrained(self, folder: str, *, selected_adapters: Sequence[str], **_: Any) -> None:
        (name,) = selected_adapters
        target = Path(folder) / ("" if name == "default" else name)
        target.mkdir(exist_ok=True)
        tensors = get_peft_model_state_dict(self.model, adapter_name=name)
        save_file({f"{PEFT_PREFIX}{key}": value.contiguous() for key, value in tensors.items()}, target / WEIGHTS_FILE)
        self.peft_config[name].save_pretrained(str(target))


def find_adapted_model(model: Any) -> AdaptedModel:
    """Return the interface of the adapter that `add_adapter` injected into a model, or that PEFT wrapped inside it.

    Raises:
        ModelError: there is no adapter, or there are several processes.
    """
    if get_world_size() > 1:
        raise ModelError("rerankers and embedding models are measured in one process; train in one, or use evaluate=")
    peft_model = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    base = model.transformers_model if peft_model is None else peft_model.get_base_model()
    if not getattr(base, "peft_config", None):
        raise ModelError(
            "the model has no PEFT adapter; add one by get_peft_model or model.add_adapter(LoraConfig(...))"
        )
    return AdaptedModel(model, base)


@dataclass(frozen=True, slots=True)
class TrainerLoss:
    """The loss of a trainer of sentence-transformers, as a function of a batch of its collator."""

    trainer: Any
    is_pointwise: bool = False  # whether the loss of a batch is the mean of the losses of its rows

    def __call__(self, batch: Batch) -> BatchLoss:
        """Compute the loss of a batch, which counts as one example."""
        inputs = self.trainer._prepare_inputs({key: value for key, value in batch.items() if key != GROUP_KEY})
        with self.trainer.compute_loss_context_manager():
            total = self.trainer.compute_loss(self.trainer.model, inputs) * count_rows(batch)
        return BatchLoss(total, total.detach().float().cpu()[None], torch.tensor([count_rows(batch)]))

    @torch.no_grad()
    def compare_rows(self, batch: Batch, row_batches: Sequence[Batch]) -> TrainerLoss:
        """Return the loss with `is_pointwise` as the loss of a batch and of its rows show it.

        Raises:
            DataError: the loss cannot be computed from the batch.
        """
        try:
            batch_loss = float(self(batch).example_losses) / count_rows(batch)
            mean_row_loss = sum(float(self(row_batch).example_losses) for row_batch in row_batches) / len(row_batches)
        except (RuntimeError, ValueError) as error:
            log_traceback(error)
            name = type(self.trainer.loss).__name__
            raise DataError(
                f"{name}: no loss can be computed from the held-out rows ({describe_error(error)}); give rows like those of "
                "the training"
            ) from error
        return replace(
            self, is_pointwise=math.isclose(batch_loss, mean_row_loss, rel_tol=POINTWISE_TOLERANCE, abs_tol=1e-6)
        )


MIN_EXAMPLES = 30
MAX_MOMENT_BATCHES = 64  # batches that are read for second moments
MOMENT_TOKEN_FRACTION = 0.02  # of the training's tokens; used for second moments
MAX_COMPARED_ROWS, MAX_COMPARISON_SECONDS = 100_000, 2.0  # limits of the search for held-out rows in the training set
# Columns that do not identify an example: masks and labels, which follow from its tokens, and row numbers.
NON_INPUT_COLUMNS = re.compile(r"mask|labels?$|^(token_type|position)_ids$|^(idx|id|index|length|seq_lengths)$|_logps$")


def is_indexable(rows: Any) -> bool:
    """Return whether rows have a length and access by index. Streams do not: reading them takes rows from other readers."""
    return not isinstance(rows, IterableDataset) and hasattr(rows, "__getitem__") and hasattr(rows, "__len__")


@dataclass(frozen=True, slots=True)
class RowReader:
    """A trainer's training set and collator. `preserve_state` keeps their random generators."""

    rows: Any  # of the training set; empty if it is a stream
    collate: Callable[[list[Any]], Batch]
    columns: frozenset[str]  # columns that reach the collator in training; empty if unknown
    query: str | None = None  # the column whose value identifies a group by default, if it is not the prompt

    @classmethod
    def from_loader(cls, loader: Any, has_queries: bool) -> RowReader:
        """Read the first row of the training set. With `has_queries`, its first column holds the queries."""
        rows: Any = loader.dataset if is_indexable(loader.dataset) else ()
        columns = list(rows[0]) if len(rows) and isinstance(rows[0], Mapping) else []
        return cls(rows, loader.collate_fn, frozenset(columns), columns[0] if has_queries and columns else None)

    def find_group_key(self, row: Mapping[str, Any], column: str | None) -> Hashable:
        """Return the value that rows of one group share: that in `column`, in the column of queries, or the prompt; None if there is none.

        Raises:
            DataError: the row has no value in the column.
        """
        column = column or self.query
        value = row.get(column) if column else _find_prompt_tokens(row)
        is_missing = value is None or (isinstance(value, float | np.floating) and bool(np.isnan(value)))
        if column and is_missing:
            raise DataError(
                f"SmallestAdapter: a held-out row has no value in the column {column!r}; it has {', '.join(row)}: give eval_dataset with the "
                "column, or leave group out"
            )
        return None if is_missing else (_to_hashable(value),)

    def read_batches(self, rows: Any, size: int, on_row: Callable[[Any], None] = lambda _: None) -> Iterator[Batch]:
        """Yield batches from the trainer's own collator, in the order of the rows. `on_row` is called with each row.

        Raises:
            DataError: the collator does not accept the rows.
        """
        remaining_rows = iterate_rows(rows)
        while chunk := list(islice(remaining_rows, size)):
            for row in chunk:
                on_row(row)
            inputs = [
                {key: value for key, value in row.items() if not self.columns or key in self.columns} for row in chunk
            ]
            try:
                batch = self.collate(inputs)
            except (KeyError, ValueError) as error:  # of a missing column, and of columns that make no tensor
                raise DataError(
                    f"SmallestAdapter: the trainer's collator does not accept the held-out rows ({get_first_line(error)}); give "
                    "trainer.eval_dataset, which the trainer has tokenized"
                ) from None
            if not isinstance(batch, Mapping):
                raise DataError(
                    f"SmallestAdapter: the trainer's collator returns a {type(batch).__name__} and no batch of tensors, as for GRPO, which "
                    f"generates its answers; {CUSTOM_EVALUATION_HINT}"
                )
            yield batch


def iterate_rows(rows: Any) -> Iterator[Any]:
    """Yield rows by index, so that an IndexError of the data set is raised instead of ending the iteration."""
    return map(rows.__getitem__, range(len(rows)))


def read_moment_batches(
    reader: RowReader, rows: Subset[Any], size: int, trained_rows: int
) -> tuple[list[Batch], float, int]:
    """Read batches for second moments until they have enough tokens.

    Returns:
        `(batches, estimated tokens of the training, tokens to use for moments)`.
    """
    batches: list[Batch] = []
    tokens, moment_tokens, read_tokens = 0.0, 1, 0
    for batch in reader.read_batches(rows, size):
        batches.append(batch)
        read_tokens += count_positions(batch)
        count = min(len(batches) * size, len(rows))
        tokens = trained_rows * read_tokens / count
        moment_tokens = max(1, min(MOMENT_TOKENS, int(MOMENT_TOKEN_FRACTION * tokens)))
        if read_tokens >= moment_tokens and count >= MIN_EXAMPLES:
            break
    return batches, tokens, moment_tokens


def select_held_out_rows(
    rows: Any, reader: RowReader, max_examples: int, group: str | None
) -> tuple[Subset[Any], list[str]]:
    """Return a random sample of the held-out rows that are not in the training set, and notes. Rows are read when they are used.

    Raises:
        DataError: no rows, rows without a length or access by index, rows that are not mappings, rows that `group` does not divide into groups,
            or fewer than two remaining rows.
    """
    if isinstance(rows, Mapping):
        raise DataError(
            f"SmallestAdapter: the trainer's eval_dataset has {len(rows)} data sets ({', '.join(rows)}); give one of them as eval_dataset="
        )
    if not is_indexable(rows):
        raise DataError(
            "SmallestAdapter has no held-out rows that it can sample, because sampling needs a length and access by index (a stream has neither): "
            "give the trainer such an eval_dataset, or give SmallestAdapter a list of a few hundred rows as eval_dataset="
        )
    sample = Subset(rows, sample_indices(len(rows), max_examples))
    input_hashes, group_keys = [], []
    for row in iterate_rows(sample):
        if not isinstance(row, Mapping):
            raise DataError(
                f"SmallestAdapter: a row is a {type(row).__name__}; give mappings with input_ids and labels"
            )
        input_hashes.append(hash_inputs(row, reader.columns))
        group_keys.append(reader.find_group_key(row, group))
    shared_hashes, notes = _find_shared_inputs(input_hashes, reader)
    unseen_indices = [index for index, input_hash in enumerate(input_hashes) if input_hash not in shared_hashes]
    if len(unseen_indices) < len(input_hashes):
        notes.append(
            f"{len(input_hashes) - len(unseen_indices)} of {len(input_hashes)} held-out rows are also in the training set; they are left out"
        )
    if len(unseen_indices) < 2:
        raise DataError(
            "SmallestAdapter: the held-out rows are in the training set; give rows that are not in it"
            if len(input_hashes) > 1
            else f"SmallestAdapter: {len(input_hashes)} held-out rows are too few; give a few hundred"
        )
    number_groups([group_keys[index] for index in unseen_indices], group)  # raises if the column forms no groups
    return Subset(rows, [sample.indices[index] for index in unseen_indices]), notes


def _find_shared_inputs(input_hashes: Sequence[int], reader: RowReader) -> tuple[set[int], list[str]]:
    """Return the input hashes that also occur in the training set, as far as it was read within `MAX_COMPARISON_SECONDS`.

    Each process compares its share of the rows, and all of them return the same set. A note states how many rows were compared.
    """
    if not len(reader.rows):
        return set(), ["the training set is a stream and is not read; held-out rows were not looked for in it"]
    index_by_hash = {input_hash: index for index, input_hash in reversed(list(enumerate(input_hashes)))}
    sampled_indices = sample_indices(len(reader.rows), MAX_COMPARED_ROWS)[get_process_index() :: get_world_size()]
    deadline, num_compared, leaked_indices = time.monotonic() + MAX_COMPARISON_SECONDS, 0, set[int | None]()
    with sync_errors():
        for index in sampled_indices:
            if time.monotonic() > deadline:
                break
            leaked_indices.add(index_by_hash.get(hash_inputs(reader.rows[index], reader.columns)))
            num_compared += 1
    # Indices are exchanged instead of hashes, because each process hashes strings differently.
    by_process = gather_objects((num_compared, leaked_indices - {None}))
    total_compared = sum(count for count, _ in by_process)
    notes = []
    if total_compared < len(reader.rows):
        notes.append(
            f"{total_compared:,} of {len(reader.rows):,} training rows (a random sample) were compared with the held-out rows within {MAX_COMPARISON_SECONDS:g} s; "
            "the others may contain held-out rows"
        )
    return {input_hashes[leaked_index] for _, shared in by_process for leaked_index in shared}, notes


def hash_inputs(row: Mapping[str, Any], columns: frozenset[str]) -> int:
    """Return a hash of all bytes of a row's inputs without padding. Rows with equal hashes are the same example."""
    names = [name for name in sorted(row) if not columns or name in columns]
    inputs = [name for name in names if not NON_INPUT_COLUMNS.search(name)] or names
    return hash(tuple((name, _to_hashable(_remove_padding(row, name))) for name in inputs))


def _remove_padding(row: Mapping[str, Any], name: str) -> Any:
    """Return the values in a column, of tokens only those that their attention mask marks."""
    prefix, is_tokens, _ = name.rpartition("input_ids")
    ids, mask = (_to_list(row.get(f"{prefix}{column}")) for column in ("input_ids", "attention_mask"))
    if not is_tokens or ids is None or mask is None or len(mask) != len(ids):
        return row[name]
    return [token for token, is_marked in zip(ids, mask, strict=True) if is_marked]


def _to_hashable(value: Any) -> Hashable:
    """Convert a value to a hashable one that keeps all its bytes. Equal numbers in lists, arrays, tensors and images stay equal."""
    if isinstance(value, Mapping):
        return tuple((name, _to_hashable(value[name])) for name in sorted(value))
    if isinstance(value, list | tuple) and not all(isinstance(element, int | float) for element in value):
        return tuple(map(_to_hashable, value))
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value  # NumPy has no bfloat16
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        return repr(array.tolist() if isinstance(value, np.ndarray) else value)  # repr shortens long arrays
    return array.shape, array.astype(np.float64 if array.dtype.kind == "f" else np.int64).tobytes()


def number_groups(keys: Sequence[Hashable], column: str | None) -> list[int]:
    """Return the number of each row's group. Without a column, a few prompts are instructions, which form no groups.

    Raises:
        DataError: the column has one value in all rows, or a different value in each row.
    """
    numbers_by_key: dict[Hashable, int] = {}
    numbers = [
        numbers_by_key.setdefault(index if key is None else key, len(numbers_by_key)) for index, key in enumerate(keys)
    ]
    if column and len(numbers_by_key) in (1, len(keys)):
        subject = "all held-out rows" if len(numbers_by_key) == 1 else "no two held-out rows"
        raise DataError(
            f"SmallestAdapter: {subject} share a value of the column {column!r}; give a column in which several rows share each value, or "
            "leave group out"
        )
    return list(range(len(keys))) if not column and are_instructions(len(numbers_by_key), len(keys)) else numbers


def _find_prompt_tokens(row: Mapping[str, Any]) -> list[int] | None:
    """Return the tokens before the first one with a loss.

    Return None if all tokens have a loss, if it is unknown which ones do, and for packed rows.
    """
    for name in ("prompt_ids", "prompt_input_ids"):
        if name in row:
            return _to_list(row[name])
    ids = _to_list(row.get("input_ids"))
    for name in ("completion_mask", "assistant_masks", "labels"):
        mask = _to_list(row.get(name))
        if "seq_lengths" not in row and mask is not None and ids is not None and len(mask) == len(ids):
            ignored_value = IGNORED if name == "labels" else 0
            return ids[: next((index for index, value in enumerate(mask) if value != ignored_value), 0)] or None
    return None


def _to_list(value: Any) -> list[Any] | None:
    """Return the values of a cell as a list, for every format of `datasets`. Return None for a single value or none."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().tolist()
    elif hasattr(value, "__array__"):
        value = np.asarray(value).tolist()
    return list(value) if isinstance(value, list | tuple) else None
