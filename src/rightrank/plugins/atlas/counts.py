"""Public sweeps of ranks: those like a question, and in how many of them each rank was enough.

`atlas.json` holds facts only: figures, their address, the licence that the source states, and how a program reads each row again
(`tests/plugins/atlas/readings.py`). A row is one sweep: the value of every rank at its best rate, a mean over seeds.

A sweep is like a question where it agrees in all that is known; where none does, less is asked. Likeness did not tell which rank is enough
on sources that were left out: a count is what others found, no estimate.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path

from rightrank.schema.errors import SettingsError

ATLAS = Path(__file__).with_name("atlas.json")
FAMILIES = (
    "language", "classification", "generation", "maths", "code", "memorising", "reinforcement", "vision", "events", "science",
)  # fmt: skip
# Of `rightrank decide`; of another metric, its share of the best.
MARGINS = {"loss": 0.005, "accuracy": 0.005, "other": 0.01}


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is counted of one sweep of ranks; its row has further facts."""

    id: str
    source: str
    family: str  # of FAMILIES
    kind: str  # of MARGINS
    better: str  # low or high
    ranks: tuple[int, ...]  # ascending
    values: Sequence[float]  # at each rank's best rate, a mean over seeds
    seeds: int
    tuned: bool  # whether the rate was chosen by rank
    noise: float | None = None  # the standard error of a difference between two ranks
    parameters: float | None = None  # of the base
    rows: int | None = None  # of training data
    diverges: bool = False  # its ranks differ by divergence at one rate: shown, never counted

    def margin(self, margin: float | None) -> float:
        """In the units of the values; None for the default of the kind of metric."""
        if self.kind == "other":
            return max(map(abs, self.values)) * (MARGINS["other"] if margin is None else margin)
        return MARGINS[self.kind] if margin is None else margin

    def smallest_enough(self, margin: float | None) -> int:
        """The smallest rank within the margin of the best, or within what the sweep's noise can't tell from it."""
        sign = 1 if self.better == "low" else -1
        losses = [sign * value for value in self.values]
        allowed = min(losses) + max(self.margin(margin), self.noise or 0.0) + 1e-12
        return next(rank for rank, loss in zip(self.ranks, losses, strict=True) if loss <= allowed)

    def rises(self, margin: float | None) -> bool:
        """Whether the highest rank beats every other: what is enough may lie above."""
        return self.smallest_enough(margin) == self.ranks[-1]

    def tells(self, rank: int, margin: float | None) -> bool | None:
        """Whether the rank was enough; None where the sweep does not say, between and beyond its ranks."""
        enough = self.smallest_enough(margin)
        if rank >= enough:
            return None if enough == self.ranks[-1] else True
        return None if rank > max((tried for tried in self.ranks if tried < enough), default=0) else False


@dataclass(frozen=True, slots=True)
class Atlas:
    """The sweeps, and by name who published them, where (`address`), when it was read and under which licence."""

    sources: Mapping[str, Mapping[str, str]]
    sweeps: Sequence[Sweep]


@cache
def load() -> Atlas:
    """The packaged atlas. That its rows can be is checked where the file is changed (`tests/plugins/atlas`)."""
    content, names = json.loads(ATLAS.read_text(encoding="utf-8")), {field.name for field in fields(Sweep)}
    rows = ({name: value for name, value in row.items() if name in names} for row in content["sweeps"])
    return Atlas(content["sources"], [Sweep(**row | {"ranks": tuple(row["ranks"])}) for row in rows])


RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SIZE_FACTOR, ROWS_FACTOR = 4.0, 10.0  # within which a base and a number of rows are alike
EVERY = "all of the atlas"


@dataclass(frozen=True, slots=True)
class Question:
    """What is known of a training before it; None: not known."""

    family: str | None = None
    kind: str | None = None
    parameters: float | None = None
    rows: int | None = None
    margin: float | None = None

    def among(self, atlas: Atlas) -> list[Sweep]:
        """The sweeps that agree in all that is known."""
        return [
            sweep
            for sweep in atlas.sweeps
            if not sweep.diverges
            and self.family in (None, sweep.family)
            and self.kind in (None, sweep.kind)
            and _near(self.parameters, sweep.parameters, SIZE_FACTOR)
            and _near(self.rows, sweep.rows, ROWS_FACTOR)
        ]

    def __str__(self) -> str:
        parts = (
            self.family,
            self.kind and f"by {self.kind}",
            self.parameters and f"about {_amount(self.parameters)} parameters",
            self.rows and f"about {_amount(self.rows)} rows",
        )
        return ", ".join(part for part in parts if part) or EVERY


@dataclass(frozen=True, slots=True)
class Expectation:
    sweeps: int
    like: str  # what they have in common
    ranks: tuple[dict[str, int], ...]  # `rank`, `enough_in` and `of`, the sweeps that say
    sources: dict[str, int]  # by address: sweeps, the most first
    notes: tuple[str, ...]


def counted(question: Question, ranks: Sequence[int] | None, notes: Sequence[str]) -> Expectation:
    """Count the sweeps that are like a question, with notes on what could not be used of it."""
    atlas, shown = load(), sorted(set(ranks or RANKS))
    if shown[0] < 1:
        raise SettingsError(f"rank {shown[0]}: give ranks from 1 on")
    asked, sweeps = question, question.among(atlas)
    for left_out in ("rows", "parameters", "kind", "family"):
        if not sweeps:
            asked = replace(asked, **{left_out: None})
            sweeps = asked.among(atlas)
    published = Counter(atlas.sources[sweep.source]["address"] for sweep in sweeps)
    said = [] if asked == question else [f"no sweep of the atlas is like this one ({question}): counted are {asked}"]
    return Expectation(
        sweeps=len(sweeps),
        like=str(asked),
        ranks=tuple(_count(rank, sweeps, question.margin) for rank in shown),
        sources=dict(published.most_common()),
        notes=(*notes, *said, *_notes(sweeps, question.margin)),
    )


def _near(asked: float | None, there: float | None, factor: float) -> bool:
    return asked is None or (bool(there) and 1 / factor <= asked / (there or 1) <= factor)


def _count(rank: int, sweeps: Sequence[Sweep], margin: float | None) -> dict[str, int]:
    answers = [answer for sweep in sweeps if (answer := sweep.tells(rank, margin)) is not None]
    return {"rank": rank, "enough_in": sum(answers), "of": len(answers)}


def _notes(sweeps: Sequence[Sweep], margin: float | None) -> list[str]:
    """What a reader must know before trusting a count."""
    tuned, seeded = sum(sweep.tuned for sweep in sweeps), sum(sweep.seeds > 1 for sweep in sweeps)
    notes = [f"{tuned} of {len(sweeps)} chose the learning rate by rank, {seeded} have seeds"]
    if not any(sweep.noise is not None and sweep.noise <= sweep.margin(margin) for sweep in sweeps):
        notes.append("no sweep among them has seeds or examples enough to resolve this margin")
    rising = sum(sweep.rises(margin) for sweep in sweeps)
    if 2 * rising > len(sweeps):
        notes.append(f"in {rising} of {len(sweeps)} the highest rank tried was the best: what is enough may lie above")
    return notes


def _amount(value: float) -> str:
    """1.5B, 300M, 20k."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


SIZE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)\s*([bBmM])(?![a-zA-Z0-9])")
KNOWN = {  # bases whose names have no size
    "distilbert": 67e6, "bert-base": 110e6, "bert-large": 335e6, "roberta-base": 125e6, "roberta-large": 355e6, "distilgpt2": 82e6,
    "gpt2": 124e6, "gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1.56e9, "t5-small": 60e6, "t5-base": 223e6, "vit-base": 86e6,
}  # fmt: skip


def ask(model: str | None, data: str | Path | None, given: Question) -> tuple[Question, list[str]]:
    """What the caller gives, completed by the model and the data; and what could not be used of it."""
    if given.family not in (None, *FAMILIES):
        raise SettingsError(f"{given.family!r} is no task family of the atlas; allowed: {', '.join(FAMILIES)}")
    for name, value in (("parameters", given.parameters), ("rows", given.rows), ("margin", given.margin)):
        if value is not None and not value > 0:
            raise SettingsError(f"{name} is {value:g}; give a number above 0")
    question, notes = Question() if data is None else _of_data(Path(data)), list[str]()
    if model is not None and given.parameters is None:
        question = replace(question, parameters=size_of(model))
        notes += [] if question.parameters else [f"{model}: its size is not known; give --parameters"]
    return replace(question, **{name: value for name, value in asdict(given).items() if value is not None}), notes


def group_of_metric(metric: str | None) -> str | None:
    """The atlas's kind of a metric: loss, accuracy (shares of answers that are right), or other."""
    if metric is None or "loss" in metric or metric == "nll":
        return metric and "loss"
    shares = ("acc", "f1", "exact", "match", "pass", "auroc", "jaccard")
    return "accuracy" if any(share in metric.lower() for share in shares) else "other"


def size_of(model: str) -> float | None:
    """Parameters of a base by its name; None where it does not tell."""
    name = model.rstrip("/").split("/")[-1].lower()
    if sizes := SIZE.findall(name):
        return max(float(number) * (1e9 if letter in "bB" else 1e6) for number, letter in sizes)
    return next((KNOWN[base] for base in sorted(KNOWN, key=len, reverse=True) if base in name), None)


def _of_data(path: Path) -> Question:
    """Rows and family of a file of rows."""
    try:
        with path.open(encoding="utf-8") as lines:
            first, rows = next(lines, ""), sum(1 for _ in lines)
        record = dict.fromkeys(next(csv.reader([first]), [])) if path.suffix == ".csv" else json.loads(first or "{}")
        if not isinstance(record, dict):
            raise ValueError("its first row is no object")
    except FileNotFoundError:
        raise SettingsError(f"{path} does not exist; give a file of rows, or leave DATA out and give --rows") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: {error}; give a .jsonl or .csv file, or leave DATA out and give --rows") from None
    rows += path.suffix != ".csv" and bool(record)
    family = "classification" if "label" in record else None if "chosen" in record else "language"
    return Question(family=family, rows=rows or None)
