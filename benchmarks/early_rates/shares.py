"""Check on the judged grids whether the stated lower bounds of the share of the gain hold on the test split.

    python -m benchmarks.early_rates.shares       # after the judgement; writes shares.json

For each truncation of what the rule hands over, the tool states from the validation examples which share of the gain it keeps at least, with 95%
confidence. The base is a zero update; a trained classifier stays. The margins are walked downward as `adapters.find_smallest` does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.early_rates.grids import JUDGED, TOP
from benchmarks.early_rates.judge import GRIDS, HERE, find_base, read_completed
from benchmarks.early_rates.rules import RULE_HANDOVER, GridTable, Key, choose_by_rule
from benchmarks.learning_rate.train_grids import TRUNCATED_RANKS
from benchmarks.machine import describe_machine
from rightrank.adapters.find_smallest import find_smallest
from rightrank.decision.adapter import Criterion, ScoredAdapter

MARGINS = ("1%", "2%", "5%")


def judge_grid(table: GridTable) -> dict[str, Any]:
    """Return the rank at each margin with the shares stated and measured, and all stated lower bounds beside the test shares."""
    top = RULE_HANDOVER(table, TOP, choose_by_rule(table))
    keys: dict[int, Key] = {rank: (f"truncated {top[0]}", rank, top[2], top[3]) for rank in TRUNCATED_RANKS}
    keys |= {TOP: top, 0: find_base(table, top)}
    test_gain = table.test[keys[0]] - table.test[top]

    def score(rank: int, criterion: Criterion) -> ScoredAdapter:
        losses = table.losses[keys[rank]]
        return ScoredAdapter.from_scores(
            str(rank), rank, losses.sum() / table.weights.sum(), (losses, table.weights), criterion
        )

    def measure_share(rank: int) -> float:
        return (table.test[keys[0]] - table.test[keys[rank]]) / test_gain

    rows: dict[str, Any] = {}
    bounds = []
    for margin in MARGINS:
        criterion = Criterion(
            "loss", higher_is_better=False, margin=margin, loss="loss" if table.classes else "token_loss"
        )
        smallest = find_smallest(
            TOP, TRUNCATED_RANKS, lambda rank: rank, lambda rank, criterion=criterion: score(rank, criterion), criterion
        )
        answer = smallest.answer
        if answer.has_no_gain:
            return {
                "family": "classifiers" if table.classes else "causal",
                "no gain shown": True,
                "test gain": round(test_gain, 4),
            }
        rows[margin] = {
            "rank": answer.rank,
            "stated at least": answer.share_kept_low,
            "on test": measure_share(answer.rank),
        }
        if margin == MARGINS[-1]:  # the longest walk has all candidates
            bounds = [[c.rank, c.share_kept_low, measure_share(c.rank)] for c in answer.candidates if c.rank < TOP]
    return {
        "family": "classifiers" if table.classes else "causal",
        "no gain shown": False,
        "margins": rows,
        "bounds": bounds,
    }


def summarise(grids: Sequence[dict[str, Any]]) -> dict[str, Any]:
    gained = [grid for grid in grids if not grid["no gain shown"]]
    bounds = [bound for grid in gained for bound in grid["bounds"]]
    summary: dict[str, Any] = {
        "grids": len(grids),
        "no gain shown": len(grids) - len(gained),
        "lower bounds that hold": f"{sum(low <= share for _, low, share in bounds)} of {len(bounds)}",
    }
    for margin in MARGINS:
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
    grids = {name: judge_grid(read_completed(GRIDS / f"{name}.npz")) for name in names}
    families = {
        family: [grid for grid in grids.values() if grid["family"] == family] for family in ("causal", "classifiers")
    }
    result = {"machine": describe_machine(), "all": summarise(list(grids.values()))}
    result |= {family: summarise(members) for family, members in families.items()} | {"grids": grids}
    (HERE / "shares.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("all", "causal", "classifiers")}, indent=1))


if __name__ == "__main__":
    main()
