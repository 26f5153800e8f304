"""Do bounds hold where rows belong together? With groups and without, on drawn and on real paired differences.

    python -m benchmarks.decide.grouped                                  # judges, and writes grouped.json
    python -m benchmarks.decide.grouped --sotu FOLDER --model FOLDER     # before: trains, and writes sotu.json

The true difference of two ranks equals the margin, so that "enough" is wrong; 5% are allowed. Drawn worlds have a number of
documents, of rows in each, and an intraclass correlation. The real differences are losses of single sentences of State of the Union
addresses, by the president's party, under adapters of ranks 1 and 16 of two seeds (texts: github.com/sunlightlabs/sotu, public domain).
Addresses are drawn with replacement, with ten of their sentences each or with all; the truth is the value over all of them.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import machine
from rightrank.decision.comparison import bounds_of_files
from rightrank.decision.rule import decide
from rightrank.decision.table import Cell, ScoreTable

HERE = Path(__file__).parent
MARGIN = 0.02
SIZES = ((40, 10), (100, 4), (12, 20))  # documents, rows of each
LIKENESS = (0.8, 0.3)
SKEWED = [120, 60, *[8] * 20]  # two documents hold half of the rows
Floats: TypeAlias = NDArray[np.float64]
Drawn: TypeAlias = tuple[Floats, Floats, NDArray[np.int64]]  # differences [seeds, rows], their true mean, groups
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def drawn(generator: np.random.Generator, sizes: list[int], likeness: float, seeds: int) -> Drawn:
    """Differences of mean MARGIN: a part of the document, one of the row, one of the row and the seed, and one of the seed."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    shared, own = generator.standard_normal(len(sizes))[groups], generator.standard_normal(len(groups))
    rows = np.sqrt(likeness) * shared + np.sqrt(1 - likeness) * own
    noise = 0.02 * generator.standard_normal((seeds, len(groups))) + 0.002 * generator.standard_normal((seeds, 1))
    return MARGIN + 0.05 * rows + noise, np.float64(MARGIN), groups  # type: ignore[return-value]


def sampled(generator: np.random.Generator, documents: list[Floats], rows: int | None, count: int) -> Drawn:
    """Documents [seeds, sentences] of the real study, drawn with replacement."""
    places = generator.integers(len(documents), size=count)
    parts = []
    for place in places:
        whole = documents[place]
        parts.append(whole if rows is None else whole[:, generator.integers(whole.shape[1], size=rows)])
    groups = np.repeat(np.arange(count), [part.shape[1] for part in parts])
    truth = np.concatenate(documents, axis=1).mean() if rows is None else np.mean([one.mean() for one in documents])
    return np.concatenate(parts, axis=1), truth, groups


def judge(draw: Callable[[], Drawn], tables: int) -> dict[str, dict[str, float]]:
    """At a margin that is the truth: the shares of tables whose decision by bounds names the worse rank, of comparisons of two files
    that find it no worse, and of the latter's bounds that hold on both sides."""
    found = {way: dict.fromkeys(("named", "of files", "covers"), 0) for way in ("rows", "groups")}
    for _ in range(tables):
        sums, truth, groups = draw()
        ones, shift = np.ones(len(groups)), max(0.0, MARGIN - float(truth))
        for way, given in (("rows", None), ("groups", groups if len(groups) > groups[-1] + 1 else None)):
            cells = {
                (rank, 1e-3, seed): Cell(f"{rank} {seed}", float(values.mean()), values, ones, groups=given)
                for rank, scores in ((4, 2 + sums + shift), (16, 2 + 0 * sums))
                for seed, values in enumerate(scores)
            }
            decided = decide(ScoreTable("loss", False, cells), float(truth) + shift, confidence=None)
            files = bounds_of_files(sums[0], ones, 0.0, given)
            found[way]["named"] += decided.rank == 4
            found[way]["of files"] += bool(files.high <= truth)
            found[way]["covers"] += bool(files.low <= truth <= files.high)
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


def rows_of(folder: Path) -> Iterator[dict[str, str]]:
    """Sentences of the addresses, with the party of the president and the address."""
    for file in sorted(folder.glob("*.txt")):
        party = file.stem.rsplit("_", 1)[1]
        for sentence in SENTENCE.split(" ".join(file.read_text(encoding="utf-8").split())):
            if party in ("d", "r") and 40 <= len(sentence) <= 400:
                yield {"text": sentence, "label": party, "address": file.stem}


def train(folder: Path, model: str) -> dict[str, Any]:
    """Ranks 1 and 16 with two seeds; differences of the losses of the held-out sentences, by address."""
    import rightrank

    with tempfile.TemporaryDirectory() as name:
        data, out = Path(name) / "sotu.jsonl", Path(name) / "run"
        data.write_text("\n".join(map(json.dumps, rows_of(folder))))
        rightrank.select_rank(
            model, str(data), out=out, group="address", ranks=[1, 16], seeds=[0, 1], strategy="grid", learning_rates=[3e-3],
            max_steps=120, batch_size=16, seq_len=32, eval_items=2000, eval_points=1, validation_fraction=0.5,
            test_fraction=0.0, eval_batch_size=64, device="cpu",
        )  # fmt: skip
        records = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    trials = {
        (one["rank"], one["seed"]): one
        for one in records
        if one["type"] == "trial_finished" and not one["truncate_from"]
    }
    losses = {key: np.array(one["item_losses"]) for key, one in trials.items()}
    groups = np.array(trials[1, 0]["item_groups"])
    order = np.argsort(groups, kind="stable")
    differences = np.stack([losses[1, seed] - losses[16, seed] for seed in (0, 1)])[:, order]
    counts = np.bincount(groups)
    return {
        "model": Path(model).name,
        "sentences": counts.tolist(),
        "likeness": round(likeness_of(differences.mean(axis=0), counts), 3),
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
    parser.add_argument("--model")
    given = parser.parse_args()
    if given.sotu:
        (HERE / "sotu.json").write_text(json.dumps(train(given.sotu, given.model), separators=(",", ":")) + "\n")
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
