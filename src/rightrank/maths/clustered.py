"""The mean of scores that share prompts and judges, with an interval over both, in closed form.

A score belongs to one prompt and one judge; both are drawn at random. The variance is that of the crossed model
(`maths.intervals`): the part of the prompts, plus that of the judges, less what both contain. The parts are cluster sums of residuals
(Cameron, Gelbach and Miller 2011, "Robust inference with multiway clustering"), which need no balanced table: judges may have read different
prompts. They estimate what a bootstrap that resamples prompts and judges shows (Owen 2007), and unlike it they hold for two or
three judges, by Satterthwaite's degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from rightrank.maths import Floats
from rightrank.maths.intervals import Estimate

ALL_ALIKE = 3 / 1.645  # rule of three, as a standard error times the number of prompts


def clustered_mean(scores: Sequence[float], prompts: Sequence[Hashable], judges: Sequence[Hashable]) -> Estimate:
    """The mean over judgements, its prompts as `examples` and its judges as `seeds`.

    With one judge the interval is over prompts alone. Where all scores are equal, nothing varies and the rule of three is used: the
    one-sided 95% bound lies 3/prompts away.

    Args:
        scores: [judgements] 1 for a win, 1/2 for a tie, 0 for a loss.
        prompts: [judgements] the prompt of each.
        judges: [judgements] the judge of each.
    """
    values = np.asarray(scores, dtype=np.float64)
    count = len(values)
    residuals = values - values.mean()
    by_prompt, by_judge = _sums(residuals, prompts), _sums(residuals, judges)
    by_both = _sums(residuals, list(zip(prompts, judges, strict=True)))
    of_prompts = _variance(by_prompt, count)
    if of_prompts == 0.0:
        of_prompts = (ALL_ALIKE / len(by_prompt)) ** 2
    of_judges = _variance(by_judge, count) if len(by_judge) > 1 else 0.0
    both = min(_variance(by_both, count), of_prompts, of_judges)
    spread = float(np.mean(by_prompt**2))
    skewness = float(np.mean(by_prompt**3)) / spread**1.5 if spread > 0 else 0.0
    judges_degrees = max(1.0, len(by_judge) - 1.0)
    return Estimate(
        float(values.mean()), of_prompts, of_judges, both, len(by_prompt), len(by_judge), judges_degrees, skewness
    )


def _sums(residuals: Floats, names: Sequence[Hashable]) -> Floats:
    places: dict[Hashable, int] = {}
    index = np.array([places.setdefault(name, len(places)) for name in names])
    sums: Floats = np.bincount(index, weights=residuals, minlength=len(places)).astype(np.float64)
    return sums


def _variance(sums: Floats, count: int) -> float:
    """Of the mean, from the sums of its clusters."""
    clusters = len(sums)
    return float((sums**2).sum()) / count**2 * clusters / max(1, clusters - 1)
