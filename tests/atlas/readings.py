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
OURS = Path(__file__).parents[2] / "benchmarks" / "selection"
csv.field_size_limit(1 << 27)


class Cell:
    """One value that was read."""

    def __init__(self, rank: Any, value: Any, rate: Any = "", seed: Any = "") -> None:
        self.rank, self.value, self.rate, self.seed = int(float(rank)), float(value), str(rate), str(seed)


def read_figures(read: Mapping[str, Any], better: str, fetch: Fetch) -> dict[str, Any]:
    """Return ranks, values at each rank's best rate, number of seeds, standard error of a difference, and whether rates were chosen by rank.

    Args:
        read: the reading of a row.
        better: "low" or "high".
        fetch: returns the text of a path in the source's repository.
    """
    table: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in read_cells(read, fetch):
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


def read_cells(read: Mapping[str, Any], fetch: Fetch) -> Iterator[Cell]:
    """Yield the cells of one reading. A cell without a number is a training without a result."""
    for rank, value, rate, seed in _read_raw_cells(read, fetch):
        try:
            cell = Cell(rank, value, rate, seed)
        except (TypeError, ValueError):
            continue
        if math.isfinite(cell.value) and cell.rank > 0 and cell.value <= read.get("below", math.inf):
            cell.value = math.log(cell.value) if read.get("log") else cell.value * read.get("scale", 1)
            yield cell


def _read_raw_cells(read: Mapping[str, Any], fetch: Fetch) -> Iterator[tuple[Any, ...]]:
    for rank, seed, path in _list_files(read):
        text = fetch(path)
        if "pattern" in read:
            yield from _match_lines(read, text)
            continue
        for record in _read_records(read, path, text, is_single=rank != ""):
            if "grid" in read:
                yield from _read_grid(get_path(record, read["grid"]))
            else:
                of = {key: get_path(record, read[key]) for key in ("rank", "value", "rate", "seed") if key in read}
                yield rank or of["rank"], of["value"], of.get("rate", ""), seed or of.get("seed", "")


def _list_files(read: Mapping[str, Any]) -> Iterator[tuple[Any, Any, str]]:
    """Rank and seed, where the file's name has them, and its path."""
    if "files" in read:
        yield from ((rank, seed, path) for rank, paths in read["files"].items() for seed, path in enumerate(paths))
    elif "ranks" in read:
        for rank, seed in product(read["ranks"], read.get("seeds", [""])):
            yield rank, seed, read["file"].replace("{rank}", str(rank)).replace("{seed}", str(seed))
    else:
        yield "", "", read["file"]


def _match_lines(read: Mapping[str, Any], text: str) -> Iterator[tuple[Any, ...]]:
    if "between" in read:
        text = text.split(read["between"][0], 1)[1].split(read["between"][1], 1)[0]
    for match in re.finditer(read["pattern"], text):
        groups = match.groupdict()
        yield groups["rank"], groups["value"], groups.get("rate", ""), ""


def _read_grid(by_rank: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[tuple[Any, ...]]:
    for rank, rates in by_rank.items():
        for rate, seeds in rates.items():
            yield from ((rank, value, rate, seed) for seed, value in seeds.items())


def _read_records(read: Mapping[str, Any], path: str, text: str, *, is_single: bool) -> list[Any]:
    """Return the records that the reading selects; for a file of a single rank, the file itself."""
    if path.endswith(".csv"):
        content: Any = list(csv.DictReader(io.StringIO(text)))
    elif path.endswith(".jsonl"):
        content = [json.loads(line) for line in text.splitlines() if line.strip()]
    else:
        content = get_path(json.loads(text), read.get("at", ""))
        if is_single:
            return [content]
    records = list(content.values()) if isinstance(content, dict) else list(content)
    return [
        r for r in records if all(str(get_path(r, key)) == str(value) for key, value in read.get("where", {}).items())
    ]


def get_path(record: Any, path: str) -> Any:
    """Return the value at a dotted path of nested mappings and lists; the record itself for an empty path."""
    for key in path.split(".") if path else ():
        if isinstance(record, list):
            record = record[int(key)]
        else:
            record = record.get(key, "") if isinstance(record, Mapping) else ""
    return record


def open_mirror(folder: Path, repo: str, commit: str) -> Fetch | None:
    """Return a reader of a local copy of a repository, `FOLDER/owner+name/repo` (git) or `/files` (plain); None without a copy."""
    repository = folder / repo.replace("/", "+")
    if (repository / "repo").exists():
        return lambda path: subprocess.run(
            ["git", "-C", str(repository / "repo"), "show", f"{commit}:{path}"], capture_output=True, check=True
        ).stdout.decode("utf-8", "replace")
    return open_folder(repository / "files") if (repository / "files").exists() else None


def open_folder(folder: Path) -> Fetch:
    """Read files of a folder; those that end with `.xz` are compressed."""

    def fetch(path: str) -> str:
        content = (folder / path).read_bytes()
        return (lzma.decompress(content) if path.endswith(".xz") else content).decode("utf-8")

    return fetch


def open_online(repo: str, commit: str) -> Fetch:
    """Return a reader of files in a public repository."""

    def fetch(path: str) -> str:
        with urlopen(f"https://raw.githubusercontent.com/{repo}/{commit}/{path}", timeout=GENEROUS_SECONDS) as answer:
            text: str = answer.read().decode("utf-8", "replace")
        return text

    return fetch


READS = {"pattern", "rank", "ranks", "files", "grid"}  # a reading with one of them is read by a program
OUTCOMES = ("same", "differs", "unreachable", "printed in a paper", "not by a program")


def check_rows(atlas: Mapping[str, Any], folder: Path | None) -> dict[str, list[str]]:
    """Group rows by the outcome of reading them again, one of `OUTCOMES`. Tables of papers were read by a person and are not read again."""
    outcome: dict[str, list[str]] = {name: [] for name in OUTCOMES}
    for row in atlas["sweeps"]:
        outcome[_check_row(row, atlas["sources"][row["source"]], folder)].append(row["id"])
    return outcome


def _check_row(row: Mapping[str, Any], source: Mapping[str, Any], folder: Path | None) -> str:
    read = row.get("read", {})
    if source["kind"] == "paper":
        return "printed in a paper"
    if not READS & read.keys():
        return "not by a program"
    fetch = _open_source(source, folder)
    if fetch is None:
        return "unreachable"
    try:
        figures = read_figures(read, row["better"], fetch)
    except (URLError, OSError, subprocess.CalledProcessError):
        return "unreachable"
    return "same" if figures["ranks"] == row["ranks"] and figures["values"] == row["values"] else "differs"


def _open_source(source: Mapping[str, Any], folder: Path | None) -> Fetch | None:
    if "repo" not in source:
        return open_folder(OURS)
    if folder is None:
        return open_online(source["repo"], source["commit"])
    return open_mirror(folder, source["repo"], source["commit"])


def main() -> None:
    """`python -m tests.atlas.readings [FOLDER OF MIRRORS]`; ends with 1 where a row differs from its source."""
    from rightrank.atlas.counts import ATLAS_FILE

    atlas = json.loads(ATLAS_FILE.read_text(encoding="utf-8"))
    outcome = check_rows(atlas, Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    print(json.dumps({name: len(rows) for name, rows in outcome.items()}))
    print(*(f"{name}: {row}" for name in ("differs", "unreachable") for row in outcome[name]), sep="\n")
    sys.exit(bool(outcome["differs"]))


if __name__ == "__main__":
    main()
