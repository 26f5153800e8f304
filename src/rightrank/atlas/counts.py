"""Public rank sweeps: find those that are similar to a question, and count in how many of them each rank was enough.

`atlas.json` holds only facts: figures, their address, the licence that the source states, and where each row is found in it.
A row is one sweep: the value of every rank at its best learning rate, averaged over seeds.

A sweep is similar if it agrees with every property in the question. If no sweep does, properties are dropped one by one. On sources
that were held out, similarity did not predict which rank is enough: a count reports what others found and is not an estimate.
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
from rightrank.schema.settings import SelectSettings

ATLAS_FILE = Path(__file__).with_name("atlas.json")
FAMILIES = (
    "language", "classification", "generation", "maths", "code", "memorising", "reinforcement", "vision", "events", "science",
)  # fmt: skip
ALIASES = {
    "chat": "language",
    "instruct": "language",
    "summarization": "generation",
    "math": "maths",
    "rl": "reinforcement",
}
DATA_TYPES = (".jsonl", ".csv")
# Defaults of `rightrank decide`; for another metric, as a share of the best value.
MARGINS = {"loss": 0.005, "accuracy": 0.005, "other": 0.01}


@dataclass(frozen=True, slots=True)
class Sweep:
    """The fields of one rank sweep that are counted. Its row in the file has more facts."""

    id: str
    source: str
    family: str  # one of FAMILIES
    kind: str  # a key of MARGINS
    better: str  # low or high
    ranks: tuple[int, ...]  # ascending
    values: Sequence[float]  # at each rank's best learning rate, averaged over seeds
    seeds: int
    tuned: bool  # whether the learning rate was chosen for each rank
    noise: float | None = None  # the standard error of a difference between two ranks
    parameters: float | None = None  # of the base
    rows: int | None = None  # of training data
    diverges: bool = False  # whether ranks diverge at the only learning rate; then the sweep is never counted

    @property
    def margin(self) -> float:
        """Return the margin of the kind of metric in the units of the values."""
        if self.kind == "other":
            return max(map(abs, self.values)) * MARGINS["other"]
        return MARGINS[self.kind]

    def find_smallest_rank(self) -> int:
        """Return the smallest rank that is within the margin of the best, or indistinguishable from it given the sweep's noise."""
        sign = 1 if self.better == "low" else -1
        losses = [sign * value for value in self.values]
        allowed = min(losses) + max(self.margin, self.noise or 0.0) + 1e-12
        return next(rank for rank, loss in zip(self.ranks, losses, strict=True) if loss <= allowed)

    def is_rising(self) -> bool:
        """Return whether the highest rank beats every other, so that a still higher rank may be needed."""
        return self.find_smallest_rank() == self.ranks[-1]

    def is_enough(self, rank: int) -> bool | None:
        """Return whether the rank was enough; None for a rank between or beyond the sweep's ranks that it cannot judge."""
        smallest_rank = self.find_smallest_rank()
        if rank >= smallest_rank:
            return None if smallest_rank == self.ranks[-1] else True
        return (
            None
            if rank > max((lower_rank for lower_rank in self.ranks if lower_rank < smallest_rank), default=0)
            else False
        )


@dataclass(frozen=True, slots=True)
class Atlas:
    """The sweeps, and for each source its publisher, `address`, date of retrieval and licence."""

    sources: Mapping[str, Mapping[str, str]]
    sweeps: Sequence[Sweep]


@cache
def load_atlas() -> Atlas:
    """Load the packaged atlas. Its rows are validated where the file is changed (`tests/atlas`)."""
    content, names = json.loads(ATLAS_FILE.read_text(encoding="utf-8")), {field.name for field in fields(Sweep)}
    rows = ({name: value for name, value in row.items() if name in names} for row in content["sweeps"])
    return Atlas(content["sources"], [Sweep(**row | {"ranks": tuple(row["ranks"])}) for row in rows])


RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOP_RANK: int = max(SelectSettings.model_fields["ranks"].default)  # which `select` trains and truncates
SIZE_FACTOR, ROWS_FACTOR = 4.0, 10.0  # ratio up to which sizes and numbers of rows count as similar
ALL_SWEEPS = "all sweeps of the atlas"


@dataclass(frozen=True, slots=True)
class Question:
    """Properties of a planned training; None for those that are not available."""

    family: str | None = None
    kind: str | None = None
    parameters: float | None = None
    rows: int | None = None

    def select_sweeps(self, atlas: Atlas) -> list[Sweep]:
        """Return the sweeps that agree with every property of the question."""
        return [
            sweep
            for sweep in atlas.sweeps
            if not sweep.diverges
            and self.family in (None, sweep.family)
            and self.kind in (None, sweep.kind)
            and _is_near(self.parameters, sweep.parameters, SIZE_FACTOR)
            and _is_near(self.rows, sweep.rows, ROWS_FACTOR)
        ]

    def __str__(self) -> str:
        descriptions = (
            self.family,
            self.kind and f"by {self.kind}",
            self.parameters and f"about {_format_amount(self.parameters)} parameters",
            self.rows and f"about {_format_amount(self.rows)} rows",
        )
        return ", ".join(description for description in descriptions if description) or ALL_SWEEPS


@dataclass(frozen=True, slots=True)
class Expectation:
    sweeps: int
    like: str  # the properties that the sweeps share
    ranks: tuple[dict[str, int], ...]  # each with `rank`, `enough_in` and `of`, the number of sweeps that can judge it
    sources: dict[str, int]  # number of sweeps by address, in descending order
    notes: tuple[str, ...]
    next_command: str


def count_sweeps(
    question: Question, ranks: Sequence[int] | None, notes: Sequence[str], next_command: str
) -> Expectation:
    """Count the sweeps that are similar to a question, with notes on properties that had to be dropped."""
    atlas, shown_ranks = load_atlas(), sorted(set(ranks or RANKS))
    if shown_ranks[0] < 1:
        raise SettingsError(f"rank {shown_ranks[0]} is not valid; give ranks of at least 1")
    relaxed_question, sweeps = question, question.select_sweeps(atlas)
    for field_name in ("rows", "parameters", "kind", "family"):
        if not sweeps:
            relaxed_question = replace(relaxed_question, **{field_name: None})
            sweeps = relaxed_question.select_sweeps(atlas)
    sources = Counter(atlas.sources[sweep.source]["address"] for sweep in sweeps)
    relaxation_notes = (
        []
        if relaxed_question == question
        else [f"no sweep of the atlas matches the question ({question}); the counts are for: {relaxed_question}"]
    )
    return Expectation(
        sweeps=len(sweeps),
        like=str(relaxed_question),
        ranks=tuple(_count_rank(rank, sweeps) for rank in shown_ranks),
        sources=dict(sources.most_common()),
        notes=(*notes, *relaxation_notes, *_build_notes(sweeps)),
        next_command=next_command,
    )


def _is_near(value: float | None, reference: float | None, factor: float) -> bool:
    return value is None or (bool(reference) and 1 / factor <= value / (reference or 1) <= factor)


def _count_rank(rank: int, sweeps: Sequence[Sweep]) -> dict[str, int]:
    answers = [answer for sweep in sweeps if (answer := sweep.is_enough(rank)) is not None]
    return {"rank": rank, "enough_in": sum(answers), "of": len(answers)}


def _build_notes(sweeps: Sequence[Sweep]) -> list[str]:
    all_sweeps = Question().select_sweeps(load_atlas())
    top = _count_rank(TOP_RANK, all_sweeps)
    tuned, seeded = sum(sweep.tuned for sweep in sweeps), sum(sweep.seeds > 1 for sweep in sweeps)
    notes = [f"{tuned} of {len(sweeps)} chose the learning rate by rank, {seeded} have seeds"]
    if not any(sweep.noise is not None and sweep.noise <= sweep.margin for sweep in sweeps):
        notes.append("none of these sweeps has enough seeds or examples to resolve the margin")
    rising = sum(sweep.is_rising() for sweep in sweeps)
    if 2 * rising > len(sweeps):
        notes.append(
            f"in {rising} of {len(sweeps)} the highest rank tried was the best, so a higher rank may be needed"
        )
    return [
        *notes,
        f"the similarity of model and data did not predict better than the counts of all {len(all_sweeps)} sweeps, "
        f"in which rank {TOP_RANK} was enough in {top['enough_in']} of {top['of']}",
    ]


def _format_amount(value: float) -> str:
    """Format a number as 1.5B, 300M or 20k."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


SIZE_PATTERN = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)\s*([bBmM])(?![a-zA-Z0-9])")
BASE_PARAMETERS = {  # models whose names do not state their size
    "distilbert": 67e6, "bert-base": 110e6, "bert-large": 335e6, "roberta-base": 125e6, "roberta-large": 355e6, "distilgpt2": 82e6,
    "gpt2": 124e6, "gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1.56e9, "t5-small": 60e6, "t5-base": 223e6, "vit-base": 86e6,
}  # fmt: skip


def build_question(model: str | None, data: str | Path | None, inputs: Question) -> tuple[Question, list[str]]:
    """Complete the given properties from the model and the data.

    Returns:
        The question, and notes on inputs that could not be used.
    """
    inputs = replace(inputs, family=ALIASES.get(inputs.family or "", inputs.family))
    if inputs.family not in (None, *FAMILIES):
        raise SettingsError(
            f"{inputs.family!r} is not a task family of the atlas; allowed families: {', '.join((*FAMILIES, *ALIASES))}"
        )
    if inputs.rows is not None and inputs.rows <= 0:
        raise SettingsError(f"rows is {inputs.rows}; give a number above 0")
    question, notes = Question() if data is None else _read_data(Path(data)), list[str]()
    if model is not None:
        question = replace(question, parameters=parse_model_size(model))
        notes += (
            [] if question.parameters else [f"the size of {model} is unknown; give a size such as 1.5B in its place"]
        )
    return replace(question, **{name: value for name, value in asdict(inputs).items() if value is not None}), notes


def classify_metric(metric: str | None) -> str | None:
    """Return the atlas's kind of a metric: loss, accuracy (a share of correct answers), or other."""
    if metric is None or "loss" in metric or metric == "nll":
        return metric and "loss"
    shares = ("acc", "f1", "exact", "match", "pass", "auroc", "jaccard")
    return "accuracy" if any(share in metric.lower() for share in shares) else "other"


def parse_model_size(model: str) -> float | None:
    """Return the number of parameters that a model's name states; None if it states none."""
    name = model.rstrip("/").split("/")[-1].lower()
    if sizes := SIZE_PATTERN.findall(name):
        return max(float(number) * (1e9 if letter in "bB" else 1e6) for number, letter in sizes)
    return next(
        (BASE_PARAMETERS[base] for base in sorted(BASE_PARAMETERS, key=len, reverse=True) if base in name), None
    )


def _read_data(path: Path) -> Question:
    try:
        with path.open(encoding="utf-8") as lines:
            first, rows = next(lines, ""), sum(1 for _ in lines)
        record = dict.fromkeys(next(csv.reader([first]), [])) if path.suffix == ".csv" else json.loads(first or "{}")
        if not isinstance(record, dict):
            raise ValueError("its first row is not an object")
    except FileNotFoundError:
        raise SettingsError(f"{path} does not exist; give a file of rows, or leave DATA out and give --rows") from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: {error}; give a .jsonl or .csv file, or leave DATA out and give --rows") from None
    rows += path.suffix != ".csv" and bool(record)
    family = "classification" if "label" in record else None if "chosen" in record else "language"
    return Question(family=family, rows=rows or None)
