"""Adapter folders on the base of an evaluator: check that they belong to it, attach them, and report the progress of evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftType

from rightrank.adapters.adapter_files import ensure_peft_format
from rightrank.adapters.adapter_folders import BASE_FILE, CONFIG_FILE, read_adapter_config, require_kept_base
from rightrank.bases.base_models import LoadedModel, read_identity
from rightrank.bases.model_sources import normalize_model_name
from rightrank.evaluation.evaluator import Evaluator
from rightrank.evaluation.peft_models import set_update_to_zero, suppress_peft_warnings, unwrap_base
from rightrank.schema.errors import ModelError, get_first_line, quote_value
from rightrank.schema.events import EvaluationProgress


def report_evaluation_progress(
    evaluator: Evaluator, description: str, report: Callable[[EvaluationProgress], None], num_evaluations: int = 1
) -> None:
    """Report the progress of evaluations under `description` from now on.

    Args:
        num_evaluations: The number of evaluations that are left, with this one. The reported total covers all of them.
    """
    start_time = time.perf_counter()

    def on_evaluated(num_evaluated: int, num_total: int) -> None:
        total, seconds = num_total * num_evaluations, time.perf_counter() - start_time
        report(EvaluationProgress(label=description, examples=num_evaluated, total_examples=total, seconds=seconds))

    evaluator.on_evaluated = on_evaluated


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
def attach_adapter(evaluator: Evaluator, folder: Path | None, *, is_zero: bool = False) -> Iterator[Any]:
    """Attach an adapter folder to the evaluator's base and yield the PeftModel. The base is restored when the block ends.

    Args:
        folder: the adapter folder; None yields the base alone.
        is_zero: set the update to zero; other trained modules, such as a head, stay.

    Raises:
        ModelError: PEFT cannot attach this adapter to this base or would change the base, or the adapter's task is not that of the data.
    """
    if folder is None:
        yield evaluator.model
        return
    _require_attachable(evaluator, folder)
    try:
        with suppress_peft_warnings(), ensure_peft_format(folder) as adapter_folder:
            peft_model: Any = PeftModel.from_pretrained(evaluator.model, str(adapter_folder))
    except (RuntimeError, TypeError, ValueError) as error:  # of tensors, of values of another type, and of names
        hint = evaluator.settings.load_error_hint("give the base that it was trained on")
        raise ModelError(
            f"{folder}: PEFT cannot attach it to {evaluator.loaded.name} ({get_first_line(error)}); {hint}"
        ) from None
    peft_model.train(False)
    if is_zero:
        set_update_to_zero(peft_model, peft_model.active_adapter)
    try:
        yield peft_model
    finally:
        unwrap_base(peft_model)


def _require_attachable(evaluator: Evaluator, folder: Path) -> None:
    """Raise for what PEFT's own errors would not explain: an adapter of another task than the data, or one that changes the base."""
    config = read_adapter_config(folder)
    require_kept_base(folder, config)
    method = config.get("peft_type", "LORA")
    if method not in PeftType.__members__:
        raise ModelError(f"{folder}: PEFT has no peft_type {quote_value(method)}; correct its {CONFIG_FILE}")
    task = config.get("task_type")
    if task in ("CAUSAL_LM", "SEQ_CLS") and (task == "SEQ_CLS") != evaluator.data.is_classification:
        raise ModelError(
            f"{folder}: its task_type {task} does not fit data of the form {evaluator.data.summary.form}; a classifier (SEQ_CLS) needs `text` "
            "and `label`, and a language model (CAUSAL_LM) any other form"
        )
