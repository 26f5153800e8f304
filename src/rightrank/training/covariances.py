"""Second moments of an adapter that the engine has trained, over examples that the training did not read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rightrank.adapters.truncation import save_moments
from rightrank.data.files import replace_file
from rightrank.data.sampling import sample_indices
from rightrank.schema.trials import Arm
from rightrank.training.device import catch_memory_errors
from rightrank.training.kinds import Linear, find_kind, find_lora_modules
from rightrank.training.moments import MOMENT_TOKENS, GatheredMoments, accumulate_moments
from rightrank.training.multi_lora import ADAPTER
from rightrank.training.runtime import Runtime, attach_adapter

MAX_TOKEN_FRACTION = 0.1  # largest fraction of a training's tokens to read
LENGTH_SAMPLE_SIZE = 256  # examples from which the mean length is estimated


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
        gathered = accumulate_moments(peft_model, linear_names, run_passes(), ADAPTER)
    if reasons:
        return GatheredMoments({}, 0, 0, (f"no moments for truncation: {reasons[0]}; the plain SVD is used",))
    return replace(gathered, notices=(*notices, *gathered.notices))


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
