"""LoRA factors at another rank: truncation by singular values or by K-FAC, or padding that keeps the product.

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

from rightrank.models.adapter_reader import AdapterFolder, AdapterModule, open_adapter
from rightrank.models.ranks import equal_scale_alphas, exact_pattern, lora_scaling, max_module_rank, pattern_value
from rightrank.schema.trials import Floats

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


def components(
    b: Floats,
    a: Floats,
    scale: float,
    moments: Moments | None = None,
    damping: float = DAMPING,
) -> Components:
    """The parts of B·A.

    Args:
        b: [d, r].
        a: [r, k].
        scale: s, which multiplies B·A in the module.
        moments: What was gathered of the module; None for the plain SVD.
        damping: Share of the plain metric that is mixed into each gathered one.
    """
    left, right = scale**2 * (b.T @ b), a @ a.T
    if moments is not None:
        right = _damped(moments.inputs, right, damping)
        left = _damped(moments.gradients, left, damping)
    root, inverse = _roots(left)
    u, sigma, _ = np.linalg.svd(root.T @ _roots(right)[0], full_matrices=False)
    # M = Σ uᵢ·uᵢᵀ in the coordinates of `root`: B' = B·L⁻ᵀ·U and A' = Uᵀ·Lᵀ·A.
    return Components(b @ (inverse @ u), (u.T @ root.T) @ a, 0.5 * sigma**2)


def _damped(moment: Floats, plain: Floats, damping: float) -> Floats:
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


def ranks_within(worth: Sequence[Floats], costs: Sequence[int], budget: int, max_rank: int) -> list[int]:
    """The ranks, from 1, that keep the most for a budget of parameters: one threshold for all modules.

    Args:
        worth: For each module, what each part is worth, in falling order.
        costs: For each module, the parameters of one rank, d + k.
        max_rank: The largest rank that a module may get.

    Returns:
        A rank for each module. For the budget of a uniform `max_rank`, every module gets it (or all that it has).
    """
    limits = [min(max_rank, len(parts)) for parts in worth]
    ranks = [min(1, limit) for limit in limits]
    left = budget - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    offers = sorted(
        (-float(value) / cost, module, position)
        for module, (parts, cost, limit) in enumerate(zip(worth, costs, limits, strict=True))
        for position, value in enumerate(parts[:limit])
        if position >= ranks[module]
    )
    for _, module, position in offers:
        if costs[module] <= left and position == ranks[module]:
            ranks[module] += 1
            left -= costs[module]
    return ranks


Factors = tuple[torch.Tensor, torch.Tensor]

ZERO_SHARE = 1e-12  # of the largest singular value; a direction below it is rounding, and its column of B is zero


def truncated_tensors(
    folder: Path, rank: int, config: LoraConfig, moments: Mapping[str, Moments]
) -> dict[str, torch.Tensor]:
    """The tensors of the adapter in `folder`, in PEFT's names, every A and B truncated; all others as saved.

    Args:
        rank: the uniform rank, which sets the number of parameters.
        config: of the truncated adapter; the rank of each module goes into it, and an alpha that gives all of them one scale.
        moments: by module name; modules that have them are truncated by K-FAC, the others by singular values.
    """
    adapter = open_adapter(folder)
    tensors = {key: adapter.tensor(key) for key in adapter.other_keys}
    pattern = config.rank_pattern or {}
    ranks = {module.address: int(pattern_value(pattern, module.address, config.r)) for module in adapter.modules}
    if len(uniform := set(ranks.values())) == 1:
        ranks = shared_ranks(adapter, uniform.pop(), max_module_rank(rank), moments) or ranks
    alphas = equal_scale_alphas(ranks, config.r, config.lora_alpha, bool(config.use_rslora))
    config.rank_pattern = exact_pattern(ranks, config.r, ranks)
    config.alpha_pattern = exact_pattern(alphas, config.lora_alpha, ranks)
    scaling = lora_scaling(config.lora_alpha, config.r, bool(config.use_rslora))
    for pair in adapter.pairs:
        tensors |= new_tensors(adapter, pair, ranks[pair[0].address], pair[0].scaling / scaling, moments)
    return tensors


def new_tensors(
    adapter: AdapterFolder, pair: Sequence[AdapterModule], rank: int, ratio: float, moments: Mapping[str, Moments]
) -> dict[str, torch.Tensor]:
    """The tensors of a pair at `rank`, computed in float64; the product is `ratio` times as large."""
    first, new = pair[0], []
    for module, factors in zip(pair, adapter.pair_factors(first), strict=True):
        b, a = map(torch.from_numpy, factors)
        if rank == module.rank:
            new.append((b * ratio, a))
        else:
            new.append(resized_factors(b, a, rank, ratio, moments.get(module.name), module.scaling))
    old_a, old_b = adapter.tensor(first.a_key), adapter.tensor(first.b_key)
    new_a, new_b = first.kind.tensors(new, old_a, old_b)
    tensors = {first.b_key: new_b.to(old_b.dtype).contiguous(), first.a_key: new_a.to(old_a.dtype).contiguous()}
    if first.bias_key is not None:  # PEFT scales it as it scales B
        bias = adapter.tensor(first.bias_key)
        tensors[first.bias_key] = (bias.double() * ratio).to(bias.dtype)
    if first.magnitude_key is not None:
        tensors[first.magnitude_key] = adapter.tensor(first.magnitude_key)
    return tensors


def shared_ranks(
    adapter: AdapterFolder, rank: int, max_rank: int, moments: Mapping[str, Moments]
) -> dict[str, int] | None:
    """The parameters of `rank` in every module, shared out over the modules by one threshold on the K-FAC cost of each.

    Returns:
        A rank up to `max_rank` by module; None where a module has no moments, or is no larger than `rank`.
    """
    modules = adapter.modules
    if max_rank == rank or any(module.name not in moments or module.rank <= rank for module in modules):
        return None
    worth = [components(*adapter.factors(module), module.scaling, moments[module.name]).costs for module in modules]
    parameters = [module.rows + module.columns for module in modules]
    ranks = ranks_within(worth, parameters, rank * sum(parameters), max_rank)
    return {module.name: shared for module, shared in zip(modules, ranks, strict=True)}


def save_moments(path: Path, moments: Mapping[str, Moments]) -> None:
    """Write moments by module name to a safetensors file, in float32."""
    tensors = {f"{name}.inputs": torch.from_numpy(moment.inputs).float() for name, moment in moments.items()}
    tensors |= {f"{name}.gradients": torch.from_numpy(moment.gradients).float() for name, moment in moments.items()}
    save_file(tensors, path)


def load_moments(path: Path) -> dict[str, Moments]:
    """The moments of `save_moments`; none where there is no such file."""
    if not path.exists():
        return {}
    tensors = {key: value.double().numpy() for key, value in load_file(path).items()}
    names = sorted({key.rpartition(".")[0] for key in tensors})
    return {name: Moments(tensors[f"{name}.inputs"], tensors[f"{name}.gradients"]) for name in names}


def resized_factors(
    b: torch.Tensor,
    a: torch.Tensor,
    rank: int,
    scale_ratio: float,
    moments: Moments | None = None,
    scale: float = 1.0,
) -> Factors:
    """`(B' [d, rank], A' [rank, k])`, truncated or padded, with B'·A' ≈ scale_ratio · B·A; scale_ratio is s/s'.

    At a higher rank the product is exact. An untrained pair (B or A zero) keeps its leading part unchanged, so that
    training can start from it. Computed in the type of `b` [d, r] and `a` [r, k].

    Args:
        scale_ratio: s/s'.
        moments: Of the module, for the K-FAC metric; None for the Frobenius norm.
        scale: s, with which the moments were gathered.
    """
    if rank > b.shape[1]:
        return _padded(b * scale_ratio, a, rank)
    if not b.any() or not a.any():
        return b[:, :rank] * scale_ratio, a[:rank]
    if moments is not None and rank < b.shape[1]:
        parts = components(b.double().numpy(), a.double().numpy(), scale, moments)
        b, a = (torch.from_numpy(part).to(a) for part in (parts.b[:, :rank], parts.a[:rank]))
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(scale_ratio * r_b @ r_a.T, full_matrices=False)
    s = s[:rank]
    root, alive = s.sqrt(), s > ZERO_SHARE * s[:1]
    # the root of each singular value on either side; a direction without energy keeps a row of A, so that further training can use it
    core_b = u[:, :rank] * torch.where(alive, root, 0)
    core_a = torch.where(alive, root, root[:1])[:, None] * vt[:rank]
    return _padded(q_b @ core_b, core_a @ q_a.T, rank)


def _padded(b: torch.Tensor, a: torch.Tensor, rank: int) -> Factors:
    """Zero columns of B against rows of A as PEFT draws them, uniform in ±1/√k: the product does not change."""
    missing, width = rank - b.shape[1], a.shape[1]
    if missing == 0:
        return b, a
    rows = np.random.default_rng([rank, width]).uniform(-1, 1, (missing, width)) / math.sqrt(width)
    return torch.cat([b, b.new_zeros((b.shape[0], missing))], 1), torch.cat([a, torch.from_numpy(rows).to(a)])
