"""From the atlas to an expectation: how often each rank was enough in sweeps like this one.

A rank's probability is a weighted share of the sweeps that say whether it was enough:

    p(r) = (Σ w · enough(r) + SHRINK / 2) / (Σ w + SHRINK)      w = quality · resolution / √(sweeps of its group)

Quality is 1, .5 or .2 (`Sweep.quality`), resolution is the margin over the sweep's noise where that is larger.

On sources that it has not seen, a weight by likeness adds nothing to this base rate (`benchmarks/atlas`). So likeness only names the sweeps
that are counted and shown beside it. It is a product of four factors, 1 for the same and lower for the less alike: task family, kind of
metric, size of the base, tokens for each parameter. What is not known, of the question or of the sweep, is neutral.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rightrank.data.files import UnreadableError, read_json_object
from rightrank.plugins.atlas.rows import FAMILIES, Atlas, Sweep, load
from rightrank.schema.errors import SettingsError

if TYPE_CHECKING:
    from rightrank.schema.events import RunStarted

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHRINK = 4.0  # an even chance weighs as much as this many independent sweeps of the best quality
OTHER_FAMILY, OTHER_KIND = 0.2, 0.5  # of a sweep of another task family, of another kind of metric
NEUTRAL = 0.5  # of a factor that is not known
SIZE_DECADES, DATA_DECADES = 1.0, 2.0  # at these ratios, of parameters and of tokens a parameter, the factor is 1/e
ALIKE = 0.3  # the least likeness of a sweep that is counted as one like this
START, TOP = 0.5, 0.8  # the start of a search is as likely enough as not; its top is enough four times in five
TOKENS_A_ROW = 150  # where rows are known and tokens are not
Z = 1.645  # of the interval of a probability, 90%


@dataclass(frozen=True, slots=True)
class Question:
    """What is known of a training before it; None: not known."""

    family: str | None = None
    parameters: float | None = None
    rows: int | None = None
    tokens: float | None = None
    kind: str | None = None
    margin: float | None = None

    @property
    def density(self) -> float | None:
        """Tokens trained on for each parameter of the base."""
        tokens = self.tokens or (None if self.rows is None else self.rows * TOKENS_A_ROW)
        return None if tokens is None or self.parameters is None else tokens / self.parameters


@dataclass(frozen=True, slots=True)
class RankExpectation:
    """One rank: in how many like sweeps it was enough, and how probable that is here."""

    rank: int
    enough_in: int
    of: int  # of the sweeps like this, those that say
    probability: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Expectation:
    """What public sweeps found for the like of a question. A start of a search, never a bound."""

    sweeps: int  # that are like it; all of the atlas, where none is
    like: str  # what they have in common
    ranks: tuple[RankExpectation, ...]
    start_rank: int
    top_rank: int
    # The five most alike, one a source; none where nothing is known of the question.
    nearest: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]


def question_of(sweep: Sweep, margin: float | None) -> Question:
    """What was known before a sweep, as a question."""
    return Question(sweep.family, sweep.parameters, sweep.rows, sweep.tokens, sweep.kind, margin)


def likeness(question: Question, sweep: Sweep) -> float:
    """From 0 to 1: a product of what the two have in common."""
    other = question_of(sweep, None)
    return (
        _same(question.family, other.family, OTHER_FAMILY)
        * _same(question.kind, other.kind, OTHER_KIND)
        * _near(question.parameters, other.parameters, SIZE_DECADES)
        * _near(question.density, other.density, DATA_DECADES)
    )


def _same(one: str | None, other: str | None, else_: float) -> float:
    return NEUTRAL if one is None or other is None else 1.0 if one == other else else_


def _near(one: float | None, other: float | None, decades: float) -> float:
    return NEUTRAL if not one or not other else math.exp(-abs(math.log10(one / other)) / decades)


def probabilities(
    margin: float | None,
    sweeps: Sequence[Sweep],
    group: Callable[[Sweep], str],
    ranks: Sequence[int],
    alike: Callable[[Sweep], float] = lambda sweep: 1.0,
    prior: Mapping[int, float] | None = None,
) -> dict[int, tuple[float, float]]:
    """By rank, the probability that it is enough and the number of sweeps, of the best quality, that it rests on.

    Args:
        alike: a further factor of a sweep's weight, and
        prior: by rank, what the shares shrink to, an even chance by default: what `benchmarks/atlas` judges beside the base rate.
    """
    sweeps = [sweep for sweep in sweeps if not sweep.diverges]
    crowd = Counter(map(group, sweeps))
    prior = prior or dict.fromkeys(ranks, 0.5)
    weights = [
        alike(sweep) * sweep.quality * min(1.0, sweep.margin(margin) / max(sweep.noise or 0.0, 1e-12))
        / math.sqrt(crowd[group(sweep)])
        for sweep in sweeps
    ]  # fmt: skip
    shares: dict[int, tuple[float, float]] = {}
    least = 0.0
    for rank in sorted(ranks):
        said = [
            (w, told)
            for w, sweep in zip(weights, sweeps, strict=True)
            if (told := sweep.tells(rank, margin)) is not None
        ]
        total = sum(w for w, _ in said)
        least = max(least, (sum(w for w, told in said if told) + SHRINK * prior[rank]) / (total + SHRINK))
        shares[rank] = (least, total + SHRINK)
    return shares


def expectation(question: Question, ranks: Sequence[int] | None = None, atlas: Atlas | None = None) -> Expectation:
    """What the atlas says of a question.

    Args:
        question: what is known.
        ranks: of the answer; None for powers of two to 256.
        atlas: None for the packaged one.

    Raises:
        SettingsError: a rank below 1.
    """
    atlas = atlas or load()
    shown = sorted(set(ranks or RANKS))
    if shown[0] < 1:
        raise SettingsError(f"rank {shown[0]}: give ranks from 1 on")
    found = probabilities(question.margin, atlas.sweeps, atlas.group, sorted({*shown, *RANKS}))
    by_likeness = sorted(
        (sweep for sweep in atlas.sweeps if not sweep.diverges), key=lambda sweep: -likeness(question, sweep)
    )
    asked = replace(question, margin=None) != Question()
    # Alike in what is known: what is not known of the question does not tell sweeps apart.
    known = (question.family, question.kind, question.parameters, question.density)
    least = ALIKE * NEUTRAL ** sum(part is None for part in known)
    like = [sweep for sweep in by_likeness if asked and likeness(question, sweep) >= least]
    counted = like or by_likeness
    first_of_source = {sweep.source: sweep for sweep in reversed(by_likeness)}
    return Expectation(
        sweeps=len(counted),
        like=_description(question) if like else "all of the atlas",
        ranks=tuple(_expected(rank, found[rank], counted, question.margin) for rank in shown),
        start_rank=_first(shown, found, START),
        top_rank=_first(shown, found, TOP),
        nearest=tuple(
            _near_row(s, question.margin, atlas) for s in by_likeness if asked and first_of_source[s.source] is s
        )[:5],
        notes=tuple(_notes(question, bool(like) or not asked, counted)),
    )


def _expected(rank: int, share: tuple[float, float], sweeps: Sequence[Sweep], margin: float | None) -> RankExpectation:
    told = [answer for sweep in sweeps if (answer := sweep.tells(rank, margin)) is not None]
    low, high = wilson(*share)
    return RankExpectation(rank, sum(told), len(told), round(share[0], 3), round(low, 3), round(high, 3))


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 90% interval of a share that rests on this many trials."""
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count)) / (1 + Z * Z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def _first(ranks: Sequence[int], found: dict[int, tuple[float, float]], wanted: float) -> int:
    return next((rank for rank in ranks if found[rank][0] >= wanted), ranks[-1])


def _near_row(sweep: Sweep, margin: float | None, atlas: Atlas) -> dict[str, Any]:
    # What a reader must know before trusting it.
    rates = None if sweep.tuned else "one learning rate for all ranks"
    seeds = "one seed" if sweep.seeds == 1 else None
    return {
        "source": atlas.sources[sweep.source]["address"],
        "base": sweep.base,
        "task": sweep.task,
        "rank": None if sweep.rises(margin) else sweep.smallest_enough(margin),
        "ranks": list(sweep.ranks),
        "not_tuned": ", ".join(filter(None, [rates, seeds, sweep.note])),
    }


def _description(question: Question) -> str:
    parts = [question.family, question.kind and f"by {question.kind}"]
    if question.parameters:
        parts.append(f"about {_amount(question.parameters)} parameters")
    if question.tokens or question.rows:
        parts.append(
            f"about {_amount(question.tokens)} tokens"
            if question.tokens
            else f"about {_amount(question.rows or 0)} rows"
        )
    return ", ".join(part for part in parts if part)


def _amount(value: float) -> str:
    """1.5B, 300M, 20k."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def _notes(question: Question, like: bool, counted: Sequence[Sweep]) -> list[str]:
    notes = [] if like else ["no sweep of the atlas is like this one: these are the rates of all"]
    if not any(sweep.noise is not None and sweep.noise <= sweep.margin(question.margin) for sweep in counted):
        notes.append("no sweep among them has seeds or examples enough to resolve this margin")
    rising = sum(sweep.rises(question.margin) for sweep in counted)
    if 2 * rising > len(counted):
        notes.append(f"in {rising} of {len(counted)} the highest rank tried was the best: what is enough may lie above")
    return notes


SIZE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)\s*([bBmM])(?![a-zA-Z0-9])")
KNOWN = {  # bases whose names have no size
    "distilbert": 67e6, "bert-base": 110e6, "bert-large": 335e6, "roberta-base": 125e6, "roberta-large": 355e6, "distilgpt2": 82e6,
    "gpt2": 124e6, "gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1.56e9, "t5-small": 60e6, "t5-base": 223e6, "vit-base": 86e6,
}  # fmt: skip
FEW = 200  # rows that are read for the length and the columns
LETTERS_A_TOKEN = 4  # of English text, about


def ask(model: str | None, data: str | Path | None, told: Question) -> tuple[Question, list[str]]:
    """What the caller gives, completed by the model and the data; and what could not be used of it.

    Raises:
        SettingsError: a number that can't be.
    """
    for name in ("parameters", "rows", "tokens", "margin"):
        value = getattr(told, name)
        if value is not None and not value > 0:
            raise SettingsError(f"{name} is {value:g}; give a number above 0")
    question, notes = Question(), list[str]()
    if data is not None:
        question = _of_data(Path(data))
        notes += [] if question.rows else [f"{data}: neither .jsonl nor .csv, so its rows are not counted; give --rows"]
    if model is not None and told.parameters is None:
        question = replace(question, parameters=size_of(model))
        notes += [] if question.parameters else [f"{model}: its size is not known; give --parameters"]
    if told.family is not None and told.family not in FAMILIES:
        notes.append(f"{told.family!r} is no task family of the atlas, and is not used: {', '.join(FAMILIES)}")
        told = replace(told, family=None)
    return replace(question, **{name: value for name, value in asdict(told).items() if value is not None}), notes


def kind_of(metric: str | None) -> str | None:
    """The atlas's kind of a metric: loss, accuracy (shares of answers that are right), or other."""
    if metric is None:
        return None
    if "loss" in metric or metric == "nll":
        return "loss"
    shares = ("acc", "f1", "exact", "match", "pass", "auroc", "jaccard")
    return "accuracy" if any(share in metric.lower() for share in shares) else "other"


def size_of(model: str) -> float | None:
    """Parameters of a base: from the weights of a folder, else from its name; None where neither tells."""
    folder = Path(model)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    if weights:
        config: Mapping[str, Any] = {}
        with suppress(UnreadableError):
            config = read_json_object(folder / "config.json")
        return weights / (4 if config.get("torch_dtype", config.get("dtype")) == "float32" else 2)
    name = model.rstrip("/").split("/")[-1].lower()
    if found := SIZE.findall(name):
        return max(float(number) * (1e9 if letter in "bB" else 1e6) for number, letter in found)
    known = [size for base, size in sorted(KNOWN.items(), key=lambda item: len(item[0])) if base in name]
    return known[-1] if known else None


def _of_data(path: Path) -> Question:
    """Rows, tokens and family of a file of rows, from its first rows and its size.

    Raises:
        SettingsError: the file can't be read.
    """
    if not path.exists():
        raise SettingsError(f"{path} does not exist; give a file of rows, or leave DATA out and give --rows")
    if path.suffix not in (".jsonl", ".csv"):
        return Question()
    try:
        with path.open(encoding="utf-8") as lines:
            first = [line for line in islice(lines, FEW) if line.strip()]
        whole = path.stat().st_size
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {error}; give a file of rows that can be read") from None
    length = sum(len(line.encode()) for line in first) / max(1, len(first))
    rows = len(first) if len(first) < FEW else round(whole / length)
    columns: Iterable[str] = next(csv.reader(first), []) if path.suffix == ".csv" else ()
    if path.suffix == ".jsonl":
        with suppress(ValueError):
            record = json.loads(first[0] if first else "{}")
            columns = record if isinstance(record, dict) else {}
    family = "classification" if "label" in columns else None if "chosen" in columns else "language"
    return Question(family=family, rows=rows or None, tokens=whole / LETTERS_A_TOKEN or None)


def of_run(started: RunStarted) -> Question:
    """What a run's first record says: nothing of its trainings."""
    train = started.data.splits.get("train")
    margin = started.settings.get("margin")
    return Question(
        family="classification" if started.data.form == "classification" else "language",
        rows=train.items if train else None,
        tokens=train.tokens if train else None,
        kind=kind_of(started.metric),
        margin=float(margin) if isinstance(margin, (int, float)) else None,
    )
