"""How many seeds a comparison of two ranks needs, from the noise over seeds of one training."""

from __future__ import annotations

import math

from rightrank.maths.intervals import normal_quantile

CONFIDENCE, POWER = 0.95, 0.8  # one-sided: of the test, and of a true difference to pass it
REACH = normal_quantile(CONFIDENCE) + normal_quantile(POWER)


def needed_seeds(deviation: float, difference: float) -> int:
    """Seeds of each rank with which a true difference is shown in four of five cases.

    n = 2 (z_.95 + z_.8)² (deviation / difference)², with `deviation` the standard deviation of one training over seeds, in
    the unit of `difference`. It counts no pairing over seeds, and measured on three seeds it is itself known to within a
    factor of two or so.
    """
    return max(1, math.ceil(2 * (REACH * deviation / difference) ** 2 - 1e-9))


def detectable_difference(deviation: float, seeds: int) -> float:
    """The smallest difference that so many seeds of each rank show in four of five cases."""
    return REACH * deviation * math.sqrt(2 / seeds)
