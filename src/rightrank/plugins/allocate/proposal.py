"""`allocate`: a rank for each module, proposed only where trainings support it.

A pattern and the uniform adapter are trained from the start, the pattern with no more parameters. The pattern wins where
the 95% interval of the paired difference is below zero against the uniform adapter, and also against the same ranks
shuffled over the modules: otherwise the distribution of the ranks, not their place, made the difference. All comparisons use the test
split.

The pattern is made from the spectra of a trained adapter, within the budget of parameters: the largest σ² of s·B·A per
parameter first. Every module has a rank of at least 1.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rightrank.adapters.resize import by_rank
from rightrank.adapters.spectra import factored_singular_values
from rightrank.decision.comparison import bounds_of, estimate
from rightrank.decision.table import groups_of
from rightrank.models.adapter_files import AdapterFolder, open_adapter
from rightrank.models.ranks import exact_pattern
from rightrank.models.truncation import ranks_within
from rightrank.schema.errors import RunError, SettingsError
from rightrank.schema.events import Listener
from rightrank.schema.results import Allocation, AllocationTrial, AllocationVerdict
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.train.adapter_runtime import DataUse, adapter_runtime
from rightrank.train.evaluation import Scores
from rightrank.train.loop import run_trial
from rightrank.train.runtime import Runtime, adapter_attached
from rightrank.train.trial import TrialFolders

CONFIDENCE = 0.975  # of each bound: a two-sided 95% interval
SHUFFLES = 400  # permutations, of which the nearest in parameters is taken

PatternKind = Literal["uniform", "allocated", "shuffled"]


@dataclass(frozen=True, slots=True)
class AllocateOptions:
    """What to train, and how to make the pattern."""

    rank: int  # of the uniform adapter that sets the budget
    learning_rate: float
    steps: int
    seeds: tuple[int, ...]
    base: str | None
    settings: SelectSettings
    on_trial: Callable[[AllocationTrial], None]


@dataclass(frozen=True, slots=True)
class _TrainedPattern:
    record: AllocationTrial
    scores: Scores


def allocate(path: Path, data: Path, options: AllocateOptions) -> Allocation:
    """Make a pattern from a trained adapter, train it and its rivals, and compare them."""
    _check(options)
    adapter = open_adapter(path)
    by_rank(adapter, options.rank)  # refuses a rank above a module's limit
    several = next((pair[0].address for pair in adapter.pairs if len(pair) > 1), None)
    if several is not None:  # PEFT gives all of its matrices one rank
        raise SettingsError(
            f"allocate gives ranks to modules, and {several} holds experts that share one; give an adapter on modules"
        )
    ranks = _by_spectra(adapter, options.rank)
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        runtime = adapter_runtime(
            adapter, options.base, DataUse(data, options.settings, Path(name) / "cache", options.steps)
        )
        patterns = {
            "uniform": dict.fromkeys(ranks, options.rank),
            "allocated": ranks,
            "shuffled": shuffled(adapter, ranks, seed=0),
        }
        trained: dict[PatternKind, list[_TrainedPattern]] = {"uniform": [], "allocated": [], "shuffled": []}
        for kind, trainings in trained.items():
            for seed in options.seeds:
                trainings.append(_train(runtime, adapter, kind, patterns[kind], seed, options))
                options.on_trial(trainings[-1].record)
    return _answer(ranks, trained, options)


def _by_spectra(adapter: AdapterFolder, rank: int) -> dict[str, int]:
    """Ranks with no more parameters than `rank` everywhere, by the energy of the trained update."""
    spectra = [factored_singular_values(*adapter.factors(module)) * abs(module.scaling) for module in adapter.modules]
    costs = [module.rows + module.columns for module in adapter.modules]
    ranks = ranks_within([s**2 for s in spectra], costs, rank * sum(costs))
    return {module.name: module_rank for module, module_rank in zip(adapter.modules, ranks, strict=True)}


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


def _check(options: AllocateOptions) -> None:
    if len(options.seeds) < 2:
        raise SettingsError(
            f"--seeds: got {len(options.seeds)}; give two or more, since a single seed does not show the seed noise"
        )
    if options.settings.test_fraction == 0:
        raise SettingsError("test_fraction 0 leaves no test split, which allocate compares on; give one above 0")
    if options.settings.scaling == "constant":
        raise SettingsError("scaling 'constant' needs another alpha at each rank; give 'alpha/r' or 'alpha/sqrt(r)'")
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
    settings, highest = runtime.settings, max(ranks.values())
    alpha, rate, steps = settings.lora_alpha, options.learning_rate, options.steps
    arm = Arm(rank=highest, learning_rate=rate, lora_alpha=alpha, seed=seed, steps=steps)
    peft_options = settings.peft_options | {"rank_pattern": exact_pattern(ranks, highest, ranks)}
    patterned = copy.copy(runtime)
    patterned.settings = settings.model_copy(update={"peft_options": peft_options, "eval_points": 1})
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        folders = TrialFolders(Path(name) / "checkpoint", Path(name) / "adapter")
        outcome = run_trial(patterned, Trial(trial_id=kind, arm=arm), None, folders, Listener())
        if not isinstance(outcome, TrialFinished):
            raise RunError(f"{kind} ranks, seed {seed}: {outcome.reason}; give a lower learning rate")
        with adapter_attached(runtime, folders.adapter):
            scores = runtime.evaluate("test")
    parameters = sum(ranks[module.name] * (module.rows + module.columns) for module in adapter.modules)
    record = AllocationTrial(pattern=kind, seed=seed, parameters=parameters, value=scores.loss, ranks=dict(ranks))
    return _TrainedPattern(record, scores)


def _answer(
    ranks: Mapping[str, int], trained: Mapping[PatternKind, list[_TrainedPattern]], options: AllocateOptions
) -> Allocation:
    verdicts = [
        compare(trained["allocated"], trained["uniform"], "uniform"),
        compare(trained["allocated"], trained["shuffled"], "shuffled"),
    ]
    better = all(verdict.better for verdict in verdicts)
    against = verdicts[0]
    figures = f"{against.difference:+.4f} nats [{against.low:+.4f}, {against.high:+.4f}] against uniform"
    if better:
        sentence = f"The pattern by spectra beats uniform rank {options.rank} at equal parameters, and beats its own shuffle: {figures}."
    else:
        why = "does not beat uniform" if not against.better else "beats uniform but not its own shuffle"
        sentence = f"Keep uniform rank {options.rank}: the pattern by spectra {why} at equal parameters: {figures}."
    return Allocation(
        proposal="pattern" if better else "uniform",
        sentence=sentence,
        rank=options.rank,
        parameters=trained["allocated"][0].record.parameters,
        rank_pattern=exact_pattern(ranks, None, ranks) if better else {},
        lora_alpha=options.settings.lora_alpha,
        verdicts=verdicts,
        trials=[training.record for trainings in trained.values() for training in trainings],
    )


def compare(
    left: list[_TrainedPattern], right: list[_TrainedPattern], against: Literal["uniform", "shuffled"]
) -> AllocationVerdict:
    """Left minus right in nats, paired over seeds and examples, with its 95% interval."""
    sums = np.array([a.scores.losses for a in left]) - np.array([b.scores.losses for b in right])
    scores = left[0].scores
    weights, groups = np.array(scores.tokens, dtype=np.float64), groups_of(scores.groups, len(scores.tokens))
    bounds = bounds_of(estimate(sums, weights, groups=groups), CONFIDENCE)
    return AllocationVerdict(
        against=against, difference=bounds.mean, low=bounds.low, high=bounds.high, better=bounds.high < 0
    )
