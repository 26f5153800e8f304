"""Initialisations that begin from the base's weights or from the data, while the base itself stays as it is.

PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024) put a part of W into B₀·A₀ and take it out of the base. All trainings of
a run share one base, so here the part taken out is carried by the adapter: W + s·(B·A - B₀·A₀) as one adapter of twice the
rank, [A; A₀] and [B, -B₀], of which the second half is frozen. It is what PEFT makes of such an adapter on saving with
`path_initial_model_for_weight_conversion`. EVA (Paischer et al. 2024) takes A from the directions in which a module's
inputs vary most, over a few training batches, and B zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.incremental_pca import IncrementalPCA

from rightrank.errors import ModelError

EVA_BATCHES = 8  # training batches whose inputs are looked at
ROWS_EACH = 2  # rows for each direction, at least, before a step of the incremental analysis

Pair = tuple[torch.Tensor, torch.Tensor]


def start_from_weights(module: Any, adapter: str, init: str, rank: int) -> None:
    """Fill one adapted module's A [2r, in] and B [out, 2r] from its base weight; the second half gets no gradient.

    Raises:
        ModelError: the weight is quantised.
    """
    weight = module.get_base_layer().weight
    if not weight.is_floating_point() or weight.dim() != 2:
        raise ModelError(f"init={init} needs the base's weights as they are; a base in 4 or 8 bits has none")
    matrix = weight.detach().float()
    a, b = factors_of(matrix.T if module.fan_in_fan_out else matrix, init, rank, module.scaling[adapter])
    whole_a, whole_b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    whole_a.copy_(torch.cat([a, a]).to(whole_a))
    whole_b.copy_(torch.cat([b, -b], dim=1).to(whole_b))
    for whole in (whole_a, whole_b):
        whole.requires_grad_(True)  # of a second adapter PEFT asks for none yet
    whole_a.register_hook(_first_rows_of(rank))
    whole_b.register_hook(_first_columns_of(rank))


def factors_of(weight: torch.Tensor, init: str, rank: int, scale: float) -> Pair:
    """A [rank, in] and B [out, rank] as PEFT draws them from `weight` [out, in]: PiSSA shares the leading singular values
    out over both, so that scale·B·A is the best approximation; OLoRA takes Q and R.
    """
    if init == "pissa":
        u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
        root = (sigma[:rank] / scale).sqrt()
        return root[:, None] * vt[:rank], u[:, :rank] * root
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


def _first_rows_of(rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda gradient: torch.cat([gradient[:rank], torch.zeros_like(gradient[rank:])])


def _first_columns_of(rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda gradient: torch.cat([gradient[:, :rank], torch.zeros_like(gradient[:, rank:])], dim=1)


@torch.no_grad()
def input_directions(
    model: Any, names: Sequence[str], rank: int, batches: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Module → [rank, in]: the leading principal directions of its inputs over the batches' real tokens.

    Raises:
        ModelError: fewer tokens than directions.
    """
    analyses = {name: _Directions(rank) for name in names}
    for batch in batches:
        mask = batch["attention_mask"].bool()
        with _inputs_seen(model, names, lambda name, rows, mask=mask: analyses[name].add(rows[mask])):  # type: ignore[misc]
            model(**batch)
    return {name: analysis.rows() for name, analysis in analyses.items()}


class _Directions:
    """PEFT's incremental principal components, fed with enough rows at a time."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._analysis: Any = IncrementalPCA(n_components=rank, copy=True)
        self._waiting: list[torch.Tensor] = []
        self._is_fitted = False

    def add(self, rows: torch.Tensor) -> None:
        self._waiting.append(rows.float())
        if sum(len(part) for part in self._waiting) >= ROWS_EACH * self._rank:
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
    """Within the block, `see` gets [batch, tokens, in] of every named module's passes."""

    def hook_of(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        return lambda _, inputs: see(name, inputs[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_of(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
