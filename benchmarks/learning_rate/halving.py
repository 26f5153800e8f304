"""Does a second evaluation, at half of the training, choose a better learning rate? Grids that were locked before they were trained.

    python -m benchmarks.learning_rate.halving write SOURCES DATA            # the rows of the tasks (texts.py says what SOURCES holds)
    python -m benchmarks.learning_rate.halving lock DATA                     # once, before the first training; writes halving_lock.json
    python -m benchmarks.learning_rate.halving train BASES DATA WORK OUT     # ranks 16 and 64; prints no value
    python -m benchmarks.learning_rate.halving judge OUT                     # writes halving.json

`README.md` has the protocol.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.learning_rate.bases import GEMMA, MINILM_L3, MINILM_L6, SMOLLM2
from benchmarks.learning_rate.judge import MARGINS, read_seed
from benchmarks.learning_rate.lock import GRIDS, HERE, hash_file
from benchmarks.learning_rate.policies import (
    PRIMARY,
    QUARTER,
    SMALL,
    TOP,
    Choice,
    Key,
    SeedTable,
    hand_over,
    is_usable,
    resample_grids,
)
from benchmarks.learning_rate.stored import read_stored
from benchmarks.learning_rate.texts import (
    WORD_CLASSES,
    Row,
    read_packages,
    read_synsets,
    select_rows,
    write_replies,
    write_usages,
)

LOCK, RESULT, STORED = HERE / "halving_lock.json", HERE / "halving.json", HERE.parent / "selection"
CODE = ("halving.py", "train_grids.py", "texts.py", "bases.py", "policies.py", "judge.py", "README.md")
HALF, FINALISTS = 0.5, 2
SEEDS = ((0, 1), (2,))
MIN_GAIN = 0.002


def write_names(sources: Path) -> Iterator[Row]:
    """Name the Debian package that a description describes; packages of one source are a group."""
    for fields in read_packages(sources):
        yield {
            "prompt": f"{fields['Description']}\nPackage:",
            "completion": f" {fields['Package']}",
            "group": fields["Group"],
        }


def write_glosses(sources: Path) -> Iterator[Row]:
    """Define a word; the first tokens of its gloss are the labels."""
    for word_class in WORD_CLASSES:
        for _, word, gloss, _ in read_synsets(sources, word_class):
            yield {"prompt": f"{word} ({word_class}):", "completion": f" {gloss}", "group": word}


def write_examples(sources: Path) -> Iterator[Row]:
    """Continue an example sentence from its first half; the examples of a synset are a group."""
    for word_class in WORD_CLASSES:
        for _, word, gloss, examples in read_synsets(sources, word_class):
            for words in (example.split() for example in examples):
                if len(words) >= 6:
                    half = len(words) // 2
                    yield {
                        "prompt": f"{word}: {' '.join(words[:half])}",
                        "completion": f" {' '.join(words[half:])}",
                        "group": f"{word}: {gloss}",
                    }


def write_sections(sources: Path) -> Iterator[Row]:
    """Tell the section of a Debian package from its description; packages of one source are a group."""
    for fields in read_packages(sources):
        yield {"text": fields["Description"], "label": fields["Section"], "group": fields["Group"]}


def write_verb_kinds(sources: Path) -> Iterator[Row]:
    """Tell the lexicographer file of a verb from its gloss."""
    for kind, _, gloss, _ in read_synsets(sources, "verb"):
        yield {"text": gloss, "label": kind}


def write_noun_kinds(sources: Path) -> Iterator[Row]:
    """Tell the lexicographer file of a noun from its gloss."""
    for kind, _, gloss, _ in read_synsets(sources, "noun"):
        yield {"text": gloss, "label": kind}


TASKS: dict[str, tuple[str, Callable[[Path], Iterator[Row]]]] = {  # in the order of training
    "names": (SMOLLM2, write_names),
    "sections": (MINILM_L6, write_sections),
    "glosses": (GEMMA, write_glosses),
    "verb_kinds": (MINILM_L3, write_verb_kinds),
    "usages": (SMOLLM2, write_usages),
    "examples": (GEMMA, write_examples),
    "noun_kinds": (MINILM_L6, write_noun_kinds),
    "replies": (SMOLLM2, write_replies),
    "sections-l3": (MINILM_L3, write_sections),
    "verb_kinds-l6": (MINILM_L6, write_verb_kinds),
    "noun_kinds-l3": (MINILM_L3, write_noun_kinds),
    "glosses-smollm2": (SMOLLM2, write_glosses),
    "names-gemma": (GEMMA, write_names),
    "examples-smollm2": (SMOLLM2, write_examples),
    "usages-gemma": (GEMMA, write_usages),
}


def write_tasks(sources: Path, data: Path) -> None:
    data.mkdir(parents=True, exist_ok=True)
    for name, (_, write) in TASKS.items():
        rows = select_rows(write(sources))
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (data / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(name, len(rows))


def lock_protocol(data: Path) -> None:
    """Record the hashes of the code, of the data and of the earlier grids, before the first training."""
    if LOCK.exists():
        raise SystemExit("the protocol is locked")
    lock = {
        "code": {name: hash_file(HERE / name) for name in CODE},
        "data": {f"{name}.jsonl": hash_file(data / f"{name}.jsonl") for name in TASKS},
    }
    LOCK.write_text(json.dumps(lock, indent=1) + "\n")


def train_tasks(bases: Path, data: Path, work: Path, out: Path) -> None:
    """Train ranks 16 and 64 at every learning rate, and truncate rank 64; continue where an earlier call stopped."""
    import torch

    from benchmarks.learning_rate import train_grids

    torch.set_num_threads(1)
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    cells = [(rank, rate) for rank in (SMALL, TOP) for rate in train_grids.RATES]
    steps = train_grids.STEPS
    for seeds in SEEDS:
        for name, (base, _) in TASKS.items():
            missing = [seed for seed in seeds if not (out / f"{name}_{seed}.npz").exists()]
            if not missing:
                continue
            task = train_grids.load_task(name, base, bases, data, work)
            for seed in missing:
                start_time = time.perf_counter()
                results = train_grids.SeedResults(task)
                adapters: list[dict[str, torch.Tensor]] = []
                history = np.zeros(0, dtype=np.float32)
                for step, current, losses in train_grids.train(task, cells, seed, steps):
                    adapters, history = current, losses
                    records = [{"kind": "checkpoint" if step < steps else "trained", "rank": rank, "rate": rate, "steps": steps, "trained": step} for rank, rate in cells]  # fmt: skip
                    results.add(records, adapters, step == steps)
                batches = train_grids.plan_batches(task, seed, steps + train_grids.MOMENT_STEPS)[steps:]
                train_grids.add_truncations(results, adapters[-len(train_grids.RATES) :], batches, "truncated", steps)
                results.save(out / f"{name}_{seed}.npz", history)
                finite = bool(np.isfinite(history).all())
                print(f"{name}, seed {seed}: {time.perf_counter() - start_time:.0f} s, finite {finite}", flush=True)


def choose_by_halving(table: SeedTable, rank: int) -> float | None:
    """Return the learning rate that is best at half among the two with the lowest validation losses at a quarter."""

    def find_best(rates: Sequence[float], fraction: float, count: int) -> list[float]:
        losses = {rate: table.adapters[Key("trained", rank, rate, fraction)].validation_mean for rate in rates}
        return sorted((rate for rate in rates if math.isfinite(losses[rate])), key=lambda rate: losses[rate])[:count]

    finalists = find_best(table.rates("trained", rank, QUARTER), QUARTER, FINALISTS)
    return next(iter(find_best(finalists, HALF, 1)), None)


def search_by_halving(table: SeedTable, margin: float) -> Choice | None:
    """Every learning rate at rank 64 to a quarter, the two best to half, the better one to the end, truncated within the margin."""
    rate, rates = choose_by_halving(table, TOP), len(table.rates("trained", TOP, QUARTER))
    if rate is None or not is_usable(table, Key("trained", TOP, rate)):
        return None
    trainings = QUARTER * rates + (HALF - QUARTER) * min(FINALISTS, rates) + (1 - HALF)
    return hand_over(table, Key("trained", TOP, rate), margin, trainings)


def compare_rules(tables: Sequence[SeedTable]) -> dict[str, Any]:
    """Compare the search by halving with that at a quarter, and both with rank 16 tuned, on the test split."""
    by_rate: dict[str, list[float]] = {}
    against_tuned: dict[str, dict[str, list[float]]] = {"halving": {}, "quarter": {}}
    ranks, costs, failed = [], [], 0
    for table in tables:
        for margin in MARGINS:
            choices = {
                "halving": search_by_halving(table, margin),
                "quarter": PRIMARY["adapter"](table, margin),
            }
            tuned = PRIMARY["16, rate tuned by whole trainings"](table, margin)
            halving, quarter = choices["halving"], choices["quarter"]
            if halving is None or quarter is None or halving.whole is None or quarter.whole is None or tuned is None:
                failed += 1
                continue
            losses = table.adapters
            difference = losses[halving.whole].test_mean - losses[quarter.whole].test_mean
            by_rate.setdefault(table.grid, []).append(difference)
            for rule, choice in choices.items():
                if choice is not None:
                    lost = losses[choice.key].test_mean - losses[tuned.key].test_mean
                    against_tuned[rule].setdefault(table.grid, []).append(lost)
            ranks.append(halving.key.rank)
            costs.append(halving.trainings / tuned.trainings)
    return {
        "halving minus quarter, rank 64": resample_grids(by_rate),
        "by grid": {grid: round(float(np.mean(values)), 5) for grid, values in sorted(by_rate.items())},
        "halving minus 16 tuned": resample_grids(against_tuned["halving"]),
        "quarter minus 16 tuned": resample_grids(against_tuned["quarter"]),
        "median rank": median(ranks),
        "cost": round(float(np.mean(costs)), 3),
        "failed": failed,
    }


def judge(out: Path) -> dict[str, Any]:
    """Return the endpoints on the locked tasks, and on these and the earlier grids together."""
    new = [read_seed(path) for path in sorted(out.glob("*.npz"))]
    earlier = [table for table in read_stored(STORED) if table.rates("trained", TOP, HALF)]
    judged = [read_seed(path) for path in sorted(GRIDS.glob("*.npz"))]
    results = {"new": compare_rules(new), "all": compare_rules([*earlier, *judged, *new])}
    is_adopted = (
        results["new"]["halving minus quarter, rank 64"]["mean"] <= -MIN_GAIN
        and results["all"]["halving minus quarter, rank 64"]["high"] < 0
    )
    return {
        **results,
        "seeds": len(new),
        "adopted": is_adopted,
        "sha256": {path.name: hash_file(path) for path in sorted(out.glob("*.npz"))},
        "changed code": find_changes(json.loads(LOCK.read_text())["code"]),
    }


def find_changes(locked: Mapping[str, str]) -> list[str]:
    """Return the files that differ from the lock."""
    return [name for name, sha256 in locked.items() if hash_file(HERE / name) != sha256]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("write", "lock", "train", "judge"))
    parser.add_argument("folders", type=Path, nargs="+")
    options = parser.parse_args()
    if options.action == "judge":
        RESULT.write_text(json.dumps(judge(*options.folders), indent=1) + "\n")
        print(RESULT.read_text())
    else:
        {"write": write_tasks, "lock": lock_protocol, "train": train_tasks}[options.action](*options.folders)


if __name__ == "__main__":
    main()
