"""Convert the rows of a result table to checked numbers, and require that its trainings differ in nothing but what is compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rightrank.schema.errors import MAX_EXACT_INTEGER, ResultsError, quote_value
from rightrank.schema.trials import Floats
from rightrank.tables.columns import Codes, Table, format_cell, format_names, is_blank
from rightrank.tables.roles import Roles, infer_column_direction, is_label, is_setting

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
            f"{_suggest_notation(str(cell).strip())}"
        )
    return numbers[column.codes]


def _is_integer(cell: Any) -> bool:
    """Return whether a cell is blank or a whole number. Texts such as `1,000` and `1.000` are a thousand in some countries."""
    if isinstance(cell, str):
        return is_blank(cell) or cell.strip().removesuffix(".0").isdecimal()
    return is_blank(cell) or float(cell).is_integer()


def _suggest_notation(text: str) -> str:
    if text.endswith("%"):
        return "; write it without the percent sign, in every row alike"
    if text.lower() in ("true", "false"):
        return "; write 1 and 0 where a right answer counts"
    return "; write it with a decimal point, and thousands without a comma" if "," in text else ""


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
            ratios = read_rows(table, roles, "alpha")[is_compared] / evaluations.ranks[is_compared]
            if len(set(np.round(ratios, 9).tolist())) == 1:
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
