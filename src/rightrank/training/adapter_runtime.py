"""Existing adapters on a base: build a runtime for one, attach it, and gather the second moments of its modules.

Moments are gathered over examples that the training of the adapter did not read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftType

from rightrank.adapters.adapter_files import AdapterFolder, ensure_peft_format
from rightrank.adapters.adapter_folders import BASE_FILE, CONFIG_FILE, read_adapter_config, require_kept_base
from rightrank.adapters.truncation import save_moments
from rightrank.bases.base_models import LoadedModel, load_base, read_identity
from rightrank.bases.model_sources import normalize_model_name, require_model
from rightrank.data.files import replace_file
from rightrank.data.rows import sample_indices
from rightrank.data.splits import DataSplits
from rightrank.evaluation.device import catch_memory_errors
from rightrank.evaluation.peft_models import (
    ADAPTER,
    MOMENT_TOKENS,
    GatheredMoments,
    accumulate_moments,
    find_lora_modules,
    set_update_to_zero,
    suppress_peft_warnings,
    unwrap_base,
)
from rightrank.evaluation.tokens import encode_splits
from rightrank.schema.errors import ModelError, SettingsError, get_first_line, quote_value
from rightrank.schema.events import EvaluationProgress
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm
from rightrank.training.multi_lora import Linear, find_kind
from rightrank.training.runtime import Runtime

MAX_TOKEN_FRACTION = 0.1  # largest fraction of a training's tokens to read for moments
LENGTH_SAMPLE_SIZE = 256  # examples from which the mean length is estimated


def make_adapter_runtime(
    adapter: AdapterFolder, base: str | None, splits: DataSplits, settings: SelectSettings, cache: Path
) -> Runtime:
    """Make a runtime that measures an adapter and its truncations.

    Args:
        base: a model; None loads the one that the configuration names.
        cache: a folder for temporary files.

    Raises:
        SettingsError: the metric needs more than an evaluation of losses.
        ModelError: no base is named, the base cannot be loaded, it is not the adapter's base, or it lacks a module.
        DataError: the data cannot be used.
    """
    if adapter.path.is_file():
        raise ModelError(f"{adapter.path}: PEFT loads no such file onto a base model; choose by --rank")
    if not settings.metric_specs[0].is_eval_metric or settings.metrics:
        raise SettingsError(
            f"metric {settings.metric_name!r}: this command measures adapters by loss or accuracy; give one of them, and leave metrics out"
        )
    parameters = dict.fromkeys(module.address for module in adapter.modules if module.kind == "expert")
    updates = {
        "ranks": (1,),
        "target_modules": tuple(module.name for module in adapter.modules if module.kind != "expert"),
        "target_parameters": tuple(parameters),
        "layers_to_transform": None,
    }
    settings = settings.model_copy(update=updates)
    base = base or adapter.base_model
    if base is None:
        raise ModelError(f"{adapter.path}: the configuration names no base model; give one with --base MODEL")
    require_model(base)
    loaded = load_base(base, settings, splits.summary.classes)
    require_matching_base(adapter.path, loaded)
    # A fully trained module may lie below the first adapter, where a cached prefix would be stale.
    cache_folder = None if adapter.other_keys else cache
    return Runtime(loaded, encode_splits(splits, loaded, settings), settings, 1, cache_folder)


def report_evaluation_progress(
    runtime: Runtime, description: str, report: Callable[[EvaluationProgress], None], num_evaluations: int = 1
) -> None:
    """Report the progress of the runtime's evaluations under `description` from now on.

    Args:
        num_evaluations: The number of evaluations that are left, with this one. The reported total covers all of them.
    """
    start_time = time.perf_counter()

    def on_evaluated(num_evaluated: int, num_total: int) -> None:
        total, seconds = num_total * num_evaluations, time.perf_counter() - start_time
        report(EvaluationProgress(label=description, examples=num_evaluated, total_examples=total, seconds=seconds))

    runtime.on_evaluated = on_evaluated


def require_matching_base(adapter: Path, base: LoadedModel) -> None:
    """Raise if the adapter was trained on a different base. Every command that loads an adapter onto a base calls this function.

    The check compares the identity in the adapter's `base.json`. Without that file it compares the last component of the names.

    Raises:
        ModelError: the base differs, or `base.json` is damaged.
    """
    identity_file = adapter / BASE_FILE
    if identity_file.is_file():
        stored_identity = read_identity(identity_file)
        if (difference := stored_identity.find_difference(base.identity)) is not None:
            raise ModelError(
                f"{adapter}: it was trained on a different base, {stored_identity.name}, than {base.name} ({difference}); give the base that it "
                "was trained on"
            )
        return
    configured_name = read_adapter_config(adapter).get("base_model_name_or_path")
    if configured_name and normalize_model_name(str(configured_name)) != normalize_model_name(base.name):
        raise ModelError(
            f"{adapter}: it was trained on {configured_name!r}, not on {base.name!r}; give that base, or if they are the same model, write the "
            f"new name into its {CONFIG_FILE} (base_model_name_or_path)"
        )


@contextmanager
def attach_adapter(runtime: Runtime, folder: Path | None, *, is_zero: bool = False) -> Iterator[Any]:
    """Attach an adapter folder to the runtime's base and yield the PeftModel. The base is restored when the block ends.

    Args:
        folder: the adapter folder; None yields the base alone.
        is_zero: set the update to zero; other trained modules, such as a head, stay.

    Raises:
        ModelError: PEFT cannot attach this adapter to this base or would change the base, or the adapter's task is not that of the data.
    """
    if folder is None:
        yield runtime.model
        return
    _require_attachable(runtime, folder)
    try:
        with suppress_peft_warnings(), ensure_peft_format(folder) as adapter_folder:
            peft_model: Any = PeftModel.from_pretrained(runtime.model, str(adapter_folder))
    except (RuntimeError, TypeError, ValueError) as error:  # of tensors, of values of another type, and of names
        hint = runtime.settings.load_error_hint("give the base that it was trained on")
        raise ModelError(
            f"{folder}: PEFT cannot attach it to {runtime.loaded.name} ({get_first_line(error)}); {hint}"
        ) from None
    peft_model.train(False)
    if is_zero:
        set_update_to_zero(peft_model, peft_model.active_adapter)
    try:
        yield peft_model
    finally:
        unwrap_base(peft_model)


def _require_attachable(runtime: Runtime, folder: Path) -> None:
    """Raise for what PEFT's own errors would not explain: an adapter of another task than the data, or one that changes the base."""
    config = read_adapter_config(folder)
    require_kept_base(folder, config)
    method = config.get("peft_type", "LORA")
    if method not in PeftType.__members__:
        raise ModelError(f"{folder}: PEFT has no peft_type {quote_value(method)}; correct its {CONFIG_FILE}")
    task = config.get("task_type")
    if task in ("CAUSAL_LM", "SEQ_CLS") and (task == "SEQ_CLS") != runtime.data.is_classification:
        raise ModelError(
            f"{folder}: its task_type {task} does not fit data of the form {runtime.data.summary.form}; a classifier (SEQ_CLS) needs `text` "
            "and `label`, and a language model (CAUSAL_LM) any other form"
        )


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
    adapters, head = find_lora_modules(peft_model), runtime.model.get_output_embeddings()
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
        read, size = 0, runtime.settings.batch_size
        for start in range(0, len(examples), size):
            if read >= tokens:
                return
            batch = runtime.make_batch("train", examples[start : start + size])
            runtime.compute_losses("train", batch, 1.0, backward=True)
            read += batch.tokens
            encoded = (runtime.data.splits["train"][index] for index in batch.indices)
            yield batch.tokens, sum(map(runtime.data.get_loss_weight, encoded))

    with catch_memory_errors() as reasons, runtime.use_gradient_checkpointing(), runtime.disable_dropout():
        gathered = accumulate_moments(peft_model, linear_names, run_passes(), ADAPTER)
    if reasons:
        return GatheredMoments({}, 0, (f"no moments for truncation: {reasons[0]}; the plain SVD is used",))
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
