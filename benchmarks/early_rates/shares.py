"""Check whether the stated lower bounds of the share of the gain hold on the test split, by kind of task.

    python -m benchmarks.early_rates.shares       # after the judgement; writes shares.json

For the truncations of what the rule hands over, the tool states from the validation examples which share of the gain each keeps at least, with
95% confidence. The base is a zero update; a trained classifier stays. The margins are walked downward as `adapters.find_smallest` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks.early_rates.grids import JUDGED, TOP
from benchmarks.early_rates.judge import GRIDS, HERE, find_base, read_completed
from benchmarks.early_rates.rules import RULE_HANDOVER, Floats, Key, choose_by_rule
from benchmarks.learning_rate.train_grids import TRUNCATED_RANKS
from benchmarks.machine import describe_machine
from rightrank.adapters.find_smallest import find_smallest
from rightrank.decision.adapter import Criterion, ReferenceComparison, ScoredAdapter
from rightrank.schema.metrics import LossKind

MARGINS = ("1%", "2%", "5%")


class ScoredRanks(NamedTuple):
    """Scores of the base (rank 0), of the adapter that is handed over (the top rank), and of its truncations."""

    validation: Mapping[int, Floats]  # by example, times its weight
    weights: Floats
    test: Mapping[int, float]  # means
    metric: Literal["loss", "accuracy"] = "loss"
    loss: LossKind = "token_loss"

    def score(self, rank: int, margin: str) -> ScoredAdapter:
        values = self.validation[rank], self.weights
        mean = float(values[0].sum() / self.weights.sum())
        return ScoredAdapter.from_scores(str(rank), rank, mean, values, self.build_criterion(margin))

    def build_criterion(self, margin: str) -> Criterion:
        return Criterion(self.metric, higher_is_better=self.metric != "loss", margin=margin, loss=self.loss)

    def measure_share(self, rank: int) -> float:
        """Return the share of the gain that a rank keeps on the test split."""
        return (self.test[0] - self.test[rank]) / (self.test[0] - self.test[TOP])


def read_judged(path: Path) -> ScoredRanks:
    table = read_completed(path)
    top = RULE_HANDOVER(table, TOP, choose_by_rule(table))
    keys: dict[int, Key] = {rank: (f"truncated {top[0]}", rank, top[2], top[3]) for rank in TRUNCATED_RANKS}
    keys |= {TOP: top, 0: find_base(table, top)}
    validation, test = ({rank: values[key] for rank, key in keys.items()} for values in (table.losses, table.test))
    return ScoredRanks(validation, table.weights, test, loss="loss" if table.classes else "token_loss")


def read_kind(path: Path, metric: Literal["loss", "accuracy"]) -> ScoredRanks:
    """Read scores of `kinds/`: of preference pairs by loss or by accuracy, and of classifiers by accuracy."""
    name, unit = ("losses", 1000) if metric == "loss" else ("scores", 2)
    with np.load(path) as arrays:
        validation, test = ({int(rank): row / unit for rank, row in zip(arrays["ranks"], arrays[f"{name}_{split}"], strict=True)} for split in ("validation", "test"))  # fmt: skip
    means = {rank: float(row.mean()) for rank, row in test.items()}
    return ScoredRanks(validation, np.ones(len(validation[0])), means, metric, "pair_loss")


def judge_grid(scored: ScoredRanks) -> dict[str, Any]:
    """Return the rank at each margin with the shares stated and measured, and the stated lower bound of each truncation beside its test share."""
    adapters = {str(rank): scored.score(rank, MARGINS[0]) for rank in scored.validation}
    comparison = ReferenceComparison(adapters[str(TOP)], adapters, scored.build_criterion(MARGINS[0]), adapters["0"])
    gain = scored.test[0] - scored.test[TOP]
    if comparison.has_no_gain:
        return {"no gain shown": True, "test gain": round(gain if scored.metric == "loss" else -gain, 4)}
    rows = {}
    for margin in MARGINS:
        criterion = scored.build_criterion(margin)
        answer = find_smallest(
            TOP,
            TRUNCATED_RANKS,
            lambda rank: rank,
            lambda rank, margin=margin: scored.score(rank, margin),
            criterion,
        ).answer
        rows[margin] = {
            "rank": answer.rank,
            "stated at least": answer.share_kept_low,
            "on test": scored.measure_share(answer.rank),
        }
    candidates = [comparison.build_candidate(adapters[str(rank)]) for rank in TRUNCATED_RANKS]
    bounds = [[c.rank, c.share_kept_low, scored.measure_share(c.rank)] for c in candidates]
    return {"no gain shown": False, "margins": rows, "bounds": bounds}


def summarise(grids: Sequence[dict[str, Any]]) -> dict[str, Any]:
    gained = [grid for grid in grids if not grid["no gain shown"]]
    bounds = [bound for grid in gained for bound in grid["bounds"]]
    summary: dict[str, Any] = {
        "grids": len(grids),
        "no gain shown": len(grids) - len(gained),
        "lower bounds that hold": f"{sum(low <= share for _, low, share in bounds)} of {len(bounds)}",
    }
    for margin in MARGINS if gained else ():
        rows = [grid["margins"][margin] for grid in gained]
        lost = [1 - row["on test"] for row in rows]
        summary[margin] = {
            "median rank": float(np.median([row["rank"] for row in rows])),
            "lost on test": round(float(np.mean(lost)), 4),
            "largest": round(max(lost), 4),
            "exceeded": f"{sum(value > float(margin[:-1]) / 100 for value in lost)} of {len(lost)}",
            "stated bound holds": f"{sum(row['stated at least'] <= row['on test'] for row in rows)} of {len(rows)}",
        }
    return summary


def main() -> None:
    names = [grid.name for grid in JUDGED if (GRIDS / f"{grid.name}.completed.npz").exists()]
    judged = {name: read_judged(GRIDS / f"{name}.npz") for name in names}
    kinds = sorted((HERE / "kinds").glob("*.npz"))
    pairs = [path for path in kinds if path.stem not in judged]
    families = {
        "causal": {name: scored for name, scored in judged.items() if scored.loss != "loss"},
        "classifiers": {name: scored for name, scored in judged.items() if scored.loss == "loss"},
        "classifiers, accuracy": {path.stem: read_kind(path, "accuracy") for path in kinds if path not in pairs},
        "preference pairs": {path.stem: read_kind(path, "loss") for path in pairs},
        "preference pairs, accuracy": {path.stem: read_kind(path, "accuracy") for path in pairs if "replies" not in path.stem},
    }  # fmt: skip
    grids = {family: {name: judge_grid(scored) for name, scored in members.items()} for family, members in families.items()}  # fmt: skip
    summary = {"all": summarise([*grids["causal"].values(), *grids["classifiers"].values()])}
    summary |= {family: summarise(list(members.values())) for family, members in grids.items()}
    result = {"machine": describe_machine(), **summary, "grids": grids}
    (HERE / "shares.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
