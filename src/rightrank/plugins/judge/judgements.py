"""Rows of judgements: `prompt, rank_a, rank_b, outcome[, judge]`; every error names the row."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Literal, TypeAlias

from rightrank.data.rows import Row
from rightrank.interop.tables import raw_rows, rows_of_mappings
from rightrank.schema.errors import ResultsError, quoted
from rightrank.schema.trials import Record, Whole

Outcome: TypeAlias = Literal["a", "b", "tie"]
SCORES: dict[str, float] = {"a": 1.0, "tie": 0.5, "b": 0.0}  # by outcome, of rank_a


class Judgement(Record):
    """One judge's choice between the answers of two ranks to one prompt."""

    prompt: str
    rank_a: Whole
    rank_b: Whole
    outcome: Outcome
    judge: str

    def score_of(self, rank: int) -> float:
        """1 for a win of `rank`, 1/2 for a tie, 0 for a loss."""
        return SCORES[self.outcome] if rank == self.rank_a else 1 - SCORES[self.outcome]


NEEDED = ("prompt", "rank_a", "rank_b", "outcome")
ONE_JUDGE = "judge"


def are_judgements(rows: Iterable[Row]) -> bool:
    """Whether the rows have the columns that only judgements have."""
    first = next(iter(rows), None)
    return first is not None and {"rank_a", "rank_b"} <= first.fields.keys()


def rows_of(source: str | Path | Iterable[Row | Mapping[str, object]]) -> list[Row]:
    """The rows of a file, or rows and mappings in memory."""
    if isinstance(source, str | Path):
        return list(raw_rows(Path(source)))
    listed = list(source)
    if all(isinstance(one, Row) for one in listed):
        return [one for one in listed if isinstance(one, Row)]
    return list(rows_of_mappings([one for one in listed if not isinstance(one, Row)]))


def judgements_of(rows: Iterable[Row], known: Collection[int] | None = None) -> tuple[list[Judgement], list[str]]:
    """`(judgements, how the rows were understood)`.

    Args:
        known: the ranks that were trained; None: any.

    Raises:
        ResultsError: a missing column, a rank that is none or is unknown, an outcome besides a, b and tie, or two rows in which one
            judge chose differently between the same answers.
    """
    seen: dict[tuple[str, int, int, str], tuple[float, str]] = {}
    found: list[Judgement] = []
    repeated = 0
    for row in rows:
        one = _judgement(row, known)
        low, high = sorted((one.rank_a, one.rank_b))
        key, score = (one.prompt, low, high, one.judge), one.score_of(low)
        before = seen.get(key)
        if before is not None and before[0] != score:
            raise ResultsError(
                f"{row.where} contradicts {before[1]}: {one.judge!r} chose differently between ranks {low} and {high} on the same "
                f"prompt ({quoted(one.prompt)}); keep one of the rows, or name two judges"
            )
        if before is not None:
            repeated += 1
            continue
        seen[key] = score, row.where
        found.append(one)
    judges, prompts = {one.judge for one in found}, {one.prompt for one in found}
    understood = [
        f"{len(found)} judgements of {len(prompts)} prompts by {len(judges)} judge{'s' if len(judges) != 1 else ''}"
    ]
    if repeated:
        understood.append(f"{repeated} rows repeat another and were left out")
    return found, understood


def _judgement(row: Row, known: Collection[int] | None) -> Judgement:
    missing = [name for name in NEEDED if row.fields.get(name) in (None, "")]
    if missing:
        raise ResultsError(
            f"{row.where}: no {missing[0]}; judgements have the columns {', '.join(NEEDED)} and, if there are several, judge"
        )
    ranks = [_rank(row, name, known) for name in ("rank_a", "rank_b")]
    if ranks[0] == ranks[1]:
        raise ResultsError(f"{row.where}: rank_a and rank_b are both {ranks[0]}; a judgement is between two ranks")
    outcome = str(row.fields["outcome"]).strip().lower()
    if outcome not in SCORES:
        raise ResultsError(f"{row.where}: outcome is {quoted(outcome)}; give a, b or tie")
    judge = row.fields.get("judge")
    return Judgement.model_validate(
        {
            "prompt": str(row.fields["prompt"]),
            "rank_a": ranks[0],
            "rank_b": ranks[1],
            "outcome": outcome,
            "judge": ONE_JUDGE if judge in (None, "") else str(judge),
        }
    )


def _rank(row: Row, name: str, known: Collection[int] | None) -> int:
    value = row.fields[name]
    try:
        rank = int(str(value))
    except ValueError:
        rank = 0
    if rank < 1:
        raise ResultsError(f"{row.where}: {name} is {quoted(value)}; give a whole number from 1")
    if known is not None and rank not in known:
        raise ResultsError(
            f"{row.where}: {name} is {rank}, which was not trained; there are {', '.join(map(str, sorted(known)))}"
        )
    return rank
