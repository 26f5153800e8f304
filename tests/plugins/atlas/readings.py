"""Reads the figures of a sweep again where they were published: tables, records, logs; a row of the atlas says how.

A reading is what a row holds under `read`:

    {"file": "results/sweep.csv", "rank": "lora_r", "value": "eval_loss", "rate": "lr", "seed": "seed", "where": {"task": "sst2"}}

`file` is a path in the source's repository; with `{rank}` in it there is a file a rank, of the ranks in `ranks`, and `files` names those of
each rank, a file a seed. A table (`.csv`), lines (`.jsonl`) and a list of records (`.json`, found at `at`) give a cell each; `grid` is the
place in a record of a value by rank, rate and seed; `pattern` reads any text with the groups `rank`, `value` and `rate`. A number in a dotted
path counts in a list, from its end where negative. `scale` multiplies a value (per cent: .01), `log` takes its logarithm (a perplexity).
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import math
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from statistics import fmean, variance
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from tests.watch import GENEROUS_SECONDS

Fetch = Callable[[str], str]
OURS = Path(__file__).parents[3] / "benchmarks" / "selection"
csv.field_size_limit(1 << 27)


class Cell:
    """One value that was read."""

    def __init__(self, rank: Any, value: Any, rate: Any = "", seed: Any = "") -> None:
        self.rank, self.value, self.rate, self.seed = int(float(rank)), float(value), str(rate), str(seed)


def figures(read: Mapping[str, Any], better: str, fetch: Fetch) -> dict[str, Any]:
    """Ranks, values at each rank's best rate, how many seeds, the standard error of a difference, whether a rate was chosen by rank.

    Args:
        read: the reading of a row.
        better: "low" or "high".
        fetch: the text of a path in the source's repository.
    """
    table: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells(read, fetch):
        table[cell.rank][cell.rate].append(cell.value)
    pick = min if better == "low" else max
    chosen = {rank: pick(rates.values(), key=fmean) for rank, rates in sorted(table.items())}
    seeds = min(map(len, chosen.values()))
    spread = [variance(values) for values in chosen.values() if len(values) > 1]
    noise = math.sqrt(2 * fmean(spread) / seeds) if spread and seeds > 1 else None
    return {
        "ranks": list(chosen),
        "values": [round(fmean(values), 5) for values in chosen.values()],
        "seeds": seeds,
        "noise": noise if noise is None else round(noise, 5),
        "tuned": min(map(len, table.values())) > 1,
    }


def cells(read: Mapping[str, Any], fetch: Fetch) -> Iterator[Cell]:
    """Those of one reading; a cell without a number is a training that has none."""
    for rank, value, rate, seed in _raw(read, fetch):
        try:
            cell = Cell(rank, value, rate, seed)
        except (TypeError, ValueError):
            continue
        if math.isfinite(cell.value) and cell.rank > 0 and cell.value <= read.get("below", math.inf):
            cell.value = math.log(cell.value) if read.get("log") else cell.value * read.get("scale", 1)
            yield cell


def _raw(read: Mapping[str, Any], fetch: Fetch) -> Iterator[tuple[Any, ...]]:
    for rank, seed, path in _files(read):
        text = fetch(path)
        if "pattern" in read:
            yield from _matches(read, text)
            continue
        for record in _records(read, path, text, one=rank != ""):
            if "grid" in read:
                yield from _grid(at(record, read["grid"]))
            else:
                of = {key: at(record, read[key]) for key in ("rank", "value", "rate", "seed") if key in read}
                yield rank or of["rank"], of["value"], of.get("rate", ""), seed or of.get("seed", "")


def _files(read: Mapping[str, Any]) -> Iterator[tuple[Any, Any, str]]:
    """Rank and seed, where the file's name has them, and its path."""
    if "files" in read:
        yield from ((rank, seed, path) for rank, paths in read["files"].items() for seed, path in enumerate(paths))
    elif "ranks" in read:
        for rank, seed in product(read["ranks"], read.get("seeds", [""])):
            yield rank, seed, read["file"].replace("{rank}", str(rank)).replace("{seed}", str(seed))
    else:
        yield "", "", read["file"]


def _matches(read: Mapping[str, Any], text: str) -> Iterator[tuple[Any, ...]]:
    if "between" in read:
        text = text.split(read["between"][0], 1)[1].split(read["between"][1], 1)[0]
    for match in re.finditer(read["pattern"], text):
        found = match.groupdict()
        yield found["rank"], found["value"], found.get("rate", ""), ""


def _grid(by_rank: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[tuple[Any, ...]]:
    for rank, rates in by_rank.items():
        for rate, seeds in rates.items():
            yield from ((rank, value, rate, seed) for seed, value in seeds.items())


def _records(read: Mapping[str, Any], path: str, text: str, *, one: bool) -> list[Any]:
    """Those that the reading asks for; of a file of one rank, the file itself."""
    if path.endswith(".csv"):
        found: Any = list(csv.DictReader(io.StringIO(text)))
    elif path.endswith(".jsonl"):
        found = [json.loads(line) for line in text.splitlines() if line.strip()]
    else:
        found = at(json.loads(text), read.get("at", ""))
        if one:
            return [found]
    records = list(found.values()) if isinstance(found, dict) else list(found)
    return [r for r in records if all(str(at(r, key)) == str(value) for key, value in read.get("where", {}).items())]


def at(record: Any, path: str) -> Any:
    """What is at a dotted path of nested mappings and lists; the record itself for an empty path."""
    for key in path.split(".") if path else ():
        if isinstance(record, list):
            record = record[int(key)]
        else:
            record = record.get(key, "") if isinstance(record, Mapping) else ""
    return record


def mirror(folder: Path, repo: str, commit: str) -> Fetch | None:
    """Reads files of a local copy of a repository, `FOLDER/owner+name/repo` (git) or `/files` (plain); None where there is none."""
    place = folder / repo.replace("/", "+")
    if (place / "repo").exists():
        return lambda path: subprocess.run(
            ["git", "-C", str(place / "repo"), "show", f"{commit}:{path}"], capture_output=True, check=True
        ).stdout.decode("utf-8", "replace")
    return plain(place / "files") if (place / "files").exists() else None


def plain(folder: Path) -> Fetch:
    """Read files of a folder; those that end with `.xz` are compressed."""

    def fetch(path: str) -> str:
        content = (folder / path).read_bytes()
        return (lzma.decompress(content) if path.endswith(".xz") else content).decode("utf-8")

    return fetch


def online(repo: str, commit: str) -> Fetch:
    """Reads files of a public repository."""

    def fetch(path: str) -> str:
        with urlopen(f"https://raw.githubusercontent.com/{repo}/{commit}/{path}", timeout=GENEROUS_SECONDS) as answer:
            text: str = answer.read().decode("utf-8", "replace")
        return text

    return fetch


READS = {"pattern", "rank", "ranks", "files", "grid"}  # a reading with one of them is read by a program
OUTCOMES = ("same", "differs", "unreachable", "printed in a paper", "not by a program")


def check(atlas: Mapping[str, Any], folder: Path | None) -> dict[str, list[str]]:
    """Rows by what became of them, one of `OUTCOMES`: a paper's table was read by a person and is not read again."""
    outcome: dict[str, list[str]] = {name: [] for name in OUTCOMES}
    for row in atlas["sweeps"]:
        outcome[_checked(row, atlas["sources"][row["source"]], folder)].append(row["id"])
    return outcome


def _checked(row: Mapping[str, Any], source: Mapping[str, Any], folder: Path | None) -> str:
    read = row.get("read", {})
    if source["kind"] == "paper":
        return "printed in a paper"
    if not READS & read.keys():
        return "not by a program"
    fetch = _fetch_of(source, folder)
    if fetch is None:
        return "unreachable"
    try:
        found = figures(read, row["better"], fetch)
    except (URLError, OSError, subprocess.CalledProcessError):
        return "unreachable"
    return "same" if found["ranks"] == row["ranks"] and found["values"] == row["values"] else "differs"


def _fetch_of(source: Mapping[str, Any], folder: Path | None) -> Fetch | None:
    if "repo" not in source:
        return plain(OURS)
    if folder is None:
        return online(source["repo"], source["commit"])
    return mirror(folder, source["repo"], source["commit"])


def main() -> None:
    """`python -m tests.plugins.atlas.readings [FOLDER OF MIRRORS]`; ends with 1 where a row differs from its source."""
    from rightrank.plugins.atlas.counts import ATLAS

    atlas = json.loads(ATLAS.read_text(encoding="utf-8"))
    outcome = check(atlas, Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    print(json.dumps({name: len(rows) for name, rows in outcome.items()}))
    print(*(f"{name}: {row}" for name in ("differs", "unreachable") for row in outcome[name]), sep="\n")
    sys.exit(bool(outcome["differs"]))


if __name__ == "__main__":
    main()
