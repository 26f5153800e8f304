"""`resize --data`: find the smallest truncation that is not worse than the adapter by the margin, by the rule of `select`.

Every candidate is truncated by K-FAC over training examples, written as an adapter folder, attached to the base model by PEFT,
and measured on the same examples.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from rightrank.adapters.adapter_files import AdapterFolder, write_same_format
from rightrank.adapters.adapter_folders import BASE_FILE
from rightrank.adapters.find_smallest import SmallestAdapterAnswer, find_smallest
from rightrank.adapters.resize import (
    RankedAdapter,
    cap_ranks,
    list_candidate_ranks,
    require_plain_update,
    resize_adapter,
    write_truncation,
)
from rightrank.adapters.truncation import Moments
from rightrank.data.forms import Example
from rightrank.data.rows import read_rows
from rightrank.data.splits import DataSplits, load_data, load_held_out
from rightrank.decision.adapter import SEARCH_OPTION, Criterion, ScoredAdapter, format_margin
from rightrank.runs.compare import load_run_splits, read_labels
from rightrank.schema.decision import AdapterMethod
from rightrank.schema.errors import DataError
from rightrank.schema.events import EvaluationProgress, Notice
from rightrank.schema.results import HeldOutValue, Resized
from rightrank.schema.settings import NO_SPLIT_OVERRIDES, SelectSettings
from rightrank.training.adapter_runtime import (
    attach_adapter,
    gather_moments,
    gather_unseen_moments,
    make_adapter_runtime,
    report_evaluation_progress,
)
from rightrank.training.evaluation import Scores
from rightrank.training.moments import GatheredMoments
from rightrank.training.runtime import Runtime


@dataclass(frozen=True, slots=True)
class _EvaluationData:
    """Examples to score in the validation split, and training examples in the train split."""

    splits: DataSplits
    scores_training_examples: bool  # the train split is the validation split, because the training data are unknown
    note: str


def load_evaluation_data(
    adapter: AdapterFolder, data: Path, train: Path | None, settings: SelectSettings
) -> _EvaluationData:
    """Load the rows of `data` to score, without those that the adapter is known to be trained on.

    Raises:
        DataError: The rows can't be used, or the adapter was trained on all but one of them.
    """
    classes = read_labels(str(adapter.path))
    training_splits, run_data = _load_training_splits(adapter, data, train, settings, classes)
    if training_splits is None and None not in read_rows(data):
        count = sum(len(list(rows)) for rows in read_rows(data).values())
        all_rows_settings = settings.model_copy(update=NO_SPLIT_OVERRIDES | {"max_eval_examples": max(2, count)})
        splits = load_data(data, all_rows_settings, classes=classes)
        return _replace_validation_split(
            splits, _limit_examples(splits.examples["validation"], settings), f"{data} (its validation split)"
        )
    if training_splits is not None and run_data is not None and data.exists() and run_data.resolve() == data.resolve():
        validation_examples = training_splits.examples["validation"]
        return _replace_validation_split(
            training_splits, validation_examples, f"{data} (the validation split of the adapter's run)"
        )
    all_splits, _ = load_held_out(data, settings, classes)
    all_examples = all_splits.examples["validation"]
    if training_splits is None:
        unknown = "if the adapter was trained on some of them, name its training data with --train"
        return _replace_validation_split(
            all_splits,
            _limit_examples(all_examples, settings),
            f"{data} (all rows); {unknown}",
            scores_training_examples=True,
        )
    if all_splits.form != training_splits.form:
        raise DataError(
            f"{data}: has the form {all_splits.form}, and the adapter's training data {training_splits.form}"
        )
    unseen = all_splits.exclude_training_examples(training_splits.examples["train"], data).examples["validation"]
    left_out = len(all_examples) - len(unseen)
    description = f"{data} (not in its training data); {left_out:,} training examples of the adapter are left out"
    return _replace_validation_split(training_splits, _limit_examples(unseen, settings), description)


def _replace_validation_split(
    splits: DataSplits, examples: Sequence[Example], source: str, scores_training_examples: bool = False
) -> _EvaluationData:
    replaced = replace(splits, examples={"train": splits.examples["train"], "validation": examples, "test": []})
    return _EvaluationData(replaced, scores_training_examples, f"scored on {len(examples):,} examples of {source}")


def _limit_examples(examples: Sequence[Example], settings: SelectSettings) -> Sequence[Example]:
    """Return all examples, or the first `max_eval_examples` if that setting was given."""
    return examples[: settings.max_eval_examples] if "max_eval_examples" in settings.model_fields_set else examples


def _load_training_splits(
    adapter: AdapterFolder, data: Path, train: Path | None, settings: SelectSettings, classes: Sequence[str] | None
) -> tuple[DataSplits | None, Path | None]:
    """Load the splits with the adapter's training examples, and the path of its run's data; None for an unknown one.

    The training examples are in the file `train`, or they belong to the run whose `adapter/` or `trials/<trial_id>/` this is. If training data
    and scored data are one file without splits, `select`'s training split of it is used.
    """
    if train is not None:
        is_same = train.exists() and data.exists() and train.resolve() == data.resolve()
        split = is_same or None not in read_rows(train)
        return (
            load_data(train, settings, classes=classes) if split else load_held_out(train, settings, classes)[0]
        ), None
    return load_run_splits(adapter.path, settings, classes) or (None, None)


@dataclass(frozen=True, slots=True)
class MeasuredTruncations:
    """The smallest adapter within the margin, and the moments of the truncations."""

    smallest: SmallestAdapterAnswer[RankedAdapter]
    gathered: GatheredMoments


MANY_EXAMPLES = 2000  # above this number, the message proposes to score fewer examples


@dataclass(frozen=True, slots=True)
class ResizeRequest:
    """A request for the smallest sufficient rank on held-out rows; see `rightrank.resize` for each field."""

    data: Path
    train: Path | None
    base: str | None
    settings: SelectSettings
    ranks: Sequence[int] | None
    on_event: Callable[[EvaluationProgress | Notice], None]


def resize_by_data(adapter: AdapterFolder, out: Path, request: ResizeRequest) -> Resized:
    """Measure the candidates, decide, and write the chosen one to `out`.

    Raises:
        InputError: The adapter or the data can't be used, or the adapter does not fit the base model.
    """
    require_plain_update(adapter)
    ranks = list_candidate_ranks(adapter, request.ranks)
    evaluation_data = load_evaluation_data(adapter, request.data, request.train, request.settings)
    request.on_event(Notice(text=evaluation_data.note))
    rank_list = ", ".join(map(str, sorted(ranks, reverse=True)))
    count = len(evaluation_data.splits.examples["validation"])
    hint = "" if count <= MANY_EXAMPLES else "; --set max_eval_examples=1000 measures on fewer"
    text = f"measuring rank {max(ranks)}, the base, then lower ranks ({rank_list}), each on {count:,} examples{hint}"
    request.on_event(Notice(text=text))
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        runtime = make_adapter_runtime(
            adapter, request.base, evaluation_data.splits, request.settings, Path(name) / "cache"
        )
        cross_fit = evaluation_data.scores_training_examples
        measured = measure_truncations(
            adapter, runtime, ranks, Path(name), cross_fit=cross_fit, on_event=request.on_event
        )
        chosen, resized = measured.smallest.adapter.folder, measured.smallest.adapter.resized
        assert resized is not None
        tensors = {key: chosen.load_tensor(key) for key in chosen.keys}
        write_same_format(adapter, out, chosen.config, tensors, {BASE_FILE: runtime.loaded.identity.to_json()})
        search = shlex.join(["rightrank", "select", runtime.loaded.name, "TRAINING_DATA", "--goal", "training-rank"])
        updates = _describe_result(measured, chosen, resized, search)
        notes = [*updates.pop("notes"), evaluation_data.note]
    return resized.model_copy(update=updates | {"out": str(out), "notes": notes, "scored_examples": count})


def _describe_result(
    measured: MeasuredTruncations, chosen: AdapterFolder, resized: Resized, search: str
) -> dict[str, Any]:
    """Return the fields of the result that the measurement determines. `search` is the command that searches the training rank."""
    answer, gathered = measured.smallest.answer, measured.gathered
    notes = [*resized.notes, *gathered.notices]
    if gathered.moments:
        notes.append(f"truncated by K-FAC over {gathered.tokens} tokens of the training split")
    if chosen.config["rank_pattern"]:
        notes.append(
            f"rank {chosen.rank_text}: the parameters of rank {answer.rank} are shared out over the modules (rank_pattern), all at the scale "
            "of lora_alpha and r (alpha_pattern)"
        )
    answer_notes = [note.replace(SEARCH_OPTION, f"({search})") for note in answer.notes]
    scored = [*filter(None, [measured.smallest.base]), *measured.smallest.scored]
    return {
        "rank": answer.rank,
        "bytes_after": chosen.weights_file.stat().st_size,
        "chosen_by": f"data, margin {format_margin(answer)}",
        "held_out": [HeldOutValue(rank=each.rank, value=each.cell.value) for each in scored],
        "answer": answer.model_copy(update={"notes": answer_notes}),
        "no_gain": answer.has_no_gain,
        "notes": notes,
    }


def measure_truncations(
    adapter: AdapterFolder,
    runtime: Runtime,
    ranks: Sequence[int],
    working_folder: Path,
    *,
    cross_fit: bool = False,
    on_event: Callable[[EvaluationProgress | Notice], None] = lambda _: None,
) -> MeasuredTruncations:
    """Measure the adapter, the base and truncations downward until one is not within the margin.

    Args:
        ranks: the adapter's rank and lower ones; `working_folder` keeps the truncations as r1, r2, …
        cross_fit: Score each half of the examples with the moments of the other half. This is needed if moments and scores come from the same
            examples.

    Raises:
        ModelError: The adapter does not fit the base model.
    """
    settings, metric = runtime.settings, runtime.settings.metric_name
    # Over the examples that `select` reads after a training with these settings: which ones another training saw is not known.
    steps = settings.count_training_steps(len(runtime.data.splits["train"]))
    with attach_adapter(runtime, adapter.path) as peft_model:
        gathered = gather_unseen_moments(runtime, peft_model, settings.seeds[0], steps)
    folds = _gather_folds(adapter, runtime) if cross_fit else []
    criterion = Criterion(metric, settings.is_higher_better(metric), settings.margin, runtime.data.summary.loss_kind)
    ascending, top_rank = sorted(ranks), max(ranks)

    def truncate(rank: int) -> RankedAdapter:
        if rank == 0:
            return RankedAdapter(0, adapter)  # evaluated with its update set to zero
        return write_truncation(adapter, working_folder / f"r{rank}", rank, gathered.moments)

    def evaluate(candidate: RankedAdapter) -> ScoredAdapter:
        rank, folder = candidate.rank, candidate.folder.path
        remaining = [lower for lower in ascending if lower <= (rank or top_rank)]
        label = f"rank {rank}" if rank else "the base"
        report_evaluation_progress(runtime, label, on_event, len(remaining) * (2 if folds else 1))
        if rank == 0:
            with attach_adapter(runtime, folder, is_zero=True):
                scores = runtime.evaluate("validation")
        elif folds:
            scores = _evaluate_folds(adapter, runtime, folds, rank, working_folder)
        else:
            with attach_adapter(runtime, folder):
                scores = runtime.evaluate("validation")
        method: AdapterMethod = "trained" if rank == top_rank else "truncated"
        scored = scores.build_scored_adapter(f"r{rank}", rank, criterion, method=method)
        on_event(Notice(text=f"{label}: held-out {scored.cell.value:.4f}"))
        return scored

    smallest = find_smallest(truncate(top_rank), ranks, truncate, evaluate, criterion)
    return MeasuredTruncations(smallest, gathered)


_Fold: TypeAlias = tuple[list[int], Mapping[str, Moments]]  # half of the scored examples, moments over the other half


def _gather_folds(adapter: AdapterFolder, runtime: Runtime) -> list[_Fold]:
    """Split the validation split into halves, so that no example is scored by a truncation that was fitted to it.

    The written adapter uses moments over all examples: as those of each half, but from twice as many.
    """
    example_ids = [example.example_id for example in runtime.data.splits["validation"]]
    halves = [
        [index for index, name in enumerate(example_ids) if int(name[:16], 16) % 2 == indices] for indices in (0, 1)
    ]
    names = [{example_ids[index] for index in indices} for indices in halves]
    train = [example.example_id for example in runtime.data.splits["train"]]
    with attach_adapter(runtime, adapter.path) as peft_model:
        return [
            (
                indices,
                gather_moments(runtime, peft_model, [i for i, name in enumerate(train) if name in other_names]).moments,
            )
            for indices, other_names in zip(halves, reversed(names), strict=True)
        ]


def _evaluate_folds(
    adapter: AdapterFolder, runtime: Runtime, folds: Sequence[_Fold], rank: int, working_folder: Path
) -> Scores:
    """Score every example with the truncation whose moments come from the half without it."""
    fold_scores = []
    for number, (indices, moments) in enumerate(folds):
        folder = working_folder / f"r{rank}-half{number}"
        resize_adapter(adapter, folder, cap_ranks(adapter, rank, moments), moments)
        with attach_adapter(runtime, folder):
            fold_scores.append(runtime.evaluate("validation", indices))
    return fold_scores[0].merge(fold_scores[1])
