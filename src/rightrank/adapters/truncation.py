"""Arithmetic on an update s·B·A with factors B [d, r] and A [r, k]: singular values, distance, truncation by singular values or by K-FAC, padding.

With s the scale of an update and s' the scale at the new rank, s'·B'·A' is the best approximation of s·B·A of that
rank (Eckart and Young 1936): its error ‖s·B·A − s'·B'·A'‖_F is the root of the sum of the squared singular values that
are dropped. With the moments of a module, s'·B'·A' is nearest in the K-FAC metric instead.

The factors are read only by products such as Bᵀ·B. With Bᵀ·B = L·Lᵀ and A·Aᵀ = K·Kᵀ, the singular values of B·A are those of the r × r
matrix Lᵀ·K. All arithmetic is in float64, so a singular value has an error of about 1e-8 of the largest one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from threadpoolctl import threadpool_limits

from rightrank.bases.safetensors_files import open_tensors, widen, write_tensors
from rightrank.schema.trials import Floats

Factors: TypeAlias = tuple[Floats, Floats]  # B [d, r] and A [r, k]

DAMPING = 0.01  # share of the identity in each metric, which keeps some weight for directions that occur in few tokens
# Relative to the largest eigenvalue; a direction below it is rounding, and has no effect. Moments are gathered in float32.
MIN_EIGENVALUE_RATIO, MIN_MOMENT_RATIO = 1e-14, 1e-12
ZERO_RATIO = 1e-7  # relative to the largest component; one below it is rounding, and its column of B becomes zero


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments of a module in the coordinates of its adapter."""

    inputs: Floats  # [r, r], E[h·hᵀ] over the positions that carry a gradient
    gradients: Floats  # [r, r], Σ δ·δᵀ over positions, per label of the batches


@dataclass(frozen=True, slots=True)
class UpdateComponents:
    """B·A as a sum of rank-one components in falling order of the cost of leaving them out; the first n are the best n."""

    b: Floats  # [d, r]
    a: Floats  # [r, k]
    costs: Floats  # [r], the K-FAC estimate of the loss, nats a label; ½·σ² of ΔW without moments


def use_one_thread() -> AbstractContextManager[None]:
    """Run numpy's linear algebra in one thread within the block: factors are thin, so that threads wait longer than they compute."""
    limits: AbstractContextManager[None] = threadpool_limits(limits=1, user_api="blas")
    return limits


def compute_singular_values(b: Floats, a: Floats) -> Floats:
    """Compute r singular values of B·A in falling order; the last ones are zero if d or k is below r."""
    return _decompose_core(*_balance_metrics(b.T @ b, a @ a.T), MIN_EIGENVALUE_RATIO)[2]


def compute_distance(b: Floats, a: Floats, other_b: Floats, other_a: Floats) -> float:
    """Compute ‖B·A − B'·A'‖_F, with an error of about 1e-8 of ‖B·A‖_F."""
    squares = (
        np.sum((b.T @ b) * (a @ a.T)),
        -2 * np.sum((b.T @ other_b) * (a @ other_a.T)),
        np.sum((other_b.T @ other_b) * (other_a @ other_a.T)),
    )
    return math.sqrt(max(0.0, float(sum(squares))))


def decompose_update(
    b: Floats,
    a: Floats,
    scale: float,
    moments: Moments | None = None,
    damping: float = DAMPING,
) -> UpdateComponents:
    """Decompose B·A into rank-one components.

    Args:
        b: [d, r].
        a: [r, k].
        scale: s, which multiplies B·A in the module.
        moments: Second moments of the module; None for the plain SVD.
        damping: Share of the plain metric that is mixed into each moment matrix.
    """
    output_metric, input_metric = scale**2 * (b.T @ b), a @ a.T
    if moments is not None:
        input_metric = _damp(moments.inputs, input_metric, damping)
        output_metric = _damp(moments.gradients, output_metric, damping)
        from_b, from_a, sigma = _decompose_core(
            output_metric, input_metric, np.ones(len(a)), np.ones(len(a)), MIN_MOMENT_RATIO
        )
    else:
        from_b, from_a, sigma = _decompose_core(*_balance_metrics(output_metric, input_metric), MIN_EIGENVALUE_RATIO)
    return UpdateComponents(b @ from_b, from_a @ a, 0.5 * sigma**2)


def _balance_metrics(output_metric: Floats, input_metric: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Return the metrics with factors [r] for the columns of B and the rows of A that make them equally large: these lose fewest digits."""
    outputs, inputs = np.diagonal(output_metric), np.diagonal(input_metric)
    is_used = (outputs > 0) & (inputs > 0)
    up = (is_used * inputs / np.where(is_used, outputs, 1.0)) ** 0.25
    return output_metric, input_metric, up, is_used / np.where(is_used, up, 1.0)


def _decompose_core(
    output_metric: Floats, input_metric: Floats, up: Floats, down: Floats, min_ratio: float
) -> tuple[Floats, Floats, Floats]:
    """Decompose B·A in two metrics [r, r], after scaling the columns of B by `up` and the rows of A by `down`.

    Returns:
        `(P, Q, σ)`: B·P [d, r] and Q·A [r, k] are the components, and σ the roots of their squared norms in both metrics.
    """
    root, inverse = _factor_metric(up[:, None] * output_metric * up, min_ratio)
    input_root, _ = _factor_metric(down[:, None] * input_metric * down, min_ratio)
    u, sigma, _ = np.linalg.svd(root.T @ input_root, full_matrices=False)
    # M = Σ uᵢ·uᵢᵀ in the coordinates of `root`: B' = B·L⁻ᵀ·U and A' = Uᵀ·Lᵀ·A.
    return up[:, None] * (inverse @ u), (u.T @ root.T) * down, sigma


def _damp(moment: Floats, plain: Floats, damping: float) -> Floats:
    """Return `moment` plus a share of the plain metric, scaled to the same trace; the plain metric alone if the moment is zero."""
    trace, plain_trace = float(np.trace(moment)), float(np.trace(plain))
    if trace <= 0 or plain_trace <= 0:
        return plain
    return moment + damping * trace / plain_trace * plain


def _factor_metric(matrix: Floats, min_ratio: float) -> tuple[Floats, Floats]:
    """Return `(L, L⁻ᵀ)` with L·Lᵀ = matrix [r, r], symmetric and positive, without directions of negligible eigenvalue."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    is_visible = values > min_ratio * values[-1]
    roots = np.sqrt(np.where(is_visible, values, 0.0))
    return vectors * roots, vectors * (is_visible / np.where(is_visible, roots, 1.0))


def resize_factors(
    b: Floats,
    a: Floats,
    rank: int,
    scale_ratio: float,
    moments: Moments | None = None,
    scale: float = 1.0,
) -> Factors:
    """Truncate or pad factors to `(B' [d, rank], A' [rank, k])` with B'·A' ≈ scale_ratio · B·A.

    At a higher rank the product is exact. An untrained pair (B or A zero) keeps its leading rows and columns unchanged, so that
    training can start from it.

    Args:
        scale_ratio: s/s'.
        moments: Second moments of the module, for the K-FAC metric; None for the Frobenius norm.
        scale: s, with which the moments were gathered.
    """
    if rank > b.shape[1]:
        return _pad_factors(b * scale_ratio, a, rank)
    if not b.any() or not a.any():
        return b[:, :rank] * scale_ratio, a[:rank]
    update = decompose_update(b, a, scale, moments)
    b, a = update.b[:, :rank], update.a[:rank]
    if moments is not None:
        b, a = _orthogonalize(b, a)
    b_norms, a_norms = np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1)
    sizes = b_norms * a_norms
    is_nonzero = sizes > ZERO_RATIO * sizes.max()
    # the root of each component's size on either side; those without energy become rows of A that further training can use
    roots = np.sqrt(abs(scale_ratio) * sizes[is_nonzero])
    b = b[:, is_nonzero] * (math.copysign(1.0, scale_ratio) * roots / b_norms[is_nonzero])
    return _pad_factors(b, a[is_nonzero] * (roots / a_norms[is_nonzero])[:, None], rank)


def _orthogonalize(b: Floats, a: Floats) -> Factors:
    """Return factors of B·A with orthogonal columns and orthogonal rows.

    Components that are orthogonal in the K-FAC metric may nearly cancel each other, and would lose digits when they are rounded.
    """
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    u, sigma, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ (u * sigma), vt @ q_a.T


def _pad_factors(b: Floats, a: Floats, rank: int) -> Factors:
    """Append zero columns to B and rows that are uniform in ±1/√k, as PEFT draws them, to A: the product does not change."""
    missing, width = rank - b.shape[1], a.shape[1]
    if missing == 0:
        return b, a
    rows = np.random.default_rng([rank, width]).uniform(-1, 1, (missing, width)) / math.sqrt(width)
    return np.hstack([b, np.zeros((b.shape[0], missing))]), np.vstack([a, rows])


def allocate_ranks(values: Sequence[Floats], costs: Sequence[int], budget: int, max_rank: int) -> list[int]:
    """Allocate a budget of parameters to ranks from 1 upward, by one threshold for all modules.

    Args:
        values: For each module, the value of each component, in falling order.
        costs: For each module, the parameters of one rank, d + k.
        max_rank: The largest rank that a module may get.

    Returns:
        A rank for each module. For the budget of a uniform `max_rank`, every module gets it (or all its components).
    """
    limits = [min(max_rank, len(module_values)) for module_values in values]
    ranks = [min(1, limit) for limit in limits]
    remaining = budget - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    candidates = sorted(
        (-float(value) / cost, module, position)
        for module, (module_values, cost, limit) in enumerate(zip(values, costs, limits, strict=True))
        for position, value in enumerate(module_values[:limit])
        if position >= ranks[module]
    )
    for _, module, position in candidates:
        if costs[module] <= remaining and position == ranks[module]:
            ranks[module] += 1
            remaining -= costs[module]
    return ranks


def save_moments(path: Path, moments: Mapping[str, Moments]) -> None:
    """Write moments by module name to a safetensors file, in float32."""
    tensors = {f"{name}.inputs": moment.inputs.astype(np.float32) for name, moment in moments.items()}
    tensors |= {f"{name}.gradients": moment.gradients.astype(np.float32) for name, moment in moments.items()}
    write_tensors(path, tensors, {})


def load_moments(path: Path) -> dict[str, Moments]:
    """Load the moments that `save_moments` wrote; return none if the file does not exist."""
    if not path.exists():
        return {}
    file = open_tensors(path)
    tensors = {key: widen(file.load_tensor(key)) for key in file.shapes}
    names = sorted({key.rpartition(".")[0] for key in tensors})
    return {name: Moments(tensors[f"{name}.inputs"], tensors[f"{name}.gradients"]) for name in names}
