"""Does the top of the ranks enter the answer to the first question?

    python -m benchmarks.selection.tops NAME MODEL DATA --work FOLDER --out benchmarks/selection/tops.json

NAME is one of `TASKS`. Every top (16, 32, 64, 128) is trained at both learning rates and by both seeds, all in shared passes. The
better learning rate on the validation split is truncated to every power of two below, and the rule of `select --goal adapter` picks.
Stored for each top and seed: the pick, its validation difference with the bound, and the test loss of the pick and of
the top as trained. FOLDER keeps what is finished; the same command resumes. `--table` prints the stored results, and what a top of 16 loses
against one of 64 on the open long grids, which trained both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.selection.compare import by_rank, whole_grids_of
from benchmarks.selection.long_grids import FEW, MINILM, SHORT_TEXTS, SMOLLM2, run_all
from benchmarks.selection.real_training import COMMON, LONG, Workshop, open_workshop
from benchmarks.selection.study import run_study
from rightrank.decision.adapter import Criterion, adapter_answer
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import TrialFinished
from rightrank.search.bracket import truncation
from rightrank.train.runtime import adapter_attached

TOPS = (16, 32, 64, 128)
LOWER = (1, 2, 4, 8)
SETTINGS = COMMON | LONG | SHORT_TEXTS | {"ranks": LOWER + TOPS, "seeds": (0, 1), "learning_rates": (1e-3, 3e-3)}
TASKS: dict[str, dict[str, object]] = {
    "newsgroups": SETTINGS | MINILM | {"metric": "accuracy"},
    "senses": SETTINGS | MINILM,
    "senses_few": SETTINGS | MINILM | FEW | {"dtype": "bfloat16"},
    "glosses": SETTINGS | SMOLLM2 | {"learning_rates": (3e-3, 6e-3)},
    "docstrings": SETTINGS | SMOLLM2,
}
MARGINS = {"loss": (0.005, 0.01, 0.02), "accuracy": (0.01, 0.02)}


def train(shop: Workshop) -> list[TrialFinished]:
    """The better training of every top and seed."""
    settings = shop.settings
    arms = [
        shop.space.arm(top, learning_rate, seed)
        for seed in settings.seeds
        for learning_rate in settings.learning_rates
        for top in TOPS
    ]
    run_all(shop, arms)
    done = [outcome for arm in arms if isinstance(outcome := shop.outcomes[arm], TrialFinished)]
    sign = -1.0 if settings.metric_name == "accuracy" else 1.0
    return [
        min((one for one in done if (one.rank, one.seed) == (top, seed)), key=lambda one: sign * one.value)
        for seed in settings.seeds
        for top in TOPS
    ]


def cut(shop: Workshop, parent: TrialFinished) -> list[TrialFinished]:
    """The parent's truncations to every power of two below."""
    arms = [truncation(parent, rank) for rank in shop.space.truncated_ranks if rank < parent.rank]
    run_all(shop, arms)
    return [outcome for arm in arms if isinstance(outcome := shop.outcomes[arm], TrialFinished)]


def test_value(shop: Workshop, trial: TrialFinished) -> float:
    with adapter_attached(shop.runtime, shop.folder.trial_adapter(trial.trial_id)):
        return float(shop.runtime.evaluate("test").metrics[shop.settings.metric_name])


def rows_of(task: str, shop: Workshop, parent: TrialFinished) -> list[dict[str, Any]]:
    """One row a margin: what the rule picks from this top's training."""
    files = {one.trial_id: one for one in [parent, *cut(shop, parent)]}
    metric = shop.settings.metric_name
    tests = {parent.trial_id: test_value(shop, parent)}
    rows = []
    for margin in MARGINS[metric]:
        answer = adapter_answer(
            list(files.values()),
            Criterion(metric, metric == "accuracy", margin, shop.space.criterion.loss),
            parent.trial_id,
        )
        assert answer is not None
        if answer.trial_id not in tests:
            tests[answer.trial_id] = test_value(shop, files[answer.trial_id])
        rows.append(
            {
                "task": task,
                "metric": metric,
                "margin": margin,
                "seed": parent.seed,
                "top": parent.rank,
                "learning_rate": parent.learning_rate,
                "rank": answer.rank,
                "difference": answer.difference,
                "difference_high": answer.difference_high,
                "validation_of_top": parent.value,
                "test_of_top": tests[parent.trial_id],
                "test_of_pick": tests[answer.trial_id],
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Per task, margin and seed: picks and test values by top."""
    lines = [
        "| task | margin | seed | rank picked with top 16, 32, 64, 128 | its test value |",
        "|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((row["task"], row["margin"], row["seed"]) for row in rows):
        found = {row["top"]: row for row in rows if (row["task"], row["margin"], row["seed"]) == key}
        picks = ", ".join(str(found[top]["rank"]) for top in TOPS if top in found)
        tests = ", ".join(f"{found[top]['test_of_pick']:.4f}" for top in TOPS if top in found)
        lines.append(f"| {key[0]} | {key[1]} | {key[2]} | {picks} | {tests} |")
    return "\n".join([*lines, "", *on_stored_grids()])


def on_stored_grids() -> list[str]:
    """By seed, on the test split: how much worse than the training at rank 64 the training at 16 and the truncation to 16 are."""
    lines = ["| grid | trained at 16 | 64 truncated to 16 |", "|---|---|---|"]
    for curve in whole_grids_of("real, 400 steps"):
        seeds = [by_rank(curve, seed) for seed in curve.seeds]
        cells = (", ".join(f"{losses[16]:+.3f}" for losses in kind) for kind in zip(*seeds, strict=True))
        lines.append(f"| {curve.name} | {' | '.join(cells)} |")
    return lines


def rows_of_task(options: argparse.Namespace) -> list[dict[str, Any]]:
    shop = open_workshop(options.model, options.data, SelectSettings(**TASKS[options.task]), options.work)
    return [row for parent in train(shop) for row in rows_of(options.task, shop, parent)]


def main() -> None:
    run_study(__doc__, TASKS, rows_of_task, table, Path(__file__).with_name("tops.json"))


if __name__ == "__main__":
    main()
