"""`allocate`: a rank for each module, proposed only where trainings support it.

A pattern and the uniform adapter are trained from the start, the pattern with no more parameters. The pattern wins where
the 95% interval of the paired difference is below zero against the uniform adapter, and also against the same ranks
shuffled over the modules: otherwise the distribution of the ranks, not their place, made the difference. The pattern is
made on the training and validation splits; all comparisons use the test split.

Ranks by module within a budget of parameters, by two measures of what a further rank of a module gains.

Every measure gives every module a rank of at least 1.
"""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rightrank.adapters.resize import by_rank
from rightrank.data.files import UnreadableError, read_json_object
from rightrank.decision.comparison import bounds_of
from rightrank.decision.intervals import estimate
from rightrank.models.adapter_files import AdapterFolder, open_adapter
from rightrank.models.ranks import exact_pattern
from rightrank.models.spectra import factored_singular_values
from rightrank.models.truncation import ranks_within, resized_factors
from rightrank.schema.errors import SettingsError, did_you_mean
from rightrank.schema.results import Allocation, AllocationTrial, AllocationVerdict
from rightrank.schema.settings import SelectSettings, make_settings
from rightrank.schema.trials import Arm, SplitName
from rightrank.train.adapter import ADAPTER, attached, lora_modules
from rightrank.train.adapter_runtime import DataUse, adapter_attached, adapter_runtime, train_attached
from rightrank.train.evaluation import Scores
from rightrank.train.runtime import Runtime
from rightrank.train.targets import lora_config

REST = "rest"


def groups_of(entries: Sequence[str], adapter: AdapterFolder) -> dict[str, str]:
    """The group of each module, by their names.

    Raises:
        SettingsError: an entry that is not NAME=PART+PART, a part that no module has, or a module in two groups.
    """
    found: dict[str, str] = {}
    for entry in entries:
        group, equals, parts = entry.partition("=")
        if not (group and equals and parts):
            raise SettingsError(f"--groups {entry!r}: give NAME=PART+PART, such as attention=q_proj+v_proj")
        for part in parts.split("+"):
            members = [module.name for module in adapter.modules if part in module.name.split(".")]
            if not members:
                raise SettingsError(f"--groups {entry!r}: no module of the adapter has {part!r} in its name")
            for name in members:
                if found.setdefault(name, group) != group:
                    raise SettingsError(f"--groups: {name} is in {found[name]} and in {group}; name each module once")
    return {module.name: found.get(module.name, REST) for module in adapter.modules}


def one_rank_a_group(ranks: Mapping[str, int], groups: Mapping[str, str], adapter: AdapterFolder) -> dict[str, int]:
    """`ranks` with one rank for each group: the mean by parameters, rounded down, so that it has no more of them."""
    spent: dict[str, int] = {}
    costs: dict[str, int] = {}
    limits: dict[str, int] = {}
    for module in adapter.modules:
        group, cost = groups[module.name], module.rows + module.columns
        spent[group] = spent.get(group, 0) + ranks[module.name] * cost
        costs[group] = costs.get(group, 0) + cost
        limits[group] = min(limits.get(group, module.rows), module.rows, module.columns)
    common = {group: min(limits[group], max(1, spent[group] // costs[group])) for group in costs}
    return {name: common[group] for name, group in groups.items()}


def ranks_by_group(ranks: Mapping[str, int], groups: Mapping[str, str]) -> dict[str, int]:
    return {group: ranks[name] for name, group in groups.items()}


MEASURES = ("sensitivity", "spectra")
CONFIDENCE = 0.975  # of each bound: a two-sided 95% interval
SHUFFLES = 400  # permutations, of which the nearest in parameters is taken

PatternKind = Literal["uniform", "allocated", "shuffled"]


@dataclass(frozen=True, slots=True)
class AllocateOptions:
    """What to train, and how to make the pattern."""

    rank: int  # of the uniform adapter that sets the budget
    learning_rate: float
    steps: int
    by: str = "sensitivity"
    pattern: Path | None = None  # a JSON file of ranks by module or group, tested instead of a measure's pattern
    groups: tuple[str, ...] = ()  # such as attention=q_proj+v_proj: one rank for all modules of a group (probe.groups)
    seeds: tuple[int, ...] = (0, 1)
    base: str | None = None
    settings: SelectSettings = field(default_factory=lambda: make_settings({}))
    on_trial: Callable[[AllocationTrial], None] = lambda _: None


@dataclass(frozen=True, slots=True)
class _TrainedPattern:
    record: AllocationTrial
    scores: Scores


def allocate(path: Path, data: Path, options: AllocateOptions) -> Allocation:
    """Make a pattern from a trained adapter, train it and its rivals, and compare them.

    Raises:
        InputError: the adapter, data, measure or pattern cannot be used.
        RunError: a training diverged.
    """
    _check(options)
    adapter = open_adapter(path)
    by_rank(adapter, options.rank)  # refuses a rank above a module's limit
    _require_matrices(adapter)
    groups = groups_of(options.groups, adapter) if options.groups else {}
    given = None if options.pattern is None else _read_pattern(options.pattern, adapter, groups)
    budget = options.rank * sum(module.rows + module.columns for module in adapter.modules)
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        runtime = adapter_runtime(
            adapter, options.base, DataUse(data, options.settings, Path(name) / "cache", options.steps)
        )
        ranks = given or _make_pattern(adapter, runtime, budget, options)
        ranks = one_rank_a_group(ranks, groups, adapter) if groups else ranks
        patterns = {
            "uniform": dict.fromkeys(ranks, options.rank),
            "allocated": ranks,
            "shuffled": shuffled(adapter, ranks, seed=0),
        }
        trained: dict[PatternKind, list[_TrainedPattern]] = {"uniform": [], "allocated": [], "shuffled": []}
        for kind, found in trained.items():
            for seed in options.seeds:
                found.append(_train(runtime, adapter, kind, patterns[kind], seed, options))
                options.on_trial(found[-1].record)
    return _answer(ranks, trained, options, groups)


def _make_pattern(adapter: AdapterFolder, runtime: Runtime, budget: int, options: AllocateOptions) -> dict[str, int]:
    """Ranks by the measure of the options, within a budget of parameters."""
    return by_spectra(adapter, budget) if options.by == "spectra" else by_sensitivity(adapter, runtime, budget)


def _read_pattern(path: Path, adapter: AdapterFolder, groups: Mapping[str, str] | None = None) -> dict[str, int]:
    """Ranks by exact module name, or by group, one for every module of the adapter.

    Raises:
        SettingsError: an unreadable file, an unknown or missing module, or a value that is no rank.
    """
    try:
        pattern = read_json_object(path)
    except UnreadableError as error:
        raise SettingsError(f"{path}: not readable as JSON ({error}); give a file of {{module: rank}}") from None
    by_group = set(pattern) & set((groups or {}).values())
    if groups and by_group:
        pattern = {name: pattern[group] for name, group in groups.items() if group in pattern} | {
            name: rank for name, rank in pattern.items() if name not in by_group
        }
    names = {module.name: min(module.rows, module.columns) for module in adapter.modules}
    for name, rank in pattern.items():
        if name not in names:
            hint = did_you_mean(name, names) or f"; modules there are: {', '.join(list(names)[:3])}, …"
            raise SettingsError(f"{path}: {name!r} is no module of the adapter{hint}")
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= names[name]:
            raise SettingsError(f"{path}: {name} has rank {rank!r}; give a whole number from 1 to {names[name]}")
    missing = [name for name in names if name not in pattern]
    if missing:
        raise SettingsError(f"{path}: {missing[0]} is not named ({len(missing)} such); name every module")
    return dict(pattern)


def shuffled(adapter: AdapterFolder, ranks: Mapping[str, int], seed: int) -> dict[str, int]:
    """The same ranks permuted over the modules; of SHUFFLES permutations the nearest in parameters."""
    costs = np.array([module.rows + module.columns for module in adapter.modules])
    limits = np.array([min(module.rows, module.columns) for module in adapter.modules])
    values = np.array([ranks[module.name] for module in adapter.modules])
    wanted = int(values @ costs)
    generator = np.random.default_rng(seed)
    draws = [generator.permutation(values) for _ in range(SHUFFLES)]
    fitting = [draw for draw in draws if (draw <= limits).all() and (draw != values).any()] or [values]
    best = min(fitting, key=lambda draw: abs(int(draw @ costs) - wanted))
    return {module.name: int(rank) for module, rank in zip(adapter.modules, best, strict=True)}


def _require_matrices(adapter: AdapterFolder) -> None:
    """Refuse parameters that hold several matrices: PEFT gives all of them one rank."""
    several = next((pair[0].address for pair in adapter.pairs if len(pair) > 1), None)
    if several is not None:
        raise SettingsError(
            f"allocate gives ranks to modules, and {several} holds experts that share one; give an adapter on modules"
        )


def _check(options: AllocateOptions) -> None:
    if len(options.seeds) < 2:
        raise SettingsError(
            f"--seeds: got {len(options.seeds)}; give two or more, since a single seed does not show the seed noise"
        )
    if options.settings.test_fraction == 0:
        raise SettingsError("test_fraction 0 leaves no test split, which allocate compares on; give one above 0")
    if options.settings.scaling == "constant":
        raise SettingsError("scaling 'constant' needs another alpha at each rank; give 'alpha/r' or 'alpha/sqrt(r)'")
    if options.pattern is None and options.by not in MEASURES:
        hint = did_you_mean(options.by, MEASURES)
        raise SettingsError(f"--by {options.by!r} is not known{hint or '; allowed: ' + ', '.join(MEASURES)}")
    if options.rank < 1 or options.steps < 1 or not options.learning_rate > 0:
        raise SettingsError("--rank and --max-steps must be whole numbers from 1, and --learning-rate above 0")


def _train(
    runtime: Runtime,
    adapter: AdapterFolder,
    kind: PatternKind,
    ranks: Mapping[str, int],
    seed: int,
    options: AllocateOptions,
) -> _TrainedPattern:
    """Train one pattern from a fresh initialisation, and measure it on the test split."""
    settings = runtime.settings
    arm = Arm(
        rank=max(ranks.values()),
        learning_rate=options.learning_rate,
        lora_alpha=settings.lora_alpha,
        seed=seed,
        steps=options.steps,
    )
    config = lora_config(settings, arm, runtime.data.is_classification, runtime.targets.names)
    config.rank_pattern = exact_pattern(ranks, arm.rank, ranks)
    with attached(runtime.model, settings, arm, config) as peft_model:
        train_attached(runtime, peft_model, options.learning_rate, seed)
        scores = runtime.evaluate("test")
    parameters = sum(ranks[module.name] * (module.rows + module.columns) for module in adapter.modules)
    record = AllocationTrial(pattern=kind, seed=seed, parameters=parameters, value=scores.loss, ranks=dict(ranks))
    return _TrainedPattern(record, scores)


def _answer(
    ranks: Mapping[str, int],
    trained: Mapping[PatternKind, list[_TrainedPattern]],
    options: AllocateOptions,
    groups: Mapping[str, str],
) -> Allocation:
    verdicts = [
        compare(trained["allocated"], trained["uniform"], "uniform"),
        compare(trained["allocated"], trained["shuffled"], "shuffled"),
    ]
    better = all(verdict.better for verdict in verdicts)
    by = "the pattern given" if options.pattern else options.by
    if groups:
        by += f" ({', '.join(f'{group} {rank}' for group, rank in ranks_by_group(ranks, groups).items())})"
    against = verdicts[0]
    figures = f"{against.difference:+.4f} nats [{against.low:+.4f}, {against.high:+.4f}] against uniform"
    if better:
        sentence = f"The pattern by {by} beats uniform rank {options.rank} at equal parameters, and beats its own shuffle: {figures}."
    else:
        why = "does not beat uniform" if not against.better else "beats uniform but not its own shuffle"
        sentence = f"Keep uniform rank {options.rank}: the pattern by {by} {why} at equal parameters: {figures}."
    return Allocation(
        proposal="pattern" if better else "uniform",
        sentence=sentence,
        by=by,
        rank=options.rank,
        parameters=trained["allocated"][0].record.parameters,
        rank_pattern=exact_pattern(ranks, None, ranks) if better else {},
        lora_alpha=options.settings.lora_alpha,
        verdicts=verdicts,
        trials=[one.record for found in trained.values() for one in found],
    )


def compare(
    left: list[_TrainedPattern], right: list[_TrainedPattern], against: Literal["uniform", "shuffled"]
) -> AllocationVerdict:
    """Left minus right in nats, paired over seeds and examples, with its 95% interval."""
    sums = np.array([a.scores.losses for a in left]) - np.array([b.scores.losses for b in right])
    found = bounds_of(estimate(sums, np.array(left[0].scores.tokens, dtype=np.float64)), CONFIDENCE)
    return AllocationVerdict(
        against=against, difference=found.mean, low=found.low, high=found.high, better=found.high < 0
    )


def by_spectra(adapter: AdapterFolder, budget: int) -> dict[str, int]:
    """Water-filling by the energy of the trained update: largest σ² of s·B·A per parameter first."""
    spectra = [factored_singular_values(*adapter.factors(module)) * abs(module.scaling) for module in adapter.modules]
    return _named(adapter, ranks_within([s**2 for s in spectra], _costs(adapter), budget))


def by_sensitivity(adapter: AdapterFolder, runtime: Runtime, budget: int) -> dict[str, int]:
    """Greedy by held-out loss: the step to a higher rank of one module that reduces the loss most per parameter first.

    Each module is truncated alone, to 1, 2, 4, … below its rank, while the others keep theirs.
    """
    curves = truncation_sensitivity(adapter, runtime, "selection")
    return greedy_ranks(curves, dict(zip(curves, _costs(adapter), strict=True)), budget)


def truncation_sensitivity(adapter: AdapterFolder, runtime: Runtime, split: SplitName) -> dict[str, dict[int, float]]:
    """The loss of `split`, nats a label, by module and rank of that module."""
    curves: dict[str, dict[int, float]] = {}
    with adapter_attached(runtime, adapter.path) as peft_model:
        whole = runtime.evaluate(split).loss
        modules = lora_modules(peft_model)
        for module in adapter.modules:
            levels = [2**power for power in range(module.rank.bit_length()) if 2**power < module.rank]
            curve = {module.rank: whole}
            whole_b, whole_a = (torch.from_numpy(factor) for factor in adapter.factors(module))
            for rank in levels:
                b, a = resized_factors(whole_b, whole_a, rank, 1.0)
                with _factors_set(modules[module.name], b, a):
                    curve[rank] = runtime.evaluate(split).loss
            curves[module.name] = dict(sorted(curve.items()))
    return curves


def greedy_ranks(curves: Mapping[str, Mapping[int, float]], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Steps to higher measured ranks, the largest loss reduction per parameter first, while the budget lasts.

    A step may skip levels that reduce nothing: of all higher levels, the one with the best ratio counts.
    """
    ranks = {name: min(curve) for name, curve in curves.items()}
    left = budget - sum(costs[name] * rank for name, rank in ranks.items())
    queue = [offer for name in curves if (offer := _best_step(name, curves[name], ranks[name], costs[name], left))]
    heapq.heapify(queue)
    while queue:
        _, name, target = heapq.heappop(queue)
        price = costs[name] * (target - ranks[name])
        if price <= left:
            left -= price
            ranks[name] = target
        if offer := _best_step(name, curves[name], ranks[name], costs[name], left):
            heapq.heappush(queue, offer)
    return ranks


def _best_step(name: str, curve: Mapping[int, float], rank: int, cost: int, left: int) -> tuple[float, str, int] | None:
    """`(-reduction per parameter, name, level)` of the best affordable step; None where there is none."""
    steps = [
        (-(curve[rank] - loss) / (cost * (level - rank)), name, level)
        for level, loss in curve.items()
        if level > rank and cost * (level - rank) <= left
    ]
    return min(steps, default=None)


@contextmanager
def _factors_set(module: Any, b: torch.Tensor, a: torch.Tensor) -> Iterator[None]:
    """Within the block, factors of a lower rank replace those of a module, whose other ranks are zero."""
    weights = (module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight)
    kept = [weight.detach().clone() for weight in weights]
    rank = b.shape[1]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.zero_()
            weights[0][:rank].copy_(a.reshape(rank, *weights[0].shape[1:]))
            weights[1][:, :rank].copy_(b.reshape(-1, rank, *weights[1].shape[2:]))
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)


def _costs(adapter: AdapterFolder) -> list[int]:
    return [module.rows + module.columns for module in adapter.modules]


def _named(adapter: AdapterFolder, ranks: Sequence[int]) -> dict[str, int]:
    return {module.name: rank for module, rank in zip(adapter.modules, ranks, strict=True)}
