"""The walk over learning rates: where it starts, and which rate is next. Both are pure functions.

The start was chosen on a public sweep of 35 models with 1 to 1,000 billion parameters and on 42 grids of models with 17 to 270 million
(benchmarks/learning_rate/starts.md). Nothing was fitted: the two pairs share .001, and a start that is one step off costs a quarter of a
training. What the parameters do not tell (alpha, the batch, the number of adapted layers, repeated rows), the walk finds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# The rates that a walk may train, a factor of about 3 apart. No published sweep has a best rate outside.
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MANY_PARAMETERS = 10**9
SMALL_START = (1e-3, 3e-3)
LARGE_START = (3e-4, 1e-3)


def choose_start_rates(num_parameters: int | None) -> tuple[float, float]:
    """Return the two neighbouring learning rates at which the walk starts.

    Args:
        num_parameters: of the base model, all experts included; None if unknown.
    """
    if num_parameters is not None and num_parameters < MANY_PARAMETERS:
        return SMALL_START
    return LARGE_START


def find_next_rate(losses: Mapping[float, float], rates: Sequence[float]) -> float | None:
    """Return the rate to train next: the one beside the best that has no loss yet. None if the walk has ended.

    The walk ends at a rate that is better than both of its neighbours, or at an end of `rates`. Of equal rates the lower one is better, so if
    both first rates diverged, the next one is below them.

    Args:
        losses: the losses so far, by rate; infinite where the training diverged. At least one.
        rates: the rates that may be trained, ascending, those of `losses` among them.
    """
    index = rates.index(choose_best_rate(losses))
    neighbours = [*rates[max(0, index - 1) : index], *rates[index + 1 : index + 2]]
    return next((rate for rate in neighbours if rate not in losses), None)


def choose_best_rate(losses: Mapping[float, float]) -> float:
    """Return the rate with the lowest loss, the lower one of equal rates."""
    return min(losses, key=lambda rate: (losses[rate], rate))
