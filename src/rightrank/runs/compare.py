"""`compare`: decide whether adapter B is no worse than adapter A.

Both sides are evaluated on the same examples, all of those in the data, and compared in pairs. B is *not worse* if the one-sided 95% upper
bound of its mean difference is below the margin, and *worse* if the lower bound is above the margin. Otherwise the
examples cannot tell.
Each side is an adapter folder that PEFT loads, the base model itself, or a full model: a folder (such as a merged one), a
GGUF file. A full model that was made from adapter A is *broken* if it equals the base model, because the converter dropped the adapter.
"""

from __future__ import annotations

import math
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
from rightrank.data.files import UnreadableError, read_json_object
from rightrank.data.splits import DataSplits, load_data, load_held_out
from rightrank.decision.adapter import Criterion, ReferenceComparison, ScoredAdapter, format_margin
from rightrank.decision.comparison import RELATIVE_TOLERANCE
from rightrank.decision.table import Cell, compute_paired_difference
from rightrank.runs.folder import Journal
from rightrank.schema.decision import DifferenceDistribution
from rightrank.schema.errors import ModelError, SettingsError
from rightrank.schema.events import EvaluationProgress, RunStarted
from rightrank.schema.metrics import LossKind, get_margin_share
from rightrank.schema.results import AdapterComparison, ComparisonVerdict, MetricComparison
from rightrank.schema.settings import SPLIT_SETTINGS, SelectSettings
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.training.adapter_runtime import attach_adapter, report_evaluation_progress, require_matching_base
from rightrank.training.answers import measure_metrics, require_metric_functions
from rightrank.training.evaluation import Progress, build_finished_trial
from rightrank.training.runtime import Runtime
from rightrank.training.tokens import encode_splits

LARGE_DIFFERENCE_MARGINS = (
    10.0  # differences of single examples above this are reported, even if the mean is within the margin
)
BITS = {"4bit": "load_in_4bit", "8bit": "load_in_8bit"}  # the settings for values of `--base-b`
VERDICTS: dict[bool | None, ComparisonVerdict] = {True: "not_worse", None: "cannot_tell", False: "worse"}
DROPPED = "it equals the base model: the adapter was dropped"
# B equals the base model if its losses are so many times closer to the base model's than to A's. Rounding moves B away from both, and a
# distance from A below this fraction of the adapter's effect is rounding.
CLOSENESS_RATIO, IGNORED_CHANGE = 3.0, 0.1


@dataclass(frozen=True, slots=True)
class _ComparedSide:
    """One side of a comparison on all examples of a data set: its source and its scores."""

    source: str
    runtime: Runtime
    adapter: Path | None  # on the base of `runtime`; None: the base model or a full model
    scores: TrialFinished


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
    require_metric_functions(settings)
    comparisons: list[MetricComparison] = []
    cause: str | None = None
    for path in data:
        first, second, trained_on = _evaluate_sides(sides, model, path, settings, on_event, base_b, run_splits)
        base = _evaluate_base(first) if get_margin_share(settings.margin) is not None else None
        results = (
            compare_trials(first.scores, second.scores, spec.name, str(path), settings, base)
            for spec in settings.metric_specs
        )
        left_out = max(
            compared_side.runtime.data.summary.splits["validation"].dropped for compared_side in (first, second)
        )
        counts = {"trained_on": trained_on, "left_out": left_out}
        comparisons += [comparison.model_copy(update=counts) for comparison in results]
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
        all_splits, settings = load_held_out(data, settings, find_shared_labels(sides))
        splits = drop_training_examples(all_splits, sides, settings, data)
        trained_on = len(all_splits.examples["validation"]) - len(splits.examples["validation"])
    else:
        splits, settings = run_splits, settings.model_copy(update={"ranks": (1,)})
    compared_sides: list[_ComparedSide] = []
    runtimes: dict[tuple[str, str | None], Runtime] = {}  # by base and its quantization
    for index, side_name in enumerate(sides):
        bits = base_b if index and base_b in BITS else None
        other_base = base_b if index and base_b not in BITS else None
        is_adapter = (Path(side_name) / CONFIG_FILE).is_file()
        source = (other_base or model) if is_adapter or side_name == BASE_SIDE else side_name
        if (source, bits) not in runtimes:
            side_settings = settings if bits is None else settings.model_copy(update={BITS[bits]: True})
            loaded = load_base(source, side_settings, splits.summary.classes)
            encoded = encode_splits(splits, loaded, side_settings)
            runtimes[source, bits] = Runtime(loaded, encoded, side_settings, 1, None)
        runtime = runtimes[source, bits]
        if is_adapter and other_base is None:
            require_matching_base(Path(side_name), runtime.loaded)
        if is_adapter and not (Path(side_name) / MLX_FILE).is_file():
            open_tensors(
                Path(side_name) / WEIGHTS_FILE
            )  # raises a clear error for a damaged file, before PEFT fails on it
        report_evaluation_progress(
            runtime, f"{'AB'[index]} ({Path(side_name).name}) on {data.name}", on_event, 2 - index
        )
        adapter = Path(side_name) if is_adapter else None
        compared_sides.append(_ComparedSide(side_name, runtime, adapter, evaluate_adapter(runtime, side_name, adapter)))
    return compared_sides[0], compared_sides[1], trained_on


def _evaluate_base(a: _ComparedSide) -> TrialFinished | None:
    """Evaluate the adapter A with its update set to zero, which keeps a trained head; None if A is a full model or the base."""
    return None if a.adapter is None else evaluate_adapter(a.runtime, "base", a.adapter, is_zero=True)


def drop_training_examples(
    splits: DataSplits, sides: Sequence[str], settings: SelectSettings, data: Path
) -> DataSplits:
    """Return the rows that no adapter was trained on, as far as the run folders around them record it.

    Raises:
        DataError: Fewer than two rows are left.
    """
    paths = [Path(side_name) for side_name in sides if side_name != BASE_SIDE]
    run_data = filter(None, [load_run_splits(path, settings, splits.summary.classes) for path in paths])
    return splits.exclude_training_examples(
        (example for run_splits, _ in run_data for example in run_splits.examples["train"]), data
    )


def load_run_splits(
    adapter: Path, settings: SelectSettings, classes: Sequence[str] | None
) -> tuple[DataSplits, Path] | None:
    """Load the splits that an adapter's run was trained with, and the path of its data.

    The run is known for an adapter in `adapter/` or `trials/<trial_id>/` of a run folder. For other adapters the result is None.
    """
    parent = adapter.resolve().parent
    journal = next((path for folder in (parent, parent.parent) if (path := folder / "journal.jsonl").is_file()), None)
    started = None if journal is None else next(iter(Journal(journal).read_complete_lines()), None)
    source = started.data_name if isinstance(started, RunStarted) else None
    if not isinstance(started, RunStarted) or source is None or not Path(source).exists():
        return None
    run_settings = settings.model_copy(update=started.select_settings.model_dump(include={*SPLIT_SETTINGS}))
    return load_data(Path(source), run_settings, classes=classes), Path(source)


def _require_same_tokens(a: TrialFinished, b: TrialFinished, metric: str) -> None:
    """Raise if the two sides have different examples, or losses over different tokens.

    Raises:
        ModelError: The models have different tokenizers or chat templates.
    """
    if a.example_tokens == b.example_tokens or (metric != "loss" and len(a.example_losses) == len(b.example_losses)):
        return
    counts = [sum(trial.example_tokens or []) for trial in (a, b)]
    raise ModelError(
        f"A and B have different tokenizers or chat templates: {counts[0]:,} and {counts[1]:,} label tokens in {len(a.example_losses)} and "
        f"{len(b.example_losses)} examples. Losses per token can't be compared then; compare the generated answers, for example with "
        "--set metric=exact_match or f1"
    )


def _is_adapter_dropped(a: _ComparedSide, b: _ComparedSide) -> bool:
    """Return whether B, a full model that was made from the adapter A, has the losses of the base model."""
    if a.adapter is None or b.adapter is not None or b.source == BASE_SIDE:
        return False
    base_losses = np.array(a.runtime.evaluate("validation").losses)
    adapter_losses, losses = np.array(a.scores.example_losses), np.array(b.scores.example_losses)
    if losses.shape != base_losses.shape:
        return False
    effect, deviation, distance = (
        float(np.abs(difference).mean())
        for difference in (base_losses - adapter_losses, losses - adapter_losses, losses - base_losses)
    )
    return deviation > IGNORED_CHANGE * effect and distance * CLOSENESS_RATIO <= deviation


def evaluate_adapter(runtime: Runtime, name: str, adapter: Path | None, *, is_zero: bool = False) -> TrialFinished:
    """Evaluate the base model, or an adapter on it, on the validation split by every metric of the settings."""
    with attach_adapter(runtime, adapter, is_zero=is_zero):
        scores, measured = runtime.evaluate("validation"), measure_metrics(runtime, "validation")
    measured.require_values(list(measured.failures))
    arm = Arm(rank=1, learning_rate=0.0, lora_alpha=1.0, seed=0, steps=0)
    return build_finished_trial(Trial(trial_id=name, arm=arm), "loss", scores, measured, Progress())


def compare_trials(
    a: TrialFinished,
    b: TrialFinished,
    metric: str,
    data: str,
    settings: SelectSettings,
    base: TrialFinished | None = None,
) -> MetricComparison:
    """Compare the scores of B with those of A on the same examples by one metric.

    Args:
        data: The name of the examples.
        base: The base with the same examples. A margin that is a share is one of A's gain over it. Without a gain that is shown, the
            default in the metric's unit holds.

    Raises:
        ModelError: The models have different tokenizers or chat templates.
        SettingsError: The metric was not measured, or gives no score per example.
    """
    _require_same_tokens(a, b, metric)
    if metric not in a.metrics:
        raise SettingsError(
            f"metric {metric!r}: the examples of {data} have none; they have {', '.join(sorted(a.metrics))}"
            " (rows with `text` and `label` have accuracy, rows with prompts exact_match and f1)"
        )
    higher = settings.is_higher_better(metric)
    loss: LossKind = "token_loss" if a.example_correct is None else "loss"
    loss = "pair_loss" if "reward_accuracy" in a.example_metrics else loss
    criterion = Criterion(metric, higher, settings.margin, loss)
    side_a, side_b = (_score_trial(trial, name, criterion) for trial, name in ((a, "A"), (b, "B")))
    cells = side_a.cell, side_b.cell
    if not all(cell.examples for cell in cells):
        raise SettingsError(f"metric {metric!r} gives no score per example, so two adapters can't be compared in pairs")
    comparison = ReferenceComparison(
        side_a, {"A": side_a}, criterion, None if base is None else _score_trial(base, "base", criterion)
    )
    comparison = replace(comparison, base=None) if comparison.has_no_gain else comparison
    bounds = comparison.compute_bounds(side_b.cell)
    margin, share = comparison.margin, comparison.share
    contrast = bounds if share is None else comparison.compute_contrast(side_b.cell, share)
    verdict = VERDICTS[contrast.is_enough(margin if share is None else 0.0)]
    return MetricComparison(
        data=data,
        metric=metric,
        verdict=verdict,
        value_a=cells[0].value,
        value_b=cells[1].value,
        difference=bounds.mean,
        difference_low=bounds.low,
        difference_high=bounds.high,
        distribution=compute_distribution(compute_paired_difference(cells[1], cells[0]), margin),
        margin=margin,
        margin_share=share,
        gain=comparison.gain,
        examples=cells[0].examples,
        groups=cells[0].num_groups if cells[0].groups is not None else None,
        examples_needed=comparison.compute_needed_examples(side_b) if verdict == "cannot_tell" else None,
    )


def _score_trial(trial: TrialFinished, name: str, criterion: Criterion) -> ScoredAdapter:
    scores = trial.get_weighted_scores(criterion.metric)
    return ScoredAdapter.from_scores(
        name, 1, trial.metrics[criterion.metric], scores, criterion, groups=trial.example_groups
    )


def _format_sentence(a: str, b: str, worst: MetricComparison, count: int, cause: str | None) -> str:
    if Path(a).name != Path(b).name:
        a, b = Path(a).name, Path(b).name
    names = f"B ({b}) against A ({a})"
    left_out = f" ({worst.left_out} more have no label within the maximum length)" if worst.left_out else ""
    left_out += f" ({worst.trained_on:,} more are training examples of A or B)" if worst.trained_on else ""
    grouped = ", taken as independent" if worst.groups is None else f" in {worst.groups} groups"
    figures = (
        f"{worst.metric} differs by {worst.difference:+.3g} (95% bounds {worst.difference_low:+.3g} to "
        f"{worst.difference_high:+.3g}) on {worst.examples} examples{grouped}{left_out}, margin {format_margin(worst)}"
    )
    worst_text = "" if count == 1 else f" The worst of {count} comparisons is on {Path(worst.data).name}."
    if cause is not None:
        return f"{names}: BROKEN, {cause}; {figures}.{worst_text}"
    if worst.verdict != "cannot_tell":
        verdict = "not worse" if worst.verdict == "not_worse" else "worse by more than the margin"
        return f"{names}: {verdict}; {figures}. {format_distribution(worst.distribution)}{worst_text}"
    noun = "examples" if worst.groups is None else "groups"
    advice = (
        f"about {worst.examples_needed:,} {noun} would show it"
        if worst.examples_needed is not None
        else f"more {noun} would show whether it is worse"
    )
    return f"{names}: these examples cannot tell; {figures}; {advice}. {format_distribution(worst.distribution)}{worst_text}"


def find_shared_labels(sides: Sequence[str]) -> list[str] | None:
    """Return the labels that both sides have, or None if neither is a classifier.

    Raises:
        ModelError: The sides are classifiers with different labels, or with another order of them.
    """
    labels_by_side = [(model_name, labels) for model_name in sides if (labels := read_labels(model_name)) is not None]
    if not labels_by_side:
        return None
    (first, labels), *other_sides = labels_by_side
    for model_name, side_labels in other_sides:
        if side_labels != labels:
            raise ModelError(
                f"{model_name}: its labels are {', '.join(side_labels)}, and those of {first} are {', '.join(labels)}: classifiers can only be "
                "compared if they have the same labels in the same order"
            )
    return labels


def _read_classifier_labels(folder: Path) -> list[str] | None:
    """Read the labels in the order of the logits from an adapter's folder; return None if it does not state them.

    Raises:
        ModelError: The file names no labels.
    """
    file = folder / CLASSIFIER_FILE
    if not file.is_file():
        return None
    try:
        return _sort_labels(read_json_object(file).get("id2label"))
    except (UnreadableError, ValueError) as error:
        raise ModelError(
            f"{file}: no labels ({error}); give id2label as {{'0': 'first label', '1': …}}, in the order of the logits"
        ) from None


def read_labels(model: str) -> list[str] | None:
    """Read the labels of an adapter or of a full model without loading it.

    The result is None for `base`, a GGUF file, and a model without a classification head. Labels without names are numbered.
    """
    folder = Path(model)
    if model == BASE_SIDE:
        return None
    if (folder / CONFIG_FILE).is_file():
        stored = _read_classifier_labels(folder)
        count = None if stored is not None else _count_head_rows(folder)
        return stored if count is None else [str(number) for number in range(count)]
    return _read_model_labels(folder / "config.json")


def _count_head_rows(folder: Path) -> int | None:
    """Count the rows of the classification head in an adapter's weights; return None if it has no head."""
    task = read_json_object(folder / CONFIG_FILE).get("task_type")
    weights = folder / WEIGHTS_FILE
    if task != "SEQ_CLS" or not weights.is_file():
        return None
    pattern = re.compile(
        r"\.(score|classifier)\.(?!.*\.?lora_).*weight$"
    )  # names of the head's weights in PEFT's files
    rows = [shape[0] for name, shape in open_tensors(weights).shapes.items() if pattern.search(name)]
    return rows[-1] if rows else None


def _read_model_labels(file: Path) -> list[str] | None:
    config = read_json_object(file) if file.is_file() else {}
    if not any("SequenceClassification" in str(name) for name in config.get("architectures") or ()):
        return None
    try:
        names = _sort_labels(config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"})
    except ValueError:
        return None
    return [str(number) for number in range(len(names))] if has_default_names(names) else names


def _sort_labels(id2label: Any) -> list[str]:
    if not isinstance(id2label, Mapping) or not id2label:
        raise ValueError("id2label is missing")
    by_number = {int(number): str(label) for number, label in id2label.items()}
    if sorted(by_number) != list(range(len(by_number))):
        raise ValueError(f"id2label numbers {', '.join(map(str, sorted(by_number)))}")
    return [by_number[number] for number in range(len(by_number))]


def compute_distribution(
    difference: Cell, margin: float, convert: Callable[[float], float] = float
) -> DifferenceDistribution:
    """Compute the distribution of a paired difference over examples; `convert` converts to the metric's unit."""
    sorted_differences = np.sort([convert(worse_by) for worse_by in (difference.sums / difference.weights).tolist()])
    threshold = LARGE_DIFFERENCE_MARGINS * margin
    share = float(np.mean(sorted_differences > threshold * (1 + RELATIVE_TOLERANCE)))
    return DifferenceDistribution(
        threshold=threshold,
        share_worse=share,
        worst_tenth_mean=float(sorted_differences[-math.ceil(len(sorted_differences) / 10) :].mean()),
    )


def format_distribution(distribution: DifferenceDistribution) -> str:
    """Format the share of examples that get much worse; add the worst tenth only if there are some."""
    if distribution.share_worse == 0:
        return f"No held-out example gets worse by more than {distribution.threshold:.2g}."
    rounded = f"{distribution.share_worse:.1%}"
    share = "Fewer than 0.1%" if rounded == "0.0%" else rounded.replace(".0%", "%")
    return (
        f"{share} of the examples get worse by more than {distribution.threshold:.2g}, and the worst tenth by "
        f"{distribution.worst_tenth_mean:.2g} on average."
    )
