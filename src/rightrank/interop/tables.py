"""Tables of results that others made: groups their rows by training and checks every cell."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from rightrank.data.rows import Row
from rightrank.interop.columns import (
    Columns,
    format_names,
    identify_columns,
    infer_column_direction,
    is_blank,
    list_columns,
    normalize_column,
)
from rightrank.interop.table_cells import Outcome, ResultRow, TrainingKey, parse_row, to_float
from rightrank.interop.table_rows import add_settings_from_names, flatten_rows, select_comparable_stages
from rightrank.schema.decision import Result, ResultsTable
from rightrank.schema.errors import ResultsError, quote_value
from rightrank.schema.metrics import format_unknown_direction, has_percentages, infer_metric_kind
from rightrank.schema.settings import TRAINER_FIELDS, PeftFields, SelectSettings

# Columns that say that trainings can't be compared: the task, the kind of adapter, and a setting of all trainings by any of its names.
SHARED_SETTINGS = ("batch_size", "seq_len", "num_train_epochs")
CONDITION_COLUMNS = {
    "model", "base_model", "model_name", "model_name_or_path", "model_id", "base_model_name_or_path", "dataset",
    "dataset_name", "data", "task", "method", "peft_type", "optimizer", "optim", "metric", "metric_name", "use_rslora",
    "train_samples", "num_train_samples", "max_train_samples", "train_size", *PeftFields.model_fields,
    *TRAINER_FIELDS, *SHARED_SETTINGS, *(other for name in SHARED_SETTINGS for other in SelectSettings.model_fields[name].also),
}  # fmt: skip
ALPHA_COLUMNS = {"lora_alpha", "alpha", "network_alpha"}


def build_results_table(
    rows: list[Row],
    table_name: str,
    metric: str | None,
    higher: bool | None,
    margin: float | None,
    mapping: Mapping[str, str],
) -> ResultsTable:
    """The trainings in rows, and how each column was read. `where` is the table's name in error messages.

    Raises:
        ResultsError: rows that can't be compared; the message names file and row.
    """
    flat, num_partial = select_comparable_stages(flatten_rows(rows), table_name)
    named = add_settings_from_names(flat, mapping)
    notes = ["rank from the names of the trainings"] if named is not flat else []
    columns = identify_columns(named, metric, mapping, table_name)
    _require_same_conditions(named, table_name, columns.by_role["rank"])
    metric = columns.metric
    with_rank = [row for row in named if not is_blank(row.fields.get(columns.by_role["rank"]))]
    lines = [parse_row(row, columns, metric) for row in with_rank]
    results, counts = _build_results(lines, columns)
    groups = _number_groups(lines, mapping.get("group"), table_name)
    results = [run.model_copy(update={"example_groups": groups}) if run.example_values else run for run in results]
    _require_comparable(results, table_name)
    if groups is None:
        columns = replace(columns, by_role={name: title for name, title in columns.by_role.items() if name != "group"})
    higher, reason = _resolve_direction(metric, higher, table_name)
    if infer_metric_kind(metric, higher) == "accuracy":
        _require_one_unit(results, metric, table_name)
    if margin is None and infer_metric_kind(metric, higher) == "other":
        notes.append(
            f"margin: 1% of the best, as the name {metric!r} says no unit (--metric NAME or --margin changes it)"
        )
    roles = [f"{name} from column {column}" for name, column in columns.by_role.items() if name != column]
    roles.append(f"value from column {columns.value}: {'higher' if higher else 'lower'} is better ({reason})")
    used_columns = {*columns.by_role.values(), columns.value, *columns.other_metrics, ""}
    unused = [name for name in list_columns(named) if name not in used_columns and _collect_texts(named, name)]
    omissions = [f"not used: {format_names(unused)}"] if unused else []
    rankless = len(named) - len(with_rank)
    omissions += [f"{rankless} row{'s' * (rankless != 1)} without a rank left out"] if rankless else []
    omissions += (
        [f"{num_partial} row{'s' * (num_partial != 1)} of truncated or stopped trainings left out"]
        if num_partial
        else []
    )
    return ResultsTable(
        metric=metric, higher_is_better=higher, results=results, input_notes=[*roles, *notes, *omissions, *counts]
    )


def _collect_texts(rows: Iterable[Row], column: str) -> list[str]:
    """The different texts of a column's cells that are not blank, sorted."""
    return sorted({str(row.fields.get(column)) for row in rows if not is_blank(row.fields.get(column))})


def _is_consistent_scale(rows: Sequence[Row], column: str, rank: str) -> bool:
    """Whether alpha is constant, or in proportion to the rank or to its root; also where either is no number."""
    pairs = [(to_float(row.fields.get(column)), to_float(row.fields.get(rank))) for row in rows]
    numeric_pairs = [(alpha, r) for alpha, r in pairs if alpha is not None and r is not None and r > 0]
    return any(len({round(alpha / r**power, 9) for alpha, r in numeric_pairs}) <= 1 for power in (0.0, 1.0, 0.5))


def _require_same_conditions(rows: Sequence[Row], table_name: str, rank: str) -> None:
    """Refuse trainings of several models, data sets, methods or settings that change what a rank is worth."""
    for name in list_columns(rows):
        texts = _collect_texts(rows, name)
        if normalize_column(name) in ALPHA_COLUMNS and not _is_consistent_scale(rows, name, rank):
            raise ResultsError(
                f"{table_name}: column {name} is neither the same at every rank nor in proportion to it ({', '.join(texts[:4])}), so the scale of "
                "the adapters differs beside their rank; keep the rows of one rule, or leave the column out if it does not matter"
            )
        if normalize_column(name) in CONDITION_COLUMNS and len(texts) > 1:
            first_text, other_text = [quote_value(text, 40) for text in texts[:2]]
            raise ResultsError(
                f"{table_name}: the trainings differ in column {name} ({first_text}, {other_text}), which is not used; keep the rows of one, "
                "or leave the column out if it does not matter"
            )


def _resolve_direction(metric: str, stated_direction: bool | None, table_name: str) -> tuple[bool, str]:
    """`(higher is better, why)`."""
    if stated_direction is not None:
        return stated_direction, "as given"
    direction = infer_column_direction(metric)
    if direction is None:
        raise ResultsError(
            f"{table_name}: {format_unknown_direction(metric)}; give --higher-is-better or --lower-is-better, or --metric NAME"
        )
    return direction, f"from its name, {metric}"


def _merge_details(lines: Sequence[ResultRow]) -> dict[str, float]:
    """Return the further numbers of a training by its last evaluation; of rows of examples those that all of them share."""
    details: dict[str, float] = {}
    for line in sorted(lines, key=lambda line: line.step):
        if not line.example:
            details |= line.details
    example_details = [line.details for line in lines if line.example]
    for name in {name for row_details in example_details for name in row_details} - details.keys():
        numbers = {row_details.get(name) for row_details in example_details}
        if len(numbers) == 1 and (number := numbers.pop()) is not None:
            details[name] = number
    return {name: number for name, number in details.items() if math.isfinite(number)}


def _build_results(lines: Sequence[ResultRow], columns: Columns) -> tuple[list[Result], list[str]]:
    """`(one result for each training, notes on what was left out)`."""
    trainings: dict[TrainingKey, dict[tuple[str, int], ResultRow]] = {}
    rows_without_value: dict[Outcome, dict[TrainingKey, list[ResultRow]]] = {
        name: {} for name in ("failed", "unfinished", "pruned")
    }
    num_repeated = 0
    for line in lines:
        if line.outcome != "value":
            rows_without_value["failed" if line.outcome == "blank" else line.outcome].setdefault(line.key, []).append(
                line
            )
            continue
        first = trainings.setdefault(line.key, {}).setdefault((line.example, line.step), line)
        if first.value != line.value:
            raise _build_conflict_error(line, first, columns)
        num_repeated += first is not line
    steps = {step for training in trainings.values() for example, step in training if not example}
    missing_scores: dict[TrainingKey, dict[str, ResultRow]] = {}
    for key, failed_rows in rows_without_value["failed"].items():
        training = trainings.get(key, {})
        if _lacks_final_value(failed_rows, list(training.values()), steps, "trial" in columns.by_role):
            del trainings[key]
            continue
        missing_scores[key] = _find_unscored_examples(failed_rows, training)
        for example, step in list(training):
            if example in missing_scores[key]:
                del training[example, step]
        if not training:
            trainings.pop(key, None)
    _require_same_examples(trainings, missing_scores)
    results = [_build_result(list(training.values()), columns) for training in trainings.values()]
    failed = [failed_rows[0] for key, failed_rows in rows_without_value["failed"].items() if key not in trainings]
    for line in failed:
        rank, learning_rate, seed = line.key
        results.append(Result(trial_id=line.origin, rank=rank, learning_rate=learning_rate, seed=seed, value=None))
    examples = sorted({example for key in trainings for example in missing_scores.get(key, ())})
    counts = (
        (num_repeated, "repeated row", "left out"),
        (len(examples), "example", f"without a score left out ({format_names(examples)})"),
        (len(failed), "training", "without a result"),
        (len(rows_without_value["unfinished"]), "unfinished training", "left out"),
        (len(rows_without_value["pruned"].keys() - trainings.keys()), "pruned training", "left out"),
    )
    return results, [f"{count} {noun}{'s' * (count != 1)} {ending}" for count, noun, ending in counts if count]


def _lacks_final_value(
    failed_rows: Sequence[ResultRow], evaluations: Sequence[ResultRow], steps: Collection[int], has_trials: bool
) -> bool:
    """Whether the last evaluation of a training has no value, so that an earlier one is not its result.

    A blank cell is an evaluation only at a step at which some training has a value: logs have rows of the training loss alone.
    """
    last_step = max((line.step for line in evaluations if not line.example), default=None)
    trials = {line.trial for line in evaluations}
    return last_step is not None and any(
        line.step > last_step and (line.outcome == "failed" or line.step in steps)
        for line in failed_rows
        if not line.example and (line.trial in trials or not has_trials)
    )


def _find_unscored_examples(
    failed_rows: Sequence[ResultRow], training: Mapping[tuple[str, int], ResultRow]
) -> dict[str, ResultRow]:
    """Return the examples whose last row has no score, each with that row."""
    last_step: dict[str, int] = {}
    for example, step in training:
        last_step[example] = max(step, last_step.get(example, step))
    return {line.example: line for line in failed_rows if line.example and line.step > last_step.get(line.example, -1)}


def _build_conflict_error(line: ResultRow, first: ResultRow, columns: Columns) -> ResultsError:
    rank, learning_rate, seed = line.key
    rate = f", lr {learning_rate:g}" if learning_rate else ""
    position = (
        f", example {line.example}" if line.example else f", step {line.step}" if columns.by_role.get("step") else ""
    )
    used_columns = {*columns.by_role.values(), columns.value, *columns.other_metrics}
    fields, first_fields = line.row.fields, first.row.fields
    other_columns = [
        name
        for name in list_columns([line.row, first.row])
        if fields.get(name) != first_fields.get(name) and name not in used_columns
    ]
    advice = (
        f"they differ in {format_names(other_columns)} too; keep the rows of one training for each rank, learning rate and seed"
        if other_columns
        else "add the column that distinguishes them (seed, lr or item), or remove one"
    )
    return ResultsError(
        f"{line.origin}: rank {rank}{rate}, seed {seed}{position} occurs twice with different values (also {first.origin}); {advice}"
    )


def _select_final_scores(lines: Iterable[ResultRow]) -> dict[str, ResultRow]:
    """By example, the row of its last look."""
    final_rows = {line.example: line for line in sorted(lines, key=lambda line: line.step) if line.example}
    return dict(sorted(final_rows.items()))


def _build_result(lines: Sequence[ResultRow], columns: Columns) -> Result:
    """One training: the mean over its examples, or its last look."""
    (rank, learning_rate, seed), examples = lines[0].key, _select_final_scores(lines).values()
    points = sorted((line.step, line.value) for line in lines if not line.example and line.value is not None)
    values = [line.value for line in examples if line.value is not None]
    weights = [line.weight for line in examples]
    mean = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights) if values else points[-1][1]
    steps = max((step for step, _ in points), default=0)
    details = _merge_details(lines)
    return Result(
        trial_id=lines[0].trial,
        rank=rank,
        learning_rate=learning_rate,
        seed=seed,
        value=mean,
        example_values=values,
        example_weights=weights if columns.by_role.get("weight") else [],
        std=details.get("std"),
        std_seeds=int(details.get("std_seeds", 1)) if "std" in details else 1,
        train_value=details.get("train_value"),
        steps=steps or None,
        points=points if steps else [],
        others={name: details[name] for name in columns.other_metrics if name in details},
    )


def _number_groups(lines: Iterable[ResultRow], stated_column: str | None, table_name: str) -> list[int] | None:
    """The groups of the examples, numbered in their order; None where the table has none."""
    groups_by_example: dict[str, set[str]] = {}
    for line in lines:
        if line.example:
            groups_by_example.setdefault(line.example, set()).add(line.group or f"example {line.example}")
    names = [min(groups) for _, groups in sorted(groups_by_example.items())]
    numbers_by_name = {name: number for number, name in enumerate(dict.fromkeys(names))}
    ambiguous_example = next((example for example, groups in groups_by_example.items() if len(groups) > 1), None)
    if ambiguous_example is None and 1 < len(numbers_by_name) < len(names):
        return [numbers_by_name[name] for name in names]
    if stated_column is not None:
        fault = (
            "there is no column of examples (item)" if not names else f"example {ambiguous_example} has two" if ambiguous_example is not None
            else "all examples share one" if len(numbers_by_name) == 1 else "no two examples share one"
        )  # fmt: skip
        raise ResultsError(
            f"{table_name}: column {stated_column} gives the examples no groups: {fault}; name one with several values, each of several "
            "examples, or leave it out: examples are then taken as independent"
        )
    return None


def _require_same_examples(
    trainings: Mapping[TrainingKey, Mapping[tuple[str, int], ResultRow]],
    missing_scores: Mapping[TrainingKey, Mapping[str, ResultRow]],
) -> None:
    scored_examples = {example for training in trainings.values() for example, _ in training}
    expected_weights: dict[str, float] = {}
    for key, training in trainings.items():
        for example, line in missing_scores.get(key, {}).items():
            if example in scored_examples:
                raise ResultsError(
                    f"{line.origin}: rank {key[0]} has no score for example {example}, which other trainings have; score every training on the "
                    "same examples, or leave this one out of all"
                )
        final_scores = _select_final_scores(training.values())
        weights = {example: line.weight for example, line in final_scores.items()}
        if not weights:
            continue
        expected_weights = expected_weights or weights
        line, differing_examples = next(iter(final_scores.values())), sorted(weights.keys() ^ expected_weights.keys())
        if differing_examples:
            raise ResultsError(
                f"{line.origin}: rank {line.key[0]} is scored on other examples than the rank before ({len(differing_examples)} differ, such as "
                f"{differing_examples[0]}); score every training on the same examples"
            )
        if weights != expected_weights:
            raise ResultsError(
                f"{line.origin}: rank {line.key[0]} has other token counts than the rank before for the same examples; give each "
                "example the same count in every training"
            )


def _require_comparable(results: list[Result], table_name: str) -> None:
    trained = [result for result in results if result.rank > 0 and result.value is not None]
    ranks = {result.rank for result in trained}
    if not ranks:
        raise ResultsError(f"{table_name}: no row has both a rank and a held-out value; give one row for each training")
    if len(ranks) < 2:
        raise ResultsError(f"{table_name}: one rank only ({ranks.pop()}); give two or more to compare")
    if (
        len({result.value for result in trained}) == 1
        and len({tuple(result.example_values) for result in trained}) == 1
    ):
        raise ResultsError(
            f"{table_name}: every training has the value {trained[0].value:g}, so there is nothing to compare; give the held-out metric"
        )
    rates = {result.learning_rate > 0 for result in trained}
    if len(rates) > 1:
        result_without_rate = next(result for result in trained if result.learning_rate == 0)
        raise ResultsError(
            f"{result_without_rate.trial_id}: no learning rate, though other rows have one; give it, or leave the column out"
        )


def _require_one_unit(results: list[Result], metric: str, table_name: str) -> None:
    """Refuse accuracies of which some are fractions and some percentages."""
    values = sorted(result.value for result in results if result.value)
    if values and (values[0] < 0 or values[-1] > 100 or (has_percentages(values) and values[0] <= 1)):
        raise ResultsError(
            f"{table_name}: {metric} is {values[0]:g} in one training and {values[-1]:g} in another; write all as fractions from 0 to 1, or all "
            "as percentages above 1"
        )
