"""Loss as a curve over ranks: a power law and its rivals, compared by cross-validation.

The power law is L(r) = a + b·r^-c with b ≥ 0 and c between 0.1 and 2. The rivals are a constant, the best non-increasing
step function (isotonic regression, Ayer et al. 1955) and a parabola in log2 r. Each predicts one rank from the others in
turn. Losses are oriented: lower is better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from rightrank.schema.arrays import Floats

CurveForm: TypeAlias = Literal["power", "constant", "monotone", "u_shaped"]

# The prior of the exponent, for curves of few ranks, from 26 published curves: median 0.57, quartiles 0.38 and 0.64. It is
# twice as wide as they are, so that data soon overrule it.
TYPICAL_EXPONENT, EXPONENT_WIDTH = 0.57, 0.8  # the width is a standard deviation of log c
EXPONENTS: Floats = np.geomspace(0.1, 2.0, 61)
HUBER = 1.5  # larger residuals, in standard errors, get less weight
ROUNDS = 6
PREFERENCE = 0.8  # a rival is chosen only below this share of the power law's prediction error


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """a + b·r^-c, elementwise over draws: each field is [draws]."""

    a: Floats
    b: Floats
    c: Floats

    def at(self, ranks: Floats) -> Floats:
        """[draws, ranks]"""
        law: Floats = self.a[:, None] + self.b[:, None] * ranks[None, :] ** -self.c[:, None]
        return law


def fit_power(ranks: Floats, losses: Floats, deviations: Floats) -> PowerLaw:
    """The power law of each row of `losses` [draws, ranks]; `deviations` [ranks] are standard errors above 0.

    For each exponent of a grid, a and b follow by weighted least squares with b ≥ 0. The exponent minimises χ² plus the
    penalty of its prior.
    """
    scale = float((deviations**-2.0).sum())
    weights = deviations**-2.0 / scale
    shapes = ranks[None, :] ** -EXPONENTS[:, None]  # [exponents, ranks]
    centred = shapes - (shapes @ weights)[:, None]
    level = losses @ weights
    slopes = (losses * weights) @ centred.T / ((centred**2) @ weights)  # [draws, exponents]
    slopes = np.maximum(slopes, 0.0)
    total = ((losses - level[:, None]) ** 2) @ weights
    explained = slopes * (2 * ((losses * weights) @ centred.T) - slopes * ((centred**2) @ weights))
    penalty = (np.log(EXPONENTS / TYPICAL_EXPONENT) / EXPONENT_WIDTH) ** 2
    cost = scale * np.maximum(total[:, None] - explained, 0.0) + penalty
    best = np.argmin(cost, axis=1)
    rows = np.arange(len(losses))
    b = slopes[rows, best]
    a = level - b * (shapes @ weights)[best]
    return PowerLaw(a, b, EXPONENTS[best])


def robust_deviations(ranks: Floats, losses: Floats, deviations: Floats) -> Floats:
    """The standard errors, increased for outliers (Huber's weights), and for all ranks if the law fits worse than they imply."""
    widened = deviations
    spread = 1.0
    for _ in range(ROUNDS if len(ranks) > 3 else 0):
        residuals = np.abs(losses - fit_power(ranks, losses[None, :], widened).at(ranks)[0])
        spread = max(1.0, float(np.median(residuals / deviations)) / 0.6745)
        widened = deviations * np.sqrt(np.maximum(1.0, residuals / (HUBER * spread * deviations)))
    return widened * spread


def predict(form: CurveForm, ranks: Floats, losses: Floats, deviations: Floats, at: Floats) -> Floats:
    """[draws, at] the predictions of the form, fitted to each row of `losses` [draws, ranks]."""
    if form == "power":
        return fit_power(ranks, losses, deviations).at(at)
    weights = 1 / deviations**2
    if form == "constant":
        return np.repeat(losses @ (weights / weights.sum()), len(at)).reshape(len(losses), len(at))
    places, wanted = np.log2(ranks), np.log2(at)
    if form == "monotone":
        steps = np.stack([falling_steps(row, weights) for row in losses])
        return np.stack([np.interp(wanted, places, row) for row in steps])
    design = np.stack([np.ones_like(places), places, places**2], axis=1)
    root = np.sqrt(weights)
    solution = np.linalg.lstsq(design * root[:, None], (losses * root).T, rcond=None)[0]
    parabola: Floats = (np.stack([np.ones_like(wanted), wanted, wanted**2], axis=1) @ solution).T
    return parabola


def falling_steps(losses: Floats, weights: Floats) -> Floats:
    """The nearest non-increasing sequence by weighted least squares (pool adjacent violators)."""
    blocks: list[list[float]] = []  # value, weight, length
    for loss, weight in zip(losses.tolist(), weights.tolist(), strict=True):
        blocks.append([loss, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            right, left = blocks.pop(), blocks.pop()
            whole = left[1] + right[1]
            blocks.append([(left[0] * left[1] + right[0] * right[1]) / whole, whole, left[2] + right[2]])
    return np.repeat([block[0] for block in blocks], [int(block[2]) for block in blocks])


def prediction_errors(ranks: Floats, losses: Floats, deviations: Floats) -> dict[CurveForm, float]:
    """The mean absolute leave-one-out error of each form; without the forms that need more ranks."""
    needs: dict[CurveForm, int] = {"power": 3, "constant": 3, "monotone": 4, "u_shaped": 5}
    errors: dict[CurveForm, float] = {}
    for form, minimum in needs.items():
        if len(ranks) < minimum:
            continue
        misses = []
        for out in range(len(ranks)):
            keep = np.arange(len(ranks)) != out
            guess = predict(form, ranks[keep], losses[None, keep], deviations[keep], ranks[out : out + 1])
            misses.append(abs(float(guess[0, 0]) - float(losses[out])))
        errors[form] = float(np.mean(misses))
    return errors


def choose_form(errors: dict[CurveForm, float]) -> CurveForm:
    """The form with the lowest error; the power law unless a rival is clearly better."""
    rival = min(errors, key=lambda form: errors[form])
    return rival if errors[rival] < PREFERENCE * errors["power"] else "power"


def margin_ranks(grid: Floats, curves: Floats, margin: float) -> Floats:
    """[draws] the smallest rank between which and its lowest point each curve [draws, grid] stays within the margin."""
    lowest = np.argmin(curves, axis=1)
    outside = curves - curves.min(axis=1, keepdims=True) > margin
    outside &= np.arange(len(grid))[None, :] < lowest[:, None]
    last_outside = np.where(outside.any(axis=1), len(grid) - 1 - np.argmax(outside[:, ::-1], axis=1), -1)
    meets: Floats = grid[np.minimum(last_outside + 1, len(grid) - 1)]
    return meets


def diminishing_rank(law: PowerLaw, margin: float) -> Floats:
    """[draws] the rank above which a doubling gains less than the margin: (b·(1 - 2^-c) / margin)^(1/c), at least 1."""
    gain = law.b * (1 - 2.0**-law.c)
    with np.errstate(over="ignore"):  # for a tiny margin no rank is large enough
        return np.maximum(1.0, np.maximum(gain / margin, 1e-12) ** (1 / law.c))
