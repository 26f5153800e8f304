"""List the grids of the study: their tasks, bases, depths and numbers of training rows."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.learning_rate.bases import GEMMA, MINILM_L3, MINILM_L6, SMOLLM2

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
BEYOND = 3e-2  # trained on the design grids only
TOP, BASELINE = 64, 16


@dataclass(frozen=True)
class Grid:
    """A task on a base. All linear layers of the last one or two blocks carry adapters."""

    name: str
    base: str
    blocks: int = 1
    train_rows: int = 0  # 0: so many that no row repeats

    @property
    def steps(self) -> int:
        return 320 if self.blocks == 1 else 160

    @property
    def counts(self) -> tuple[int, int, int]:
        """Return the number of test, validation and training rows."""
        test, validation, train = (1024, 512, 2880) if self.blocks == 1 else (512, 256, 1440)
        return test, validation, self.train_rows or train

    @property
    def lengths(self) -> tuple[int, int]:
        """Return the largest number of tokens of a sequence, and of labels among them."""
        return (20, 6) if self.blocks == 1 else (32, 10)

    @property
    def is_repeated(self) -> bool:
        return self.train_rows > 0


# In the order of training. Rules are chosen on these.
DESIGN = (
    Grid("docstrings", SMOLLM2),
    Grid("quotations", GEMMA, train_rows=480),
    Grid("topics", MINILM_L6),
    Grid("headers", SMOLLM2, train_rows=320),
    Grid("newsgroups", MINILM_L3),
    Grid("changelogs", SMOLLM2),
    Grid("jargon", SMOLLM2, train_rows=480),
    Grid("topics-few", MINILM_L6, train_rows=320),
    Grid("perl_pages", GEMMA),
    Grid("docstrings-few", SMOLLM2, train_rows=640),
    Grid("perl_pages-2", SMOLLM2, blocks=2),
)

# The locked rule is judged on these. No earlier grid has their tasks. In the order of training, so that a prefix is balanced.
JUDGED = (
    Grid("computing_terms", SMOLLM2),
    Grid("german_words", GEMMA),
    Grid("spam", MINILM_L6),
    Grid("verses", SMOLLM2, blocks=2),
    Grid("stress", MINILM_L3),
    Grid("pronunciations", SMOLLM2),
    Grid("english_words", GEMMA),
    Grid("manual_sections", MINILM_L6, train_rows=320),
    Grid("spanish_words", SMOLLM2, blocks=2),
    Grid("elisp", SMOLLM2),
    Grid("tales", GEMMA, train_rows=320),
    Grid("periods", MINILM_L3),
    Grid("hypernyms", SMOLLM2),
    Grid("german_manuals", GEMMA),
    Grid("books", MINILM_L6),
    Grid("octave_pages", SMOLLM2, blocks=2),
    Grid("italian_quotations", SMOLLM2, train_rows=320),
    Grid("emails", SMOLLM2),
    Grid("spanish_quotations", GEMMA),
    Grid("word_languages", MINILM_L3),
    Grid("database_pages", SMOLLM2),
    Grid("handbook", GEMMA, train_rows=640),
    Grid("speeches", SMOLLM2, blocks=2),
    Grid("acronyms", SMOLLM2),
    Grid("french_words", GEMMA),
    Grid("audiences", MINILM_L6, train_rows=480),
    Grid("opinions", SMOLLM2, train_rows=480),
    Grid("german_quotations", SMOLLM2, blocks=2),
    Grid("novels", SMOLLM2),
    Grid("manuals", GEMMA),
    Grid("french_handbook", SMOLLM2, blocks=2),
    Grid("opinion_topics", MINILM_L3, train_rows=320),
)
ALL = {grid.name: grid for grid in (*DESIGN, *JUDGED)}
