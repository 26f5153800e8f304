"""The locked grids judge what was found on the others, once.

    python -m benchmarks.selection.judge_locked
    python -m benchmarks.selection.judge_locked --picture
    python -m benchmarks.selection.judge_locked --table

Refused while fewer than six locked grids are whole, where a file differs from its hash, and once `judged.json` is there.
What is judged was written down before (`locked/README.md`): the probability of one seed with the constant that the open grids fit, what each
confidence picks, every strategy and baseline of `compare.py`, the adapter answer, and the savings of `savings.py`. `--rehearse`
takes the open grids of `grids/` in their place, to see that everything runs; its figures judge nothing. `--picture` draws all
long grids as `grids.svg`, and the locked ones with them once they have judged. `--table` prints what `judged.json` says to each question
that was written down before, for `locked/README.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.selection import compare, locks, one_seed, savings
from benchmarks.selection.tables import read_grids

FAMILY = compare.LOCKED
MARGINS = one_seed.MARGINS["long"]
NEEDED = 6  # whole grids
JUDGED = compare.HERE / "judged.json"
PICTURE = compare.HERE / "grids.svg"


def refusal(judged: Path = JUDGED) -> str | None:
    """Why the locked grids can't judge now."""
    if judged.exists():
        return f"the locked grids judged on {json.loads(judged.read_text())['date']}: they judge once"
    known = locks.read_lock()
    touched = [name for name, entry in known.items() if locks.digest(locks.LOCKED / name) != entry["sha256"]]
    if touched:
        return f"touched after their lock: {', '.join(touched)}"
    whole = [name for name, entry in known.items() if not entry["partial"]]
    if len(whole) < NEEDED:
        return f"{len(whole)} of {NEEDED} locked grids are whole: {', '.join(whole)}"
    return None


def judge(files: Sequence[Path]) -> dict[str, Any]:
    """Everything about the grids of `files`."""
    names = " ".join(str(file.relative_to(compare.HERE)) for file in files)
    compare.FAMILIES[FAMILY] = (names, slice(None), MARGINS)
    return {
        "machine": machine(),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "grids": [file.stem for file in files],
        "one seed": one_seed_judged(files),
        "compare": {key: value for key, value in compare.compare([FAMILY]).items() if key != "machine"},
        "savings": savings_judged(),
    }  # fmt: skip


def one_seed_judged(files: Sequence[Path]) -> dict[str, Any]:
    """The probability against other answers; nothing here is fitted on these grids."""
    every = one_seed.every_seed(one_seed.curves_in(files))
    opened = [pair for seen in one_seed.every_seed(one_seed.curves()) for pair in seen.pairs]
    ratio = math.exp(one_seed.fit(opened, one_seed.CHOSEN, one_seed.DEGREES)[0])
    ratios = dict.fromkeys({seen.source for seen in every}, ratio)
    found: dict[str, Any] = {"ratio": round(ratio, 4), "brier": {}, "by grid": {}, "reliability": {}}
    for name, forecast in one_seed.forecasts(ratios).items():
        events = one_seed.events(every, forecast)
        found["brier"][name] = {"all": round(one_seed.brier(events), 3), "interval": one_seed.over_grids(events)}
        found["by grid"][name] = {
            grid: round(one_seed.brier([event for event in events if event.grid == grid]), 3)
            for grid in sorted({event.grid for event in events})
        }
        if name in ("probability", "examples alone"):
            found["reliability"][name] = one_seed.reliability(events)
    found["picks"] = {name: row["long"] for name, row in one_seed.all_picks(every, ratios).items()}
    found["picks after bracket"] = one_seed.picks_after_bracket((FAMILY,))[FAMILY]
    return found


def savings_judged() -> dict[str, Any]:
    curves = compare.whole_grids_of(FAMILY)
    opened = [case for family in savings.USED for case in savings.halves(family, compare.whole_grids_of(family))]
    locked = list(savings.halves(FAMILY, curves))
    return {
        "noise": savings.noise(curves),
        "learning rates": savings.learning_rates(curves, MARGINS[1]),
        "stops": savings.stops([*opened, *locked], (FAMILY,)),
    }


def answers(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Question, figures and what follows, by the rules that were written down before (`locked/README.md`)."""
    seed, compared = result["one seed"], result["compare"]
    brier = {name: row["all"] for name, row in seed["brier"].items()}
    low, high = seed["brier"]["probability"]["interval"]
    others = ("present rule", "whole one-seed grid", "always 16")
    level, rule = (seed["picks"][name] for name in ("at 0.7", "present rule"))
    (mean,) = (row for row in compared["means"] if row["method"] == compare.EQUAL_COST_WITH)
    passes, adapters = (sum(row[name] for row in compared["adapters"]) for name in ("false_passes", "curves"))
    stops = [row["below 0.02"] for row in result["savings"]["stops"].values()]
    stopped, wrong = (sum(row[name] for row in stops) for name in ("stopped", "of these would have held"))
    chosen = level["too low"] < rule["too low"] and level["exact"] >= rule["exact"]
    return [
        (
            "the probability of one seed",
            f"Brier {brier['probability']:.3f} ({low:.3f} to {high:.3f}); {', '.join(f'{name} {brier[name]:.3f}' for name in others)}",
            "lower than all three" if all(brier["probability"] < brier[name] for name in others) else "not lower than all three",
        ),
        (
            "the level of a one-seed answer",
            f".7 is too low in {level['too low']} and exact in {level['exact']} of {level['cases']}, the rule in {rule['too low']} and {rule['exact']}",
            ".7 becomes the default" if chosen else "the rule stays",
        ),
        (
            "the search (`bracket`)",
            f"exact {compare.share(mean, 'exact')}, too low {compare.share(mean, 'under')}, {mean['trainings']:.1f} trainings",
            "the claim",
        ),
        ("the adapter", f"{passes} false passes of {adapters}", "the claim"),
        (
            "a failing rank stopped at half below 2%",
            f"{wrong} wrong stops of {stopped}",
            "it is built" if stopped and not wrong else "it is dropped",
        ),
    ]  # fmt: skip


def answer_table(result: dict[str, Any]) -> str:
    lines = [("question", "on the locked grids", "what follows"), ("---", "---", "---"), *answers(result)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(path: Path = PICTURE) -> list[str]:
    """Every long grid in one picture; the names of those drawn. Locked ones are read only after their judgement."""
    opened = compare.whole_grids_of("real, 400 steps")
    names = json.loads(JUDGED.read_text())["grids"] if JUDGED.exists() else []
    locked = [curve for name in names for curve in read_grids(locks.LOCKED / f"{name}.json")]
    compare.draw_grids([*opened, *locked], MARGINS[1], path, {curve.name for curve in locked})
    return [curve.name for curve in (*opened, *locked)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", type=Path, metavar="FILE", help="judge the open grids of `grids/` and write FILE")
    parser.add_argument("--picture", action="store_true", help="draw `grids.svg` and judge nothing")
    parser.add_argument("--table", action="store_true", help="print the answers that `judged.json` gives")
    options = parser.parse_args()
    if options.table:
        print(answer_table(json.loads(JUDGED.read_text())))
        return 0
    if options.picture:
        print("\n".join(draw()))
        return 0
    if options.rehearse is None and (reason := refusal()) is not None:
        print(f"judge_locked: {reason}")
        return 2
    result = judge(sorted(locks.files() if options.rehearse is None else compare.HERE.glob("grids/*.json")))
    (options.rehearse or JUDGED).write_text(json.dumps(result, indent=1) + "\n")
    if options.rehearse is None:
        draw()
    print(answer_table(result))
    print(json.dumps(result["one seed"], indent=1))
    print(compare.text(result["compare"]))
    print(json.dumps(result["savings"], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
