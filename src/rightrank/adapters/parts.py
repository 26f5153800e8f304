"""The parts of an adapter, which are kinds of modules, blocks of layers and towers, and what each is worth by the same examples.

A part is switched off, so that its modules compute what the base model does (`ablation.py`). A large rank is seldom needed everywhere,
but truncation saves far more parameters for the same loss than removal does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rightrank.adapters.adapter_reader import AdapterFolder, AdapterModule
from rightrank.adapters.rank_math import matches_pattern
from rightrank.decision.comparison import compute_file_bounds
from rightrank.decision.table import build_table, compute_paired_difference
from rightrank.schema.errors import SettingsError
from rightrank.schema.results import PartValue
from rightrank.schema.trials import TrialFinished

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
    count = min(MAX_BLOCKS, len(numbers))
    for index in range(count):
        block = numbers[index * len(numbers) // count : (index + 1) * len(numbers) // count]
        label = f"layers {block[0]}–{block[-1]}" if len(block) > 1 else f"layer {block[0]}"
        blocks[label] = [module for number in block for module in layers[number]]
    return kinds | (blocks if len(blocks) > 1 else {}) | (towers if len(towers) > 1 else {})


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
