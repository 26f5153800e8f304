"""`compare`: decide whether adapter B is no worse than adapter A.

Both sides are evaluated on the same examples, all of those in the data, and compared in pairs. B is *not worse* if the one-sided 95% upper
bound of its mean difference is below the margin, and *worse* if the lower bound is above the margin. Otherwise the
examples cannot tell.
Each side is an adapter folder that PEFT loads, the base model itself, or a full model: a folder (such as a merged one), a
GGUF file. A full model that was made from adapter A is *broken* if it equals the base model, because the converter dropped the adapter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rightrank.adapters.adapter_folders import CLASSIFIER_FILE, CONFIG_FILE, MLX_FILE, WEIGHTS_FILE
from rightrank.bases.base_models import has_default_names, load_base
from rightrank.bases.model_sources import BASE_SIDE
from rightrank.bases.safetensors_files import open_tensors
from rightrank.data.files import read_json_object
from rightrank.data.rows import can_be_read
from rightrank.data.splits import DataSplits, load_data, load_held_out
from rightrank.decision.adapter import Criterion, ReferenceComparison, format_margin
from rightrank.decision.comparison import INTERVAL
from rightrank.evaluation.answers import measure_metrics, require_metric_functions
from rightrank.evaluation.attached_adapters import attach_adapter, report_evaluation_progress, require_matching_base
from rightrank.evaluation.evaluator import Evaluator, build_evaluator
from rightrank.evaluation.scores import Scores
from rightrank.evaluation.tokens import encode_splits
from rightrank.runs.folder import Journal
from rightrank.schema.errors import ModelError, SettingsError
from rightrank.schema.events import EvaluationProgress, RunStarted
from rightrank.schema.metrics import get_margin_share
from rightrank.schema.results import AdapterComparison, ComparisonVerdict, MetricComparison
from rightrank.schema.settings import SPLIT_SETTINGS, SelectSettings

BITS = {"4bit": "load_in_4bit", "8bit": "load_in_8bit"}  # the settings for values of `--base-b`
VERDICTS: dict[bool | None, ComparisonVerdict] = {True: "not_worse", None: "cannot_tell", False: "worse"}
DROPPED = "it equals the base model: the adapter was dropped"
# B equals the base model if its losses are so many times closer to the base model's than to A's. Rounding moves B away from both, and a
# distance from A below this fraction of the adapter's effect is rounding.
CLOSENESS_RATIO, IGNORED_CHANGE = 3.0, 0.1


@dataclass(frozen=True, slots=True)
class _ComparedSide:
    """One side of a comparison on all examples of a data set: its source and its scores by every metric of the settings."""

    source: str
    evaluator: Evaluator
    adapter: Path | None  # on the base of `evaluator`; None: the base model or a full model
    scores: Scores


def compare_adapters(
    sides: tuple[str, str],
    model: str,
    data: Sequence[Path],
    settings: SelectSettings,
    on_event: Callable[[EvaluationProgress], None] = lambda _: None,
    base_b: str | None = None,
    run_splits: DataSplits | None = None,
) -> AdapterComparison:
    """Evaluate A and B on every data set and compare them by every metric; see `rightrank.compare`.

    Args:
        run_splits: Examples whose validation split is scored in place of the rows of `data`, which then holds one name.

    Raises:
        InputError: A side, the model, the data or a metric can't be used.
    """
    if base_b is not None and base_b.endswith("bit") and base_b not in BITS:
        raise SettingsError(f"base_b: got {base_b!r}; give 4bit, 8bit, or another base of B")
    require_metric_functions(settings)
    comparisons: list[MetricComparison] = []
    cause: str | None = None
    for path in data:
        first, second, trained_on = _evaluate_sides(sides, model, path, settings, on_event, base_b, run_splits)
        has_base = first.adapter is not None and get_margin_share(settings.margin) is not None
        base = _evaluate_adapter(first.evaluator, first.adapter, is_zero=True) if has_base else None
        for spec in settings.metric_specs:
            comparison = _compare_sides(first, second, spec.name, str(path), settings, base)
            comparisons.append(comparison.model_copy(update={"trained_on": trained_on}))
        cause = cause or (DROPPED if _is_adapter_dropped(first, second) else None)
    worst = max(comparisons, key=lambda comparison: list(VERDICTS.values()).index(comparison.verdict))
    fields = worst.model_dump(exclude={"data", "value_a", "value_b"}) | ({"verdict": "broken"} if cause else {})
    sentence = _format_sentence(*sides, worst, len(comparisons), cause)
    return AdapterComparison(sentence=sentence, comparisons=comparisons, cause=cause, **fields)


def _evaluate_sides(
    sides: tuple[str, str],
    model: str,
    data: Path,
    settings: SelectSettings,
    on_event: Callable[[EvaluationProgress], None],
    base_b: str | None,
    run_splits: DataSplits | None,
) -> tuple[_ComparedSide, _ComparedSide, int]:
    """Evaluate both sides, and count the rows that an adapter was trained on, which are left out."""
    trained_on = 0
    if run_splits is None:
        all_splits = load_held_out(data, settings, find_shared_labels(sides))
        splits = _drop_training_examples(all_splits, sides, settings, data)
        trained_on = len(all_splits.examples["validation"]) - len(splits.examples["validation"])
    else:
        splits = run_splits
    bits = BITS.get(base_b or "")
    settings_b = settings if bits is None else settings.model_copy(update={bits: True})
    model_b = model if base_b is None or bits is not None else base_b
    compared_sides: list[_ComparedSide] = []
    evaluators: dict[tuple[str, int | None], Evaluator] = {}  # by model and its quantization
    for side_name, base, side_settings in zip(sides, (model, model_b), (settings, settings_b), strict=True):
        folder = Path(side_name)
        adapter = folder if (folder / CONFIG_FILE).is_file() else None
        key = side_name if adapter is None and side_name != BASE_SIDE else base, side_settings.weight_bits
        if key not in evaluators:
            loaded = load_base(key[0], side_settings, splits.summary.classes)
            evaluators[key] = build_evaluator(loaded, encode_splits(splits, loaded, side_settings), side_settings)
        evaluator = evaluators[key]
        if adapter is not None and base == model:
            require_matching_base(adapter, evaluator.loaded)
        if adapter is not None and not (adapter / MLX_FILE).is_file():
            open_tensors(adapter / WEIGHTS_FILE)  # raises a clear error for a damaged file, before PEFT fails on it
        label = f"{'AB'[len(compared_sides)]} ({folder.name}) on {data.name}"
        report_evaluation_progress(evaluator, label, on_event, 2 - len(compared_sides))
        scores = _evaluate_adapter(evaluator, adapter)
        compared_sides.append(_ComparedSide(side_name, evaluator, adapter, scores))
    return compared_sides[0], compared_sides[1], trained_on


def _drop_training_examples(
    splits: DataSplits, sides: Sequence[str], settings: SelectSettings, data: Path
) -> DataSplits:
    """Return the rows that no adapter was trained on, as far as the run folders around them record it.

    Raises:
        DataError: Fewer than two rows are left.
    """
    loaded = (load_run_splits(Path(name), settings, splits.summary.classes) for name in sides if name != BASE_SIDE)
    trained = (example for run_splits, _ in filter(None, loaded) for example in run_splits.examples["train"])
    return splits.exclude_training_examples(trained, data)


def load_run_splits(
    adapter: Path, settings: SelectSettings, classes: Sequence[str] | None
) -> tuple[DataSplits, Path] | None:
    """Load the splits that an adapter's run was trained with, and the path of its data.

    The run is known for an adapter in `adapter/` or `trials/<trial_id>/` of a run folder. For other adapters the result is None.
    """
    folders = list(adapter.resolve().parents)[:2]
    journal = next((path for folder in folders if (path := folder / "journal.jsonl").is_file()), None)
    started = None if journal is None else next(iter(Journal(journal).read_complete_lines()), None)
    if not isinstance(started, RunStarted) or started.data_name is None or not can_be_read(started.data_name):
        return None
    run_settings = settings.model_copy(update=started.select_settings.model_dump(include={*SPLIT_SETTINGS}))
    return load_data(Path(started.data_name), run_settings, classes=classes), Path(started.data_name)


def _require_same_tokens(a: Scores, b: Scores, metric: str) -> None:
    """Raise if the two sides have different examples, or losses over different tokens.

    Raises:
        ModelError: The models have different tokenizers or chat templates.
    """
    if a.tokens == b.tokens or (metric != "loss" and len(a.tokens) == len(b.tokens)):
        return
    raise ModelError(
        f"A and B have different tokenizers or chat templates: {sum(a.tokens):,} and {sum(b.tokens):,} label tokens in {len(a.tokens)} and "
        f"{len(b.tokens)} examples. Losses per token can't be compared then; compare the generated answers, for example with "
        "--set metric=exact_match or f1"
    )


def _is_adapter_dropped(a: _ComparedSide, b: _ComparedSide) -> bool:
    """Return whether B, a full model that was made from the adapter A, has the losses of the base model."""
    if a.adapter is None or b.adapter is not None or b.source == BASE_SIDE:
        return False
    base_losses = np.array(a.evaluator.evaluate("validation").losses)
    adapter_losses, losses = np.array(a.scores.losses), np.array(b.scores.losses)
    if losses.shape != base_losses.shape:
        return False
    effect, deviation, distance = (
        float(np.abs(difference).mean())
        for difference in (base_losses - adapter_losses, losses - adapter_losses, losses - base_losses)
    )
    return deviation > IGNORED_CHANGE * effect and distance * CLOSENESS_RATIO <= deviation


def _evaluate_adapter(evaluator: Evaluator, adapter: Path | None, *, is_zero: bool = False) -> Scores:
    """Score an adapter, or the model alone, on the validation split by every metric that has a score for each example."""
    with attach_adapter(evaluator, adapter, is_zero=is_zero):
        scores = evaluator.evaluate("validation")
        measured = measure_metrics(evaluator, "validation")
    measured.require_values(list(measured.failures))
    return replace(scores, example_metrics=scores.example_metrics | measured.example_scores)


def _compare_sides(
    a: _ComparedSide, b: _ComparedSide, metric: str, data: str, settings: SelectSettings, base: Scores | None
) -> MetricComparison:
    """Compare the scores of B with those of A on the same examples by one metric.

    Args:
        data: The name of the examples.
        base: The base with the same examples. A margin that is a share is one of A's gain over it. Without a gain that is shown, the
            default in the metric's unit holds.

    Raises:
        ModelError: The models have different tokenizers or chat templates.
        SettingsError: The metric gives no score per example.
    """
    _require_same_tokens(a.scores, b.scores, metric)
    if metric not in a.scores.metrics:
        raise SettingsError(
            f"metric {metric!r}: the examples of {data} have no score by it, so two adapters can't be compared in pairs; they have scores by "
            f"{', '.join(sorted(a.scores.metrics))} (rows with `text` and `label` have accuracy, rows with prompts exact_match and f1)"
        )
    summaries = [compared_side.evaluator.data.summary for compared_side in (a, b)]
    criterion = Criterion(metric, settings.is_higher_better(metric), settings.margin, summaries[0].loss_kind)
    side_a = a.scores.build_scored_adapter("A", 1, criterion)
    side_b = b.scores.build_scored_adapter("B", 1, criterion)
    scored_base = None if base is None else base.build_scored_adapter("base", 1, criterion)
    comparison = ReferenceComparison(side_a, {"A": side_a}, criterion, scored_base)
    comparison = replace(comparison, base=None) if comparison.has_no_gain else comparison
    bounds = comparison.compute_bounds(side_b.cell)
    margin, share = comparison.margin, comparison.share
    contrast = bounds if share is None else comparison.compute_contrast(side_b.cell, share)
    verdict = VERDICTS[contrast.is_enough(margin if share is None else 0.0)]
    cell = side_a.cell
    return MetricComparison(
        data=data,
        metric=metric,
        verdict=verdict,
        value_a=cell.value,
        value_b=side_b.cell.value,
        difference=bounds.mean,
        difference_low=bounds.low,
        difference_high=bounds.high,
        margin=margin,
        margin_share=share,
        gain=comparison.gain,
        examples=cell.examples,
        left_out=max(summary.splits["validation"].dropped for summary in summaries),
        groups=cell.num_groups if cell.groups is not None else None,
        examples_needed=comparison.compute_needed_examples(side_b) if verdict == "cannot_tell" else None,
    )


def _format_sentence(a: str, b: str, worst: MetricComparison, count: int, cause: str | None) -> str:
    if Path(a).name != Path(b).name:
        a, b = Path(a).name, Path(b).name
    names = f"B ({b}) against A ({a})"
    left_out = f" ({worst.left_out} more have no label within the maximum length)" if worst.left_out else ""
    left_out += f" ({worst.trained_on:,} more are training examples of A or B)" if worst.trained_on else ""
    grouped = ", taken as independent" if worst.groups is None else f" in {worst.groups} groups"
    figures = (
        f"{worst.metric} differs by {worst.difference:+.3g} ({INTERVAL:.0%} interval {worst.difference_low:+.3g} to "
        f"{worst.difference_high:+.3g}) on {worst.examples} examples{grouped}{left_out}, margin {format_margin(worst)}"
    )
    worst_text = "" if count == 1 else f" The worst of {count} comparisons is on {Path(worst.data).name}."
    if cause is not None:
        return f"{names}: BROKEN, {cause}; {figures}.{worst_text}"
    if worst.verdict != "cannot_tell":
        verdict = "not worse" if worst.verdict == "not_worse" else "worse by more than the margin"
        return f"{names}: {verdict}; {figures}.{worst_text}"
    noun = "examples" if worst.groups is None else "groups"
    advice = (
        f"about {worst.examples_needed:,} {noun} would show it"
        if worst.examples_needed is not None
        else f"more {noun} would show whether it is worse"
    )
    return f"{names}: these examples cannot tell; {figures}; {advice}.{worst_text}"


def find_shared_labels(sides: Sequence[str]) -> list[str] | None:
    """Return the labels that both sides have, or None if neither is a classifier.

    Raises:
        ModelError: The sides are classifiers with different labels, or with another order of them.
    """
    labels_by_side = [(model, labels) for model in sides if (labels := read_labels(model)) is not None]
    for model, labels in labels_by_side:
        first, first_labels = labels_by_side[0]
        if labels != first_labels:
            raise ModelError(
                f"{model}: its labels are {', '.join(labels)}, and those of {first} are {', '.join(first_labels)}: classifiers can only be "
                "compared if they have the same labels in the same order"
            )
    return labels_by_side[0][1] if labels_by_side else None


def read_labels(model: str) -> list[str] | None:
    """Read the labels of an adapter or of a full model, in the order of the logits, without loading it.

    The result is None for `base`, a GGUF file, and a model without a classification head. Labels without names are numbered.

    Raises:
        ModelError: The file of the labels is damaged.
    """
    folder = Path(model)
    is_adapter = (folder / CONFIG_FILE).is_file()
    file = folder / (CLASSIFIER_FILE if is_adapter else "config.json")
    if model == BASE_SIDE or not file.is_file():
        return _number_head_rows(folder) if is_adapter else None
    try:
        config = read_json_object(file)
        if is_adapter:
            return _sort_labels(config.get("id2label"))
        if not any("SequenceClassification" in str(name) for name in config.get("architectures") or ()):
            return None
        names = _sort_labels(config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"})
    except ValueError as error:
        raise ModelError(
            f"{file}: no labels ({error}); give id2label as {{'0': 'first label', '1': …}}, in the order of the logits"
        ) from None
    return [str(number) for number in range(len(names))] if has_default_names(names) else names


def _number_head_rows(folder: Path) -> list[str] | None:
    """Return the numbers of the rows of the classification head in an adapter's weights; None if it has no head."""
    weights = folder / WEIGHTS_FILE
    if read_json_object(folder / CONFIG_FILE).get("task_type") != "SEQ_CLS" or not weights.is_file():
        return None
    # names of the head's weights in PEFT's files
    pattern = re.compile(r"\.(score|classifier)\.(?!.*\.?lora_).*weight$")
    rows = [shape[0] for name, shape in open_tensors(weights).shapes.items() if pattern.search(name)]
    return [str(number) for number in range(rows[-1])] if rows else None


def _sort_labels(id2label: Any) -> list[str]:
    if not isinstance(id2label, Mapping) or not id2label:
        raise ValueError("id2label is missing")
    by_number = {int(number): str(label) for number, label in id2label.items()}
    if sorted(by_number) != list(range(len(by_number))):
        raise ValueError(f"id2label numbers {', '.join(map(str, sorted(by_number)))}")
    return [by_number[number] for number in range(len(by_number))]
