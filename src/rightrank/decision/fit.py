"""The fitted curve over ranks: where it reaches the margin, and the gain that larger ranks still promise."""

from __future__ import annotations

import numpy as np

from rightrank.decision.comparison import is_within, walk_down
from rightrank.decision.curve import (
    CurveForm,
    PowerLaw,
    choose_form,
    diminishing_rank,
    fit_power,
    margin_ranks,
    predict,
    prediction_errors,
    robust_deviations,
)
from rightrank.decision.evidence import Comparison, Evidence, Unit
from rightrank.decision.intervals import two_sided
from rightrank.decision.verdicts import shown_rank
from rightrank.schema.arrays import Floats
from rightrank.schema.decision import CurveFit, FittedPoint

MIN_RANKS = 3
DRAWS = 400
DRAWN_POINTS = 33
GRID_POINTS = 257
MAX_DIMINISHING_RANK = 2.0**20  # a larger rank of diminishing returns is not reported


def fit_curve(found: Comparison, unit: Unit) -> CurveFit | None:
    """The fit with its intervals; None below `MIN_RANKS` ranks.

    The decision's evidence comes before the fit: `r_margin` lies above every rank that is measured to be worse than the margin and not
    above one that is measured to be within it, and its interval holds no rank that was refuted and none above one shown to be enough.
    """
    evidence, margin = found.evidence, found.margin
    contenders = [evidence.contenders[rank] for rank in sorted(evidence.contenders)]
    if len(contenders) < MIN_RANKS:
        return None
    ranks = np.array([float(contender.rank) for contender in contenders])
    losses = np.array([contender.fair_loss for contender in contenders])
    measured = _rank_deviations(evidence)
    deviations = robust_deviations(ranks, losses, measured)
    errors = prediction_errors(ranks, losses, deviations)
    form = choose_form(errors)
    draws = np.vstack([losses, losses + _noise(evidence, deviations / measured)])  # the first row is the fit itself
    grid = np.geomspace(ranks[0], ranks[-1], GRID_POINTS)
    law = fit_power(ranks, draws, deviations)
    meets = margin_ranks(grid, predict(form, ranks, draws, deviations, grid), margin)
    r_margin, lows, highs = _within_evidence(float(meets[0]), meets[1:], found)
    gain = law.b * ranks[-1] ** -law.c
    doubling = gain * (1 - 2.0**-law.c)
    come_low, come_high = np.quantile(gain[1:], two_sided(0.95))
    diminishing = float(diminishing_rank(law, margin)[0])
    power_like = form in ("power", "monotone")
    return CurveFit(
        form=form,
        prediction_error={name: unit.difference(error) for name, error in errors.items()},
        **_parameters(law, unit),
        points=_points(form, ranks, draws, deviations, unit),
        r_margin=r_margin,
        r_margin_low=lows,
        r_margin_high=highs,
        diminishing_rank=diminishing if power_like and diminishing < MAX_DIMINISHING_RANK else None,
        next_doubling_gain=unit.difference(float(doubling[0])) if power_like else 0.0,
        gain_to_come=unit.difference(float(gain[0])) if power_like else 0.0,
        gain_to_come_low=unit.difference(float(come_low)) if power_like else 0.0,
        gain_to_come_high=unit.difference(float(come_high)),
    )


def _within_evidence(fitted: float, draws: Floats, found: Comparison) -> tuple[float, float, float]:
    """Where the curve meets the margin, with its 95% interval from draws, as far as the measured ranks leave it open."""
    reference = found.reference.rank
    measured = walk_down(
        found.ranks, reference, lambda rank: is_within(found.by_rank[rank].difference.mean, found.margin)
    )
    below = max((rank for rank in found.ranks if rank < measured), default=0)
    refuted = max((rank for rank in found.ranks if rank < reference and found.is_worse(rank)), default=0)
    meets = min(max(fitted, below + 1.0), float(measured))
    low, high = (float(end) for end in np.quantile(draws, two_sided(0.95)))
    return meets, min(max(low, refuted + 1.0), meets), max(min(high, float(shown_rank(found) or high)), meets)


def _noise(evidence: Evidence, widened: Floats) -> Floats:
    """[draws, ranks] of the noise of the means, with their covariance; `widened` [ranks] scales the deviations.

    A multivariate t: variances that few seeds measured are themselves uncertain.
    """
    generator = np.random.default_rng(0x5EED)
    covariance = evidence.covariance * np.outer(widened, widened)
    noise = generator.multivariate_normal(np.zeros(len(widened)), covariance, size=DRAWS, method="eigh")
    others = [one for one in evidence.contenders.values() if one is not evidence.reference]
    degrees = float(np.median([evidence.difference(contender).degrees for contender in others]))
    noise /= np.sqrt(generator.chisquare(degrees, size=DRAWS) / degrees)[:, None]
    return noise


def _rank_deviations(evidence: Evidence) -> Floats:
    """[ranks] the standard error of each rank's mean, without the part that all ranks share.

    A paired difference has the variance of two ranks, so each gets half of it.
    """
    variances = {
        rank: evidence.difference(contender).variance / 2
        for rank, contender in evidence.contenders.items()
        if rank != evidence.reference.rank
    }
    variances[evidence.reference.rank] = float(np.mean(list(variances.values())))
    level = abs(evidence.reference.loss)
    found = np.sqrt([variances[rank] for rank in sorted(variances)])
    return np.maximum(found, max(1e-6 * level, 1e-9))


def _parameters(law: PowerLaw, unit: Unit) -> dict[str, float]:
    """The parameters of value(r) = a + b·r^-c in the metric's direction; for a perplexity, of its logarithm."""
    sign = 1.0 if unit.value(2.0) > unit.value(1.0) else -1.0
    return {"a": sign * float(law.a[0]), "b": sign * float(law.b[0]), "c": float(law.c[0])}


def _points(form: CurveForm, ranks: Floats, draws: Floats, deviations: Floats, unit: Unit) -> list[FittedPoint]:
    at = np.geomspace(ranks[0], ranks[-1], DRAWN_POINTS)
    curves = predict(form, ranks, draws, deviations, at)
    bands = np.quantile(curves[1:], two_sided(0.95), axis=0)
    points = []
    for column, rank in enumerate(at.tolist()):
        ends = sorted(unit.value(float(end)) for end in bands[:, column])
        points.append(FittedPoint(rank=rank, value=unit.value(float(curves[0, column])), low=ends[0], high=ends[1]))
    return points
