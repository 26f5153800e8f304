"""Second moments of an adapter's modules over training examples, for truncation (`adapters.truncation`).

A forward hook on each adapted module gives h = A·x [n, r], and a hook on its output gives g [n, out], from which δ = s·Bᵀ·g
follows. Only r × r sums are stored. A pass costs as much as a training step of the same micro-batch without parameter gradients
and without the optimizer. The peak memory therefore stays below that of a training step, and the fraction of the training time
stays below the fraction of the training tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from rightrank.adapters.truncation import Moments
from rightrank.training.kinds import find_lora_modules

MOMENT_TOKENS = 4096  # see benchmarks/README.md, archive
ZERO_GRADIENT_TOLERANCE = 1e-6  # relative to a batch's largest gradient; a smaller gradient counts as none


@dataclass(frozen=True, slots=True)
class GatheredMoments:
    """Moments by module name in the base model, with the number of tokens that they were computed from."""

    moments: Mapping[str, Moments]
    tokens: int
    notices: tuple[str, ...] = ()  # modules that are truncated by the plain SVD instead, and why


def accumulate_moments(
    peft_model: Any, names: Sequence[str], passes: Iterable[tuple[int, int]], adapter: str
) -> GatheredMoments:
    """Run the passes and return the moments of the named modules.

    Args:
        passes: each item runs a forward and a backward pass and yields the numbers of tokens and labels read.
    """
    # By module, in float32 on the device: the sums of outer products of inputs and of gradients, and the number of rows.
    sums: dict[str, tuple[torch.Tensor, ...]] = {}

    def accumulate(name: str, hidden: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add one pass to the sums. Positions without a gradient (padding, or tokens that reach no label) do not count."""
        hidden, gradients = hidden.float(), gradients.float()
        size = gradients.abs().amax(dim=1, keepdim=True)
        # A product keeps NaN and infinity and needs no device synchronisation, unlike an index.
        is_active = size > ZERO_GRADIENT_TOLERANCE * size.max()
        hidden, gradients = hidden * is_active, gradients * is_active
        moment_sums = hidden.T @ hidden, gradients.T @ gradients, is_active.sum()
        sums[name] = moment_sums if name not in sums else tuple(map(torch.add, moment_sums, sums[name]))

    tokens = labels = 0
    with _observe_rank_space(peft_model, names, accumulate, adapter):
        for pass_tokens, pass_labels in passes:
            tokens, labels = tokens + pass_tokens, labels + pass_labels
    if not labels:
        return GatheredMoments(
            {}, 0, ("truncated by singular values: the training examples that were read have no labels",)
        )
    if not all(bool(torch.isfinite(tensor).all()) for module_sums in sums.values() for tensor in module_sums):
        notice = "a gradient is not finite, so there are no second moments for truncation; the plain SVD is used"
        return GatheredMoments({}, tokens, (notice,))
    moments = {
        name: Moments(
            inputs.cpu().double().numpy() / max(1, int(rows)), gradients.cpu().double().numpy() / max(1, labels)
        )
        for name, (inputs, gradients, rows) in sums.items()
    }
    missing = [name for name in names if name not in sums]
    notice = (
        f"{len(missing)} of {len(names)} modules ({', '.join(missing[:1])}, …) are truncated by singular values: the loss does not depend on "
        "them, or the model computes their layers without calling PEFT's modules (fused kernels)"
    )
    return GatheredMoments(moments, tokens, (notice,) if missing else ())


@contextmanager
def _observe_rank_space(
    peft_model: Any, names: Sequence[str], callback: Callable[[str, torch.Tensor, torch.Tensor], None], adapter: str
) -> Iterator[None]:
    """Call `callback(name, h [n, r], δ [n, r])` for the named modules in every backward pass within the block.

    Parameters get no gradients within the block.
    """
    modules = find_lora_modules(peft_model)
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    handles = [
        modules[name].register_forward_hook(partial(_observe_module, partial(callback, name), adapter))
        for name in names
    ]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)


def _observe_module(
    callback: Callable[[torch.Tensor, torch.Tensor], None],
    adapter: str,
    module: Any,
    inputs: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return output
    if not output.requires_grad:  # no module below the first adapted one requires a gradient
        output.requires_grad_()
    a, b = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
    hidden = inputs[0].detach().flatten(0, -2).to(a.dtype) @ a.T

    def observe_gradient(gradient: torch.Tensor) -> None:
        callback(hidden, module.scaling[adapter] * gradient.detach().flatten(0, -2).to(b.dtype) @ b)

    register: Any = output.register_hook  # untyped in torch
    register(observe_gradient)
    return output
