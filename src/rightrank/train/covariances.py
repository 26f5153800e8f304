"""Second moments of an adapter's modules over training examples, for truncation (`models.truncation`).

A forward hook on each adapted module gives h = A·x [n, r], and a hook on its output gives g [n, out], from which δ = s·Bᵀ·g
follows. Only r × r sums are stored. A pass costs as much as a training step of the same micro-batch without parameter gradients
and without the optimizer. The peak memory therefore stays below that of a training step, and the fraction of the training time
stays below the fraction of the training tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rightrank.data.files import replace_file
from rightrank.data.splits import sample_indices
from rightrank.models.kinds import find_kind
from rightrank.models.kinds.linear import Linear
from rightrank.models.truncation import Moments, save_moments
from rightrank.schema.trials import Arm
from rightrank.train.device import catch_memory_errors
from rightrank.train.multi_lora import ADAPTER, find_lora_modules
from rightrank.train.runtime import Runtime, attach_adapter

MOMENT_TOKENS = 4096  # see benchmarks/README.md, archive
MAX_TOKEN_FRACTION = 0.1  # largest fraction of a training's tokens to read
LENGTH_SAMPLE_SIZE = 256  # examples from which the mean length is estimated
ZERO_GRADIENT_TOLERANCE = 1e-6  # relative to a batch's largest gradient; a smaller gradient counts as none

GradientCallback = Callable[[str, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class GatheredMoments:
    """Moments by module name in the base model, with the numbers of examples and tokens that they were computed from."""

    moments: Mapping[str, Moments]
    examples: int
    tokens: int
    notices: tuple[str, ...] = ()  # modules that are truncated by the plain SVD instead, and why


def gather_moments(
    runtime: Runtime, peft_model: Any, examples: Sequence[int], tokens: int = MOMENT_TOKENS
) -> GatheredMoments:
    """Gather the moments of the adapter that PEFT has loaded on the runtime's base, over training examples in the given order.

    Modules whose update is not a plain product of matrices (DoRA, embeddings, experts) get no moments. If memory runs out or a
    gradient is not finite, no module does. A notice reports each case.

    Args:
        peft_model: PEFT's model around `runtime.model`; it does not have to be trainable.
        examples: indices in the training split, preferably of examples that the adapter was not trained on.
        tokens: the number of tokens to read. Complete micro-batches of `batch_size` are read until it is reached.
    """
    adapters = find_lora_modules(peft_model)
    # These modules add s·B·(A·x) to their output.
    linear_names = [name for name, module in adapters.items() if isinstance(find_kind(module), Linear)]
    num_excluded = len(adapters) - len(linear_names)
    note = f"{num_excluded} modules (DoRA, embeddings or experts) have no second moments and are truncated by the plain SVD"
    notices = (note,) if num_excluded else ()
    head = runtime.model.get_output_embeddings()
    if linear_names and all(
        adapters[name] is head for name in linear_names
    ):  # the loss computes the head itself, on frozen inputs
        notices, linear_names = (
            (*notices, "only the output head is adapted; it has no second moments and is truncated by the plain SVD"),
            [],
        )
    if not linear_names:
        return GatheredMoments({}, 0, 0, notices)
    batches = list(_make_micro_batches(runtime, examples, tokens))
    runtime.expect_examples("train", [index for indices in batches for index in indices])

    def run_passes() -> Iterator[tuple[int, int, int]]:
        for indices in batches:
            runtime.compute_losses("train", runtime.make_batch("train", indices), 1.0, backward=True)
            encoded = [runtime.data.splits["train"][index] for index in indices]
            read = sum(example.length for example in encoded)
            yield len(indices), read, sum(map(runtime.data.get_loss_weight, encoded))

    with catch_memory_errors() as reasons, runtime.use_gradient_checkpointing(), runtime.disable_dropout():
        gathered = accumulate_moments(peft_model, linear_names, run_passes())
    if reasons:
        return GatheredMoments({}, 0, 0, (f"no moments for truncation: {reasons[0]}; the plain SVD is used",))
    return replace(gathered, notices=(*notices, *gathered.notices))


def accumulate_moments(
    peft_model: Any, names: Sequence[str], passes: Iterable[tuple[int, int, int]], adapter: str = ADAPTER
) -> GatheredMoments:
    """Run the passes and return the moments of the named modules.

    Args:
        passes: each item runs a forward and a backward pass and yields the numbers of examples, tokens and labels read.
    """
    # By module, in float32 on the device: the sums of outer products of inputs and of gradients, and the number of rows.
    sums: dict[str, tuple[torch.Tensor, ...]] = {}

    def accumulate(name: str, hidden: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add one pass to the sums. Positions without a gradient (padding, or tokens that reach no label) do not count."""
        hidden, gradients = hidden.float(), gradients.float()
        size = gradients.abs().amax(dim=1, keepdim=True)
        is_active = (
            size > ZERO_GRADIENT_TOLERANCE * size.max()
        )  # a product keeps NaN and infinity and needs no device synchronisation, unlike an index
        hidden, gradients = hidden * is_active, gradients * is_active
        moment_sums = hidden.T @ hidden, gradients.T @ gradients, is_active.sum()
        sums[name] = moment_sums if name not in sums else tuple(map(torch.add, moment_sums, sums[name]))

    counts = np.zeros(3, dtype=int)
    with observe_rank_space(peft_model, names, accumulate, adapter):
        for pass_counts in passes:
            counts += pass_counts
    examples, tokens, labels = counts.tolist()
    if not labels:
        return GatheredMoments(
            {},
            0,
            0,
            ("truncated by singular values: the training examples have no labels within the tokens that were read",),
        )
    if not all(bool(torch.isfinite(tensor).all()) for module_sums in sums.values() for tensor in module_sums):
        notice = "a gradient is not finite, so there are no second moments for truncation; the plain SVD is used"
        return GatheredMoments({}, examples, tokens, (notice,))
    moments = {
        name: Moments(
            inputs.cpu().double().numpy() / max(1, int(rows)), gradients.cpu().double().numpy() / max(1, labels)
        )
        for name, (inputs, gradients, rows) in sums.items()
    }
    missing = len(names) - len(sums)
    notice = (
        f"{missing} of {len(names)} modules are truncated by singular values: the model computes their layers without calling PEFT's modules "
        "(fused kernels), so second moments cannot be measured"
    )
    return GatheredMoments(moments, examples, tokens, (notice,) if missing else ())


def gather_unseen_moments(runtime: Runtime, peft_model: Any, seed: int, steps: int) -> GatheredMoments:
    """Gather moments over the examples that a training of `seed` would read after its `steps`.

    If the training saw every example, it reads them again. At most `MOMENT_TOKENS` tokens are read, and at most
    `MAX_TOKEN_FRACTION` of the training's tokens.
    """
    examples = [index for batch in runtime.plan_batches(seed, 2 * steps)[steps:] for index in batch]
    encoded = runtime.data.splits["train"]
    sample = sample_indices(len(encoded), LENGTH_SAMPLE_SIZE)
    mean_tokens = sum(encoded[index].length for index in sample) / len(sample)
    training_tokens = steps * runtime.settings.examples_per_step * mean_tokens
    return gather_moments(
        runtime, peft_model, examples, max(1, min(MOMENT_TOKENS, int(MAX_TOKEN_FRACTION * training_tokens)))
    )


def ensure_moments(runtime: Runtime, arm: Arm, adapter: Path, path: Path) -> tuple[str, ...]:
    """Gather the moments of a finished training's adapter into `path` unless the file exists; return notices.

    Args:
        arm: a truncation of the training.
        adapter: the folder of the training's adapter.
        path: a file among the run's checkpoints. If the adapter gets no moments, the file is empty.
    """
    if path.exists():
        return ()
    with attach_adapter(runtime, adapter) as peft_model:
        gathered = gather_unseen_moments(runtime, peft_model, arm.seed, runtime.steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as temporary:
        save_moments(temporary, gathered.moments)
    return gathered.notices


def _make_micro_batches(runtime: Runtime, examples: Sequence[int], tokens: int) -> Iterator[Sequence[int]]:
    """Yield training examples in micro-batches until the number of tokens is reached."""
    encoded, size = runtime.data.splits["train"], runtime.settings.batch_size
    read = 0
    for start in range(0, len(examples), size):
        if read >= tokens:
            return
        indices = examples[start : start + size]
        read += sum(encoded[index].length for index in indices)
        yield indices


@contextmanager
def observe_rank_space(
    peft_model: Any, names: Sequence[str], callback: GradientCallback, adapter: str = ADAPTER
) -> Iterator[None]:
    """Call `callback(name, h [n, r], δ [n, r])` for the named modules in every backward pass within the block.

    Parameters get no gradients within the block.
    """
    modules = find_lora_modules(peft_model)
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    handles = [modules[name].register_forward_hook(partial(_observe_module, name, callback, adapter)) for name in names]
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
    name: str,
    callback: GradientCallback,
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
        callback(name, hidden, module.scaling[adapter] * gradient.detach().flatten(0, -2).to(b.dtype) @ b)

    register: Any = output.register_hook  # untyped in torch
    register(observe_gradient)
    return output
