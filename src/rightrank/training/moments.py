"""Second moments of an adapter's modules over examples that its training did not read; they weight its truncation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rightrank.adapters.truncation import save_moments
from rightrank.data.files import replace_file
from rightrank.data.rows import sample_indices
from rightrank.evaluation.attached_adapters import attach_adapter
from rightrank.evaluation.device import catch_memory_errors
from rightrank.evaluation.evaluator import Evaluator
from rightrank.evaluation.peft_models import (
    ADAPTER,
    MOMENT_TOKENS,
    GatheredMoments,
    accumulate_moments,
    find_lora_modules,
)
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm
from rightrank.training.multi_lora import Linear, find_kind
from rightrank.training.runtime import Runtime, plan_training_batches, use_gradient_checkpointing

MAX_TOKEN_FRACTION = 0.1  # largest fraction of a training's tokens to read for moments
LENGTH_SAMPLE_SIZE = 256  # examples from which the mean length is estimated


def gather_moments(
    evaluator: Evaluator,
    settings: SelectSettings,
    peft_model: Any,
    examples: Sequence[int],
    tokens: int = MOMENT_TOKENS,
) -> GatheredMoments:
    """Gather the moments of the adapter that PEFT has loaded on the evaluator's base, over training examples in the given order.

    Modules whose update is not a plain product of matrices (DoRA, embeddings, experts) get no moments. If memory runs out or a
    gradient is not finite, no module does. A notice reports each case.

    Args:
        peft_model: PEFT's model around `evaluator.model`; it does not have to be trainable.
        examples: indices in the training split, preferably of examples that the adapter was not trained on.
        tokens: the number of tokens to read. Complete micro-batches of `batch_size` are read until it is reached.
    """
    adapters = find_lora_modules(peft_model)
    head = evaluator.model.get_output_embeddings()
    # These modules add s·B·(A·x) to their output.
    linear_names = [name for name, module in adapters.items() if isinstance(find_kind(module), Linear)]
    if all(adapters[name] is head for name in linear_names):  # the loss computes the head itself, on frozen inputs
        linear_names = []
    num_excluded = len(adapters) - len(linear_names)
    note = f"{num_excluded} modules (DoRA, embeddings, experts or the head alone) have no second moments and are truncated by the plain SVD"
    notices = (note,) if num_excluded else ()
    if not linear_names:
        return GatheredMoments({}, 0, notices)

    def run_passes() -> Iterator[tuple[int, int]]:
        read = 0
        size = settings.batch_size
        for start in range(0, len(examples), size):
            if read >= tokens:
                return
            batch = evaluator.make_batch("train", examples[start : start + size])
            evaluator.compute_losses("train", batch, 1.0, backward=True)
            read += batch.tokens
            encoded = (evaluator.data.splits["train"][index] for index in batch.indices)
            yield batch.tokens, sum(map(evaluator.data.get_loss_weight, encoded))

    with (
        catch_memory_errors() as reasons,
        use_gradient_checkpointing(evaluator.model, settings),
        evaluator.disable_dropout(),
    ):
        gathered = accumulate_moments(peft_model, linear_names, run_passes(), ADAPTER)
    if reasons:
        return GatheredMoments({}, 0, (f"no moments for truncation: {reasons[0]}; the plain SVD is used",))
    return replace(gathered, notices=(*notices, *gathered.notices))


def gather_unseen_moments(
    evaluator: Evaluator, settings: SelectSettings, peft_model: Any, seed: int, steps: int
) -> GatheredMoments:
    """Gather moments over the examples that a training of `seed` would read after its `steps`.

    If the training saw every example, it reads them again. At most `MOMENT_TOKENS` tokens are read, and at most
    `MAX_TOKEN_FRACTION` of the training's tokens.
    """
    plan = plan_training_batches(evaluator.data, settings, 2 * steps, seed)[steps:]
    examples = [index for batch in plan for index in batch]
    encoded = evaluator.data.splits["train"]
    sample = sample_indices(len(encoded), LENGTH_SAMPLE_SIZE)
    mean_tokens = sum(encoded[index].length for index in sample) / len(sample)
    training_tokens = steps * settings.examples_per_step * mean_tokens
    tokens = max(1, min(MOMENT_TOKENS, int(MAX_TOKEN_FRACTION * training_tokens)))
    return gather_moments(evaluator, settings, peft_model, examples, tokens)


def ensure_moments(runtime: Runtime, arm: Arm, adapter: Path, path: Path) -> tuple[str, ...]:
    """Gather the moments of a finished training's adapter into `path` unless the file exists; return notices.

    Args:
        arm: a truncation of the training.
        adapter: the folder of the training's adapter.
        path: a file among the run's checkpoints. If the adapter gets no moments, the file is empty.
    """
    if path.exists():
        return ()
    with attach_adapter(runtime.evaluator, adapter) as peft_model:
        gathered = gather_unseen_moments(runtime.evaluator, runtime.settings, peft_model, arm.seed, runtime.steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as temporary:
        save_moments(temporary, gathered.moments)
    return gathered.notices
