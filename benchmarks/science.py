"""The tables of docs/explanation/science.md, from the stored results, so that the page can't say what was not measured.

python -m benchmarks.science     # writes the tables anew after a benchmark has run again
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "explanation" / "science.md"
SLOT = re.compile(r"(<!-- table: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
METHODS = (
    "bracket",
    "bracket, two seeds",
    "grid",
    "always 16, rate tuned",
    "Kneedle",
    "random search",
    "Optuna TPE + median",
    "ASHA (Optuna)",
)
WITHOUT_LOOKS = (
    "real, short, no early looks",
)  # older grids, which can't judge the search; benchmarks/selection has them

HALVES = ("planted, first half", "planted, second half")  # one family here


def stored(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / name).read_text(encoding="utf-8"))


def compared(name: str) -> list[dict[str, Any]]:
    """The rows of `results.json`, and those of the locked grids once they have judged."""
    judged = ROOT / "benchmarks" / "selection" / "judged.json"
    further = stored("selection/judged.json")["compare"][name] if judged.exists() else []
    rows = [*stored("selection/results.json")[name], *further]
    return [row | {"family": row["family"].partition(", ")[0]} if row["family"] in HALVES else row for row in rows]


def strategies() -> str:
    """Over all margins of a family: how often the whole grid's rank is found, and for how many trainings."""
    rows = compared("table")
    families = list(dict.fromkeys(row["family"] for row in rows if row["family"] not in WITHOUT_LOOKS))
    lines = []
    for method in METHODS:
        cells: list[str] = [method]
        for family in families:
            found = [row for row in rows if (row["family"], row["method"]) == (family, method)]
            grids = sum(row["curves"] for row in found)
            if not grids:
                cells.append("–")
                continue
            exact, under = (sum(row[name] for row in found) / grids for name in ("exact", "under_picks"))
            trainings = sum(row["mean_trainings"] * row["curves"] for row in found) / grids
            cells.append(f"{exact:.0%}, {under:.0%}, {trainings:.1f}")
        lines.append(cells)
    return table(["exact, too small, trainings", *families], lines)


def adapters() -> str:
    """The first question, over all margins of a family."""
    rows = compared("adapters")
    lines = []
    for family in dict.fromkeys(row["family"] for row in rows if row["family"] not in WITHOUT_LOOKS):
        found = [row for row in rows if row["family"] == family]
        grids = sum(row["curves"] for row in found)
        names = ("exact", "under_picks", "false_passes", "not_above_direct")
        shares = [f"{sum(row[name] for row in found) / grids:.0%}" for name in names]
        trainings = sum(row["mean_trainings"] * row["curves"] for row in found) / grids
        lines.append([family, *shares, f"{trainings:.1f}"])
    head = ["grids", "exact", "too small", "false passes", "rank not above that of direct trainings", "trainings"]
    return table(head, lines)


def published() -> str:
    scores = stored("decide/published.json")["scores"]
    head = ["acceptable", "too small", "too large"]
    return table(
        ["rule", *head, "of"], [[rule, *(row[name] for name in head), row["of"]] for rule, row in scores.items()]
    )


def coverage() -> str:
    summary = stored("decide/calibration.json")["summary"]
    names = {
        "covers, two seeds or more": "95% intervals that cover, two seeds or more",
        "covers, quiet seeds": "the same, seeds far quieter than on short real grids",
        "covers, one seed": "one seed (an indication): intervals over examples alone",
        "false acceptance, mean": "a rank worse than the margin is named",
        "false acceptance, worst world": "the same, in the worst kind of table",
        "named at the margin, noisy seeds, worst": "a rank worse by exactly the margin is named, noisy seeds (5% allowed), worst kind",
        "within an octave, of all decided": "decided cases within a factor of two of the truth",
        "false indication, one seed": "one seed: a rank worse than the margin is indicated",
    }
    rows = [[told, f"{summary[name]:.1%}"] for name, told in names.items()]
    printed = stored("decide/printed.json")["summary"]["two seeds or more"]
    before, after = printed["before"], printed["after"]
    rows.append(["printed after a search: upper bounds that hold", f"{after['upper']:.1%}"])
    rows.append([f"lower bounds (before: {before['lower']:.1%})", f"{after['lower']:.1%}"])
    rows.append([f"a rank is named (before: {before['decided']:.1%})", f"{after['decided']:.1%}"])
    return table(["simulated tables", "share"], rows)


def memory() -> str:
    cases = stored("plan/results/published.json")["cases"]
    return table(
        ["published case", "measured", "planned", "error"],
        [
            [
                f"rank {case['rank']} on {', '.join(case['target_modules'])}",
                f"{case['reserved'] / 1e9:.2f} GB",
                f"{case['predicted'] / 1e9:.2f} GB",
                f"{case['error']:+.1%}",
            ]
            for case in cases
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    "strategies": strategies,
    "adapters": adapters,
    "published": published,
    "coverage": coverage,
    "memory": memory,
}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def with_tables(page: str) -> str:
    """The page with every table as the results have it now."""
    return SLOT.sub(lambda slot: slot[1] + TABLES[slot[2]]() + slot[3], page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
