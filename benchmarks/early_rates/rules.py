"""Define the rules of the study as functions of one grid's validation losses: which learning rate to finish, and which evaluation to hand over."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from benchmarks.early_rates.grids import ALL, BASELINE, RATES, TOP, Grid
from rightrank.schema.settings import EVAL_SUBSET_SIZE

DIVERGED = 65535
ENDS = (0.25, 0.5, 0.75, 1.0)
Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Key: TypeAlias = tuple[str, int, float, float]  # kind, rank, learning rate, share of the steps


@dataclass(frozen=True)
class GridTable:
    """The losses of a grid by adapter: validation losses of each example, and mean test losses."""

    grid: Grid
    losses: Mapping[Key, Floats]  # summed over the label tokens of each validation example
    weights: Floats
    test: Mapping[Key, float]
    base_test: float
    test_losses: Mapping[Key, Floats]
    test_weights: Floats
    classes: bool  # whether the task is a classification
    examples: int = EVAL_SUBSET_SIZE  # validation examples that an evaluation during a training scores

    def measure(self, key: Key) -> float:
        """Return the mean validation loss per label; infinite where the training diverged or is missing."""
        if key not in self.losses:
            return math.inf
        return float(self.losses[key][: self.examples].sum() / self.weights[: self.examples].sum())

    def measure_error(self, key: Key, other: Key) -> float:
        """Return the standard error of the paired difference of two adapters."""
        difference = (self.losses[key] - self.losses[other])[: self.examples] / self.weights[: self.examples].mean()
        return float(difference.std(ddof=1) / math.sqrt(len(difference)))


def read_table(path: Path) -> GridTable:
    with np.load(path) as arrays:
        records, weights = json.loads(str(arrays["records"])), arrays["weights_validation"].astype(float)
        validation, tests = arrays["validation"], iter(arrays["test"])
        test_weights = arrays["weights_test"].astype(float)
    losses, test_losses, base_test = {}, {}, math.nan
    for record, thousandths in zip(records, validation, strict=True):
        key = record["kind"], record["rank"], record["rate"], record["fraction"]
        on_test = next(tests) if record["test"] else None
        if not (thousandths == DIVERGED).any():
            losses[key] = thousandths / 1000
        if on_test is not None and not (on_test == DIVERGED).any():
            test_losses[key] = on_test / 1000
    classes = any(record["kind"] == "head" for record in records)
    test = {key: float(values.sum() / test_weights.sum()) for key, values in test_losses.items()}
    base_test = test[("base", 0, 0.0, 0.0)]
    return GridTable(ALL[path.stem], losses, weights, test, base_test, test_losses, test_weights, classes)


# A rule for the learning rate receives the values to rank, by learning rate, and returns the rates' order of preference.
ChooseRate: TypeAlias = Callable[[GridTable, Mapping[float, Key]], float]


def choose_best(table: GridTable, keys: Mapping[float, Key]) -> float:
    return min(keys, key=lambda rate: (table.measure(keys[rate]), rate))


def choose_lower(table: GridTable, keys: Mapping[float, Key], errors: float = 1.0) -> float:
    """Choose the next lower rate where it is within so many standard errors of the best one."""
    best = choose_best(table, keys)
    lower = max((rate for rate in keys if rate < best), default=None)
    return lower if lower is not None and is_close(table, keys[lower], keys[best], errors) else best


def choose_higher(table: GridTable, keys: Mapping[float, Key], errors: float = 2.0) -> float:
    """Choose the next higher rate where it is within so many standard errors of the best one."""
    best = choose_best(table, keys)
    higher = min((rate for rate in keys if rate > best), default=None)
    return higher if higher is not None and is_close(table, keys[higher], keys[best], errors) else best


def choose_shifted(table: GridTable, keys: Mapping[float, Key], shift: float = 0.1) -> float:
    """Fit a parabola in log rate through the best rate and its neighbours, shift its minimum up, and choose the nearest rate."""
    rates = sorted(rate for rate in keys if math.isfinite(table.measure(keys[rate])))
    best = choose_best(table, keys)
    index = min(max(rates.index(best), 1), len(rates) - 2)
    if len(rates) < 3:
        return best
    x = np.log10(rates[index - 1 : index + 2])
    curvature, slope, _ = np.polyfit(x, [table.measure(keys[rate]) for rate in rates[index - 1 : index + 2]], 2)
    vertex = float(np.clip(-slope / (2 * curvature), x[0], x[-1])) if curvature > 0 else math.log10(best)
    return min(rates, key=lambda rate: abs(math.log10(rate) - vertex - shift))


def is_close(table: GridTable, key: Key, best: Key, errors: float) -> bool:
    if key not in table.losses:
        return False
    return table.measure(key) - table.measure(best) <= errors * table.measure_error(key, best)


CHOICES: dict[str, ChooseRate] = {
    "best": choose_best,
    "lower within 1 se": choose_lower,
    "higher within 1 se": lambda table, keys: choose_higher(table, keys, 1.0),
    "higher within 2 se": choose_higher,
    "parabola, shifted by .1": choose_shifted,
}


def list_keys(table: GridTable, kind: str, rank: int, fraction: float, rates: Sequence[float] = RATES) -> dict[float, Key]:  # fmt: skip
    """Return the keys of the values that rank the rates; `current or mean` takes the better one of each rate."""
    if kind == "current or mean":
        pairs = {rate: [(name, rank, rate, fraction) for name in ("current", "mean")] for rate in rates}
        return {rate: min(pair, key=table.measure) for rate, pair in pairs.items()}
    return {rate: (kind, rank, rate, fraction) for rate in rates}


def hand_over_last(table: GridTable, rank: int, rate: float) -> Key:
    return ("current", rank, rate, 1.0)


def hand_over_best(table: GridTable, rank: int, rate: float, kinds: Sequence[str] = ("current",), errors: float = 0.0) -> Key:  # fmt: skip
    """Return the best evaluation from a quarter on; the last one unless an earlier one is better by so many standard errors."""
    last = hand_over_last(table, rank, rate)
    candidates = [(kind, rank, rate, fraction) for kind in kinds for fraction in ENDS]
    best = min(candidates, key=lambda key: (table.measure(key), -key[3]))
    if best == last or last not in table.losses:
        return best
    is_better = table.measure(last) - table.measure(best) > errors * table.measure_error(last, best)
    return best if is_better else last


def hand_over_stopped(table: GridTable, rank: int, rate: float, errors: float = 0.0) -> Key:
    """Return the evaluation before the first one at which the current loss rises by so many standard errors."""
    previous: Key = ("current", rank, rate, ENDS[0])
    for fraction in ENDS[1:]:
        key: Key = ("current", rank, rate, fraction)
        if key not in table.losses or table.measure(key) - table.measure(previous) > errors * table.measure_error(key, previous):  # fmt: skip
            return previous
        previous = key
    return previous


HandOver: TypeAlias = Callable[[GridTable, int, float], Key]
HANDOVERS: dict[str, HandOver] = {
    "last": hand_over_last,
    "best": hand_over_best,
    "best beyond 2 se": lambda table, rank, rate: hand_over_best(table, rank, rate, errors=2.0),
    "best or best mean": lambda table, rank, rate: hand_over_best(table, rank, rate, ("current", "mean")),
    "best mean beyond 2 se": lambda table, rank, rate: hand_over_best(table, rank, rate, ("current", "mean"), 2.0),
    "stop at a rise": hand_over_stopped,
    "stop at a rise beyond 2 se": lambda table, rank, rate: hand_over_stopped(table, rank, rate, 2.0),
}


def tune_by_whole_trainings(table: GridTable, rank: int, hand_over: HandOver) -> Key:
    """Return what four whole trainings hand over: the best by validation loss."""
    return min((hand_over(table, rank, rate) for rate in RATES), key=table.measure)


def choose_as_before(table: GridTable) -> Key:
    """Return what the rule of before this study hands over: the lower rate within one standard error at a quarter, with the check of a rise."""
    rate = choose_lower(table, list_keys(table, "current", TOP, 0.25))
    lower = max((other for other in RATES if other < rate), default=None)
    half = "current", TOP, rate, 0.5
    if table.measure(half) > table.measure(("current", TOP, rate, 0.25)) and lower is not None:
        rate = lower if table.measure(("current", TOP, lower, 0.5)) < table.measure(half) else rate
    return hand_over_last(table, TOP, rate)


def tune_baseline(table: GridTable, hand_over: HandOver) -> Key:
    return tune_by_whole_trainings(table, BASELINE, hand_over)


# The locked rule: the mean of the factors over the last quarter of the steps taken ranks the rates at a quarter of the training, and the best
# evaluation of the current factors or of their mean since the warm-up is handed over.
RULE_KIND, RULE_HANDOVER = "mean 25%", HANDOVERS["best or best mean"]


def choose_by_rule(table: GridTable, fraction: float = 0.25) -> float:
    return choose_best(table, list_keys(table, RULE_KIND, TOP, fraction))
