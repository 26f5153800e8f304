"""LoRA factors at another rank: truncation by singular values or by K-FAC, or padding that keeps the product.

With s the scale of an update s·B·A and s' the scale at the new rank, s'·B'·A' is the best approximation of s·B·A of that
rank (Eckart and Young 1936): its error ‖s·B·A − s'·B'·A'‖_F is the root of the sum of the squared singular values that
are dropped. With B = Q_B R_B and Aᵀ = Q_A R_A, only the r × r core R_B R_Aᵀ is decomposed. With the moments of a module,
s'·B'·A' is nearest in the K-FAC metric instead (`maths.truncation`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rightrank.io.adapter_folder import PREFIX, WEIGHTS_FILE
from rightrank.maths.truncation import Moments, components, shared_ranks

Factors = tuple[torch.Tensor, torch.Tensor]

MOMENTS_FILE = "moments.safetensors"  # beside the weights of the adapter that they belong to
ZERO_SHARE = 1e-12  # of the largest singular value; a direction below it is rounding, and its column of B is zero


def truncated_tensors(
    folder: Path,
    ranks: Mapping[str, int],
    scale: Callable[[int], float],
    new_scale: Callable[[int], float],
    moments: Mapping[str, Moments],
) -> dict[str, torch.Tensor]:
    """The tensors of the adapter in `folder`, in PEFT's names, every A and B truncated; all others as saved.

    Args:
        folder: an adapter folder as PEFT saves it.
        ranks: the rank of each module, by its name in the base.
        scale: PEFT's scale s of the saved adapter by rank.
        new_scale: PEFT's scale s' of the truncated adapter by rank.
        moments: by module name; modules that have them are truncated by K-FAC, the others by singular values.
    """
    tensors = load_file(folder / WEIGHTS_FILE)
    for module, (key_b, key_a) in _factor_keys(tensors).items():
        b, a, rank = tensors[key_b], tensors[key_a], ranks[module]
        before = scale(a.shape[0])
        ratio = before / new_scale(rank)
        new_b, new_a = resized_factors(b.float(), a.float(), rank, ratio, moments.get(module), before)
        tensors[key_b], tensors[key_a] = new_b.to(b.dtype).contiguous(), new_a.to(a.dtype).contiguous()
    return tensors


def module_ranks(
    folder: Path, rank: int, max_rank: int, scale: Callable[[int], float], moments: Mapping[str, Moments]
) -> dict[str, int]:
    """The rank of each module of a truncation that holds at most the parameters of a uniform `rank`.

    One threshold on the K-FAC cost per parameter shares the parameters out over the modules, up to `max_rank` in each.
    Where a module has no moments, or the adapter is no larger than `rank`, every module gets `rank`.
    """
    tensors = load_file(folder / WEIGHTS_FILE)
    keys = _factor_keys(tensors)
    uniform = dict.fromkeys(keys, rank)
    pairs = {module: (tensors[key_b].double(), tensors[key_a].double()) for module, (key_b, key_a) in keys.items()}
    if max_rank == rank or any(module not in moments or a.shape[0] <= rank for module, (_, a) in pairs.items()):
        return uniform
    worth = [
        components(b.numpy(), a.numpy(), scale(a.shape[0]), moments[module]).costs for module, (b, a) in pairs.items()
    ]
    parameters = [b.shape[0] + a.shape[1] for b, a in pairs.values()]
    return dict(zip(keys, shared_ranks(worth, parameters, rank, max_rank), strict=True))


def _factor_keys(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, str]]:
    """The names of B and A of each module, by its name in the base."""
    names = [name for name in tensors if "lora_A" in name or "lora_embedding_A" in name]
    return {
        name.removeprefix(PREFIX).partition(".lora_")[0]: (
            name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B"),
            name,
        )
        for name in names
    }


def adapter_rank(folder: Path) -> int:
    """The rank of the adapter's first module, from the header of its weights."""
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        name = next(name for name in sorted(file.keys()) if "lora_A" in name or "lora_embedding_A" in name)
        return int(file.get_slice(name).get_shape()[0])


def save_moments(path: Path, moments: Mapping[str, Moments]) -> None:
    """Write moments by module name to a safetensors file, in float32."""
    tensors = {f"{name}.inputs": torch.from_numpy(one.inputs).float() for name, one in moments.items()}
    tensors |= {f"{name}.gradients": torch.from_numpy(one.gradients).float() for name, one in moments.items()}
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
        b: [d, r].
        a: [r, k].
        rank: Of the result.
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
        b, a = (torch.from_numpy(part).to(a) for part in parts.leading(rank))
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(scale_ratio * r_b @ r_a.T, full_matrices=False)
    core_b, core_a = balanced_factors(u, s, vt, rank)
    return _padded(q_b @ core_b, core_a @ q_a.T, rank)


def balanced_factors(u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor, rank: int) -> Factors:
    """The leading `rank` triplets of an SVD (fewer where it has fewer), the root of each singular value on either side.

    A direction without energy has a zero column of B and keeps a row of A, so that further training can use it.
    """
    s = s[:rank]
    root = s.sqrt()
    alive = s > ZERO_SHARE * s[:1]
    return u[:, :rank] * torch.where(alive, root, 0), torch.where(alive, root, root[:1])[:, None] * vt[:rank]


def _padded(b: torch.Tensor, a: torch.Tensor, rank: int) -> Factors:
    """Zero columns of B against rows of A as PEFT draws them, uniform in ±1/√k: the product does not change."""
    missing, width = rank - b.shape[1], a.shape[1]
    if missing == 0:
        return b, a
    rows = np.random.default_rng([rank, width]).uniform(-1, 1, (missing, width)) / math.sqrt(width)
    return torch.cat([b, b.new_zeros((b.shape[0], missing))], 1), torch.cat([a, torch.from_numpy(rows).to(a)])
