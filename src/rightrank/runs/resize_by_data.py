"""`resize --data`: find the smallest truncation that is not worse than the adapter by the margin, by the rule of `select`.

Every candidate is truncated by K-FAC over training examples, written as an adapter folder, attached to the base model by PEFT,
and measured on the same examples.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from rightrank.adapters.adapter_files import AdapterFolder, write_adapter
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
from rightrank.bases.base_models import load_base
from rightrank.bases.model_sources import require_model
from rightrank.data.rows import read_rows
from rightrank.data.splits import DataSplits, load_data, load_held_out
from rightrank.decision.adapter import Criterion, ScoredAdapter, format_margin
from rightrank.evaluation.attached_adapters import attach_adapter, report_evaluation_progress, require_matching_base
from rightrank.evaluation.evaluator import Evaluator, build_evaluator
from rightrank.evaluation.peft_models import GatheredMoments
from rightrank.evaluation.scores import Scores
from rightrank.evaluation.tokens import encode_splits
from rightrank.runs.compare import load_run_splits, read_labels
from rightrank.schema.errors import DataError, ModelError, SettingsError
from rightrank.schema.events import EvaluationProgress, Notice
from rightrank.schema.results import AdapterMethod, Resized
from rightrank.schema.settings import NO_SPLIT_OVERRIDES, SelectSettings
from rightrank.training.moments import gather_moments, gather_unseen_moments


def load_evaluation_data(
    adapter: AdapterFolder, data: Path, train: Path | None, settings: SelectSettings
) -> tuple[DataSplits, bool, str]:
    """Load the rows of `data` to score, without those that the adapter is known to be trained on.

    The training examples are in the file `train`, or they belong to the run whose `adapter/` or `trials/<trial_id>/` this is. If training data
    and scored data are one file without splits, `select`'s training split of it is used.

    Returns:
        Splits with the examples to score as validation and training examples as train, whether both are the same examples because the
        training data are unknown, and a note.

    Raises:
        DataError: The rows can't be used, or the adapter was trained on all but one of them.
    """
    classes = read_labels(str(adapter.path))
    training_splits, run_data, is_unknown = None, None, False
    if train is None:
        training_splits, run_data = load_run_splits(adapter.path, settings, classes) or (None, None)
    elif None not in read_rows(train, settings.data_config) or train.resolve() == data.resolve():
        training_splits = load_data(train, settings, classes=classes)
    else:
        training_splits = load_held_out(train, settings, classes)
    if training_splits is None and None not in read_rows(data, settings.data_config):
        all_rows = NO_SPLIT_OVERRIDES | {"max_eval_examples": sys.maxsize}
        splits = load_data(data, settings.model_copy(update=all_rows), classes=classes)
        examples, source = splits.examples["validation"], "its validation split"
    elif training_splits is not None and run_data is not None and run_data.resolve() == data.resolve():
        splits, examples = training_splits, training_splits.examples["validation"]
        source = "the validation split of the adapter's run"
    else:
        splits = load_held_out(data, settings, classes)
        examples, is_unknown = splits.examples["validation"], training_splits is None
        source = "all rows; if the adapter was trained on some of them, name its training data with --train"
        if training_splits is not None:
            if splits.form != training_splits.form:
                raise DataError(
                    f"{data}: has the form {splits.form}, and the adapter's training data {training_splits.form}"
                )
            unseen = splits.exclude_training_examples(training_splits.examples["train"], data).examples["validation"]
            source = f"not in its training data; {len(examples) - len(unseen):,} training examples of the adapter are left out"
            splits, examples = training_splits, unseen
    if "max_eval_examples" in settings.model_fields_set:
        examples = examples[: settings.max_eval_examples]
    splits = replace(splits, examples={"train": splits.examples["train"], "validation": examples, "test": []})
    return splits, is_unknown, f"scored on {len(examples):,} examples of {data} ({source})"


def build_adapter_evaluator(
    adapter: AdapterFolder, base: str | None, splits: DataSplits, settings: SelectSettings, cache: Path
) -> Evaluator:
    """Build an evaluator for an adapter and its truncations.

    Args:
        base: a model; None loads the one that the configuration names.
        cache: a folder for temporary files.

    Raises:
        SettingsError: the metric needs more than an evaluation of losses.
        ModelError: no base is named, the base cannot be loaded, or it is not the adapter's base.
        DataError: the data cannot be used.
    """
    if adapter.path.is_file():
        raise ModelError(f"{adapter.path}: PEFT loads no such file onto a base model; choose by --rank")
    if not settings.metric_specs[0].is_eval_metric or settings.metrics:
        raise SettingsError(
            f"metric {settings.metric_name!r}: this command measures adapters by loss or accuracy; give one of them, and leave metrics out"
        )
    base = base or adapter.base_model
    if base is None:
        raise ModelError(f"{adapter.path}: the configuration names no base model; give one with --base MODEL")
    require_model(base)
    loaded = load_base(base, settings, splits.summary.classes)
    require_matching_base(adapter.path, loaded)
    return build_evaluator(
        loaded,
        encode_splits(splits, loaded, settings),
        settings,
        adapted_modules=[module.name for module in adapter.modules],
        # A fully trained module may lie below the first adapter, where a cached prefix would be stale.
        cache_folder=None if adapter.other_keys else cache,
    )


MANY_EXAMPLES = 2000  # above this number, the message proposes to score fewer examples


def resize_by_data(
    adapter: AdapterFolder,
    out: Path,
    *,
    data: Path,
    train: Path | None,
    base: str | None,
    settings: SelectSettings,
    ranks: Sequence[int] | None,
    on_event: Callable[[EvaluationProgress | Notice], None],
) -> Resized:
    """Measure the candidates, decide, and write the chosen one to `out`; see `rightrank.resize` for the arguments.

    Raises:
        InputError: The adapter or the data can't be used, or the adapter does not fit the base model.
    """
    require_plain_update(adapter)
    ranks = list_candidate_ranks(adapter, ranks)
    splits, is_unknown, note = load_evaluation_data(adapter, data, train, settings)
    on_event(Notice(text=note))
    rank_list = ", ".join(map(str, sorted(ranks, reverse=True)))
    count = len(splits.examples["validation"])
    hint = "" if count <= MANY_EXAMPLES else "; --set max_eval_examples=1000 measures on fewer"
    text = f"measuring rank {max(ranks)}, the base, then lower ranks ({rank_list}), each on {count:,} examples{hint}"
    on_event(Notice(text=text))
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        evaluator = build_adapter_evaluator(adapter, base, splits, settings, Path(name) / "cache")
        smallest, gathered = measure_truncations(
            adapter, evaluator, settings, ranks, Path(name), cross_fit=is_unknown, on_event=on_event
        )
        chosen, resized = smallest.adapter.folder, smallest.adapter.resized
        assert resized is not None
        tensors = {key: chosen.load_tensor(key) for key in chosen.keys}
        write_adapter(out, chosen.config, tensors, adapter, {BASE_FILE: evaluator.loaded.identity.to_json()})
        written_bytes = chosen.weights_file.stat().st_size
    answer, notes = smallest.answer, [*resized.notes, *gathered.notices]
    if gathered.moments:
        notes.append(f"truncated by K-FAC over {gathered.tokens} tokens of the training split")
    if chosen.config["rank_pattern"]:
        notes.append(
            f"the parameters of rank {answer.rank} are shared out over the modules (rank_pattern), all at the scale "
            "of lora_alpha and r (alpha_pattern)"
        )
    updates = {
        "rank": answer.rank,
        "bytes_after": written_bytes,
        "chosen_by": f"data, margin {format_margin(answer)}",
        "answer": answer,
        "out": str(out),
        "notes": [*notes, note],
    }
    return resized.model_copy(update=updates)


def measure_truncations(
    adapter: AdapterFolder,
    evaluator: Evaluator,
    settings: SelectSettings,
    ranks: Sequence[int],
    working_folder: Path,
    *,
    cross_fit: bool = False,
    on_event: Callable[[EvaluationProgress | Notice], None] = lambda _: None,
) -> tuple[SmallestAdapterAnswer[RankedAdapter], GatheredMoments]:
    """Measure the adapter, the base and truncations downward until one is not within the margin.

    Args:
        ranks: the adapter's rank and lower ones; `working_folder` keeps the truncations as r1, r2, …
        cross_fit: Score each half of the examples with the moments of the other half. This is needed if moments and scores come from the same
            examples.

    Returns:
        The smallest adapter within the margin, and the moments of the truncations.

    Raises:
        ModelError: The adapter does not fit the base model.
    """
    metric = settings.metric_name
    # Over the examples that `select` reads after a training with these settings: which ones another training saw is not known.
    steps = settings.count_training_steps(len(evaluator.data.splits["train"]))
    with attach_adapter(evaluator, adapter.path) as peft_model:
        gathered = gather_unseen_moments(evaluator, settings, peft_model, settings.seeds[0], steps)
    folds = _gather_folds(adapter, evaluator, settings) if cross_fit else []
    criterion = Criterion(metric, settings.is_higher_better(metric), settings.margin, evaluator.data.summary.loss_kind)
    top_rank = max(ranks)

    def truncate(rank: int) -> RankedAdapter:
        if rank == 0:
            return RankedAdapter(0, adapter)  # evaluated with its update set to zero
        return write_truncation(adapter, working_folder / f"r{rank}", rank, gathered.moments)

    def evaluate(candidate: RankedAdapter) -> ScoredAdapter:
        rank = candidate.rank
        num_remaining = sum(lower <= (rank or top_rank) for lower in ranks)
        label = f"rank {rank}" if rank else "the base"
        report_evaluation_progress(evaluator, label, on_event, num_remaining * (2 if folds else 1))
        if rank and folds:
            scores = _evaluate_folds(adapter, evaluator, folds, rank, working_folder)
        else:
            with attach_adapter(evaluator, candidate.folder.path, is_zero=rank == 0):
                scores = evaluator.evaluate("validation")
        method: AdapterMethod = "trained" if rank == top_rank else "truncated"
        scored = scores.build_scored_adapter(f"r{rank}", rank, criterion, method=method)
        on_event(Notice(text=f"{label}: held-out {scored.cell.value:.4f}"))
        return scored

    return find_smallest(truncate(top_rank), ranks, truncate, evaluate, criterion), gathered


_Fold: TypeAlias = tuple[list[int], Mapping[str, Moments]]  # half of the scored examples, moments over the other half


def _gather_folds(adapter: AdapterFolder, evaluator: Evaluator, settings: SelectSettings) -> list[_Fold]:
    """Split the validation split into halves, so that no example is scored by a truncation that was fitted to it.

    The written adapter uses moments over all examples: as those of each half, but from twice as many.
    """
    halves: list[list[int]] = [[], []]
    for index, example in enumerate(evaluator.data.splits["validation"]):
        halves[int(example.example_id[:16], 16) % 2].append(index)
    names = [{evaluator.data.splits["validation"][index].example_id for index in half} for half in halves]
    train = [example.example_id for example in evaluator.data.splits["train"]]
    with attach_adapter(evaluator, adapter.path) as peft_model:
        gathered = [
            gather_moments(evaluator, settings, peft_model, [i for i, name in enumerate(train) if name in half_names])
            for half_names in names
        ]
    return [(halves[0], gathered[1].moments), (halves[1], gathered[0].moments)]


def _evaluate_folds(
    adapter: AdapterFolder, evaluator: Evaluator, folds: Sequence[_Fold], rank: int, working_folder: Path
) -> Scores:
    """Score every example with the truncation whose moments come from the half without it."""
    fold_scores = []
    for number, (indices, moments) in enumerate(folds):
        folder = working_folder / f"r{rank}-half{number}"
        resize_adapter(adapter, folder, cap_ranks(adapter, rank, moments), moments)
        with attach_adapter(evaluator, folder):
            fold_scores.append(evaluator.evaluate("validation", indices))
    return fold_scores[0].merge(fold_scores[1])
