"""Write the tables of docs/explanation/science.md from the stored results, so that the page only states what was measured.

python -m benchmarks.science     # rewrites the tables after a benchmark has run again
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
    "Optuna TPE + median",
    "ASHA (Optuna)",
)
OMITTED = (  # grids without early evaluations, those that rules were tuned on, and linear models
    "real, short, no early looks",
    "planted, first half",
    "planted, second half",
    "linear",
)


def read_stored(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / name).read_text(encoding="utf-8"))


def read_compared(name: str) -> list[dict[str, Any]]:
    """Return the rows of `results.json`, and those of the locked grids once these have been judged."""
    judged = ROOT / "benchmarks" / "selection" / "judged.json"
    judged_rows = read_stored("selection/judged.json")["compare"][name] if judged.exists() else []
    rows = [*read_stored("selection/results.json")[name], *judged_rows]
    return [row for row in rows if row["family"] not in OMITTED]


def format_strategies() -> str:
    """Format, over all margins of a family, how often a strategy selects the full grid's rank and how many trainings it needs."""
    rows = read_compared("table")
    families = list(dict.fromkeys(row["family"] for row in rows))
    lines = []
    for method in METHODS:
        cells: list[str] = [method]
        for family in families:
            method_rows = [row for row in rows if (row["family"], row["method"]) == (family, method)]
            grids = sum(row["curves"] for row in method_rows)
            if not grids:
                cells.append("–")
                continue
            exact, under = (sum(row[name] for row in method_rows) / grids for name in ("exact", "under_picks"))
            trainings = sum(row["mean_trainings"] * row["curves"] for row in method_rows) / grids
            cells.append(f"{exact:.0%}, {under:.0%}, {trainings:.1f}")
        lines.append(cells)
    return format_table(["exact, too small, trainings", *families], lines)


def format_endpoints() -> str:
    """Format the endpoints of the judgement of the learning-rate rule, in nats on the test split."""
    judged = read_stored("early_rates/judged.json")
    holds, summary = judged["holds"], judged["summary"]
    lines = []
    for key, text, endpoint in (
        ("a: adapter minus 16 tuned, both hand over their best evaluation", "`--goal adapter`, 1.75 trainings, minus rank 16 tuned by four", "a"),
        ("a, the last evaluations: rank 64 minus 16 tuned", "the same, if both hand over their last evaluation, before truncation", ""),
        ("b: regret of the rate at rank 64", "the chosen rate minus the best of the four, at rank 64", "b"),
        ("c: the rule minus the rule of before, repeated rows", "the chosen rate minus that of the earlier rule, where rows repeat", "c"),
    ):  # fmt: skip
        row = summary[key]
        result = "" if not endpoint else "holds" if holds[endpoint] else "fails"
        lines.append([text, _format_signed(row), f"{row['worst']:+.3f}", str(row["grids"]), result])
    return format_table(["test loss", "mean (95% interval)", "worst grid", "grids", "endpoint"], lines)


def format_families() -> str:
    """Format the first endpoint, and the regret of the rate, by family of grids."""
    families = read_stored("early_rates/judged.json")["families"]
    lines = []
    for name, rows in families.items():
        adapter = rows["a: adapter minus 16 tuned, both hand over their best evaluation"]
        regret = rows["b: regret of the rate at rank 64"]
        lines.append(
            [name, str(adapter["grids"]), _format_signed(adapter), f"{regret['mean']:.4f}, {regret['worst']:.3f}"]
        )
    return format_table(["grids", "number", "adapter minus rank 16 tuned", "regret of the rate: mean, worst"], lines)


def format_shares() -> str:
    """Format what truncations within a share of the gain lost on the test split, by kind of task."""
    shares = read_stored("early_rates/shares.json")
    lines = [
        [
            kind,
            f"{one['median rank']:g}/{two['median rank']:g}",
            f"{100 * one['lost on test']:.2f}/{two['lost on test']:.2%}",
            f"{100 * one['largest']:.2f}/{two['largest']:.2%}",
            f"{one['exceeded'].split()[0]}/{two['exceeded']}",
            shares[kind]["lower bounds that hold"],
        ]
        for kind in shares["grids"]
        for one, two in [(shares[kind]["1%"], shares[kind]["2%"])]
    ]
    head = ["margin 1%/2%", "median rank", "lost of the gain, mean", "largest", "exceeded", "stated bounds hold"]
    return format_table(head, lines)


def _format_signed(interval: dict[str, Any]) -> str:
    return f"{interval['mean']:+.3f} ({interval['low']:+.3f} to {interval['high']:+.3f})"


def format_coverage() -> str:
    summary = read_stored("decide/calibration.json")["summary"]
    names = {
        "covers, two seeds or more": "95% intervals that cover, two seeds or more",
        "covers, one seed": "one seed (an indication): intervals over examples alone",
        "false fallback, mean": "a rank that the bounds show to be enough is worse than the margin",
        "false fallback, worst world": "the same, in the worst kind of table",
    }
    rows = [[description, f"{summary[name]:.1%}"] for name, description in names.items()]
    printed = read_stored("decide/printed.json")["summary"]["two seeds or more"]
    uncorrected, corrected = printed["plain"], printed["corrected"]
    rows.append(["printed after a search: upper bounds that hold", f"{corrected['upper']:.1%}"])
    rows.append(
        [
            f"lower bounds (without the estimate of the selection bias: {uncorrected['lower']:.1%})",
            f"{corrected['lower']:.1%}",
        ]
    )
    return format_table(["simulated tables", "share"], rows)


def format_rerankers() -> str:
    """Format how the base, the trained adapter and the one that the callback hands over rank held-out documents."""
    lines = []
    for line in (ROOT / "benchmarks" / "in_training" / "rerankers.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answer = row["answer"]
        name = f"{'hard' if row['hard'] else 'random'} negatives" if row["kind"] == "reranker" else row["kind"]
        mean, low, high = row["mrr_difference"]
        difference = "" if answer["rank"] == 64 else f": {mean:+.3f} ({low:+.3f} to {high:+.3f})"
        share = "no gain shown"
        if answer["share_kept"] is not None and answer["rank"] == 64:
            share = "undecided"
        elif answer["share_kept"] is not None:
            share = f"{answer['share_kept']:.2%} (at least {answer['share_kept_low']:.2%})"
        lines.append(
            [
                f"{name}, {row['seed']}",
                *(f"{row['metrics'][model]['mrr']:.3f}" for model in ("base", "trained")),
                f"{row['metrics']['handed over']['mrr']:.3f}{difference}",
                answer["rank"],
                share,
            ]
        )
    head = ["training, seed", "base", "rank 64", "handed over", "its rank", "keeps of the loss gained"]
    return format_table(head, lines)


TABLES: dict[str, Callable[[], str]] = {
    "strategies": format_strategies,
    "endpoints": format_endpoints,
    "families": format_families,
    "shares": format_shares,
    "coverage": format_coverage,
    "rerankers": format_rerankers,
}


def format_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def replace_tables(page: str) -> str:
    """Return the page with every table updated from the stored results."""
    return SLOT.sub(lambda slot: slot[1] + TABLES[slot[2]]() + slot[3], page)


if __name__ == "__main__":
    PAGE.write_text(replace_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
