"""Read the trainings of a table as trials: group its rows by training, and check that the trainings can be compared."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rightrank.data.rows import Row
from rightrank.decision.records import Records
from rightrank.schema.errors import ResultsError, quote_value
from rightrank.schema.events import DataSummary, RunKind, RunStarted
from rightrank.schema.metrics import format_unknown_direction, has_percentages, infer_metric_kind
from rightrank.schema.settings import TRAINER_FIELDS, PeftFields, SelectSettings
from rightrank.schema.trials import EvalPoint, TrialFailed, TrialFinished, TrialOutcome
from rightrank.tables.columns import (
    Columns,
    format_names,
    identify_columns,
    infer_column_direction,
    is_blank,
    list_columns,
    normalize_column,
)
from rightrank.tables.table_cells import Outcome, ResultRow, TrainingKey, parse_row, to_float
from rightrank.tables.table_rows import add_settings_from_names, flatten_rows, select_comparable_stages

# Trainings that differ in one of these columns cannot be compared: task, kind of adapter, and shared settings under any of their names.
SHARED_SETTINGS = ("batch_size", "seq_len", "num_train_epochs")
CONDITION_COLUMNS = {
    "model", "base_model", "model_name", "model_name_or_path", "model_id", "base_model_name_or_path", "dataset",
    "dataset_name", "data", "task", "method", "peft_type", "optimizer", "optim", "metric", "metric_name", "use_rslora",
    "train_samples", "num_train_samples", "max_train_samples", "train_size", *PeftFields.model_fields,
    *TRAINER_FIELDS, *SHARED_SETTINGS, *(synonym for name in SHARED_SETTINGS for synonym in SelectSettings.model_fields[name].foreign_names),
}  # fmt: skip
ALPHA_COLUMNS = {"lora_alpha", "alpha", "network_alpha"}


def build_table_records(
    rows: list[Row],
    table_name: str,
    metric: str | None,
    higher_is_better: bool | None,
    margin: float | None,
    mapping: Mapping[str, str],
) -> Records:
    """Return the trainings in a table, with notes on how it was read as their environment. `table_name` appears in error messages.

    Raises:
        ResultsError: trainings that cannot be compared; the message names file and row.
    """
    flat_rows, num_partial = select_comparable_stages(flatten_rows(rows), table_name)
    named_rows = add_settings_from_names(flat_rows, mapping)
    notes = ["rank read from the names of the trainings"] if named_rows is not flat_rows else []
    columns = identify_columns(named_rows, metric, mapping, table_name)
    _require_same_conditions(named_rows, table_name, columns.by_role["rank"])
    metric = columns.metric
    ranked_rows = [row for row in named_rows if not is_blank(row.fields.get(columns.by_role["rank"]))]
    result_rows = [parse_row(row, columns, metric) for row in ranked_rows]
    outcomes, value_notes = _build_outcomes(result_rows, columns)
    groups = _number_groups(result_rows, mapping.get("group"), table_name)
    outcomes = [
        outcome.model_copy(update={"example_groups": groups}) if isinstance(outcome, TrialFinished) else outcome
        for outcome in outcomes
    ]
    finished = [outcome for outcome in outcomes if isinstance(outcome, TrialFinished)]
    _require_comparable(finished, table_name)
    if groups is None:
        columns = replace(columns, by_role={name: title for name, title in columns.by_role.items() if name != "group"})
    higher_is_better, reason = _resolve_direction(metric, higher_is_better, table_name)
    if infer_metric_kind(metric, higher_is_better) == "accuracy":
        _require_one_unit(finished, metric, table_name)
    if margin is None and infer_metric_kind(metric, higher_is_better) == "other":
        notes.append(
            f"margin: 1% of the best value, because the name {metric!r} states no unit (--metric NAME or --margin changes it)"
        )
    roles = [f"{name} from column {column}" for name, column in columns.by_role.items() if name != column]
    roles.append(f"value from column {columns.value}: {'higher' if higher_is_better else 'lower'} is better ({reason})")
    used_columns = {*columns.by_role.values(), columns.value, *columns.other_metrics, ""}
    unused = [
        name for name in list_columns(named_rows) if name not in used_columns and _collect_texts(named_rows, name)
    ]
    omissions = [f"not used: {format_names(unused)}"] if unused else []
    num_without_rank = len(named_rows) - len(ranked_rows)
    omissions += (
        [f"{num_without_rank} row{'s' * (num_without_rank != 1)} without a rank omitted"] if num_without_rank else []
    )
    omissions += (
        [f"{num_partial} row{'s' * (num_partial != 1)} of truncated or stopped trainings omitted"]
        if num_partial
        else []
    )
    num_bare = sum(trial.example_scores is None and trial.rank > 0 for trial in finished)
    if 0 < num_bare < sum(trial.rank > 0 for trial in finished):
        omissions.append(f"scores by example not used: {num_bare} training{'s' * (num_bare != 1)} without them")
    started = RunStarted.build(
        RunKind.TABLE,
        {},
        environment={
            f"read {number}": note for number, note in enumerate([*roles, *notes, *omissions, *value_notes], start=1)
        },
        data=DataSummary(form="custom", splits={}, splits_given=False, duplicates_across_splits=0),
        evaluation_examples=[],
        metric=metric,
        higher_is_better=higher_is_better,
        started_at="",
    )
    return Records(started, outcomes)


def _collect_texts(rows: Iterable[Row], column: str) -> list[str]:
    """Return the distinct texts of a column without blank cells, sorted."""
    return sorted({str(row.fields.get(column)) for row in rows if not is_blank(row.fields.get(column))})


def _is_consistent_scale(rows: Sequence[Row], column: str, rank: str) -> bool:
    """Return whether alpha is constant or proportional to the rank or its square root. Rows without numbers are ignored."""
    pairs = [(to_float(row.fields.get(column)), to_float(row.fields.get(rank))) for row in rows]
    numeric_pairs = [(alpha, r) for alpha, r in pairs if alpha is not None and r is not None and r > 0]
    return any(len({round(alpha / r**power, 9) for alpha, r in numeric_pairs}) <= 1 for power in (0.0, 1.0, 0.5))


def _require_same_conditions(rows: Sequence[Row], table_name: str, rank: str) -> None:
    """Raise if the trainings differ in model, data set, method or a setting that changes the effect of a rank."""
    for name in list_columns(rows):
        texts = _collect_texts(rows, name)
        if normalize_column(name) in ALPHA_COLUMNS and not _is_consistent_scale(rows, name, rank):
            raise ResultsError(
                f"{table_name}: column {name} is neither constant nor proportional to the rank ({', '.join(texts[:4])}), so the adapters "
                "differ in their scale as well as in their rank; keep the rows with one scaling rule, or remove the column if it does not matter"
            )
        if normalize_column(name) in CONDITION_COLUMNS and len(texts) > 1:
            first_text, other_text = [quote_value(text, 40) for text in texts[:2]]
            raise ResultsError(
                f"{table_name}: the trainings differ in column {name} ({first_text}, {other_text}), so they cannot be compared; keep the rows with one value, "
                "or remove the column if it does not matter"
            )


def _resolve_direction(metric: str, stated_direction: bool | None, table_name: str) -> tuple[bool, str]:
    """Return `(higher is better, reason)`."""
    if stated_direction is not None:
        return stated_direction, "as stated"
    direction = infer_column_direction(metric)
    if direction is None:
        raise ResultsError(
            f"{table_name}: {format_unknown_direction(metric)}; give --higher-is-better or --lower-is-better, or --metric NAME"
        )
    return direction, f"from its name, {metric}"


def _merge_details(result_rows: Sequence[ResultRow]) -> dict[str, float]:
    """Return the additional numbers of a training: from its last evaluation, or those that all rows of its examples share."""
    details: dict[str, float] = {}
    for row in sorted(result_rows, key=lambda row: row.step):
        if not row.example:
            details |= row.details
    example_details = [row.details for row in result_rows if row.example]
    for name in {name for row_details in example_details for name in row_details} - details.keys():
        numbers = {row_details.get(name) for row_details in example_details}
        if len(numbers) == 1 and (number := numbers.pop()) is not None:
            details[name] = number
    return {name: number for name, number in details.items() if math.isfinite(number)}


def _build_outcomes(result_rows: Sequence[ResultRow], columns: Columns) -> tuple[list[TrialOutcome], list[str]]:
    """Return `(the outcome of each training, notes on omitted rows)`."""
    trainings: dict[TrainingKey, dict[tuple[str, int], ResultRow]] = {}
    rows_without_value: dict[Outcome, dict[TrainingKey, list[ResultRow]]] = {
        name: {} for name in ("failed", "unfinished", "pruned")
    }
    num_repeated = 0
    for row in result_rows:
        if row.outcome != "value":
            rows_without_value["failed" if row.outcome == "blank" else row.outcome].setdefault(row.key, []).append(row)
            continue
        first_row = trainings.setdefault(row.key, {}).setdefault((row.example, row.step), row)
        if first_row.value != row.value:
            raise _build_conflict_error(row, first_row, columns)
        num_repeated += first_row is not row
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
    outcomes: list[TrialOutcome] = [_build_finished([*training.values()], columns) for training in trainings.values()]
    failed_trainings = [
        failed_rows[0] for key, failed_rows in rows_without_value["failed"].items() if key not in trainings
    ]
    for row in failed_trainings:
        reason = "the table has no result for this training"
        outcomes.append(TrialFailed(trial_id=row.origin, **_build_arm_fields(row.key), error="error", reason=reason))
    examples = sorted({example for key in trainings for example in missing_scores.get(key, ())})
    omitted_counts = (
        (num_repeated, "repeated row", "omitted"),
        (len(examples), "example", f"without a score omitted ({format_names(examples)})"),
        (len(failed_trainings), "training", "without a result"),
        (len(rows_without_value["unfinished"]), "unfinished training", "omitted"),
        (len(rows_without_value["pruned"].keys() - trainings.keys()), "pruned training", "omitted"),
    )
    return outcomes, [
        f"{count} {noun}{'s' * (count != 1)} {description}" for count, noun, description in omitted_counts if count
    ]


def _lacks_final_value(
    failed_rows: Sequence[ResultRow], evaluations: Sequence[ResultRow], steps: Collection[int], has_trials: bool
) -> bool:
    """Return whether the last evaluation of a training has no value, so that an earlier value is not its result.

    A blank cell counts as an evaluation only at steps at which some training has a value, because logs also have rows with only the
    training loss.
    """
    last_step = max((row.step for row in evaluations if not row.example), default=None)
    trials = {row.trial for row in evaluations}
    return last_step is not None and any(
        row.step > last_step and (row.outcome == "failed" or row.step in steps)
        for row in failed_rows
        if not row.example and (row.trial in trials or not has_trials)
    )


def _find_unscored_examples(
    failed_rows: Sequence[ResultRow], training: Mapping[tuple[str, int], ResultRow]
) -> dict[str, ResultRow]:
    """Return the examples whose last row has no score, each with that row."""
    last_step: dict[str, int] = {}
    for example, step in training:
        last_step[example] = max(step, last_step.get(example, step))
    return {row.example: row for row in failed_rows if row.example and row.step > last_step.get(row.example, -1)}


def _build_conflict_error(row: ResultRow, first_row: ResultRow, columns: Columns) -> ResultsError:
    rank, learning_rate, seed = row.key
    rate = f", lr {learning_rate:g}" if learning_rate else ""
    position = (
        f", example {row.example}" if row.example else f", step {row.step}" if columns.by_role.get("step") else ""
    )
    used_columns = {*columns.by_role.values(), columns.value, *columns.other_metrics}
    fields, first_fields = row.row.fields, first_row.row.fields
    other_columns = [
        name
        for name in list_columns([row.row, first_row.row])
        if fields.get(name) != first_fields.get(name) and name not in used_columns
    ]
    advice = (
        f"they also differ in {format_names(other_columns)}; keep the rows of one training for each rank, learning rate and seed"
        if other_columns
        else "add the column that distinguishes them (seed, lr or example), or remove one"
    )
    return ResultsError(
        f"{row.origin}: rank {rank}{rate}, seed {seed}{position} occurs twice with different values (also in {first_row.origin}); {advice}"
    )


def _select_final_scores(result_rows: Iterable[ResultRow]) -> dict[str, ResultRow]:
    """Return the row of each example's last evaluation."""
    final_rows = {row.example: row for row in sorted(result_rows, key=lambda row: row.step) if row.example}
    return dict(sorted(final_rows.items()))


def _build_arm_fields(key: TrainingKey, steps: int = 0) -> dict[str, Any]:
    """Return the fields of `Arm`. The alpha of a table is the same for all trainings, up to its scaling rule."""
    rank, learning_rate, seed = key
    return {"rank": rank, "learning_rate": learning_rate, "lora_alpha": 1, "seed": seed, "steps": steps}


def _build_finished(result_rows: Sequence[ResultRow], columns: Columns) -> TrialFinished:
    """Return the outcome of a training: the mean over its examples, or its last evaluation."""
    examples = _select_final_scores(result_rows).values()
    points = sorted((row.step, row.value) for row in result_rows if not row.example and row.value is not None)
    values = [row.value for row in examples if row.value is not None]
    weights = [row.weight for row in examples]
    mean = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights) if values else points[-1][1]
    steps = max((step for step, _ in points), default=0)
    details = _merge_details(result_rows)
    other_metrics = {name: details[name] for name in columns.other_metrics if name in details}
    return TrialFinished(
        trial_id=result_rows[0].trial,
        **_build_arm_fields(result_rows[0].key, steps),
        value=mean,
        metrics={**other_metrics, columns.metric: mean},
        example_scores=values or None,
        example_weights=weights if values and "weight" in columns.by_role else None,
        train_value=details.get("train_value"),
        points=[EvalPoint(step=step, value=value) for step, value in points] if steps else [],
        seed_deviation=details.get("std"),
        averaged_seeds=int(details.get("std_seeds", 1)) if "std" in details else 1,
    )


def _number_groups(result_rows: Iterable[ResultRow], stated_column: str | None, table_name: str) -> list[int] | None:
    """Return the group number of each example in sorted order, or None if the table has no groups."""
    groups_by_example: dict[str, set[str]] = {}
    for row in result_rows:
        if row.example:
            groups_by_example.setdefault(row.example, set()).add(row.group or f"example {row.example}")
    names = [min(groups) for _, groups in sorted(groups_by_example.items())]
    numbers_by_name = {name: number for number, name in enumerate(dict.fromkeys(names))}
    ambiguous_example = next((example for example, groups in groups_by_example.items() if len(groups) > 1), None)
    if ambiguous_example is None and 1 < len(numbers_by_name) < len(names):
        return [numbers_by_name[name] for name in names]
    if stated_column is not None:
        fault = (
            "there is no column that identifies examples (example)" if not names else f"example {ambiguous_example} has two" if ambiguous_example is not None
            else "all examples share one" if len(numbers_by_name) == 1 else "no two examples share one"
        )  # fmt: skip
        raise ResultsError(
            f"{table_name}: column {stated_column} does not divide the examples into groups: {fault}; name a column in which several examples share "
            "each value, or leave `group` out: examples are then treated as independent"
        )
    return None


def _require_same_examples(
    trainings: Mapping[TrainingKey, Mapping[tuple[str, int], ResultRow]],
    missing_scores: Mapping[TrainingKey, Mapping[str, ResultRow]],
) -> None:
    scored_examples = {example for training in trainings.values() for example, _ in training}
    expected_weights: dict[str, float] = {}
    for key, training in trainings.items():
        for example, row in missing_scores.get(key, {}).items():
            if example in scored_examples:
                raise ResultsError(
                    f"{row.origin}: rank {key[0]} has no score for example {example}, which other trainings have; score every training on the "
                    "same examples, or remove this example from all"
                )
        final_scores = _select_final_scores(training.values())
        weights = {example: row.weight for example, row in final_scores.items()}
        if not weights:
            continue
        expected_weights = expected_weights or weights
        row, differing_examples = next(iter(final_scores.values())), sorted(weights.keys() ^ expected_weights.keys())
        if differing_examples:
            raise ResultsError(
                f"{row.origin}: rank {row.key[0]} is scored on other examples than the previous rank ({len(differing_examples)} differ, such as "
                f"{differing_examples[0]}); score every training on the same examples"
            )
        if weights != expected_weights:
            raise ResultsError(
                f"{row.origin}: rank {row.key[0]} has other token counts than the previous rank for the same examples; give each "
                "example the same count in every training"
            )


def _require_comparable(finished: list[TrialFinished], table_name: str) -> None:
    trainings = [trial for trial in finished if trial.rank > 0]
    ranks = {trial.rank for trial in trainings}
    if not ranks:
        raise ResultsError(f"{table_name}: no row has both a rank and a held-out value; give one row for each training")
    if len(ranks) < 2:
        raise ResultsError(
            f"{table_name}: the trainings have only rank {ranks.pop()}; give two or more ranks to compare"
        )
    if (
        len({trial.value for trial in trainings}) == 1
        and len({tuple(trial.example_scores or ()) for trial in trainings}) == 1
    ):
        raise ResultsError(
            f"{table_name}: every training has the value {trainings[0].value:g}, so there is nothing to compare; give the held-out metric"
        )
    has_rate_values = {trial.learning_rate > 0 for trial in trainings}
    if len(has_rate_values) > 1:
        trial_without_rate = next(trial for trial in trainings if trial.learning_rate == 0)
        raise ResultsError(
            f"{trial_without_rate.trial_id}: this row has no learning rate, but other rows have one; add it, or remove the column"
        )


def _require_one_unit(finished: list[TrialFinished], metric: str, table_name: str) -> None:
    """Raise if some accuracies are fractions and others are percentages."""
    values = sorted(trial.value for trial in finished if trial.value)
    if values and (values[0] < 0 or values[-1] > 100 or (has_percentages(values) and values[0] <= 1)):
        raise ResultsError(
            f"{table_name}: {metric} is {values[0]:g} in one training and {values[-1]:g} in another; write all as fractions from 0 to 1, or all "
            "as percentages above 1"
        )
