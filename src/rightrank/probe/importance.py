"""Where rank could pay: what each module would gain from each further rank, by four measures.

Every measure ends in ranks of at most the budget's parameters, one for each module and at least 1.
"""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, initialize_lora_eva_weights

from rightrank.engine.adapter import ADAPTER, lora_modules, unwrapped, wrapped
from rightrank.engine.runtime import Runtime
from rightrank.io.adapter_folder import AdapterFolder
from rightrank.io.truncation import resized_factors
from rightrank.maths.spectra import factored_singular_values, ranks_by_water_filling
from rightrank.probe.adapter_runtime import adapter_on
from rightrank.records import SplitName

GRADIENT_ITEMS = 64  # training items that the gradient is averaged over
EVA_BATCHES = 16
EVA_RHO = 2.0  # PEFT's default: at most twice the rank anywhere


def by_spectra(adapter: AdapterFolder, budget: int) -> dict[str, int]:
    """Water-filling by the energy of the trained update: σ² of s·B·A for its parameters."""
    spectra = [factored_singular_values(*adapter.factors(module)) * abs(module.scaling) for module in adapter.modules]
    return _named(adapter, ranks_by_water_filling(spectra, _costs(adapter), budget))


def by_sensitivity(
    adapter: AdapterFolder, runtime: Runtime, budget: int, split: SplitName = "selection"
) -> dict[str, int]:
    """Greedy by held-out loss: the step up the ranks of one module that saves most loss for its parameters.

    Every module is truncated alone, to 1, 2, 4, … below its rank, the others staying whole.
    """
    curves = truncation_sensitivity(adapter, runtime, split)
    return greedy_ranks(curves, dict(zip(curves, _costs(adapter), strict=True)), budget)


def truncation_sensitivity(adapter: AdapterFolder, runtime: Runtime, split: SplitName) -> dict[str, dict[int, float]]:
    """The loss of `split` by module and rank of that module."""
    curves: dict[str, dict[int, float]] = {}
    with adapter_on(runtime, adapter.path) as peft_model:
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
    """Steps up the measured ranks, the one that saves most loss a parameter first, while the budget lasts.

    A step may jump levels that save nothing: of all higher levels the best ratio counts.
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
    """`(-saving a parameter, name, level)` of the best affordable step up; None where there is none."""
    steps = [
        (-(curve[rank] - loss) / (cost * (level - rank)), name, level)
        for level, loss in curve.items()
        if level > rank and cost * (level - rank) <= left
    ]
    return min(steps, default=None)


def by_gradient(adapter: AdapterFolder, runtime: Runtime, budget: int) -> dict[str, int]:
    """Water-filling by the energy of the loss's gradient to each weight, at the base, before any training."""
    gradients = weight_gradients(runtime, [module.name for module in adapter.modules])
    limits = [min(module.rows, module.columns) for module in adapter.modules]
    spectra = [
        torch.linalg.svdvals(gradients[module.name].double()).numpy()[:limit]
        for module, limit in zip(adapter.modules, limits, strict=True)
    ]
    return _named(adapter, ranks_by_water_filling(spectra, _costs(adapter), budget))


def weight_gradients(runtime: Runtime, names: Sequence[str], items: int = GRADIENT_ITEMS) -> dict[str, torch.Tensor]:
    """The gradient of the mean training loss to each named weight of the bare base, over the first `items` items."""
    weights = {name: runtime.model.get_submodule(name).weight for name in names}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        count = min(items, len(runtime.examples("train")))
        size = runtime.settings.batch_size
        for start in range(0, count, size):
            batch = runtime.batch("train", range(start, min(start + size, count)))
            torch.autograd.backward(runtime.losses("train", batch, 1 / count).total)
        return {name: weight.grad.detach().clone() for name, weight in weights.items()}
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None


def by_eva(adapter: AdapterFolder, runtime: Runtime, budget: int, rank: int) -> dict[str, int]:
    """PEFT's EVA: ranks by the variance that each further direction of a module's inputs explains.

    EVA shares out ranks, not parameters; where its pattern costs more than the budget it is scaled down.
    """
    config = LoraConfig(
        r=rank,
        target_modules=[module.name for module in adapter.modules],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=EVA_RHO),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on EVA, which is used only for its ranks
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
    """Factors of a lower rank in the place of a module's own, the rest of its rank at zero."""
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
