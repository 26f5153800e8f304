"""What others found before any training: an atlas of public sweeps of ranks, and how often each rank was enough in them.

rows (a sweep, and which rank was enough in it) → estimate (what is known of a training before it, and the share of sweeps in which each
rank was enough) → view (the command, its picture, the lines of a selection, a run's own row). A start of a search, never a bound:
nothing here narrows what a selection tries or enters its evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rightrank.plugins.atlas import view
from rightrank.plugins.atlas.estimate import Expectation, Question, ask, expectation, kind_of
from rightrank.runs.plugins import Plugin


def expect(
    model: str | None = None,
    data: str | Path | None = None,
    *,
    task: str | None = None,
    parameters: float | None = None,
    rows: int | None = None,
    tokens: float | None = None,
    metric: str | None = None,
    ranks: Sequence[int] | None = None,
    margin: float | None = None,
) -> Expectation:
    """What public sweeps found for models and data like these, before any training. No network.

    Args:
        model: a name or a folder, for the size of the base.
        data: a `.jsonl` or `.csv` file, for rows, tokens and the task family.
        task: the family, such as `language` or `classification`; an unknown one is not used.
        parameters: of the base.
        rows: of training data.
        tokens: trained on.
        metric: `loss`, `accuracy` or another.
        ranks: of the answer; None for powers of two to 256.
        margin: in nats, as a share of answers, or as a share of another metric; None for the default of each sweep's metric.

    Raises:
        SettingsError: a number or rank that can't be, or data that can't be read.
    """
    question, notes = ask(model, data, Question(task, parameters, rows, tokens, kind_of(metric), margin))
    found = expectation(question, ranks)
    return replace(found, notes=(*notes, *found.notes))


def atlas_row(run: str | Path) -> dict[str, Any]:
    """A run as a row of the atlas that a user may contribute: no data, no names of files; see `docs/how-to/atlas.md`.

    Raises:
        RunFolderError: the folder has no journal that can be read.
    """
    from rightrank.decision.run import records_of
    from rightrank.runs.folder import RunFolder

    folder = RunFolder.existing(run)
    return view.atlas_row(records_of(folder.journal.read(), str(folder.path)))


PLUGIN = Plugin(
    name="atlas",
    commands=[view.expect],
    functions={"expect": expect, "atlas_row": atlas_row},
    outlook=view.outlook,
)
