"""Do bounds hold where rows belong together? With groups and without, on drawn and on real paired differences.

    python -m benchmarks.decide.grouped                                  # judges, and writes grouped.json
    python -m benchmarks.decide.grouped --sotu FOLDER                    # before: writes sotu.json, from the texts

The true difference of two ranks equals the margin, so that "enough" is wrong; 5% are allowed. Drawn worlds have a number of
documents, of rows in each, and an intraclass correlation. The real differences are of single sentences of State of the Union addresses
(github.com/sunlightlabs/sotu, public domain): how much worse a model of characters that read two fifths of the training addresses is than
one that read all of them. No adapter is trained: what matters is how sentences of one address go together. Addresses are drawn with
replacement, with ten of their sentences each or with all; the truth is the value over all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import machine
from rightrank.decision.comparison import bounds_of_files
from rightrank.decision.rule import decision_of
from rightrank.decision.table import Cell, ScoreTable

HERE = Path(__file__).parent
MARGIN = 0.02
ORDER, SMOOTH, ROWS_OF_ADDRESS = 4, 5.0, 30  # of the models of characters; sentences of an address
SIZES = ((40, 10), (100, 4), (12, 20))  # documents, rows of each
LIKENESS = (0.8, 0.3)
SKEWED = [120, 60, *[8] * 20]  # two documents hold half of the rows
Floats: TypeAlias = NDArray[np.float64]
# Differences [seeds, rows]; their true mean, over seeds and of the first one, whose two files are compared; groups.
Drawn: TypeAlias = tuple[Floats, float, float, NDArray[np.int64]]
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def drawn(generator: np.random.Generator, sizes: list[int], likeness: float, seeds: int) -> Drawn:
    """Differences of mean MARGIN: a part of the document, one of the row, one of the row and the seed, and one of the seed."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    shared, own = generator.standard_normal(len(sizes))[groups], generator.standard_normal(len(groups))
    rows = np.sqrt(likeness) * shared + np.sqrt(1 - likeness) * own
    of_seeds = 0.002 * generator.standard_normal((seeds, 1))
    noise = 0.02 * generator.standard_normal((seeds, len(groups)))
    return MARGIN + 0.05 * rows + of_seeds + noise, MARGIN, MARGIN + float(of_seeds[0, 0]), groups


def sampled(generator: np.random.Generator, documents: list[Floats], rows: int | None, count: int) -> Drawn:
    """Documents [seeds, sentences] of the real study, drawn with replacement."""
    places = generator.integers(len(documents), size=count)
    parts = []
    for place in places:
        whole = documents[place]
        parts.append(whole if rows is None else whole[:, generator.integers(whole.shape[1], size=rows)])
    groups = np.repeat(np.arange(count), [part.shape[1] for part in parts])
    each = documents if rows else [np.concatenate(documents, axis=1)]
    means = np.mean([one.mean(axis=1) for one in each], axis=0)  # of each seed
    return np.concatenate(parts, axis=1), float(means.mean()), float(means[0]), groups


def judge(draw: Callable[[], Drawn], tables: int) -> dict[str, dict[str, float]]:
    """At a margin that is the truth: the shares of tables whose decision by bounds names the worse rank, of comparisons of two files
    that find it no worse, and of the latter's bounds that hold on both sides."""
    found = {way: dict.fromkeys(("named", "of files", "covers"), 0) for way in ("rows", "groups")}
    for _ in range(tables):
        sums, truth, of_files, groups = draw()
        ones, shift = np.ones(len(groups)), max(0.0, MARGIN - truth)
        for way, given in (("rows", None), ("groups", groups if len(groups) > groups[-1] + 1 else None)):
            cells = {
                (rank, 1e-3, seed): Cell(f"{rank} {seed}", float(values.mean()), values, ones, groups=given)
                for rank, scores in ((4, 2 + sums + shift), (16, 2 + 0 * sums))
                for seed, values in enumerate(scores)
            }
            decided = decision_of(ScoreTable("loss", False, cells), truth + shift, confidence=None)
            files = bounds_of_files(sums[0], ones, 0.0, given)
            found[way]["named"] += decided.rank == 4
            found[way]["of files"] += bool(files.high <= of_files)
            found[way]["covers"] += bool(files.low <= of_files <= files.high)
    return {way: {name: round(count / tables, 4) for name, count in each.items()} for way, each in found.items()}


def worlds() -> Iterator[tuple[str, list[int], float]]:
    for likeness in LIKENESS:
        yield from ((f"{count} x {rows}", [rows] * count, likeness) for count, rows in SIZES)
        yield "120, 60, 20 x 8", SKEWED, likeness


def study(tables: int, seed: int = 1790) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, sizes, likeness in worlds():
        generator = np.random.default_rng([seed, len(found)])
        result = judge(lambda: drawn(generator, sizes, likeness, 2), tables)  # noqa: B023
        found.append({"world": name, "likeness": likeness, **result})
    stored = json.loads((HERE / "sotu.json").read_text())
    lengths = np.cumsum(stored["sentences"])[:-1]
    documents = np.split(np.array(stored["differences"]), lengths, axis=1)
    for rows, count in ((10, 20), (10, 40), (None, 20)):
        generator = np.random.default_rng([seed, len(found)])
        result = judge(lambda: sampled(generator, documents, rows, count), tables)  # noqa: B023
        name = f"{count} addresses x {'all' if rows is None else rows} sentences"
        found.append({"world": name, "likeness": stored["likeness"], **result})
    return found


def addresses(folder: Path) -> dict[str, list[str]]:
    """The sentences of each address."""
    texts = {file.stem: " ".join(file.read_text(encoding="utf-8").split()) for file in sorted(folder.glob("*.txt"))}
    return {name: [one for one in SENTENCE.split(text) if 40 <= len(one) <= 400] for name, text in texts.items()}


def model_of(sentences: list[str]) -> Callable[[str], float]:
    """Nats a character of a sentence, by characters after at most three others; a longer context counts by how often it was seen."""
    counts: Counter[str] = Counter()
    for sentence in sentences:
        for size in range(ORDER + 1):
            counts.update(sentence[at : at + size] for at in range(len(sentence) - size + 1))

    def loss(sentence: str) -> float:
        whole = 0.0
        for at in range(len(sentence)):
            chance = 1 / 256
            for size in range(min(at, ORDER - 1) + 1):
                context = sentence[at - size : at]
                chance = (counts[context + sentence[at]] + SMOOTH * chance) / (counts[context] + SMOOTH)
            whole -= math.log(chance)
        return whole / len(sentence)

    return loss


def measure(folder: Path) -> dict[str, Any]:
    """How much worse models of a part of the training addresses are than one of all of them, by held-out sentence."""
    texts = addresses(folder)
    names = sorted(texts)
    generator = np.random.default_rng(1790)
    held_out, known = names[::2], names[1::2]
    chosen = [list(generator.permutation(texts[name])[:ROWS_OF_ADDRESS]) for name in held_out]
    best = model_of([one for name in known for one in texts[name]])
    parts = [generator.choice(known, len(known) * 2 // 5, replace=False) for _ in range(2)]
    worse = [model_of([one for name in part for one in texts[name]]) for part in parts]
    differences = [[loss(one) - best(one) for rows in chosen for one in rows] for loss in worse]
    counts = np.array([len(rows) for rows in chosen])
    return {
        "sentences": counts.tolist(),
        "likeness": round(likeness_of(np.mean(differences, axis=0), counts), 3),
        "differences": np.round(differences, 4).tolist(),
    }


def likeness_of(values: Floats, counts: NDArray[np.int64]) -> float:
    """The intraclass correlation, from the analysis of variance of one factor."""
    groups = np.repeat(np.arange(len(counts)), counts)
    means = np.bincount(groups, values) / counts
    between = float((counts * (means - values.mean()) ** 2).sum()) / (len(counts) - 1)
    within = float(((values - means[groups]) ** 2).sum()) / (len(values) - len(counts))
    size = (len(values) - float((counts**2).sum()) / len(values)) / (len(counts) - 1)
    return (between - within) / (between + (size - 1) * within)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tables", type=int, default=400)
    parser.add_argument("--sotu", type=Path)
    given = parser.parse_args()
    if given.sotu:
        (HERE / "sotu.json").write_text(json.dumps(measure(given.sotu), separators=(",", ":")) + "\n")
        return
    found = study(given.tables)
    stored = {"machine": machine(), "tables": given.tables, "margin": MARGIN, "results": found}
    (HERE / "grouped.json").write_text(json.dumps(stored, indent=1) + "\n")
    print(f"{'world':32} likeness  rows: named, of files  groups: named, of files")
    for one in found:
        shares = [f"{one[way][name]:.1%}" for way in ("rows", "groups") for name in ("named", "of files")]
        print(f"{one['world']:32} {one['likeness']:8}  {'  '.join(shares)}")


if __name__ == "__main__":
    main()
