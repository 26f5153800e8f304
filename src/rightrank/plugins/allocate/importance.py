"""Ranks by module within a budget of parameters, by four measures of what a further rank of a module gains.

Every measure gives every module a rank of at least 1.
"""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, initialize_lora_eva_weights

from rightrank.adapters.checkpoints import weight_gradients
from rightrank.models.adapter_files import AdapterFolder
from rightrank.models.spectra import factored_singular_values
from rightrank.models.truncation import ranks_within, resized_factors
from rightrank.schema.trials import SplitName
from rightrank.train.adapter import ADAPTER, lora_modules, unwrapped, wrapped
from rightrank.train.adapter_runtime import adapter_attached
from rightrank.train.runtime import Runtime

EVA_BATCHES = 16
EVA_RHO = 2.0  # PEFT's default: at most twice the rank anywhere


def by_spectra(adapter: AdapterFolder, budget: int) -> dict[str, int]:
    """Water-filling by the energy of the trained update: largest σ² of s·B·A per parameter first."""
    spectra = [factored_singular_values(*adapter.factors(module)) * abs(module.scaling) for module in adapter.modules]
    return _named(adapter, ranks_within([s**2 for s in spectra], _costs(adapter), budget))


def by_sensitivity(adapter: AdapterFolder, runtime: Runtime, budget: int) -> dict[str, int]:
    """Greedy by held-out loss: the step to a higher rank of one module that reduces the loss most per parameter first.

    Each module is truncated alone, to 1, 2, 4, … below its rank, while the others keep theirs.
    """
    curves = truncation_sensitivity(adapter, runtime, "selection")
    return greedy_ranks(curves, dict(zip(curves, _costs(adapter), strict=True)), budget)


def truncation_sensitivity(adapter: AdapterFolder, runtime: Runtime, split: SplitName) -> dict[str, dict[int, float]]:
    """The loss of `split`, nats a label, by module and rank of that module."""
    curves: dict[str, dict[int, float]] = {}
    with adapter_attached(runtime, adapter.path) as peft_model:
        whole = runtime.evaluate(split).loss
        modules = lora_modules(peft_model)
        for module in adapter.modules:
            levels = [2**power for power in range(module.rank.bit_length()) if 2**power < module.rank]
            curve = {module.rank: whole}
            whole_b, whole_a = (torch.from_numpy(factor) for factor in adapter.factors(module))
            for rank in levels:
                b, a = resized_factors(whole_b, whole_a, rank, 1.0)
                with _factors_set(modules[module.name], b, a):
                    curve[rank] = runtime.evaluate(split).loss
            curves[module.name] = dict(sorted(curve.items()))
    return curves


def greedy_ranks(curves: Mapping[str, Mapping[int, float]], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Steps to higher measured ranks, the largest loss reduction per parameter first, while the budget lasts.

    A step may skip levels that reduce nothing: of all higher levels, the one with the best ratio counts.
    """
    ranks = {name: min(curve) for name, curve in curves.items()}
    left = budget - sum(costs[name] * rank for name, rank in ranks.items())
    queue = [offer for name in curves if (offer := _best_step(name, curves[name], ranks[name], costs[name], left))]
    heapq.heapify(queue)
    while queue:
        _, name, target = heapq.heappop(queue)
        price = costs[name] * (target - ranks[name])
        if price <= left:
            left -= price
            ranks[name] = target
        if offer := _best_step(name, curves[name], ranks[name], costs[name], left):
            heapq.heappush(queue, offer)
    return ranks


def _best_step(name: str, curve: Mapping[int, float], rank: int, cost: int, left: int) -> tuple[float, str, int] | None:
    """`(-reduction per parameter, name, level)` of the best affordable step; None where there is none."""
    steps = [
        (-(curve[rank] - loss) / (cost * (level - rank)), name, level)
        for level, loss in curve.items()
        if level > rank and cost * (level - rank) <= left
    ]
    return min(steps, default=None)


def by_gradient(adapter: AdapterFolder, runtime: Runtime, budget: int) -> dict[str, int]:
    """Water-filling by the energy of the gradient of the loss with respect to each weight of the untrained base."""
    gradients = weight_gradients(runtime, [module.name for module in adapter.modules])
    limits = [min(module.rows, module.columns) for module in adapter.modules]
    spectra = [
        torch.linalg.svdvals(gradients[module.name].double()).numpy()[:limit]
        for module, limit in zip(adapter.modules, limits, strict=True)
    ]
    return _named(adapter, ranks_within([s**2 for s in spectra], _costs(adapter), budget))


def by_eva(adapter: AdapterFolder, runtime: Runtime, budget: int, rank: int) -> dict[str, int]:
    """PEFT's EVA (Paischer et al. 2024): ranks by the variance of a module's inputs that each direction explains.

    EVA distributes ranks and not parameters; a pattern beyond the budget is scaled down.
    """
    config = LoraConfig(
        r=rank,
        target_modules=[module.name for module in adapter.modules],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=EVA_RHO),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about EVA's factors, which only give ranks here
        peft_model = wrapped(runtime.model, config)
        try:
            initialize_lora_eva_weights(peft_model, list(_batches(runtime)), show_progress_bar=False)
            found = {name: int(module.r[ADAPTER]) for name, module in lora_modules(peft_model).items()}
        finally:
            unwrapped(peft_model)
    ranks = [found.get(module.name, 1) for module in adapter.modules]
    costs = _costs(adapter)
    share = min(1.0, budget / sum(one * cost for one, cost in zip(ranks, costs, strict=True)))
    return _named(adapter, [max(1, int(one * share)) for one in ranks])


def _batches(runtime: Runtime) -> Iterator[dict[str, torch.Tensor]]:
    size = runtime.settings.batch_size
    for start in range(0, min(EVA_BATCHES * size, len(runtime.examples("train"))), size):
        batch = runtime.batch("train", range(start, min(start + size, len(runtime.examples("train")))))
        yield {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


@contextmanager
def _factors_set(module: Any, b: torch.Tensor, a: torch.Tensor) -> Iterator[None]:
    """Within the block, factors of a lower rank replace those of a module, whose other ranks are zero."""
    weights = (module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight)
    kept = [weight.detach().clone() for weight in weights]
    rank = b.shape[1]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.zero_()
            weights[0][:rank].copy_(a.reshape(rank, *weights[0].shape[1:]))
            weights[1][:, :rank].copy_(b.reshape(-1, rank, *weights[1].shape[2:]))
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)


def _costs(adapter: AdapterFolder) -> list[int]:
    return [module.rows + module.columns for module in adapter.modules]


def _named(adapter: AdapterFolder, ranks: Sequence[int]) -> dict[str, int]:
    return {module.name: rank for module, rank in zip(adapter.modules, ranks, strict=True)}
