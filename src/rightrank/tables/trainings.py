"""Read the trainings in a table of results: checked numbers of trainings that differ in nothing but what is compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rightrank.schema.errors import MAX_EXACT_INTEGER, ResultsError, quote_value
from rightrank.schema.metrics import (
    format_unknown_direction,
    has_percentages,
    infer_metric_kind,
)
from rightrank.schema.trials import Arm, EvalPoint, Floats, TrialFailed, TrialFinished, TrialOutcome, round_digits
from rightrank.tables.roles import Roles, identify_roles, infer_column_direction, is_label, is_setting
from rightrank.tables.sources import Codes, Table, format_cell, format_names, is_blank, parse_number, read_table

MAX_RANK = 2**20
MAX_NUMBER = 1e60  # larger than any metric; squares and sums of such numbers are still finite
LIMITS: dict[str, tuple[str, float, float]] = {  # the allowed numbers of a role in words, the lowest and the highest
    "rank": (f"a whole number up to {MAX_RANK:,}; 0 is the base", 0, MAX_RANK),
    "std_seeds": ("a whole number from 1", 1, MAX_EXACT_INTEGER),
    **dict.fromkeys(("seed", "step"), ("a whole number from 0", 0, MAX_EXACT_INTEGER)),
    **dict.fromkeys(("lr", "weight", "std"), (f"a number from 0 to {MAX_NUMBER:g}", 0, MAX_NUMBER)),
    **dict.fromkeys(
        ("value", "train_value", "alpha"),
        (
            f"a number from -{MAX_NUMBER:g} to {MAX_NUMBER:g}, or leave the cell empty where a training has no result",
            -MAX_NUMBER,
            MAX_NUMBER,
        ),
    ),
}
WHOLE_ROLES = ("rank", "seed", "step", "std_seeds")
NOTATION = "; write numbers with a decimal point, without thousands separators and percent signs, and 1 and 0 for true and false"


@dataclass(frozen=True, slots=True)
class Evaluations:
    """The rows of a table as numbers: an evaluation of a training, or the score of one of its examples.

    `trainings`, `steps` and `examples` are indices of `keys`, `step_numbers` and `example_names`, which are sorted.
    """

    values: Floats  # [rows] NaN: no value
    ranks: Floats  # [rows]
    trainings: Codes  # [rows]
    steps: Codes  # [rows]
    examples: Codes  # [rows]
    keys: list[tuple[int, float, int]]  # rank, learning rate, seed
    step_numbers: Floats
    example_names: list[str]

    def describe_training(self, training: int) -> str:
        rank, rate, seed = self.keys[training]
        return f"rank {rank}{f', lr {rate:g}' if rate else ''}, seed {seed}"


def number_evaluations(table: Table, roles: Roles) -> Evaluations:
    """Convert the rows of a table to numbers.

    Raises:
        ResultsError: a cell that is not allowed, or an example without a name.
    """
    ranks, rates, seeds, steps = (
        np.nan_to_num(read_rows(table, roles, role)) for role in ("rank", "lr", "seed", "step")
    )
    distinct_rates, rate_codes = np.unique(rates, return_inverse=True)
    rates = np.array(list(map(round_digits, distinct_rates.tolist())))[rate_codes]
    rates[ranks == 0] = 0  # the base model is not trained
    example_names, examples = encode_texts(table, roles, "example")
    trainings = np.zeros(len(ranks), dtype=np.int64)
    for numbers in (ranks, rates, seeds):
        distinct, codes = np.unique(numbers, return_inverse=True)
        trainings = trainings * len(distinct) + codes
    _, first_rows, trainings = np.unique(trainings, return_index=True, return_inverse=True)
    keys = [(int(ranks[row]), float(rates[row]), int(seeds[row])) for row in first_rows]
    step_numbers, step_codes = np.unique(steps, return_inverse=True)
    values = read_rows(table, roles, "value")
    return Evaluations(values, ranks, trainings, step_codes, examples, keys, step_numbers, example_names)


def read_rows(table: Table, roles: Roles, role: str) -> Floats:
    """Return the number of each row; NaN for a blank or infinite one, and everywhere if no column has the role."""
    name = roles.columns.get(role)
    if name is None:
        return np.full(len(table.numbers), np.nan)
    column, (allowed, low, high) = table.columns[name], LIMITS[role]
    numbers = np.empty(len(column.cells))
    refused: list[int] = []
    for code, (cell, number) in enumerate(zip(column.cells, column.parse_numbers(), strict=True)):
        numbers[code] = math.nan if number is None or math.isinf(number) else number
        is_absent = number is not None and (math.isnan(number) or (math.isinf(number) and low < 0))
        is_allowed = is_absent if number is None or not math.isfinite(number) else low <= number <= high
        if not is_allowed or (role in WHOLE_ROLES and not _is_integer(cell)) or (role == "rank" and is_absent):
            refused.append(code)
    if refused:
        row = int(np.flatnonzero(np.isin(column.codes, refused))[0])
        cell = table.get_cell(name, row)
        title = name if role == "value" else "learning rate" if role == "lr" else role
        raise ResultsError(
            f"{table.describe_row(row)}: {title} {quote_value(cell, 40)} is not allowed: give {allowed}"
            f"{'' if parse_number(cell) is not None else NOTATION}"
        )
    return numbers[column.codes]


def _is_integer(cell: Any) -> bool:
    """Return whether a cell is blank or a whole number. Texts such as `1,000` and `1.000` are a thousand in some countries."""
    if isinstance(cell, str):
        return is_blank(cell) or cell.strip().removesuffix(".0").isdecimal()
    return is_blank(cell) or float(cell).is_integer()


def encode_texts(table: Table, roles: Roles, role: str) -> tuple[list[str], Codes]:
    """Return the sorted texts of a role and the index of each row's text.

    Raises:
        ResultsError: a cell that is blank, or a placeholder such as `n/a`.
    """
    name = roles.columns.get(role)
    if name is None:
        return [""], np.zeros(len(table.numbers), dtype=np.int64)
    column = table.columns[name]
    blank_rows = np.flatnonzero(column.test(is_blank))
    if len(blank_rows):
        row = blank_rows[0]
        raise ResultsError(
            f"{table.describe_row(row)}: the {role} {quote_value(table.get_cell(name, row), 40)} in column {name} is no name; name the {role} "
            f"of every row, or leave the column out with --ignore {name}"
        )
    return column.encode(lambda cell: str(cell).strip())


def require_same_conditions(table: Table, roles: Roles, evaluations: Evaluations) -> list[str]:
    """Require that the trainings differ in nothing but rank, learning rate, seed, step, example and metric.

    Returns:
        Notes on the numbers that differ between the trainings.

    Raises:
        ResultsError: texts or settings of adapters differ, or alphas that are not proportional to the rank.
    """
    alpha = roles.columns.get("alpha")
    others = sorted(table.columns.keys() - (set(roles.columns.values()) - {alpha}))
    refused, numeric, notes = [], [], []
    for name in [name for name in others if not is_label(name) and _is_different(table, name, evaluations)]:
        if name == alpha:
            is_compared = ~np.isnan(evaluations.values) & (evaluations.ranks > 0)
            alphas = read_rows(table, roles, "alpha")[is_compared]
            if len(set(map(round_digits, alphas.tolist()))) == 1:
                continue
            ratios = alphas / evaluations.ranks[is_compared]
            if len(set(map(round_digits, ratios.tolist()))) == 1:
                notes.append(f"{name} is {ratios[0]:g} times the rank")
                continue
        if name == alpha or name in table.settings or None in table.columns[name].parse_numbers():
            refused.append(name)
        elif is_setting(name) or infer_column_direction(name) is None:
            numeric.append(name)
    if refused:
        raise ResultsError(_format_refusal(table, refused, alpha))
    if numeric:
        notes.append(f"different between the trainings, and not taken into account: {format_names(numeric)}")
    return notes


def _is_different(table: Table, name: str, evaluations: Evaluations) -> bool:
    """Return whether a column is not the same for the same example and step of every training.

    The base model is not trained: settings of the training may be blank in its rows.
    """
    texts, codes = table.columns[name].encode(format_cell)
    has_value, is_base = ~np.isnan(evaluations.values), evaluations.ranks == 0
    is_trained = has_value & ~is_base
    trained = codes[is_trained]
    distinct = np.unique(trained)
    if len(distinct) < 2:
        allowed = [*distinct, *(code for code, text in enumerate(texts) if not text)]
        return not np.isin(codes[has_value & is_base], allowed).all()

    def count_pairs(ids: Codes) -> tuple[int, int]:
        """Count the distinct ids, and their pairs with texts."""
        return len(np.unique(ids)), len(np.unique(ids * len(texts) + trained))

    num_trainings, num_training_pairs = count_pairs(evaluations.trainings[is_trained])
    places = evaluations.steps * len(evaluations.example_names) + evaluations.examples
    num_places, num_place_pairs = count_pairs(places[is_trained])
    return num_training_pairs != num_trainings * len(distinct) or num_place_pairs != num_places


def _format_refusal(table: Table, names: list[str], alpha: str | None) -> str:
    differences = []
    for name in names:
        texts = table.columns[name].encode(format_cell)[0]
        shown = ", ".join(quote_value(text, 40) for text in texts[:2]) + ", …" * (len(texts) > 2)
        rule = "; neither equal nor proportional to the rank" if name == alpha else ""
        differences.append(f"{name} ({shown}{rule})")
    ignored = " ".join(f"--ignore {name!r}" if " " in name else f"--ignore {name}" for name in names)
    return (
        f"{table.name}: the trainings differ in {format_names(differences)}, so they cannot be compared; keep the rows with one value "
        f"(--where {names[0]}=VALUE), or say that the difference does not matter ({ignored})"
    )


SUCCESSES = ("finished", "complete", "completed", "success", "succeeded", "done")
FAILURES = ("failed", "fail", "crashed", "killed", "error", "diverged", "collapsed")  # no result, if there is no value


@dataclass(frozen=True, slots=True)
class ResultTable:
    outcomes: list[TrialOutcome]
    metric: str
    higher_is_better: bool
    notes: list[str]


def read_result_table(
    source: Any,
    *,
    metric: str | None = None,
    higher_is_better: bool | None = None,
    columns: Mapping[str, str] | None = None,
    ignore: Iterable[str] = (),
    where: Mapping[str, object] | None = None,
) -> ResultTable:
    """Read the trainings in a table of results.

    Whatever differs between the trainings and is neither rank, learning rate, seed, step, example nor metric must be declared:
    a column whose texts differ is refused unless it is ignored or restricted to one value; numbers that differ are named in a note.

    Args:
        source: a file, a folder, a data frame or mappings, as for `read_table`.
        columns: role → column, for columns with other names.
        ignore: columns that are not read.
        where: column → value; only the rows with these values are read.

    Raises:
        ResultsError: the table cannot be read, or its trainings cannot be compared; the message names file and row.
    """
    mapping = columns or {}
    table = read_table(source).keep_rows_where(where or {}).ignore(ignore)
    roles = identify_roles(table, metric, mapping)
    table, notes = _drop_blank_rows(table, roles)
    _require_successes(table, roles)
    evaluations = number_evaluations(table, roles)
    if np.isnan(evaluations.values[evaluations.ranks > 0]).all():
        raise ResultsError(f"{table.name}: no row has both a rank and a held-out value; give one row for each training")
    notes += require_same_conditions(table, roles, evaluations)
    outcomes, omissions = _build_outcomes(table, roles, evaluations, mapping.get("group"))
    finished = [outcome for outcome in outcomes if isinstance(outcome, TrialFinished)]
    _require_comparable(finished, table.name)
    higher, reason = _resolve_direction(roles.metric, higher_is_better, table.name)
    kind = infer_metric_kind(roles.metric, higher)
    if kind == "perplexity" and (lowest := min(outcome.value for outcome in finished)) <= 0:
        raise ResultsError(f"{table.name}: a perplexity of {lowest:g} is not possible; perplexities are above 0")
    if kind == "accuracy":
        _require_one_unit(finished, roles.metric, table.name)
    readings = [
        f"{role} from column {name}"
        for role, name in sorted(roles.columns.items())
        if role not in (name, "value", "alpha")
    ]
    readings.append(
        f"value from column {roles.columns['value']}: {'higher' if higher else 'lower'} is better ({reason})"
    )
    return ResultTable(outcomes, roles.metric, higher, [*readings, *notes, *omissions])


def _drop_blank_rows(table: Table, roles: Roles) -> tuple[Table, list[str]]:
    """Return the rows with a rank or a value, and a note on the others."""
    is_used = ~np.logical_and(*(table.columns[roles.columns[role]].test(is_blank) for role in ("rank", "value")))
    if is_used.all():
        return table, []
    count = int(np.sum(~is_used))
    return table.select(is_used), [_count(count, "row", "with neither rank nor value omitted")]


def _count(number: int, noun: str, description: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)} {description}"


def _require_successes(table: Table, roles: Roles) -> None:
    """Raise if the state of a row is not a known success, unless it is a known failure and there is no value."""
    if (name := roles.columns.get("status")) is None:
        return
    status, value = table.columns[name], table.columns[roles.columns["value"]]
    is_success = status.test(lambda cell: _normalize_state(cell) in SUCCESSES)
    is_failure = status.test(lambda cell: _normalize_state(cell) in FAILURES)
    has_value = value.test(lambda cell: (number := parse_number(cell)) is None or math.isfinite(number))
    refused = np.flatnonzero(~is_success & ~(is_failure & ~has_value))
    if len(refused):
        success = next((cell for cell in status.cells if _normalize_state(cell) in SUCCESSES), "finished")
        raise ResultsError(
            f"{table.describe_row(refused[0])}: {name} {quote_value(table.get_cell(name, refused[0]), 40)} is not a known success "
            f"({', '.join(SUCCESSES)}); leave such rows out with --where {name}={success}, or count them with --ignore {name}"
        )


def _normalize_state(cell: Any) -> str:
    return str(cell).strip().lower()


def _build_outcomes(
    table: Table, roles: Roles, evaluations: Evaluations, stated_group: str | None
) -> tuple[list[TrialOutcome], list[str]]:
    """Build the outcome of each training, in the order of rank, learning rate and seed.

    Returns:
        The outcomes, and notes on the rows that were omitted.
    """
    rows, num_repeated = _find_distinct_rows(table, roles, evaluations)
    trainings, steps, examples = evaluations.trainings[rows], evaluations.steps[rows], evaluations.examples[rows]
    values = evaluations.values[rows]
    has_value = ~np.isnan(values)
    # A row without a value counts only at a step at which some training has a value: logs have rows with only the training loss.
    is_evaluation = np.isin(steps, steps[has_value])
    last_steps = np.full(len(evaluations.keys), -1)
    np.maximum.at(last_steps, trainings[is_evaluation], steps[is_evaluation])
    is_last = steps == last_steps[trainings]
    final = np.flatnonzero(is_last & has_value)
    finished, counts = np.unique(trainings[final], return_counts=True)
    scored = np.unique(examples[final])
    for training, count in zip(finished, counts, strict=True):
        if count < len(scored):
            missing = np.setdiff1d(scored, examples[final][trainings[final] == training])[0]
            raise ResultsError(
                f"{table.name}: {evaluations.describe_training(training)} has scores of {count:,} of the {len(scored):,} examples of other trainings "
                f"({evaluations.example_names[missing]} is missing); score every training on the same examples, at its last step"
            )
    shape = (len(finished), len(scored))
    scores = values[final].reshape(shape)
    weights = _read_weights(table, roles, evaluations, rows[final].reshape(shape))
    groups = _number_groups(table, roles, evaluations, rows[final].reshape(shape), stated_group)
    first_rows = rows[final].reshape(shape)[:, 0]
    details = {role: read_rows(table, roles, role)[first_rows] for role in ("std", "std_seeds", "train_value")}
    bounds = np.searchsorted(trainings, np.arange(len(evaluations.keys) + 1))
    outcomes: list[TrialOutcome] = []
    for training, (rank, rate, seed) in enumerate(evaluations.keys):
        length = int(evaluations.step_numbers[last_steps[training]])
        arm = Arm(rank=rank, learning_rate=rate, lora_alpha=1, seed=seed, steps=length)  # the alphas follow one rule
        fields = {"trial_id": arm.format_label(), **arm.model_dump()}
        index = int(np.searchsorted(finished, training))
        if index == len(finished) or finished[index] != training:
            outcomes.append(TrialFailed(**fields, error="error", reason="the table has no result for this training"))
            continue
        evaluated = slice(bounds[training], bounds[training + 1])
        points = zip(evaluations.step_numbers[steps[evaluated]].tolist(), values[evaluated].tolist(), strict=True)
        value = float(np.average(scores[index], weights=weights))
        stated = {role: float(numbers[index]) for role, numbers in details.items() if not np.isnan(numbers[index])}
        by_example = {} if "example" not in roles.columns else {
            "example_scores": scores[index].tolist(),
            "example_weights": None if weights is None else weights.tolist(),
            "example_groups": groups,
        }  # fmt: skip
        outcomes.append(
            TrialFinished(
                **fields,
                **by_example,
                value=value,
                metrics={roles.metric: value},
                train_value=stated.get("train_value"),
                points=[EvalPoint(step=int(step), value=value) for step, value in points if value == value]
                if length and not by_example
                else [],
                seed_deviation=stated.get("std"),
                averaged_seeds=int(stated.get("std_seeds", 1)) if "std" in stated else 1,
            )
        )
    is_unscored = is_last & ~has_value & np.isin(trainings, finished)
    unscored = [evaluations.example_names[example] for example in np.setdiff1d(examples[is_unscored], scored)]
    num_failed = len(evaluations.keys) - len(finished)
    omissions = (
        (num_repeated, "repeated row", "omitted"),
        (len(unscored), "example", f"without a score omitted ({format_names(unscored)})"),
        (num_failed, "training", "without a result"),
    )
    return outcomes, [_count(*omission) for omission in omissions if omission[0]]


def _find_distinct_rows(table: Table, roles: Roles, evaluations: Evaluations) -> tuple[Codes, int]:
    """Return one row for each training, step and example, in this order, and the number of repeated rows.

    Raises:
        ResultsError: two rows of one training, step and example have different values.
    """
    places = (evaluations.trainings * len(evaluations.step_numbers) + evaluations.steps) * len(
        evaluations.example_names
    )
    places += evaluations.examples
    order = np.lexsort((evaluations.values, places))  # NaN comes last
    places, values = places[order], evaluations.values[order]
    is_repeated = np.append(False, (places[1:] == places[:-1]) & ~np.isnan(values[1:]))
    conflicts = np.flatnonzero(is_repeated[1:] & (values[1:] != values[:-1]))
    if len(conflicts):
        first, second = sorted(order[conflicts[0] : conflicts[0] + 2])
        raise ResultsError(_format_conflict(table, roles, evaluations, int(first), int(second)))
    is_first = np.append(True, places[1:] != places[:-1])
    return order[is_first], int(is_repeated.sum())


def _format_conflict(table: Table, roles: Roles, evaluations: Evaluations, first: int, second: int) -> str:
    training = evaluations.describe_training(evaluations.trainings[second])
    unused = table.columns.keys() - roles.columns.values()
    differing = sorted(name for name in unused if table.get_cell(name, first) != table.get_cell(name, second))
    advice = (
        f"they also differ in {format_names(differing)}; keep the rows of one training for each rank, learning rate and seed"
        if differing
        else "add the column that distinguishes them (seed, lr, step or item), or remove one"
    )
    return f"{table.describe_row(second)}: {training} occurs twice with different values (also in {table.describe_row(first)}); {advice}"


def _require_equal_rows(
    table: Table, evaluations: Evaluations, rows: Codes, numbers: Floats | Codes, name: str
) -> None:
    """Raise if the numbers of the examples [trainings, examples] are not the same in every training."""
    different = np.argwhere(numbers != numbers[0])
    if len(different):
        training, example = different[0]
        row = rows[training, example]
        raise ResultsError(
            f"{table.describe_row(row)}: example {evaluations.example_names[evaluations.examples[row]]} has another {name} than in "
            f"{table.describe_row(rows[0, example])}; give each example the same {name} in every training"
        )


def _read_weights(table: Table, roles: Roles, evaluations: Evaluations, rows: Codes) -> Floats | None:
    """Return the weight of each example; None if all weigh the same."""
    if (name := roles.columns.get("weight")) is None:
        return None
    weights = read_rows(table, roles, "weight")[rows]
    missing = np.argwhere(~(weights > 0))
    if len(missing):
        raise ResultsError(
            f"{table.describe_row(rows[tuple(missing[0])])}: {name} is not above 0; give the weight of every scored example"
        )
    _require_equal_rows(table, evaluations, rows, weights, name)
    return weights[0] if len(weights) else None


def _number_groups(
    table: Table, roles: Roles, evaluations: Evaluations, rows: Codes, stated_group: str | None
) -> list[int] | None:
    """Return the number of each example's group; None if each example stands for itself."""
    if (name := roles.columns.get("group")) is None:
        return None
    groups = encode_texts(table, roles, "group")[1][rows] if "example" in roles.columns else np.zeros((0, 0))
    if groups.size:
        _require_equal_rows(table, evaluations, rows, groups, name)
        if 1 < len(np.unique(groups[0])) < groups.shape[1]:
            return [int(group) for group in groups[0]]
    if stated_group is not None:
        raise ResultsError(
            f"{table.name}: column {name} does not divide the examples into groups; name a column in which several examples share each value, "
            "or leave `group` out: examples are then treated as independent"
        )
    return None


def _require_comparable(finished: Sequence[TrialFinished], table_name: str) -> None:
    trainings = [trial for trial in finished if trial.rank > 0]
    first = trainings[0]
    is_equal = all((trial.value, trial.example_scores) == (first.value, first.example_scores) for trial in trainings)
    if is_equal and len(trainings) > 1:
        raise ResultsError(
            f"{table_name}: every training has the value {trainings[0].value:g}, so there is nothing to compare; give the held-out metric"
        )
    if len({trial.learning_rate > 0 for trial in trainings}) > 1:
        label = next(trial.trial_id for trial in trainings if trial.learning_rate == 0)
        raise ResultsError(
            f"{table_name}: {label} has no learning rate, but other trainings have one; add it, or leave the column out with --ignore"
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


def _require_one_unit(finished: Sequence[TrialFinished], metric: str, table_name: str) -> None:
    """Raise if some accuracies are fractions and others are percentages."""
    values = sorted(trial.value for trial in finished if trial.value)
    if values and (values[0] < 0 or values[-1] > 100 or (has_percentages(values) and values[0] <= 1)):
        raise ResultsError(
            f"{table_name}: {metric} is {values[0]:g} in one training and {values[-1]:g} in another; write all as fractions from 0 to 1, or all "
            "as percentages above 1"
        )
