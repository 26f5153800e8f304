"""The joint distribution of the ranks' true means, given the measured ones: what a statement about several ranks at once rests on.

Every mean is as likely before. The noise is a multivariate t, drawn from a fixed seed of its own. Its covariance has the variances of all paired
differences; the level that all ranks share is in no difference, and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rightrank.decision.seeds import multivariate_noise
from rightrank.schema.trials import Floats

DRAWS = 10_000  # a probability is known to .005


@dataclass(frozen=True, slots=True)
class JointMeans:
    """Oriented means: lower is better. The base, where there is one, is rank 0 and no rival to the others."""

    ranks: tuple[int, ...]
    means: Floats  # [ranks]
    noise: Floats  # [ranks, draws] of the means
    errors: Floats  # [ranks, ranks] standard errors of the differences
    degrees: float

    @property
    def _rivals(self) -> list[int]:
        """The places of the ranks that can be the best."""
        return [place for place, rank in enumerate(self.ranks) if rank > 0]

    def worse_than_best(self, noise: float = 1.0) -> Floats:
        """[ranks, draws] how much worse each rank truly is than the best, with the noise scaled by `noise`."""
        true = self.means[:, None] + noise * self.noise
        worse: Floats = true - true[self._rivals].min(axis=0)
        return worse

    def alike(self, confidence: float) -> list[int]:
        """The ranks that are not shown to be worse than the best, ascending.

        A rank that is as good as the best is left out with the remaining probability, although the best is the best of several: how much worse it
        looks is compared with how much worse equal ranks look (Gupta 1965, "On some multiple decision (selection and ranking) rules", Technometrics
        7). The clearest rank comes first, and one that is left out is no rival to the next.
        """
        race = self._rivals
        best = min(race, key=lambda place: (self.means[place], self.ranks[place]))
        worse = self.means - self.means[best]
        for place in sorted(race, key=lambda place: worse[place] / (self.errors[place, best] or 1.0), reverse=True):
            equal = self.noise[place] - self.noise[race].min(axis=0)
            if worse[place] <= np.quantile(equal, confidence):
                break
            race.remove(place)
        return sorted(self.ranks[place] for place in race)

    def error(self, rank: int, other: int) -> float:
        """The standard error of the difference of two ranks."""
        return float(self.errors[self.ranks.index(rank), self.ranks.index(other)])


def sample_joint_means(ranks: Sequence[int], means: Sequence[float], variances: Floats, degrees: float) -> JointMeans:
    """Draw the joint distribution of the true means, each less that of the first rank.

    The ranks come the best first: a worse one then changes no draw of the others.

    Args:
        variances: [ranks, ranks] of each paired difference. Where no covariance has all of them, it has some larger ones.
        degrees: of freedom, with which the variances are known.
    """
    covariance = (variances[0] + variances[:, :1] - variances) / 2
    noise = multivariate_noise(covariance, degrees, DRAWS)
    return JointMeans(tuple(ranks), np.array(means), noise, np.sqrt(variances), degrees)
