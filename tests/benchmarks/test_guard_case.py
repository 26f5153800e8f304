"""The stored case of a guard that changes the answer agrees with itself."""

from __future__ import annotations

import json
from pathlib import Path

import benchmarks

STORED = Path(benchmarks.__file__).parent / "guard" / "results.json"


def test_the_handed_over_adapter_is_both_and_the_tasks_answer_is_not() -> None:
    case = json.loads(STORED.read_text(encoding="utf-8"))["cases"]["changes the answer"]
    guard, handed_over = case["guard"], case["handed_over"]
    rows = {one["trial_id"]: one for one in guard["candidates"]}
    task = rows[guard["task_trial_id"]]
    assert (task["task_holds"], task["guard_holds"]) == (True, False)
    both = [one for one in rows.values() if one["task_holds"] and one["guard_holds"]]
    assert handed_over["rank"] == min(one["rank"] for one in both) > guard["task_rank"]
    assert guard["holds"]
    assert guard["confidence"] == 1 - 0.05 / sum(
        one["task_holds"] and one["rank"] >= guard["task_rank"] for one in rows.values()
    )
