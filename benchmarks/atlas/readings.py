"""Reads the figures of a sweep again where they were published: tables, records, logs; a row of the atlas says how.

A reading is what a row holds under `read`:

    {"file": "results/sweep.csv", "rank": "lora_r", "value": "eval_loss", "rate": "lr", "seed": "seed", "where": {"task": "sst2"}}

`file` is a path in the source's repository; with `{rank}` in it there is a file a rank, of the ranks in `ranks`. A table (`.csv`) and a
list of records (`.json`, found at `at`) give a cell each; `pattern` reads any text with the groups `rank`, `value` and `rate`. `scale`
multiplies a value (per cent: .01), `log` takes its logarithm (a perplexity).
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean, variance
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

Fetch = Callable[[str], str]
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
    path = read["file"]
    if "ranks" in read:
        for rank in read["ranks"]:
            for seed in read.get("seeds", [""]):
                record = json.loads(fetch(path.replace("{rank}", str(rank)).replace("{seed}", str(seed))))
                yield rank, at(record, read["value"]), "", seed
        return
    text = fetch(path)
    if "pattern" in read:
        if "between" in read:
            text = text.split(read["between"][0], 1)[1].split(read["between"][1], 1)[0]
        for match in re.finditer(read["pattern"], text):
            found = match.groupdict()
            yield found["rank"], found["value"], found.get("rate", ""), ""
        return
    for record in _records(read, text):
        if all(str(at(record, key)) == str(value) for key, value in read.get("where", {}).items()):
            yield tuple(at(record, read[key]) if key in read else "" for key in ("rank", "value", "rate", "seed"))


def _records(read: Mapping[str, Any], text: str) -> list[Any]:
    if read["file"].endswith(".csv"):
        return list(csv.DictReader(io.StringIO(text)))
    found = at(json.loads(text), read.get("at", ""))
    return list(found.values()) if isinstance(found, dict) else list(found)


def at(record: Any, path: str) -> Any:
    """What is at a dotted path of nested mappings; the record itself for an empty path given as the place of records."""
    for key in path.split(".") if path else ():
        record = record.get(key, "") if isinstance(record, Mapping) else ""
    return record


def mirror(folder: Path, repo: str, commit: str) -> Fetch | None:
    """Reads files of a local copy of a repository, `FOLDER/owner+name/repo`; None where there is none."""
    place = folder / repo.replace("/", "+") / "repo"
    if not place.exists():
        return None

    def fetch(path: str) -> str:
        command = ["git", "-C", str(place), "show", f"{commit}:{path}"]
        return subprocess.run(command, capture_output=True, check=True).stdout.decode("utf-8", "replace")

    return fetch


def online(repo: str, commit: str) -> Fetch:
    """Reads files of a public repository."""

    def fetch(path: str) -> str:
        with urlopen(f"https://raw.githubusercontent.com/{repo}/{commit}/{path}", timeout=30) as answer:
            text: str = answer.read().decode("utf-8", "replace")
        return text

    return fetch


def check(atlas: Mapping[str, Any], folder: Path | None) -> dict[str, list[str]]:
    """Rows by what became of them: `same`, `differs`, `unreachable`, and `not by a program` (papers, transcribed logs)."""
    outcome: dict[str, list[str]] = {"same": [], "differs": [], "unreachable": [], "not by a program": []}
    for row in atlas["sweeps"]:
        outcome[_checked(row, atlas["sources"][row["source"]], folder)].append(row["id"])
    return outcome


def _checked(row: Mapping[str, Any], source: Mapping[str, Any], folder: Path | None) -> str:
    read = row.get("read", {})
    if "repo" not in source or not {"pattern", "rank", "ranks"} & read.keys():
        return "not by a program"
    fetch = (
        online(source["repo"], source["commit"]) if folder is None else mirror(folder, source["repo"], source["commit"])
    )
    if fetch is None:
        return "unreachable"
    try:
        found = figures(read, row["better"], fetch)
    except (URLError, OSError, subprocess.CalledProcessError):
        return "unreachable"
    return "same" if found["ranks"] == row["ranks"] and found["values"] == row["values"] else "differs"


def main() -> None:
    """`python -m benchmarks.atlas.readings [FOLDER OF MIRRORS]`; ends with 1 where a row differs from its source."""
    from rightrank.plugins.atlas.rows import ATLAS

    atlas = json.loads(ATLAS.read_text(encoding="utf-8"))
    outcome = check(atlas, Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    print(json.dumps({name: len(rows) for name, rows in outcome.items()}))
    print(*(f"{name}: {row}" for name in ("differs", "unreachable") for row in outcome[name]), sep="\n")
    sys.exit(bool(outcome["differs"]))


if __name__ == "__main__":
    main()
