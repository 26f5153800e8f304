"""Ablate an adapter: score the held-out examples with it, and without each of its parts, which PEFT switches off."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rightrank.adapters.adapter_reader import AdapterFolder, AdapterModule
from rightrank.adapters.parts import Parts, compute_part_values
from rightrank.runs.resize_by_data import load_evaluation_data
from rightrank.schema.events import EvaluationProgress, Notice
from rightrank.schema.results import PartValue
from rightrank.schema.settings import SelectSettings
from rightrank.training.adapter_runtime import RuntimeInputs, make_adapter_runtime, report_evaluation_progress
from rightrank.training.evaluation import build_trial_record
from rightrank.training.runtime import attach_adapter


def measure_parts(
    adapter: AdapterFolder,
    parts: Parts,
    data: Path,
    base: str | None,
    settings: SelectSettings,
    on_event: Callable[[EvaluationProgress | Notice], None],
) -> tuple[list[PartValue], str]:
    """Score the held-out examples with the adapter, and without each part of it.

    Returns:
        The parts in their order, and a sentence that says which examples were scored.

    Raises:
        InputError: The adapter or the data can't be used, or the adapter does not fit the base model.
    """
    evaluation_data = load_evaluation_data(adapter, data, None, settings)
    on_event(Notice(text=evaluation_data.note))
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        inputs = RuntimeInputs(data, settings, Path(name), splits=evaluation_data.splits)
        runtime = make_adapter_runtime(adapter, base, inputs)
        metric = runtime.settings.metric_name
        with attach_adapter(runtime, adapter.path) as peft_model:
            trials = []
            for number, (label, modules) in enumerate({"": (), **parts}.items()):
                report_evaluation_progress(runtime, f"without {label}" if label else "the adapter", on_event)
                with _disable_modules(peft_model, modules):
                    trials.append(build_trial_record(label, number, runtime.evaluate("validation"), metric))
        values = compute_part_values(parts, trials, metric, runtime.settings.is_higher_better(metric))
    return values, evaluation_data.note


@contextmanager
def _disable_modules(peft_model: Any, modules: Sequence[AdapterModule]) -> Iterator[None]:
    """Let modules compute what the base model does within the block."""
    layers = [peft_model.get_submodule(module.a_key.rpartition(".lora_")[0]) for module in modules]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
