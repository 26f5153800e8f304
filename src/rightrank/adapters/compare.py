"""`compare`: is adapter B no worse than adapter A?

Both are read on the same examples, all of those in the data, and compared in pairs. B is *not worse* if the one-sided 95% upper
bound of its mean difference is below the margin, *worse* if the lower bound is above the margin, and otherwise the
examples cannot tell. Each side is an adapter folder that PEFT loads, the base itself, or a whole model: a folder (such as a merged one), a
GGUF file, or a folder of MLX. A whole model that is made of A is *broken* where it is another function than A, with the cause.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rightrank.adapters.conversion_faults import Side, cause_of, difference_of_tokens
from rightrank.data.files import UnreadableError, read_json_object
from rightrank.data.splits import DataSplits, load_all, load_data
from rightrank.decision.comparison import bounds_of_files, estimate_of_files, examples_needed
from rightrank.decision.table import minus, spread_of, spread_sentence, table_of
from rightrank.models.adapter_folders import CLASSIFIER_FILE, CONFIG_FILE, MLX_FILE, WEIGHTS_FILE
from rightrank.models.base_models import are_unnamed, load_base
from rightrank.models.mlx import torch_folder
from rightrank.models.model_sources import BASE
from rightrank.models.safetensors_files import read_header
from rightrank.runs.journal import Journal
from rightrank.schema.errors import DataError, ModelError, SettingsError
from rightrank.schema.events import Evaluating, RunStarted
from rightrank.schema.metrics import LossKind, default_margin
from rightrank.schema.results import AdapterComparison, ComparisonVerdict, MetricComparison
from rightrank.schema.settings import SPLIT_SETTINGS, SelectSettings
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.train.adapter_runtime import report_evaluation_progress, require_matching_base
from rightrank.train.evaluation import MetricResults, Scores
from rightrank.train.metrics import measure_metrics, require_metric_functions
from rightrank.train.optimizer import Progress
from rightrank.train.runtime import Runtime, attach_adapter
from rightrank.train.tokens import encode_splits
from rightrank.train.trial import build_finished_trial

BITS = {"4bit": "load_in_4bit", "8bit": "load_in_8bit"}  # of `--base-b`
VERDICTS: dict[bool | None, ComparisonVerdict] = {True: "not_worse", None: "cannot_tell", False: "worse"}


def compare_adapters(
    sides: tuple[str, str],
    model: str,
    data: Sequence[Path],
    settings: SelectSettings,
    on_event: Callable[[Evaluating], None] = lambda _: None,
    base_b: str | None = None,
    of_run: DataSplits | None = None,
) -> AdapterComparison:
    """Read A and B on every data set and compare them by every metric; see `rightrank.compare`.

    Args:
        of_run: in place of the rows of `data`, its only name: examples whose validation split is scored.

    Raises:
        InputError: a side, the model, the data or a metric can't be used.
    """
    require_metric_functions(settings)
    comparisons: list[MetricComparison] = []
    cause: str | None = None
    for place in data:
        with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
            *read, trained_on = _read_sides(sides, model, place, settings, Path(name), on_event, base_b, of_run)
            named = (_compare((read[0], read[1]), spec.name, place, settings) for spec in settings.metric_specs)
            comparisons += [comparison.model_copy(update={"trained_on": trained_on}) for comparison in named]
            cause = cause or cause_of((read[0], read[1]), scored)
    worst = max(comparisons, key=lambda comparison: list(VERDICTS.values()).index(comparison.verdict))
    kept = worst.model_dump(exclude={"data", "value_a", "value_b"}) | ({"verdict": "broken"} if cause else {})
    sentence = _sentence(*sides, worst, len(comparisons), cause)
    return AdapterComparison(sentence=sentence, comparisons=comparisons, cause=cause, **kept)


def _read_sides(
    sides: tuple[str, str],
    model: str,
    data: Path,
    settings: SelectSettings,
    cache: Path,
    on_event: Callable[[Evaluating], None],
    base_b: str | None,
    of_run: DataSplits | None,
) -> tuple[Side, Side, int]:
    """Both sides, and the number of rows that an adapter was trained on, which are left out."""
    trained_on = 0
    if of_run is None:
        whole, settings = load_all(data, settings.model_copy(update={"cache_prefix": False}), _shared_labels(sides))
        splits = _unseen(whole, sides, settings, data)
        trained_on = len(whole.examples["selection"]) - len(splits.examples["selection"])
    else:
        splits, settings = of_run, settings.model_copy(update={"cache_prefix": False, "ranks": (1,)})
    read: list[Side] = []
    base: Runtime | None = None
    for number, place in enumerate(sides):
        is_adapter = (Path(place) / CONFIG_FILE).is_file()
        on_base = is_adapter or place == BASE
        source, read_as = model if on_base else place, settings
        if number and base_b in BITS:
            read_as = settings.model_copy(update={BITS[base_b]: True})
        elif number and base_b is not None and on_base:
            source = base_b
        other_tokens = None
        if not on_base or base is None or (number and base_b is not None):
            first = read[0].runtime if read and read[0].adapter is not None else None  # B is made of A
            runtime, other_tokens = _runtime(source, splits, read_as, cache / str(number), first)
            base = runtime if on_base and base is None else base
        else:
            runtime = base
        if is_adapter and not (number and base_b is not None and base_b not in BITS):
            require_matching_base(Path(place), runtime.loaded)
        if is_adapter and not (Path(place) / MLX_FILE).is_file():
            read_header(Path(place) / WEIGHTS_FILE)  # refuses a damaged file, which PEFT fails on in its own way
        report_evaluation_progress(runtime, f"{'AB'[number]} ({Path(place).name}) on {data.name}", on_event)
        adapter = Path(place) if is_adapter else None
        read.append(Side(place, runtime, adapter, scored(runtime, place, adapter), other_tokens))
    return read[0], read[1], trained_on


def _unseen(splits: DataSplits, sides: Sequence[str], settings: SelectSettings, data: Path) -> DataSplits:
    """The rows that neither adapter was trained on, as far as the run folders around them say.

    Raises:
        DataError: fewer than two are left.
    """
    seen = set[str]()
    for side in sides:
        if side != BASE and (known := splits_of_run(Path(side), settings, splits.summary.classes)) is not None:
            seen |= {example.example_id for example in known[0].examples["train"]}
    unseen = splits.without(seen)
    count, left = (len(side.examples["selection"]) for side in (splits, unseen))
    if left < 2:
        raise DataError(
            f"{data}: {count - left} of {count} distinct rows are among the training examples of A or B; give rows that "
            "neither was trained on"
        )
    return unseen


def splits_of_run(
    adapter: Path, settings: SelectSettings, classes: Sequence[str] | None
) -> tuple[DataSplits, Path] | None:
    """`(the splits that the run trained with, its data)` of an adapter in a run's `adapter/` or `trials/<trial_id>/`; None where not known."""
    parent = adapter.resolve().parent
    journal = next((place for at in (parent, parent.parent) if (place := at / "journal.jsonl").is_file()), None)
    started = None if journal is None else next(iter(Journal(journal).read_complete_lines()), None)
    source = started.data_name if isinstance(started, RunStarted) else None
    if not isinstance(started, RunStarted) or source is None or not Path(source).exists():
        return None
    of_run = settings.model_copy(update=started.select_settings.model_dump(include=SPLIT_SETTINGS))
    return load_data(Path(source), of_run, classes=classes), Path(source)


def _require_alike(a: TrialFinished, b: TrialFinished, metric: str) -> None:
    """Refuse sides whose examples, or whose losses by token, are not of the same things.

    Raises:
        ModelError: two models of different tokenizers.
    """
    if a.example_tokens == b.example_tokens or (metric != "loss" and len(a.example_losses) == len(b.example_losses)):
        return
    counts = [sum(side.example_tokens or []) for side in (a, b)]
    raise ModelError(
        f"A and B have different tokenizers: {counts[0]:,} and {counts[1]:,} label tokens in {len(a.example_losses)} and "
        f"{len(b.example_losses)} examples. Losses by token can't be compared then; compare what they answer, such as by "
        "--metric exact_match or f1"
    )


def _runtime(
    model: str, splits: DataSplits, settings: SelectSettings, cache: Path, first: Runtime | None
) -> tuple[Runtime, str | None]:
    """The runtime of a model; on the tokens of the adapter that it is made of, `first`, where its vocabulary is the same.

    Its own tokens, with its own template, may then be others: the second value says so.
    """
    with torch_folder(model) as place:
        loaded = load_base(place, settings, splits.summary.classes)
        loaded = loaded if place == model else replace(loaded, name=model)
    numbers = loaded.tokenizer.get_vocab().items()  # of tokens
    if first is None or not first.loaded.tokenizer.get_vocab().items() <= numbers:
        return Runtime(loaded, encode_splits(splits, loaded, settings), settings, 1, cache), None
    try:
        other_tokens = difference_of_tokens(first, loaded.tokenizer, encode_splits(splits, loaded, settings))
    except DataError as error:
        other_tokens = f"its tokenizer or chat template was changed: {error}"
    return Runtime(loaded, first.data, settings, 1, cache), other_tokens


def scored(runtime: Runtime, name: str, adapter: Path | None) -> TrialFinished:
    """The held-out scores of the base, or of an adapter on it, by every metric of the settings."""
    with attach_adapter(runtime, adapter):
        scores, measured = runtime.evaluate("selection"), measure_metrics(runtime, "selection")
    measured.require(list(measured.failed))
    trial = finished_trial(name, 1, scores, "loss")
    return trial.model_copy(update=scores.fields(measured) | {"metrics": scores.metrics | measured.values})


def _compare(sides: tuple[Side, Side], metric: str, data: Path, settings: SelectSettings) -> MetricComparison:
    a, b = (side.scores for side in sides)
    _require_alike(a, b, metric)
    if metric not in a.metrics:
        raise SettingsError(
            f"metric {metric!r}: the examples of {data} have none; they have {', '.join(sorted(a.metrics))}"
            " (rows with `text` and `label` have accuracy, rows with prompts exact_match and f1)"
        )
    higher = settings.is_higher_better(metric)
    loss: LossKind = "token_loss" if a.example_correct is None else "loss"
    loss = "pair_loss" if "reward_accuracy" in a.example_metrics else loss
    tables = [table_of([trial], metric, higher, loss=loss) for trial in (a, b)]
    cells = [next(iter(table.cells.values())) for table in tables]
    if not all(cell.examples for cell in cells):
        raise SettingsError(
            f"metric {metric!r} gives no score by example: two adapters can't be compared in pairs by it"
        )
    worse = minus(cells[1], cells[0])
    difference = worse.sums, worse.weights, worse.span, worse.groups
    bounds = bounds_of_files(*difference)
    margin = settings.margin
    if margin is None:
        margin = default_margin(tables[0].kind, cells[0].value, [cells[0].value])
    verdict = VERDICTS[bounds.is_enough(margin)]
    return MetricComparison(
        data=str(data),
        metric=metric,
        verdict=verdict,
        value_a=cells[0].value,
        value_b=cells[1].value,
        difference=bounds.mean,
        difference_low=bounds.low,
        difference_high=bounds.high,
        spread=spread_of(worse, margin),
        margin=margin,
        examples=cells[0].examples,
        groups=cells[0].units if cells[0].groups is not None else None,
        left_out=max(side.runtime.data.summary.splits["selection"].dropped for side in sides),
        examples_needed=examples_needed(estimate_of_files(*difference), margin) if verdict == "cannot_tell" else None,
    )


def _sentence(a: str, b: str, worst: MetricComparison, count: int, cause: str | None) -> str:
    if Path(a).name != Path(b).name:
        a, b = Path(a).name, Path(b).name
    names = f"B ({b}) against A ({a})"
    left_out = f" ({worst.left_out} more have no label within the maximum length)" if worst.left_out else ""
    left_out += f" ({worst.trained_on:,} more are training examples of A or B)" if worst.trained_on else ""
    grouped = ", taken as independent" if worst.groups is None else f" in {worst.groups} groups"
    figures = (
        f"{worst.metric} differs by {worst.difference:+.3g} (95% bounds {worst.difference_low:+.3g} to "
        f"{worst.difference_high:+.3g}) on {worst.examples} examples{grouped}{left_out}, margin {worst.margin:g}"
    )
    among = "" if count == 1 else f" The worst of {count} comparisons is on {Path(worst.data).name}."
    if cause is not None:
        return f"{names}: BROKEN, {cause}; {figures}.{among}"
    if worst.verdict != "cannot_tell":
        told = "not worse" if worst.verdict == "not_worse" else "worse by more than the margin"
        return f"{names}: {told}; {figures}. {spread_sentence(worst.distribution)}{among}"
    noun = "examples" if worst.groups is None else "groups"
    cure = (
        f"about {worst.examples_needed:,} {noun} would show it"
        if worst.examples_needed is not None
        else f"more {noun} would show whether it is worse"
    )
    return f"{names}: these examples cannot tell; {figures}; {cure}. {spread_sentence(worst.distribution)}{among}"


def _shared_labels(sides: Sequence[str]) -> list[str] | None:
    """The labels that both sides of a comparison have; None where neither is a classifier.

    Raises:
        ModelError: two classifiers of other labels, or of another order.
    """
    known = [(side, labels) for side in sides if (labels := labels_of_side(side)) is not None]
    if not known:
        return None
    (first, labels), *others = known
    for side, theirs in others:
        if theirs != labels:
            raise ModelError(
                f"{side}: its labels are {', '.join(theirs)}, and those of {first} are {', '.join(labels)}: classifiers are "
                "compared with the same labels in the same order"
            )
    return labels


def _stored_labels(folder: Path) -> list[str] | None:
    """The labels in the order of the logits, as the adapter's folder states them; None where it does not.

    Raises:
        ModelError: a file that names no labels.
    """
    file = folder / CLASSIFIER_FILE
    if not file.is_file():
        return None
    try:
        return _in_order(read_json_object(file).get("id2label"))
    except (UnreadableError, ValueError) as error:
        raise ModelError(
            f"{file}: no labels ({error}); give id2label as {{'0': 'first label', '1': …}}, in the order of the logits"
        ) from None


def labels_of_side(side: str) -> list[str] | None:
    """The labels of an adapter or of a whole model, without loading it; None for no classifier, for `base` and a GGUF file.

    Where nothing names them, they are the numbers of the head's rows.
    """
    folder = Path(side)
    if side == BASE:
        return None
    if (folder / CONFIG_FILE).is_file():
        stored = _stored_labels(folder)
        count = None if stored is not None else _rows_of_head(folder)
        return stored if count is None else [str(number) for number in range(count)]
    return _labels_of_model(folder / "config.json")


def _rows_of_head(folder: Path) -> int | None:
    """The rows of the classification head in an adapter's weights; None where it has none."""
    task = read_json_object(folder / CONFIG_FILE).get("task_type")
    weights = folder / WEIGHTS_FILE
    if task != "SEQ_CLS" or not weights.is_file():
        return None
    head = re.compile(r"\.(score|classifier)\.(?!.*\.?lora_).*weight$")  # what PEFT saves of a classifier
    rows = [shape[0] for name, shape in read_header(weights)[0].items() if head.search(name)]
    return rows[-1] if rows else None


def _labels_of_model(file: Path) -> list[str] | None:
    config = read_json_object(file) if file.is_file() else {}
    if not any("SequenceClassification" in str(name) for name in config.get("architectures") or ()):
        return None
    try:
        names = _in_order(config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"})
    except ValueError:
        return None
    return [str(number) for number in range(len(names))] if are_unnamed(names) else names


def _in_order(id2label: Any) -> list[str]:
    if not isinstance(id2label, Mapping) or not id2label:
        raise ValueError("id2label is missing")
    by_number = {int(number): str(label) for number, label in id2label.items()}
    if sorted(by_number) != list(range(len(by_number))):
        raise ValueError(f"id2label numbers {', '.join(map(str, sorted(by_number)))}")
    return [by_number[number] for number in range(len(by_number))]


def finished_trial(
    name: str, rank: int, scores: Scores, metric: str, *, steps: int = 0, truncate_from: str | None = None
) -> TrialFinished:
    """Held-out scores as a record that `decide` reads."""
    arm = Arm(rank=rank, learning_rate=0.0, lora_alpha=1.0, seed=0, steps=steps, truncate_from=truncate_from)
    return build_finished_trial(Trial(trial_id=name, arm=arm), metric, scores, MetricResults(), Progress())
