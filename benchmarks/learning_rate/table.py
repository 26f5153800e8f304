"""Compare policies by what they hand over: rank, trainings, regret of the adapter and of the recipe, on the stored grids or on the new ones.

    python -m benchmarks.learning_rate.table stored    # the grids of an earlier study, with a rehearsal of the endpoints
    python -m benchmarks.learning_rate.table new       # after the judgement; both write table_*.json and print a table

The *regret of the adapter* is its test loss minus that of the best trained adapter of the same seed. The *regret of the recipe* is the test loss of the trainings of the other
seeds at the policy's training rank and learning rate, minus that of the rank and rate that are best for those seeds. Means are over grids, intervals resample grids.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.learning_rate.judge import GRIDS, JUDGED, MARGINS, judge, read_seed
from benchmarks.learning_rate.lock import HERE
from benchmarks.learning_rate.policies import (
    PRIMARY,
    QUARTER,
    SMALL,
    TOP,
    Choice,
    Key,
    Policy,
    SeedTable,
    choose_learning_rate,
    cost_of_search,
    is_usable,
    resample_grids,
    truncate_within,
    tune,
)
from benchmarks.learning_rate.stored import read_stored

DRAWS = 5  # of a stochastic search
FIXED_RATES = (3e-4, 1e-3)
SCORED = ("answers", "words", "replies", "roles", "word_classes", "speakers", "languages")


@dataclass(frozen=True)
class Outcome:
    """What a policy hands over, with its test loss."""

    rank: int
    trainings: float
    test: float
    recipe: tuple[int, float]


# Receives the table of the seed, that of a second seed of the grid, the margin and a generator.
Search = Callable[[SeedTable, SeedTable, float, np.random.Generator], Outcome | None]


def conclude(table: SeedTable, choice: Choice | None) -> Outcome | None:
    """Look up the test loss of a choice."""
    if choice is None:
        return None
    return Outcome(choice.key.rank, choice.trainings, table.adapters[choice.key].test_mean, choice.recipe)


def use(policy: Policy) -> Search:
    """Return a search that follows a policy of one seed."""
    return lambda table, _second_table, margin, _generator: conclude(table, policy(table, margin))


def fix(rank: int, rate: float) -> Policy:
    """Return the policy of one training at fixed settings."""

    def policy(table: SeedTable, _margin: float) -> Choice | None:
        key = Key("trained", rank, rate)
        return Choice(key, 1.0, (rank, rate)) if is_usable(table, key) else None

    return policy


def search_whole_grid(table: SeedTable, margin: float) -> Choice | None:
    """Train everything; take the smallest rank within the margin of the best, at its best learning rate."""
    return pick_smallest(
        table,
        {cell: measured.validation_mean for cell, measured in table.trained().items()},
        margin,
        float(len(table.trained())),
    )


def pick_smallest(
    table: SeedTable, losses: Mapping[tuple[int, float], float], margin: float, trainings: float
) -> Choice | None:
    """Choose the smallest rank whose best cell is within the margin of the best of the losses seen."""
    finite = {cell: loss for cell, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        return None
    rank = min(rank for (rank, _), loss in finite.items() if loss - min(finite.values()) <= margin)
    cell = min((cell for cell in finite if cell[0] == rank), key=lambda cell: finite[cell])
    return Choice(Key("trained", *cell), trainings, cell)


def train_second_seed(
    table: SeedTable, second_table: SeedTable, margin: float, _generator: np.random.Generator
) -> Outcome | None:
    """Train a second seed at rank 64 and the chosen learning rate; the better of the two is truncated."""
    return finish_second(table, second_table, margin, is_averaged=False)


def average_two_seeds(
    table: SeedTable, second_table: SeedTable, margin: float, _generator: np.random.Generator
) -> Outcome | None:
    """Train a second seed at the chosen learning rate; the best of both and of their average is truncated within the margin."""
    return finish_second(table, second_table, margin, is_averaged=True)


def finish_second(table: SeedTable, second_table: SeedTable, margin: float, is_averaged: bool) -> Outcome | None:
    """Truncate the best candidate of two seeds by validation loss."""
    rate = choose_learning_rate(table, TOP)
    if rate is None:
        return None
    candidates = [(member, Key("trained", TOP, rate)) for member in (table, second_table)]
    if is_averaged:
        later, earlier = max(table, second_table, key=lambda member: member.seed), min(table.seed, second_table.seed)
        means = [key for key in later.adapters if key.kind == "average" and key.other == earlier]
        if not means:
            return None
        candidates.append((later, min(means, key=lambda key: abs(math.log(key.rate / rate)))))
    usable = [(member, key) for member, key in candidates if is_usable(member, key)]
    if not usable:
        return None
    member, full_adapter = min(usable, key=lambda candidate: candidate[0].adapters[candidate[1]].validation_mean)
    key = truncate_within(member, full_adapter, margin)
    return conclude(member, Choice(key, cost_of_search(table, TOP) + 1, (TOP, rate), full_adapter))


def train_longer(is_lower: bool) -> Policy:
    """Return the policy of twice the steps, after a search at a quarter, at the chosen learning rate or the next lower one."""

    def policy(table: SeedTable, margin: float) -> Choice | None:
        rate, rates = choose_learning_rate(table, TOP), table.rates("trained", TOP)
        if rate is None:
            return None
        rate = rates[max(0, rates.index(rate) - 1)] if is_lower else rate
        key = Key("long", TOP, rate)
        if not is_usable(table, key):
            return None
        return Choice(truncate_within(table, key, margin), QUARTER * len(rates) + 2, (TOP, rate), key)

    return policy


def search_randomly(budget: Policy) -> Search:
    """Return a search that finishes random cells until it has spent what another policy spends."""

    def search(
        table: SeedTable, _second_table: SeedTable, margin: float, generator: np.random.Generator
    ) -> Outcome | None:
        reference, trained = budget(table, margin), table.trained()
        if reference is None:
            return None
        cells = [
            sorted(trained)[index] for index in generator.permutation(len(trained))[: math.ceil(reference.trainings)]
        ]
        return conclude(
            table,
            pick_smallest(table, {cell: trained[cell].validation_mean for cell in cells}, margin, float(len(cells))),
        )

    return search


def search_with_optuna(budget: Policy, is_tpe: bool) -> Search:
    """Return a search by Optuna: TPE with median pruning, or random sampling with successive halving (ASHA), at another policy's cost.

    Trials report at the stored parts of a training; a cell that was trained before costs nothing.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def search(
        table: SeedTable, _second_table: SeedTable, margin: float, generator: np.random.Generator
    ) -> Outcome | None:
        reference, trained = budget(table, margin), table.trained()
        if reference is None:
            return None
        seed = int(generator.integers(2**31))
        sampler: Any = (
            optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
            if is_tpe
            else optuna.samplers.RandomSampler(seed=seed)
        )
        pruner: Any = (
            optuna.pruners.MedianPruner(n_startup_trials=3)
            if is_tpe
            else optuna.pruners.SuccessiveHalvingPruner(reduction_factor=2)
        )
        study = optuna.create_study(sampler=sampler, pruner=pruner)
        paid: dict[tuple[int, float], float] = {}
        losses: dict[tuple[int, float], float] = {}
        for _ in range(20 * len(trained)):
            if sum(paid.values()) >= reference.trainings:
                break
            trial = study.ask()
            cell = (
                trial.suggest_categorical("rank", sorted({rank for rank, _ in trained})),
                trial.suggest_categorical("rate", sorted({rate for _, rate in trained})),
            )
            if cell not in trained:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            early = sorted(
                (key.fraction, measured.validation_mean)
                for key, measured in table.adapters.items()
                if (key.kind, key.rank, key.rate) == ("trained", *cell)
            )
            is_pruned = not early or not all(math.isfinite(loss) for _, loss in early)
            for number, (fraction, loss) in enumerate(early, start=1):
                if not math.isfinite(loss):
                    break
                trial.report(loss, number)
                paid[cell] = max(paid.get(cell, 0.0), fraction)
                if fraction < 1 and trial.should_prune():
                    is_pruned = True
                    break
            if is_pruned:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                losses[cell] = trained[cell].validation_mean
                study.tell(trial, losses[cell])
        return conclude(table, pick_smallest(table, losses, margin, sum(paid.values())))

    return search


def list_searches() -> dict[str, Search]:
    """Return the rows of the table by name."""
    adapter, best = PRIMARY["adapter"], PRIMARY["best-adapter"]
    policies: dict[str, Policy] = {
        **{f"{rank} at {rate:g}": fix(rank, rate) for rank in (SMALL, TOP) for rate in FIXED_RATES},
        "16, rate tuned by whole trainings": PRIMARY["16, rate tuned by whole trainings"],
        "64, rate tuned by whole trainings": tune(TOP),
        "64, rate tuned by whole trainings, truncated": tune(TOP, is_truncated=True),
        "whole grid": search_whole_grid,
        "adapter": adapter,
        "best-adapter": best,
        "twice the steps, truncated": train_longer(is_lower=False),
        "twice the steps at the next lower rate, truncated": train_longer(is_lower=True),
    }
    return {name: use(policy) for name, policy in policies.items()} | {
        "adapter, a second seed": train_second_seed,
        "adapter, average of two seeds": average_two_seeds,
        "random search at the cost of adapter": search_randomly(adapter),
        "random search at the cost of best-adapter": search_randomly(best),
        "Optuna TPE, median pruning, at the cost of best-adapter": search_with_optuna(best, is_tpe=True),
        "ASHA at the cost of best-adapter": search_with_optuna(best, is_tpe=False),
    }


STOCHASTIC = ("random search", "Optuna", "ASHA")
TRUNCATION_MARGINS = (0.0025, 0.005, 0.01, 0.02, 0.05)


def summarise_margins(tables: Sequence[SeedTable]) -> list[dict[str, Any]]:
    """Return, for each margin, what `--goal adapter` loses against rank 16 tuned, and how much of it the truncation loses.

    The margin 0 keeps the adapter at its full rank.
    """
    rows = []
    for margin in TRUNCATION_MARGINS:
        against_tuned: dict[str, list[float]] = {}
        by_truncation: dict[str, list[float]] = {}
        ranks = []
        for table in tables:
            truncated, full, tuned = (
                conclude(table, policy(table, limit))
                for policy, limit in (
                    (PRIMARY["adapter"], margin),
                    (PRIMARY["adapter"], 0.0),
                    (PRIMARY["16, rate tuned by whole trainings"], margin),
                )
            )
            if truncated is None or full is None or tuned is None:
                continue
            against_tuned.setdefault(table.grid, []).append(truncated.test - tuned.test)
            by_truncation.setdefault(table.grid, []).append(truncated.test - full.test)
            ranks.append(truncated.rank)
        rows.append(
            {
                "margin": margin,
                "median rank": median(ranks),
                "minus rank 16 tuned": resample_grids(against_tuned),
                "lost by the truncation": resample_grids(by_truncation),
            }
        )
    return rows


def measure_recipe(outcome: Outcome, others: Sequence[SeedTable]) -> float:
    """Return the regret of the recipe on other seeds; not a number where one of its trainings there is missing or diverged."""
    tables = [seed_table.trained() for seed_table in others]
    shared = set.intersection(*(set(table) for table in tables)) if tables else set()
    means = {cell: float(np.mean([table[cell].test_mean for table in tables])) for cell in shared}
    return means.get(outcome.recipe, math.nan) - min(means.values(), default=math.nan)


def iterate_outcomes(
    search: Search, tables: Sequence[SeedTable], draws: int
) -> Iterator[tuple[SeedTable, list[SeedTable], Outcome]]:
    """Yield each case with the other seeds of its grid; the second seed of a case is the next one in a circle."""
    for table in tables:
        others = [candidate for candidate in tables if candidate.grid == table.grid and candidate is not table]
        later = [candidate for candidate in others if candidate.seed > table.seed]
        for margin in MARGINS if others else ():
            for draw in range(draws):
                outcome = search(table, (later or others)[0], margin, np.random.default_rng([draw, table.seed]))
                if outcome is not None and math.isfinite(outcome.test):
                    yield table, others, outcome


def summarise(name: str, search: Search, tables: Sequence[SeedTable]) -> dict[str, Any] | None:
    """Return one row of the table; None where no grid has what the policy needs."""
    adapters: dict[str, list[float]] = {}
    recipes: dict[str, list[float]] = {}
    ranks, trainings = [], []
    for table, others, outcome in iterate_outcomes(search, tables, DRAWS if name.startswith(STOCHASTIC) else 1):
        best = min(measured.test_mean for measured in table.trained().values() if math.isfinite(measured.test_mean))
        adapters.setdefault(table.grid, []).append(outcome.test - best)
        if math.isfinite(recipe := measure_recipe(outcome, others)):
            recipes.setdefault(table.grid, []).append(recipe)
        ranks.append(outcome.rank)
        trainings.append(outcome.trainings)
    if not ranks:
        return None
    return {
        "policy": name,
        "median rank": median(ranks),
        "geometric mean rank": round(math.exp(float(np.mean(np.log(ranks)))), 1),
        "trainings": round(float(np.mean(trainings)), 2),
        "regret of the adapter": resample_grids(adapters),
        "regret of the recipe": resample_grids(recipes) if recipes else None,
        "by grid": {grid: round(float(np.mean(values)), 4) for grid, values in sorted(adapters.items())},
        "cases": len(ranks),
    }


def summarise_all(tables: Sequence[SeedTable]) -> list[dict[str, Any]]:
    """Return the rows of all policies that have what they need."""
    return [row for name, search in list_searches().items() if (row := summarise(name, search, tables)) is not None]


def read_shares(path: Path) -> SeedTable:
    """Read a seed with the share of wrong answers, labels or preferences in place of the test loss; policies still choose by validation loss."""
    table = read_seed(path)
    with np.load(path) as arrays:
        shares = iter(1 - arrays["scores"].mean(1))
    final = {
        key: replace(measured, test_mean=float(next(shares)))
        for key, measured in table.adapters.items()
        if measured.test is not None
    }
    return replace(table, adapters={**table.adapters, **final})


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| policy | median rank | trainings | regret of the adapter | regret of the recipe | grids |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        regrets = [row["regret of the adapter"], row["regret of the recipe"]]
        cells = [
            f"{entry['mean']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})" if entry else "–" for entry in regrets
        ]
        lines.append(
            f"| {row['policy']} | {row['median rank']:g} | {row['trainings']:g} | {cells[0]} | {cells[1]} | {regrets[0]['grids']} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", choices=("stored", "new"))
    parser.add_argument(
        "folder", type=Path, nargs="?", default=HERE.parent / "selection", help="folder of the stored grids"
    )
    options = parser.parse_args()
    if options.grids == "new" and not JUDGED.exists():
        print("table: the new grids have not been judged yet: run benchmarks.learning_rate.judge first")
        return 2
    tables = (
        read_stored(options.folder)
        if options.grids == "stored"
        else [read_seed(path) for path in sorted(GRIDS.glob("*.npz"))]
    )
    result: dict[str, Any] = {"rows": summarise_all(tables)}
    if options.grids == "stored":
        result["endpoints"] = judge(tables)  # a rehearsal: the policies were chosen on these grids
    else:
        result["margins"] = summarise_margins(tables)
        scored = [path for path in sorted(GRIDS.glob("*.npz")) if path.stem.rpartition("_")[0] in SCORED]
        result["rows in shares of wrong answers"] = summarise_all([read_shares(path) for path in scored])
    (HERE / f"table_{options.grids}.json").write_text(json.dumps(result, indent=1) + "\n")
    for title, rows in result.items():
        if title not in ("endpoints", "margins"):
            print(f"{title}\n\n{format_table(rows)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
