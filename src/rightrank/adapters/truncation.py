"""Change the rank of LoRA factors: truncation by singular values or by K-FAC, or padding that keeps the product.

With s the scale of an update s·B·A and s' the scale at the new rank, s'·B'·A' is the best approximation of s·B·A of that
rank (Eckart and Young 1936): its error ‖s·B·A − s'·B'·A'‖_F is the root of the sum of the squared singular values that
are dropped. With B = Q_B R_B and Aᵀ = Q_A R_A, only the r × r core R_B R_Aᵀ is decomposed. With the moments of a module,
s'·B'·A' is nearest in the K-FAC metric instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from rightrank.adapters.adapter_reader import AdapterFolder, AdapterModule, open_adapter
from rightrank.adapters.rank_math import (
    build_exact_pattern,
    compute_equal_scale_alphas,
    compute_scaling,
    find_server_rank,
    get_pattern_value,
)
from rightrank.schema.trials import Floats

DAMPING = 0.01  # share of the identity in each metric, which keeps some weight for directions that occur in few tokens
MIN_EIGENVALUE_RATIO = 1e-12  # relative to the largest eigenvalue; a direction below it has no effect


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments of a module in the coordinates of its adapter."""

    inputs: Floats  # [r, r], E[h·hᵀ] over the positions that carry a gradient
    gradients: Floats  # [r, r], Σ δ·δᵀ over positions, per label of the batches


@dataclass(frozen=True, slots=True)
class UpdateComponents:
    """B·A as a sum of rank-one components in falling order of the cost of leaving them out; the first n are the best n."""

    b: Floats  # [d, q]
    a: Floats  # [q, k]
    costs: Floats  # [q], the K-FAC estimate of the loss, nats a label; ½·σ² of ΔW without moments


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
    root, inverse = _factor_metric(output_metric)
    u, sigma, _ = np.linalg.svd(root.T @ _factor_metric(input_metric)[0], full_matrices=False)
    # M = Σ uᵢ·uᵢᵀ in the coordinates of `root`: B' = B·L⁻ᵀ·U and A' = Uᵀ·Lᵀ·A.
    return UpdateComponents(b @ (inverse @ u), (u.T @ root.T) @ a, 0.5 * sigma**2)


def _damp(moment: Floats, plain: Floats, damping: float) -> Floats:
    """Return `moment` plus a share of the plain metric, scaled to the same trace; the plain metric alone if the moment is zero."""
    trace, plain_trace = float(np.trace(moment)), float(np.trace(plain))
    if trace <= 0 or plain_trace <= 0:
        return plain
    return moment + damping * trace / plain_trace * plain


def _factor_metric(matrix: Floats) -> tuple[Floats, Floats]:
    """Return `(L, L⁻ᵀ)` with L·Lᵀ = matrix [r, r], symmetric and positive, without directions of negligible eigenvalue."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    is_visible = values > MIN_EIGENVALUE_RATIO * max(float(values[-1]), 0.0)
    roots = np.sqrt(np.where(is_visible, values, 0.0))
    return vectors * roots, vectors * np.where(is_visible, 1 / np.where(is_visible, roots, 1.0), 0.0)


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


Factors = tuple[torch.Tensor, torch.Tensor]

ZERO_RATIO = (
    1e-12  # relative to the largest singular value; a direction below it is rounding, and its column of B becomes zero
)


def truncate_tensors(
    folder: Path, rank: int, config: LoraConfig, moments: Mapping[str, Moments]
) -> dict[str, torch.Tensor]:
    """Return the tensors of the adapter in `folder`, in PEFT's names, with every A and B truncated and all others unchanged.

    Args:
        rank: The uniform rank, which sets the number of parameters.
        config: The configuration of the truncated adapter. The rank of each module is written into it, with an alpha that gives all modules one scale.
        moments: Second moments by module name. Modules that have them are truncated by K-FAC, the others by singular values.
    """
    adapter = open_adapter(folder)
    tensors = {key: adapter.load_tensor(key) for key in adapter.other_keys}
    pattern = config.rank_pattern or {}
    ranks = {module.address: int(get_pattern_value(pattern, module.address, config.r)) for module in adapter.modules}
    if len(distinct_ranks := set(ranks.values())) == 1:
        ranks = allocate_module_ranks(adapter, distinct_ranks.pop(), find_server_rank(rank), moments) or ranks
    alphas = compute_equal_scale_alphas(ranks, config.r, config.lora_alpha, bool(config.use_rslora))
    config.rank_pattern = build_exact_pattern(ranks, config.r, ranks)
    config.alpha_pattern = build_exact_pattern(alphas, config.lora_alpha, ranks)
    scaling = compute_scaling(config.lora_alpha, config.r, bool(config.use_rslora))
    for pair in adapter.pairs:
        tensors |= resize_pair(adapter, pair, ranks[pair[0].address], pair[0].scaling / scaling, moments)
    return tensors


def resize_pair(
    adapter: AdapterFolder, pair: Sequence[AdapterModule], rank: int, ratio: float, moments: Mapping[str, Moments]
) -> dict[str, torch.Tensor]:
    """Return the tensors of a pair at `rank`, computed in float64; the product is `ratio` times as large."""
    first, new_factors = pair[0], []
    for module, factors in zip(pair, adapter.load_pair_factors(first), strict=True):
        b, a = map(torch.from_numpy, factors)
        if rank == module.rank:
            new_factors.append((b * ratio, a))
        else:
            new_factors.append(resize_factors(b, a, rank, ratio, moments.get(module.name), module.scaling))
    old_a, old_b = adapter.load_tensor(first.a_key), adapter.load_tensor(first.b_key)
    new_a, new_b = first.kind.pack_factors(new_factors, old_a, old_b)
    tensors = {first.b_key: new_b.to(old_b.dtype).contiguous(), first.a_key: new_a.to(old_a.dtype).contiguous()}
    if first.bias_key is not None:  # PEFT scales it as it scales B
        bias = adapter.load_tensor(first.bias_key)
        tensors[first.bias_key] = (bias.double() * ratio).to(bias.dtype)
    if first.magnitude_key is not None:
        tensors[first.magnitude_key] = adapter.load_tensor(first.magnitude_key)
    return tensors


def allocate_module_ranks(
    adapter: AdapterFolder, rank: int, max_rank: int, moments: Mapping[str, Moments]
) -> dict[str, int] | None:
    """Allocate the parameters of a uniform `rank` to the modules by one threshold on their K-FAC costs.

    Returns:
        A rank up to `max_rank` by module; None if a module has no moments, or has no larger rank than `rank`.
    """
    modules = adapter.modules
    if max_rank == rank or any(module.name not in moments or module.rank <= rank for module in modules):
        return None
    costs = [
        decompose_update(*adapter.load_factors(module), module.scaling, moments[module.name]).costs
        for module in modules
    ]
    parameters = [module.rows + module.columns for module in modules]
    ranks = allocate_ranks(costs, parameters, rank * sum(parameters), max_rank)
    return {module.name: module_rank for module, module_rank in zip(modules, ranks, strict=True)}


def save_moments(path: Path, moments: Mapping[str, Moments]) -> None:
    """Write moments by module name to a safetensors file, in float32."""
    tensors = {f"{name}.inputs": torch.from_numpy(moment.inputs).float() for name, moment in moments.items()}
    tensors |= {f"{name}.gradients": torch.from_numpy(moment.gradients).float() for name, moment in moments.items()}
    save_file(tensors, path)


def load_moments(path: Path) -> dict[str, Moments]:
    """Load the moments that `save_moments` wrote; return none if the file does not exist."""
    if not path.exists():
        return {}
    tensors = {key: value.double().numpy() for key, value in load_file(path).items()}
    names = sorted({key.rpartition(".")[0] for key in tensors})
    return {name: Moments(tensors[f"{name}.inputs"], tensors[f"{name}.gradients"]) for name in names}


def resize_factors(
    b: torch.Tensor,
    a: torch.Tensor,
    rank: int,
    scale_ratio: float,
    moments: Moments | None = None,
    scale: float = 1.0,
) -> Factors:
    """Truncate or pad factors to `(B' [d, rank], A' [rank, k])` with B'·A' ≈ scale_ratio · B·A.

    At a higher rank the product is exact. An untrained pair (B or A zero) keeps its leading rows and columns unchanged, so that
    training can start from it. The computation is in the dtype of `b` [d, r] and `a` [r, k].

    Args:
        scale_ratio: s/s'.
        moments: Second moments of the module, for the K-FAC metric; None for the Frobenius norm.
        scale: s, with which the moments were gathered.
    """
    if rank > b.shape[1]:
        return _pad_factors(b * scale_ratio, a, rank)
    if not b.any() or not a.any():
        return b[:, :rank] * scale_ratio, a[:rank]
    if moments is not None and rank < b.shape[1]:
        update = decompose_update(b.double().numpy(), a.double().numpy(), scale, moments)
        b, a = (torch.from_numpy(factor).to(a) for factor in (update.b[:, :rank], update.a[:rank]))
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(scale_ratio * r_b @ r_a.T, full_matrices=False)
    s = s[:rank]
    root, is_nonzero = s.sqrt(), s > ZERO_RATIO * s[:1]
    # the root of each singular value on either side; a direction without energy keeps a row of A, so that further training can use it
    core_b = u[:, :rank] * torch.where(is_nonzero, root, 0)
    core_a = torch.where(is_nonzero, root, root[:1])[:, None] * vt[:rank]
    return _pad_factors(q_b @ core_b, core_a @ q_a.T, rank)


def _pad_factors(b: torch.Tensor, a: torch.Tensor, rank: int) -> Factors:
    """Append zero columns to B and rows that are uniform in ±1/√k, as PEFT draws them, to A: the product does not change."""
    missing, width = rank - b.shape[1], a.shape[1]
    if missing == 0:
        return b, a
    rows = np.random.default_rng([rank, width]).uniform(-1, 1, (missing, width)) / math.sqrt(width)
    return torch.cat([b, b.new_zeros((b.shape[0], missing))], 1), torch.cat([a, torch.from_numpy(rows).to(a)])
