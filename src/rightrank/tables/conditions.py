"""Require that the trainings of a table differ in nothing but what is compared: rank, learning rate, seed, step, example and metric."""

from __future__ import annotations

import numpy as np

from rightrank.schema.errors import ResultsError, quote_value
from rightrank.tables.columns import Table, format_names
from rightrank.tables.numbers import Evaluations, read_rows
from rightrank.tables.roles import Roles, infer_column_direction, is_label, is_setting


def require_same_conditions(table: Table, roles: Roles, evaluations: Evaluations) -> list[str]:
    """Return notes on the numbers that differ between the trainings.

    Raises:
        ResultsError: texts or settings of adapters differ, or alphas that are not proportional to the rank.
    """
    alpha = roles.columns.get("alpha")
    others = sorted(table.columns.keys() - (set(roles.columns.values()) - {alpha}))
    refused, numeric, notes = [], [], []
    for name in [name for name in others if not is_label(name) and _is_different(table, name, evaluations)]:
        if name == alpha:
            ratios = set(np.round(_compute_alpha_ratios(table, roles, evaluations), 9).tolist())
            if len(ratios) == 1:
                notes.append(f"{name} is {ratios.pop():g} times the rank")
                continue
        if name == alpha or name in table.settings or None in table.parse_numbers(name):
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
    texts = table.columns[name].list_texts()
    codes_by_text = {text: code for code, text in enumerate(dict.fromkeys(texts))}
    codes = np.array([codes_by_text[text] for text in texts])[table.columns[name].codes]
    has_value, is_base = ~np.isnan(evaluations.values), evaluations.ranks == 0
    trained, base = codes[has_value & ~is_base], codes[has_value & is_base]
    distinct = np.unique(trained)
    if len(distinct) < 2:
        return not np.isin(base, [*distinct, codes_by_text.get("", -1)]).all()
    places = evaluations.steps * len(evaluations.example_names) + evaluations.examples
    trainings, places = (ids[has_value & ~is_base] for ids in (evaluations.trainings, places))
    places = np.unique(places, return_inverse=True)[1]

    def count_pairs(ids: np.ndarray) -> int:
        return len(np.unique(ids * len(texts) + trained))

    num_trainings, num_places = len(np.unique(trainings)), int(places.max()) + 1
    return count_pairs(trainings) != num_trainings * len(distinct) or count_pairs(places) != num_places


def _compute_alpha_ratios(table: Table, roles: Roles, evaluations: Evaluations) -> np.ndarray:
    is_compared = ~np.isnan(evaluations.values) & (evaluations.ranks > 0)
    return read_rows(table, roles, "alpha")[is_compared] / evaluations.ranks[is_compared]


def _format_refusal(table: Table, names: list[str], alpha: str | None) -> str:
    differences = []
    for name in names:
        texts = sorted(set(table.columns[name].list_texts()))
        shown = ", ".join(quote_value(text, 40) for text in texts[:2]) + ", …" * (len(texts) > 2)
        rule = "; neither equal nor proportional to the rank" if name == alpha else ""
        differences.append(f"{name} ({shown}{rule})")
    ignored = " ".join(f"--ignore {name!r}" if " " in name else f"--ignore {name}" for name in names)
    return (
        f"{table.name}: the trainings differ in {format_names(differences)}, so they cannot be compared; keep the rows with one value "
        f"(--where {names[0]}=VALUE), or say that the difference does not matter ({ignored})"
    )
