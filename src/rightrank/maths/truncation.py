"""A trained update at a lower rank: the best approximation, measured where the loss sees it.

An adapter adds ΔW = s·B·A, B [d, r] and A [r, k]. To second order, and with the inputs x [k] and the output gradients
g [d] of a module taken as independent (K-FAC, Martens and Grosse 2015), an error E in ΔW costs

    ½·tr(G·E·C·Eᵀ),    C = E[x·xᵀ] [k, k],    G = E[g·gᵀ] [d, d].

An error of the form s·B·M·A sees C and G only through the r × r matrices E[h·hᵀ] with h = A·x, and E[δ·δᵀ] with
δ = s·Bᵀ·g, the gradient of the loss to h. Those are all that has to be gathered: 2·r² numbers for a module of any size.
With L·Lᵀ = E[δ·δᵀ] and R·Rᵀ = E[h·hᵀ], the best M of rank n truncates the SVD of Lᵀ·R. Without moments, C and G are
identities and the result is the truncated SVD of ΔW (Eckart and Young 1936). All arithmetic is in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from rightrank.maths import Floats

Weighting: TypeAlias = Literal["none", "inputs", "both"]

DAMPING = 0.01  # share of the identity in each metric: directions that few tokens have shown keep some weight
INVISIBLE = 1e-12  # of the largest eigenvalue: below it a direction changes nothing


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments of a module in the coordinates of its adapter."""

    inputs: Floats  # [r, r], E[h·hᵀ] over the positions that carry a gradient
    gradients: Floats  # [r, r], Σ δ·δᵀ over positions, per label of the batches


@dataclass(frozen=True, slots=True)
class Components:
    """B·A as a sum of rank-one parts in falling order of what leaving them out costs; the first n are the best n."""

    b: Floats  # [d, q]
    a: Floats  # [q, k]
    costs: Floats  # [q], the K-FAC estimate of the loss, nats a label; ½·σ² of ΔW without moments

    def leading(self, rank: int) -> tuple[Floats, Floats]:
        """`(B' [d, n], A' [n, k])` with n = min(rank, q)."""
        return self.b[:, :rank], self.a[:rank]


def components(
    b: Floats,
    a: Floats,
    scale: float,
    moments: Moments | None = None,
    weighting: Weighting = "both",
    damping: float = DAMPING,
) -> Components:
    """The parts of B·A.

    Args:
        b: [d, r].
        a: [r, k].
        scale: s, which multiplies B·A in the module.
        moments: What was gathered of the module; None for the plain SVD.
        weighting: "both" is K-FAC, "inputs" weighs by the inputs alone, "none" is the plain SVD.
        damping: Share of the plain metric that is mixed into each gathered one.
    """
    left, right = scale**2 * (b.T @ b), a @ a.T
    if moments is not None and weighting != "none":
        right = damped(moments.inputs, right, damping)
        if weighting == "both":
            left = damped(moments.gradients, left, damping)
    root, inverse = _roots(left)
    u, sigma, _ = np.linalg.svd(root.T @ _roots(right)[0], full_matrices=False)
    # M = Σ uᵢ·uᵢᵀ in the coordinates of `root`: B' = B·L⁻ᵀ·U and A' = Uᵀ·Lᵀ·A.
    return Components(b @ (inverse @ u), (u.T @ root.T) @ a, 0.5 * sigma**2)


def damped(moment: Floats, plain: Floats, damping: float) -> Floats:
    """`moment` with a share of the plain metric, scaled to the same trace; `plain` alone where the moment is zero."""
    trace, whole = float(np.trace(moment)), float(np.trace(plain))
    if trace <= 0 or whole <= 0:
        return plain
    return moment + damping * trace / whole * plain


def _roots(matrix: Floats) -> tuple[Floats, Floats]:
    """`(L, L⁻ᵀ)` with L·Lᵀ = matrix [r, r], symmetric and positive; invisible directions are left out of both."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    seen = values > INVISIBLE * max(float(values[-1]), 0.0)
    roots = np.sqrt(np.where(seen, values, 0.0))
    return vectors * roots, vectors * np.where(seen, 1 / np.where(seen, roots, 1.0), 0.0)


def shared_ranks(spectra: Sequence[Floats], costs: Sequence[int], rank: int, max_rank: int) -> list[int]:
    """Ranks of 1 to `max_rank` that keep the most for the parameters of a uniform `rank`: one threshold for all modules.

    Args:
        spectra: For each module, what each part is worth, in falling order.
        costs: For each module, the parameters of one rank, d + k.
        rank: The uniform rank that sets the budget, rank·Σcosts.
        max_rank: The largest rank that a module may get.

    Returns:
        A rank for each module. Where `max_rank` equals `rank`, every module gets `rank` (or all that it has).
    """
    limits = [min(max_rank, len(spectrum)) for spectrum in spectra]
    ranks = [min(1, limit) for limit in limits]
    left = rank * sum(costs) - sum(one * cost for one, cost in zip(ranks, costs, strict=True))
    offers = sorted(
        (-float(value) / cost, module, position)
        for module, (spectrum, cost, limit) in enumerate(zip(spectra, costs, limits, strict=True))
        for position, value in enumerate(spectrum[:limit])
        if position >= ranks[module]
    )
    for _, module, position in offers:
        if costs[module] <= left and position == ranks[module]:
            ranks[module] += 1
            left -= costs[module]
    return ranks
