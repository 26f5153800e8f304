"""The stored results and the tables of the README, from the lines that `study` wrote.

python -m benchmarks.truncation.table FOLDER/*.jsonl --out benchmarks/truncation/results.json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from benchmarks.results import store
from benchmarks.truncation.study import RANKS, TOP
from benchmarks.truncation.tops import whole_trainings
from rightrank.decision.comparison import Estimate, estimate
from rightrank.schema.trials import TrialFinished

Row = dict[str, Any]
MARGIN = 0.005  # nats a label
COLUMNS = (
    ("svd", {"method": "svd"}),
    ("kfac", {"method": "kfac"}),
    ("activation", {"method": "activation"}),
    ("para", {"method": "para"}),
    ("kfac_global", {"method": "kfac_global"}),
    ("svd_served", {"method": "svd_served"}),
    ("kfac_served", {"method": "kfac_served"}),
    ("kfac + 20%", {"method": "kfac", "share": 0.2}),
    ("kfac + 10%", {"method": "kfac", "share": 0.1}),
    ("kfac + 5%", {"method": "kfac", "share": 0.05}),
    ("svd + 20%", {"method": "svd", "share": 0.2}),
    ("kfac_served + 20%", {"method": "kfac_served", "share": 0.2}),
    ("top + 20%, then kfac", {"method": "kfac", "share": 0.2, "order": "after"}),
    ("top + 20%, then kfac_served", {"method": "kfac_served", "share": 0.2, "order": "after"}),
    ("top + 20%", {"method": "top", "share": 0.2}),
    ("top + 10%", {"method": "top", "share": 0.1}),
    ("top + 5%", {"method": "top", "share": 0.05}),
)


@dataclass(frozen=True)
class Lines:
    """Every measured adapter, by task, seed, what it is, and split."""

    rows: Mapping[tuple[Any, ...], Row]
    steps: int = 400

    def find(self, task: str, seed: int, method: str, rank: int, share: float = 0.0, order: str = "") -> Row | None:
        return self.rows.get((task, seed, method, rank, round(share * self.steps), order, "test"))

    @property
    def tops(self) -> list[tuple[str, int]]:
        return sorted({(key[0], key[1]) for key in self.rows})

    def reference(self, task: str, seed: int, share: float) -> Row | None:
        """The better of the top as trained and the top with the same extra steps; None where one was not measured."""
        plain = self.find(task, seed, "top", TOP)
        more = self.find(task, seed, "top", TOP, share)
        if plain is None or more is None:
            return None
        return plain if plain["loss"] <= more["loss"] else more


def read(paths: Sequence[Path]) -> Lines:
    rows: dict[tuple[Any, ...], Row] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if "damping" in row or "source" in row or row.get("factor", 0.1) != 0.1:
                continue
            if row["method"] != "top" and row.get("tokens", 4096) not in (0, 4096):
                continue
            rows[
                row["task"],
                row["seed"],
                row["method"],
                row["rank"],
                row.get("steps", 0),
                row.get("order", ""),
                row["split"],
            ] = row
    return Lines(rows)


def paired(rows: Sequence[Row], references: Sequence[Row]) -> Estimate:
    """Loss minus the reference's over examples and seeds, nats a label."""
    sums = np.array([np.subtract(row["losses"], other["losses"]) for row, other in zip(rows, references, strict=True)])
    return estimate(sums, np.array(rows[0]["tokens_of"], dtype=np.float64))


def differences(lines: Lines) -> list[Row]:
    """For each task, method and rank: the mean over seeds, its 95% interval, and how many seeds hold at the margin."""
    found: list[Row] = []
    tasks = list(dict.fromkeys(task for task, _ in lines.tops))
    for task in tasks:
        seeds = [seed for other, seed in lines.tops if other == task]
        for label, what in COLUMNS:
            for rank in (TOP, *RANKS):
                share = float(what.get("share", 0.0))
                order = str(what.get("order", ""))
                pairs = [
                    (lines.find(task, s, str(what["method"]), rank, share, order), lines.reference(task, s, share))
                    for s in seeds
                ]
                known = [(row, reference) for row, reference in pairs if row is not None and reference is not None]
                if known:
                    found.append(_difference(task, label, rank, known))
    return found


def _difference(task: str, label: str, rank: int, known: Sequence[tuple[Row, Row]]) -> Row:
    whole = paired([row for row, _ in known], [reference for _, reference in known])
    each = [paired([row], [reference]) for row, reference in known]
    return {
        "task": task,
        "what": label,
        "rank": rank,
        "difference": round(whole.mean, 5),
        "low": round(whole.bound(0.025), 5),
        "high": round(whole.bound(0.975), 5),
        "by_seed": [round(one.mean, 5) for one in each],
        "errors": [round(one.standard_error, 5) for one in each],
        "hold": sum(one.bound(0.95) < MARGIN for one in each),
        "seeds": len(each),
        "max_module_rank": max(row.get("max_module_rank", rank) for row, _ in known),
    }


def direct(task: str, work: Path) -> list[Row]:
    """Trainings at lower ranks minus the top of the same seed, each at its best learning rate, on the validation split."""
    trials = whole_trainings(work)
    learning_rates = {trial.learning_rate for trial in trials}
    best: dict[tuple[int, int], TrialFinished] = {}
    for trial in sorted(trials, key=lambda trial: trial.metrics["loss"]):
        best.setdefault((trial.rank, trial.seed), trial)
    found: list[Row] = []
    for rank in sorted({rank for rank, _ in best} - {TOP}, reverse=True):
        cells = Counter(trial.seed for trial in trials if trial.rank in (rank, TOP))
        seeds = sorted(seed for seed, count in cells.items() if count == 2 * len(learning_rates))
        if not seeds:
            continue
        pairs = [(best[rank, seed], best[TOP, seed]) for seed in seeds]
        sums = np.array([np.subtract(one.item_losses, top.item_losses) for one, top in pairs])
        weights = np.array(pairs[0][0].item_tokens, dtype=np.float64)
        each = [estimate(row[None], weights) for row in sums]
        found.append(
            {
                "task": task,
                "rank": rank,
                "difference": round(estimate(sums, weights).mean, 5),
                "by_seed": [round(one.mean, 5) for one in each],
                "errors": [round(one.standard_error, 5) for one in each],
                "learning_rates": [one.learning_rate for one, _ in pairs],
            }
        )
    return found


def versus(lines: Lines, left: Mapping[str, Any], right: Mapping[str, Any], rank: int) -> Row | None:
    """How often the left method's loss is lower than the right's, by task and seed, and the mean difference."""
    pairs, ratios = [], []
    for task, seed in lines.tops:
        one = lines.find(task, seed, left["method"], rank, left.get("share", 0.0), left.get("order", ""))
        other = lines.find(task, seed, right["method"], rank, right.get("share", 0.0), right.get("order", ""))
        if one is not None and other is not None:
            pairs.append((task, paired([one], [other])))
            top = lines.find(task, seed, "top", TOP)
            assert top is not None
            ratios.append(paired([one], [top]).standard_error / paired([other], [top]).standard_error)
    if not pairs:
        return None
    clear = [pair for _, pair in pairs if abs(pair.mean) > 2 * pair.standard_error]
    return {
        "left": left,
        "right": right,
        "rank": rank,
        "cases": len(pairs),
        "left_lower": sum(pair.mean < 0 for _, pair in pairs),
        "clearly_lower": sum(pair.mean < 0 for pair in clear),
        "clearly_higher": sum(pair.mean > 0 for pair in clear),
        "mean_difference": round(float(np.mean([pair.mean for _, pair in pairs])), 5),
        "median_error_ratio": round(float(np.median(ratios)), 3),
        "median_difference": round(float(np.median([pair.mean for _, pair in pairs])), 5),
    }


def markdown(found: Sequence[Row]) -> str:
    """One table a task: methods down, ranks across; the mean over seeds, and of how many seeds hold at the margin."""
    by_task: dict[str, dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in found:
        by_task[row["task"]][row["what"]][row["rank"]] = row
    parts: list[str] = []
    for task, whats in by_task.items():
        ranks = [rank for rank in (TOP, *RANKS) if any(rank in cells for cells in whats.values())]
        parts.append(
            f"**{task}**\n\n| | " + " | ".join(f"r={rank}" for rank in ranks) + " |\n|---|" + "---|" * len(ranks)
        )
        parts += [
            f"| {what} | " + " | ".join(_cell(cells.get(rank)) for rank in ranks) + " |"
            for what, cells in whats.items()
        ]
        parts.append("")
    return "\n".join(parts)


def _cell(row: Row | None) -> str:
    return "" if row is None else f"{row['difference']:+.4f} ({row['hold']}/{row['seeds']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--grids", nargs="*", default=[], help="TASK=FOLDER with the trainings at every rank")
    options = parser.parse_args()
    lines = read(options.lines)
    found = differences(lines)
    print(markdown(found))
    pairs = [
        ({"method": "kfac"}, {"method": "svd"}),
        ({"method": "activation"}, {"method": "svd"}),
        ({"method": "para"}, {"method": "svd"}),
        ({"method": "kfac_global"}, {"method": "kfac"}),
        ({"method": "kfac_global"}, {"method": "para"}),
        ({"method": "kfac_served"}, {"method": "kfac"}),
        ({"method": "svd_served"}, {"method": "svd"}),
        ({"method": "kfac_served"}, {"method": "svd_served"}),
        ({"method": "kfac", "share": 0.2}, {"method": "svd", "share": 0.2}),
        ({"method": "kfac", "share": 0.2}, {"method": "kfac"}),
        ({"method": "kfac_served", "share": 0.2}, {"method": "kfac", "share": 0.2}),
        ({"method": "kfac", "share": 0.2, "order": "after"}, {"method": "kfac", "share": 0.2}),
        ({"method": "kfac_served", "share": 0.2, "order": "after"}, {"method": "kfac_served", "share": 0.2}),
        ({"method": "kfac", "share": 0.1}, {"method": "kfac", "share": 0.2}),
        ({"method": "kfac", "share": 0.05}, {"method": "kfac", "share": 0.2}),
    ]
    compared = [one for left, right in pairs for rank in RANKS if (one := versus(lines, left, right, rank))]
    for one in compared:
        print(json.dumps(one))
    top = [versus_top(lines, share) for share in (0.2, 0.1, 0.05)]
    print(json.dumps(top))
    tops = [
        {"task": task, "seed": seed, "learning_rate": _any(lines, task, seed)["learning_rate"]}
        for task, seed in lines.tops
    ]
    trained = [row for one in options.grids for row in direct(one.partition("=")[0], Path(one.partition("=")[2]))]
    for row in trained:
        print(json.dumps(row))
    result = {"machine": machine(), "tops": tops, "differences": found, "pairs": compared, "top_further": top}
    store(result | {"direct": trained}, options.out)


def versus_top(lines: Lines, share: float) -> Row:
    """What the same extra steps do to the top itself."""
    pairs = []
    for task, seed in lines.tops:
        more, plain = lines.find(task, seed, "top", TOP, share), lines.find(task, seed, "top", TOP)
        if more is not None and plain is not None:
            pairs.append((task, seed, paired([more], [plain])))
    return {
        "share": share,
        "changes": [
            {
                "task": task,
                "seed": seed,
                "difference": round(one.mean, 5),
                "standard_error": round(one.standard_error, 5),
            }
            for task, seed, one in pairs
        ],
    }


def _any(lines: Lines, task: str, seed: int) -> Row:
    row = lines.find(task, seed, "top", TOP)
    assert row is not None
    return row


if __name__ == "__main__":
    main()
