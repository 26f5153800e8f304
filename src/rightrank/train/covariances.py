"""Second moments of an adapter's modules over training examples, for truncation (`models.truncation`).

A forward hook on each adapted module gives h = A·x [n, r], and a hook on its output g [n, out], from which δ = s·Bᵀ·g. Only
r × r sums are kept. A pass costs a training step of the same micro-batch without gradients to parameters and without the
optimizer, so the peak memory stays below that of a training step, and the share of a training's time below the share of
its tokens.
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

from rightrank.data.files import replacing
from rightrank.data.splits import sample_indices
from rightrank.models.kinds import kind_of
from rightrank.models.kinds.linear import Linear
from rightrank.models.truncation import Moments, save_moments
from rightrank.schema.trials import Arm
from rightrank.train.device import memory_permitting
from rightrank.train.multi_lora import ADAPTER, lora_modules
from rightrank.train.runtime import Runtime, adapter_attached

MOMENT_TOKENS = 4096  # see docs/explanation/science.md, archive
MAX_SHARE = 0.1  # of the tokens of a training
LENGTH_ROWS = 256  # by which the mean length of a training's rows is estimated
ROUNDING = 1e-6  # of a batch's largest gradient: below it a position has none

See = Callable[[str, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class Gathered:
    """Moments by module name in the base model, and what they rest on."""

    moments: Mapping[str, Moments]
    examples: int
    tokens: int
    notices: tuple[str, ...] = ()  # what is truncated by the plain SVD instead, and why


def gather_moments(runtime: Runtime, peft_model: Any, examples: Sequence[int], tokens: int = MOMENT_TOKENS) -> Gathered:
    """Moments of the adapter that PEFT has on the runtime's base, over training examples in the order given.

    Modules whose update is not a plain product of matrices (DoRA, embeddings, experts), and all modules where memory
    runs out or a gradient is not finite, get none; a notice says so.

    Args:
        peft_model: PEFT's model around `runtime.model`, which need not be trainable.
        examples: Numbers in the training split, best those that the adapter was not trained on.
        tokens: How many tokens to read; whole micro-batches of `batch_size` are read until then, or all examples.
    """
    adapted = lora_modules(peft_model)
    # Modules that add s·B·(A·x) to their output.
    plain = [name for name, module in adapted.items() if isinstance(kind_of(module), Linear)]
    left_out = len(adapted) - len(plain)
    note = f"{left_out} modules have no moments (DoRA, embeddings or experts): the plain SVD is used there"
    notices = (note,) if left_out else ()
    head = runtime.model.get_output_embeddings()
    if plain and all(adapted[name] is head for name in plain):  # the loss computes the head itself, on frozen inputs
        notices, plain = (*notices, "the head alone is adapted and has no moments: the plain SVD is used"), []
    if not plain:
        return Gathered({}, 0, 0, notices)
    batches = list(_micro_batches(runtime, examples, tokens))
    runtime.expect("train", [index for indices in batches for index in indices])

    def passes() -> Iterator[tuple[int, int, int]]:
        for indices in batches:
            runtime.losses("train", runtime.batch("train", indices), 1.0, backward=True)
            encoded = [runtime.data.splits["train"][index] for index in indices]
            read = sum(example.length for example in encoded)
            yield len(indices), read, sum(map(runtime.data.loss_weight, encoded))

    with memory_permitting() as reasons, runtime.recomputing(), runtime.without_dropout():
        gathered = gather_passes(peft_model, plain, passes())
    if reasons:
        return Gathered({}, 0, 0, (f"no moments for truncation: {reasons[0]}; the plain SVD is used",))
    return replace(gathered, notices=(*notices, *gathered.notices))


def gather_passes(
    peft_model: Any, names: Sequence[str], passes: Iterable[tuple[int, int, int]], adapter: str = ADAPTER
) -> Gathered:
    """Moments of the named modules over passes that this runs, whoever calls the model.

    Args:
        passes: Each is a forward and a backward pass; its value has the examples, tokens and labels that were read.
    """
    # By module, in float32 on the device: the outer products of inputs and of gradients, and the rows behind the inputs'.
    sums: dict[str, tuple[torch.Tensor, ...]] = {}

    def see(name: str, hidden: torch.Tensor, gradients: torch.Tensor) -> None:
        """Positions without a gradient (padding, what reaches no label) are left out of the inputs too."""
        hidden, gradients = hidden.float(), gradients.float()
        size = gradients.abs().amax(dim=1, keepdim=True)
        seen = size > ROUNDING * size.max()  # multiplied, not indexed: NaN and infinity stay, and no device waits
        hidden, gradients = hidden * seen, gradients * seen
        parts = hidden.T @ hidden, gradients.T @ gradients, seen.sum()
        sums[name] = parts if name not in sums else tuple(map(torch.add, parts, sums[name]))

    counts = np.zeros(3, dtype=int)
    with rank_space(peft_model, names, see, adapter):
        for read in passes:
            counts += read
    examples, tokens, labels = counts.tolist()
    if not labels:
        return Gathered(
            {}, 0, 0, ("truncated by singular values: the training examples that were read have no labels",)
        )
    if not all(bool(torch.isfinite(part).all()) for parts in sums.values() for part in parts):
        notice = "no moments for truncation: a gradient is not finite; the plain SVD is used"
        return Gathered({}, examples, tokens, (notice,))
    moments = {
        name: Moments(
            inputs.cpu().double().numpy() / max(1, int(rows)), gradients.cpu().double().numpy() / max(1, labels)
        )
        for name, (inputs, gradients, rows) in sums.items()
    }
    missing = len(names) - len(sums)
    notice = (
        f"{missing} of {len(names)} modules truncated by singular values: the model computes their layers without calling PEFT's modules "
        "(fused kernels), so that no second moments arrive"
    )
    return Gathered(moments, examples, tokens, (notice,) if missing else ())


def gather_unseen_moments(runtime: Runtime, peft_model: Any, seed: int, steps: int) -> Gathered:
    """Moments over the examples that a training of `seed` reads after its `steps`; where it saw all, its own are read again.

    They are `MOMENT_TOKENS`, or the share of the training's tokens that gathering may take where that is less.
    """
    examples = [index for batch in runtime.batch_plan(seed, 2 * steps)[steps:] for index in batch]
    encoded = runtime.data.splits["train"]
    sample = sample_indices(len(encoded), LENGTH_ROWS)
    mean = sum(encoded[index].length for index in sample) / len(sample)
    training = steps * runtime.settings.items_per_step * mean
    return gather_moments(runtime, peft_model, examples, max(1, min(MOMENT_TOKENS, int(MAX_SHARE * training))))


def ensure_moments(runtime: Runtime, arm: Arm, adapter: Path, path: Path) -> tuple[str, ...]:
    """Gather the moments of a finished training's adapter into `path` before it is truncated, once; return notices.

    Args:
        arm: A truncation of the training.
        adapter: The folder that holds the training's adapter.
        path: A file beside the run's checkpoints. An adapter that gets no moments leaves an empty one.
    """
    if path.exists():
        return ()
    with adapter_attached(runtime, adapter) as peft_model:
        gathered = gather_unseen_moments(runtime, peft_model, arm.seed, runtime.steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_moments(temporary, gathered.moments)
    return gathered.notices


def _micro_batches(runtime: Runtime, examples: Sequence[int], tokens: int) -> Iterator[Sequence[int]]:
    """Training examples in micro-batches until so many tokens are reached."""
    encoded, size = runtime.data.splits["train"], runtime.settings.batch_size
    read = 0
    for start in range(0, len(examples), size):
        if read >= tokens:
            return
        indices = examples[start : start + size]
        read += sum(encoded[index].length for index in indices)
        yield indices


@contextmanager
def rank_space(peft_model: Any, names: Sequence[str], see: See, adapter: str = ADAPTER) -> Iterator[None]:
    """Within the block, every backward pass gives `see(name, h [n, r], δ [n, r])` of the named modules; no parameter gets a gradient."""
    modules = lora_modules(peft_model)
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    handles = [modules[name].register_forward_hook(partial(_hook, name, see, adapter)) for name in names]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)


def _hook(
    name: str, see: See, adapter: str, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return output
    if not output.requires_grad:  # nothing below the first adapted module asks for a gradient
        output.requires_grad_()
    a, b = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
    hidden = inputs[0].detach().flatten(0, -2).to(a.dtype) @ a.T

    def back(gradient: torch.Tensor) -> None:
        see(name, hidden, module.scaling[adapter] * gradient.detach().flatten(0, -2).to(b.dtype) @ b)

    register: Any = output.register_hook  # untyped in torch
    register(back)
    return output
