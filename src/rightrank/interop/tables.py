"""Tables of results that others made: groups their rows by training and checks every cell."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from rightrank.data.rows import Row
from rightrank.interop.columns import (
    Columns,
    direction_of,
    identify_columns,
    is_blank,
    listed,
    names_of,
    plain,
)
from rightrank.interop.table_cells import Key, Outcome, ResultRow, parse_row, to_float
from rightrank.interop.table_rows import add_settings_from_names, flatten_rows, select_comparable_stages
from rightrank.schema.decision import Result, ResultsTable
from rightrank.schema.errors import ResultsError, quoted
from rightrank.schema.metrics import is_percent, metric_kind, unknown_direction
from rightrank.schema.settings import TRAINER_FIELDS, PeftFields, SelectSettings

# Columns that say that trainings can't be compared: the task, the kind of adapter, and a setting of all trainings by any of its names.
OF_ALL = ("batch_size", "seq_len", "num_train_epochs")
KINDS = {
    "model", "base_model", "model_name", "model_name_or_path", "model_id", "base_model_name_or_path", "dataset",
    "dataset_name", "data", "task", "method", "peft_type", "optimizer", "optim", "metric", "metric_name", "use_rslora",
    "train_samples", "num_train_samples", "max_train_samples", "train_size", *PeftFields.model_fields,
    *TRAINER_FIELDS, *OF_ALL, *(other for name in OF_ALL for other in SelectSettings.model_fields[name].also),
}  # fmt: skip
ALPHAS = {"lora_alpha", "alpha", "network_alpha"}


def results_of_rows(
    rows: list[Row],
    where: str,
    metric: str | None,
    higher: bool | None,
    margin: float | None,
    mapping: Mapping[str, str],
) -> ResultsTable:
    """The trainings in rows, and how each column was read. `where` is the table's name in error messages.

    Raises:
        ResultsError: rows that can't be compared; the message names file and row.
    """
    flat, num_partial = select_comparable_stages(flatten_rows(rows), where)
    named = add_settings_from_names(flat, mapping)
    notes = ["rank from the names of the trainings"] if named is not flat else []
    columns = identify_columns(named, metric, mapping, where)
    _require_one_kind(named, where, columns.by_name["rank"])
    metric = columns.metric
    with_rank = [row for row in named if not is_blank(row.fields.get(columns.by_name["rank"]))]
    lines = [parse_row(row, columns, metric) for row in with_rank]
    results, counts = _results(lines, columns)
    groups = _groups(lines, mapping.get("group"), where)
    results = [run.model_copy(update={"example_groups": groups}) if run.example_values else run for run in results]
    _require_comparable(results, where)
    if groups is None:
        columns = replace(columns, by_name={name: title for name, title in columns.by_name.items() if name != "group"})
    higher, why = _direction(metric, higher, where)
    if metric_kind(metric, higher) == "accuracy":
        _require_one_unit(results, metric, where)
    if margin is None and metric_kind(metric, higher) == "other":
        notes.append(
            f"margin: 1% of the best, as the name {metric!r} says no unit (--metric NAME or --margin changes it)"
        )
    roles = [f"{name} from column {column}" for name, column in columns.by_name.items() if name != column]
    roles.append(f"value from column {columns.value}: {'higher' if higher else 'lower'} is better ({why})")
    taken = {*columns.by_name.values(), columns.value, *columns.others, ""}
    unused = [name for name in names_of(named) if name not in taken and _texts_of(named, name)]
    left = [f"not used: {listed(unused)}"] if unused else []
    rankless = len(named) - len(with_rank)
    left += [f"{rankless} row{'s' * (rankless != 1)} without a rank left out"] if rankless else []
    left += (
        [f"{num_partial} row{'s' * (num_partial != 1)} of truncated or stopped trainings left out"]
        if num_partial
        else []
    )
    return ResultsTable(
        metric=metric, higher_is_better=higher, results=results, understood=[*roles, *notes, *left, *counts]
    )


def _texts_of(rows: Iterable[Row], column: str) -> list[str]:
    """The different texts of a column's cells that are not blank, sorted."""
    return sorted({str(row.fields.get(column)) for row in rows if not is_blank(row.fields.get(column))})


def _is_one_scale(rows: Sequence[Row], column: str, rank: str) -> bool:
    """Whether alpha is constant, or in proportion to the rank or to its root; also where either is no number."""
    pairs = [(to_float(row.fields.get(column)), to_float(row.fields.get(rank))) for row in rows]
    known = [(alpha, r) for alpha, r in pairs if alpha is not None and r is not None and r > 0]
    return any(len({round(alpha / r**power, 9) for alpha, r in known}) <= 1 for power in (0.0, 1.0, 0.5))


def _require_one_kind(rows: Sequence[Row], where: str, rank: str) -> None:
    """Refuse trainings of several models, data sets, methods or settings that change what a rank is worth."""
    for name in names_of(rows):
        texts = _texts_of(rows, name)
        if plain(name) in ALPHAS and not _is_one_scale(rows, name, rank):
            raise ResultsError(
                f"{where}: column {name} is neither the same at every rank nor in proportion to it ({', '.join(texts[:4])}), so the scale of "
                "the adapters differs beside their rank; keep the rows of one rule, or leave the column out if it does not matter"
            )
        if plain(name) in KINDS and len(texts) > 1:
            first, other = [quoted(text, 40) for text in texts[:2]]
            raise ResultsError(
                f"{where}: the trainings differ in column {name} ({first}, {other}), which is not used; keep the rows of one, "
                "or leave the column out if it does not matter"
            )


def _direction(metric: str, asked: bool | None, where: str) -> tuple[bool, str]:
    """`(higher is better, why)`."""
    if asked is not None:
        return asked, "as given"
    known = direction_of(metric)
    if known is None:
        raise ResultsError(
            f"{where}: {unknown_direction(metric)}; give --higher-is-better or --lower-is-better, or --metric NAME"
        )
    return known, f"from its name, {metric}"


def _merged_details(lines: Sequence[ResultRow]) -> dict[str, float]:
    """Return the further numbers of a training by its last evaluation; of rows of examples those that all of them share."""
    details: dict[str, float] = {}
    for line in sorted(lines, key=lambda line: line.step):
        if not line.item:
            details |= line.details
    of_items = [line.details for line in lines if line.item]
    for name in {name for by_name in of_items for name in by_name} - details.keys():
        numbers = {by_name.get(name) for by_name in of_items}
        if len(numbers) == 1 and (number := numbers.pop()) is not None:
            details[name] = number
    return {name: number for name, number in details.items() if math.isfinite(number)}


def _results(lines: Sequence[ResultRow], columns: Columns) -> tuple[list[Result], list[str]]:
    """`(one result for each training, notes on what was left out)`."""
    trainings: dict[Key, dict[tuple[str, int], ResultRow]] = {}
    left: dict[Outcome, dict[Key, list[ResultRow]]] = {name: {} for name in ("failed", "unfinished", "pruned")}
    repeated = 0
    for line in lines:
        if line.outcome != "value":
            left["failed" if line.outcome == "blank" else line.outcome].setdefault(line.key, []).append(line)
            continue
        first = trainings.setdefault(line.key, {}).setdefault((line.item, line.step), line)
        if first.value != line.value:
            raise _two_values(line, first, columns)
        repeated += first is not line
    steps = {step for training in trainings.values() for item, step in training if not item}
    missing_scores: dict[Key, dict[str, ResultRow]] = {}
    for key, failures in left["failed"].items():
        training = trainings.get(key, {})
        if _ends_without_value(failures, list(training.values()), steps, "trial" in columns.by_name):
            del trainings[key]
            continue
        missing_scores[key] = _unscored_examples(failures, training)
        for item, step in list(training):
            if item in missing_scores[key]:
                del training[item, step]
        if not training:
            trainings.pop(key, None)
    _require_same_examples(trainings, missing_scores)
    results = [_result(list(training.values()), columns) for training in trainings.values()]
    failed = [failures[0] for key, failures in left["failed"].items() if key not in trainings]
    for line in failed:
        rank, learning_rate, seed = line.key
        results.append(Result(trial_id=line.where, rank=rank, learning_rate=learning_rate, seed=seed, value=None))
    examples = sorted({item for key in trainings for item in missing_scores.get(key, ())})
    counts = (
        (repeated, "repeated row", "left out"),
        (len(examples), "example", f"without a score left out ({listed(examples)})"),
        (len(failed), "training", "without a result"),
        (len(left["unfinished"]), "unfinished training", "left out"),
        (len(left["pruned"].keys() - trainings.keys()), "pruned training", "left out"),
    )
    return results, [f"{count} {noun}{'s' * (count != 1)} {what}" for count, noun, what in counts if count]


def _ends_without_value(
    failures: Sequence[ResultRow], evaluations: Sequence[ResultRow], steps: Collection[int], has_trials: bool
) -> bool:
    """Whether the last evaluation of a training has no value, so that an earlier one is not its result.

    A blank cell is an evaluation only at a step at which some training has a value: logs have rows of the training loss alone.
    """
    last = max((line.step for line in evaluations if not line.item), default=None)
    trials = {line.trial for line in evaluations}
    return last is not None and any(
        line.step > last and (line.outcome == "failed" or line.step in steps)
        for line in failures
        if not line.item and (line.trial in trials or not has_trials)
    )


def _unscored_examples(
    failures: Sequence[ResultRow], training: Mapping[tuple[str, int], ResultRow]
) -> dict[str, ResultRow]:
    """Return the examples whose last row has no score, each with that row."""
    last: dict[str, int] = {}
    for item, step in training:
        last[item] = max(step, last.get(item, step))
    return {line.item: line for line in failures if line.item and line.step > last.get(line.item, -1)}


def _two_values(line: ResultRow, first: ResultRow, columns: Columns) -> ResultsError:
    rank, learning_rate, seed = line.key
    rate = f", lr {learning_rate:g}" if learning_rate else ""
    what = f", example {line.item}" if line.item else f", step {line.step}" if columns.by_name.get("step") else ""
    taken = {*columns.by_name.values(), columns.value, *columns.others}
    fields, other = line.row.fields, first.row.fields
    other_columns = [
        name for name in names_of([line.row, first.row]) if fields.get(name) != other.get(name) and name not in taken
    ]
    advice = (
        f"they differ in {listed(other_columns)} too; keep the rows of one training for each rank, learning rate and seed"
        if other_columns
        else "add the column that distinguishes them (seed, lr or item), or remove one"
    )
    return ResultsError(
        f"{line.where}: rank {rank}{rate}, seed {seed}{what} occurs twice with different values (also {first.where}); {advice}"
    )


def _scored(lines: Iterable[ResultRow]) -> dict[str, ResultRow]:
    """By example, the row of its last look."""
    last = {line.item: line for line in sorted(lines, key=lambda line: line.step) if line.item}
    return dict(sorted(last.items()))


def _result(lines: Sequence[ResultRow], columns: Columns) -> Result:
    """One training: the mean over its examples, or its last look."""
    (rank, learning_rate, seed), examples = lines[0].key, _scored(lines).values()
    points = sorted((line.step, line.value) for line in lines if not line.item and line.value is not None)
    values = [line.value for line in examples if line.value is not None]
    weights = [line.weight for line in examples]
    mean = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights) if values else points[-1][1]
    steps = max((step for step, _ in points), default=0)
    details = _merged_details(lines)
    return Result(
        trial_id=lines[0].trial,
        rank=rank,
        learning_rate=learning_rate,
        seed=seed,
        value=mean,
        example_values=values,
        example_weights=weights if columns.by_name.get("weight") else [],
        std=details.get("std"),
        std_seeds=int(details.get("std_seeds", 1)) if "std" in details else 1,
        train_value=details.get("train_value"),
        steps=steps or None,
        points=points if steps else [],
        others={name: details[name] for name in columns.others if name in details},
    )


def _groups(lines: Iterable[ResultRow], asked: str | None, where: str) -> list[int] | None:
    """The groups of the examples, numbered in their order; None where the table has none."""
    by_item: dict[str, set[str]] = {}
    for line in lines:
        if line.item:
            by_item.setdefault(line.item, set()).add(line.group or f"example {line.item}")
    names = [min(groups) for _, groups in sorted(by_item.items())]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    twice = next((item for item, groups in by_item.items() if len(groups) > 1), None)
    if twice is None and 1 < len(places) < len(names):
        return [places[name] for name in names]
    if asked is not None:
        what = (
            "there is no column of examples (item)" if not names else f"example {twice} has two" if twice is not None
            else "all examples share one" if len(places) == 1 else "no two examples share one"
        )  # fmt: skip
        raise ResultsError(
            f"{where}: column {asked} gives the examples no groups: {what}; name one with several values, each of several "
            "examples, or leave it out: examples are then taken as independent"
        )
    return None


def _require_same_examples(
    trainings: Mapping[Key, Mapping[tuple[str, int], ResultRow]], missing_scores: Mapping[Key, Mapping[str, ResultRow]]
) -> None:
    scored_items = {item for training in trainings.values() for item, _ in training}
    before: dict[str, float] = {}
    for key, training in trainings.items():
        for item, line in missing_scores.get(key, {}).items():
            if item in scored_items:
                raise ResultsError(
                    f"{line.where}: rank {key[0]} has no score for example {item}, which other trainings have; score every training on the "
                    "same examples, or leave this one out of all"
                )
        scored = _scored(training.values())
        own = {item: line.weight for item, line in scored.items()}
        if not own:
            continue
        before = before or own
        line, odd = next(iter(scored.values())), sorted(own.keys() ^ before.keys())
        if odd:
            raise ResultsError(
                f"{line.where}: rank {line.key[0]} is scored on other examples than the rank before ({len(odd)} differ, such as "
                f"{odd[0]}); score every training on the same examples"
            )
        if own != before:
            raise ResultsError(
                f"{line.where}: rank {line.key[0]} has other token counts than the rank before for the same examples; give each "
                "example the same count in every training"
            )


def _require_comparable(results: list[Result], where: str) -> None:
    trained = [result for result in results if result.rank > 0 and result.value is not None]
    ranks = {result.rank for result in trained}
    if not ranks:
        raise ResultsError(f"{where}: no row has both a rank and a held-out value; give one row for each training")
    if len(ranks) < 2:
        raise ResultsError(f"{where}: one rank only ({ranks.pop()}); give two or more to compare")
    if (
        len({result.value for result in trained}) == 1
        and len({tuple(result.example_values) for result in trained}) == 1
    ):
        raise ResultsError(
            f"{where}: every training has the value {trained[0].value:g}, so there is nothing to compare; give the held-out metric"
        )
    rates = {result.learning_rate > 0 for result in trained}
    if len(rates) > 1:
        bare = next(result for result in trained if result.learning_rate == 0)
        raise ResultsError(
            f"{bare.trial_id}: no learning rate, though other rows have one; give it, or leave the column out"
        )


def _require_one_unit(results: list[Result], metric: str, where: str) -> None:
    """Refuse accuracies of which some are fractions and some percentages."""
    values = sorted(result.value for result in results if result.value)
    if values and (values[0] < 0 or values[-1] > 100 or (is_percent(values) and values[0] <= 1)):
        raise ResultsError(
            f"{where}: {metric} is {values[0]:g} in one training and {values[-1]:g} in another; write all as fractions from 0 to 1, or all "
            "as percentages above 1"
        )
