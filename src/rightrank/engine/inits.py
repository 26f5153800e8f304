"""Initialisations from the base's weights or from the data that leave the base unchanged.

PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024) move a part B₀·A₀ of W into the adapter and subtract it from the base.
All arms of a run share one base, so here the adapter subtracts it: W + s·(B·A - B₀·A₀) is one adapter of twice the rank,
[A; A₀] and [B, -B₀], whose second half is frozen. PEFT writes the same adapter when it saves with
`path_initial_model_for_weight_conversion`. EVA (Paischer et al. 2024) sets A to the directions in which a module's inputs
vary most over a few training batches, and B to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.incremental_pca import IncrementalPCA

from rightrank.errors import ModelError

EVA_BATCHES = 8  # training batches whose inputs are analysed
MIN_ROWS_PER_DIRECTION = 2  # before a step of the incremental analysis

Pair = tuple[torch.Tensor, torch.Tensor]


def start_from_weights(module: Any, adapter: str, init: str, rank: int) -> None:
    """Set an adapted module's A [2r, in] and B [out, 2r] from its base weight; the second half gets no gradient.

    Raises:
        ModelError: the weight is quantised.
    """
    weight = module.get_base_layer().weight
    if not weight.is_floating_point() or weight.dim() != 2:
        raise ModelError(f"init={init} needs the base's unquantised weights; load the base in 16 or 32 bits")
    matrix = weight.detach().float()
    a, b = factors_of(matrix.T if module.fan_in_fan_out else matrix, init, rank, module.scaling[adapter])
    whole_a, whole_b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    whole_a.copy_(torch.cat([a, a]).to(whole_a))
    whole_b.copy_(torch.cat([b, -b], dim=1).to(whole_b))
    for whole in (whole_a, whole_b):
        whole.requires_grad_(True)  # PEFT enables gradients for its active adapter only
    whole_a.register_hook(lambda gradient: torch.cat([gradient[:rank], torch.zeros_like(gradient[rank:])]))
    whole_b.register_hook(lambda gradient: torch.cat([gradient[:, :rank], torch.zeros_like(gradient[:, rank:])], dim=1))


def factors_of(weight: torch.Tensor, init: str, rank: int, scale: float) -> Pair:
    """A [rank, in] and B [out, rank] as PEFT computes them from `weight` [out, in].

    PiSSA: weight = U·Σ·Vᵀ, A = (Σᵣ/scale)^½·Vᵣᵀ and B = Uᵣ·(Σᵣ/scale)^½, so that scale·B·A is the best approximation of
    rank r. OLoRA: weight = Q·R, A = Rᵣ and B = Qᵣ.
    """
    if init == "pissa":
        u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
        root = (sigma[:rank] / scale).sqrt()
        return root[:, None] * vt[:rank], u[:, :rank] * root
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


@torch.no_grad()
def input_directions(
    model: Any, names: Sequence[str], rank: int, batches: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """By module name, [rank, in]: the leading principal directions of the module's inputs over the batches' real tokens.

    Raises:
        ModelError: the batches have fewer tokens than `rank`.
    """
    analyses = {name: _Directions(rank) for name in names}
    for batch in batches:
        mask = batch["attention_mask"].bool()
        with _inputs_seen(model, names, lambda name, rows, mask=mask: analyses[name].add(rows[mask])):  # type: ignore[misc]
            model(**batch)
    return {name: analysis.rows() for name, analysis in analyses.items()}


class _Directions:
    """PEFT's incremental principal component analysis, given enough rows at a time."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._analysis: Any = IncrementalPCA(n_components=rank, copy=True)
        self._waiting: list[torch.Tensor] = []
        self._is_fitted = False

    def add(self, rows: torch.Tensor) -> None:
        self._waiting.append(rows.float())
        if sum(len(part) for part in self._waiting) >= MIN_ROWS_PER_DIRECTION * self._rank:
            self._fit()

    def rows(self) -> torch.Tensor:
        """[rank, in]"""
        if not self._is_fitted:
            if sum(len(part) for part in self._waiting) < self._rank:
                raise ModelError(f"init=eva: {EVA_BATCHES} batches have fewer tokens than rank {self._rank}")
            self._fit()
        found: torch.Tensor = self._analysis.components_
        return found

    def _fit(self) -> None:
        self._analysis.partial_fit(torch.cat(self._waiting))
        self._waiting = []
        self._is_fitted = True


@contextmanager
def _inputs_seen(model: Any, names: Sequence[str], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Within the block, `see` receives the inputs [batch, tokens, in] of every pass of the named modules."""

    def hook_of(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        return lambda _, inputs: see(name, inputs[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_of(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
