"""Measure what the parts of an adapter are worth: the held-out loss without a kind of module, a block of layers, or a tower.

A part is switched off by PEFT, so that its modules compute what the base model does, and the same examples are scored with and
without it. A large rank is seldom needed everywhere, but truncation saves far more parameters for the same loss than removal does.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rightrank.adapters.compare import build_trial_record
from rightrank.adapters.resize_by_data import load_evaluation_data
from rightrank.decision.comparison import compute_file_bounds
from rightrank.decision.table import build_table, compute_paired_difference
from rightrank.models.adapter_reader import AdapterFolder, AdapterModule
from rightrank.models.ranks import matches_pattern
from rightrank.schema.errors import SettingsError
from rightrank.schema.events import EvaluationProgress, Notice
from rightrank.schema.results import PartValue
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import TrialFinished
from rightrank.train.adapter_runtime import RuntimeInputs, make_adapter_runtime, report_evaluation_progress
from rightrank.train.runtime import attach_adapter

MAX_BLOCKS = 4  # of layers; each costs one evaluation
LANGUAGE_MODEL, VISION_TOWER = "language model", "vision tower"
TOWERS = {"projector": r"projector|connector|merger", VISION_TOWER: r"vision|visual|image"}  # the first that matches

Parts = Mapping[str, Sequence[AdapterModule]]


def group_modules(modules: Sequence[AdapterModule]) -> Parts:
    """Group modules by kind, by block of layers, and in a vision-language model by tower, projector and language model."""
    kinds: dict[str, list[AdapterModule]] = {}
    towers: dict[str, list[AdapterModule]] = {}
    layers: dict[int, list[AdapterModule]] = {}
    for module in modules:
        components = module.name.split(".")
        kinds.setdefault(next(name for name in reversed(components) if not name.isdecimal()), []).append(module)
        tower = next((name for name, pattern in TOWERS.items() if re.search(pattern, module.name)), LANGUAGE_MODEL)
        towers.setdefault(tower, []).append(module)
        layer = next((int(name) for name in components if name.isdecimal()), None)
        if layer is not None and tower == LANGUAGE_MODEL:
            layers.setdefault(layer, []).append(module)
    numbers, blocks = sorted(layers), {}
    for index in range(min(MAX_BLOCKS, len(numbers))):
        count = min(MAX_BLOCKS, len(numbers))
        block = numbers[index * len(numbers) // count : (index + 1) * len(numbers) // count]
        label = f"layers {block[0]}–{block[-1]}" if len(block) > 1 else f"layer {block[0]}"
        blocks[label] = [module for number in block for module in layers[number]]
    return kinds | (blocks if len(blocks) > 1 else {}) | (towers if len(towers) > 1 else {})


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


def compute_part_values(
    parts: Parts, trials: Sequence[TrialFinished], metric: str, is_higher_better: bool
) -> list[PartValue]:
    """Compare the scores without each part with those of the complete adapter, which is the first trial."""
    reference, *others = build_table(trials, metric, is_higher_better).cells.values()
    values: list[PartValue] = []
    for (label, modules), cell in zip(parts.items(), others, strict=True):
        worse = compute_paired_difference(cell, reference)
        bounds = compute_file_bounds(worse.sums, worse.weights, worse.score_range, worse.groups)
        values.append(
            PartValue(
                part=label,
                modules=len(modules),
                parameters=sum(module.parameters for module in modules),
                value_without=cell.value,
                worse_by=bounds.mean,
                worse_by_low=bounds.low,
                worse_by_high=bounds.high,
            )
        )
    return values


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


def select_modules(adapter: AdapterFolder, patterns: Sequence[str]) -> list[AdapterModule]:
    """Return the modules that a pattern matches, as PEFT matches the keys of `rank_pattern`.

    Raises:
        SettingsError: A pattern matches no module, or no module would remain.
    """
    names = {pair[0].address for pair in adapter.pairs}
    for pattern in patterns:
        if not any(matches_pattern(pattern, name) for name in names):
            kinds = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise SettingsError(f"--without {pattern} matches no module; give the ends of their names, such as {kinds}")
    removed = [m for m in adapter.modules if any(matches_pattern(pattern, m.address) for pattern in patterns)]
    if len(removed) == len(adapter.modules):
        raise SettingsError("--without matches every module; leave some")
    if adapter.foreign is not None and adapter.foreign.mlx_config is not None:
        raise SettingsError("--without does not write mlx-lm's format, which has one list of keys for all layers")
    return removed
