"""The joint distribution of the ranks' true means given the measured ones, for statements about several ranks at once.

The prior is flat. The noise is a multivariate t, drawn from a fixed seed of its own. Its covariance has the variances of all paired
differences. The level that all ranks share cancels in every difference and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rightrank.decision.seeds import sample_multivariate_noise
from rightrank.schema.trials import Floats

DRAWS = 10_000  # a probability is known to .005


@dataclass(frozen=True, slots=True)
class JointMeans:
    """Draws of the oriented means: lower is better. The base model, if present, is rank 0 and never counts as the best."""

    ranks: tuple[int, ...]
    means: Floats  # [ranks]
    noise: Floats  # [ranks, draws] of the means
    errors: Floats  # [ranks, ranks] standard errors of the differences
    degrees: float

    @property
    def _rivals(self) -> list[int]:
        """Return the indices of the ranks that can be the best."""
        return [index for index, rank in enumerate(self.ranks) if rank > 0]

    def compute_losses_to_best(self, noise: float = 1.0) -> Floats:
        """Return [ranks, draws] how much worse each rank truly is than the best, with the noise scaled by `noise`."""
        true = self.means[:, None] + noise * self.noise
        worse: Floats = true - true[self._rivals].min(axis=0)
        return worse

    def find_indistinguishable_ranks(self, confidence: float) -> list[int]:
        """Return the ranks that are not shown to be worse than the best, in ascending order.

        A rank that equals the best is excluded with the remaining probability, although the best is the best of several: its difference
        is compared with that of equal ranks (Gupta 1965, "On some multiple decision (selection and ranking) rules", Technometrics
        7). The clearest rank is tested first, and an excluded rank is no rival to the next.
        """
        rivals = self._rivals
        best = min(rivals, key=lambda index: (self.means[index], self.ranks[index]))
        differences = self.means - self.means[best]
        for index in sorted(
            rivals, key=lambda index: differences[index] / (self.errors[index, best] or 1.0), reverse=True
        ):
            equal_differences = self.noise[index] - self.noise[rivals].min(axis=0)
            if differences[index] <= np.quantile(equal_differences, confidence):
                break
            rivals.remove(index)
        return sorted(self.ranks[index] for index in rivals)

    def get_standard_error(self, rank: int, other_rank: int) -> float:
        """Return the standard error of the difference of two ranks."""
        return float(self.errors[self.ranks.index(rank), self.ranks.index(other_rank)])


def sample_joint_means(ranks: Sequence[int], means: Sequence[float], variances: Floats, degrees: float) -> JointMeans:
    """Draw the joint distribution of the true means, each minus that of the first rank.

    Ranks are in order from best to worst, so that a worse one changes no draw of the others.

    Args:
        variances: [ranks, ranks] of each paired difference. If no covariance has all of them, some of them become larger.
        degrees: the degrees of freedom of the variances.
    """
    covariance = (variances[0] + variances[:, :1] - variances) / 2
    noise = sample_multivariate_noise(covariance, degrees, DRAWS)
    return JointMeans(tuple(ranks), np.array(means), noise, np.sqrt(variances), degrees)
