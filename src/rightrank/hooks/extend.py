"""`--extend`: the run continues with a larger top while the answer needs it, and with the next learning rate at an edge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import Hook, Hooks
from rightrank.runs.run import complete, open_run
from rightrank.runs.values import Request, Selected
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.errors import ModelError, SettingsError
from rightrank.schema.settings import SelectSettings

MAX_EXTENSIONS = 3


def select_extended(request: Request, folder: RunFolder, hooks: Sequence[Hook]) -> Selected:
    """Load, train, decide and hand over; an unfinished run in `folder` is resumed.

    With the setting `extend`, or a time budget, this is done again with further settings as long as the answer asks for them, and
    memory and budget allow.
    """
    told = Hooks(hooks)
    run = open_run(request, folder, told)
    loaded = None if run.prepared is None else run.prepared.runtime.loaded
    selected = complete(run)
    for _ in range(MAX_EXTENSIONS):
        settings, before = run.settings, selected.cost["trainings"]
        further = extended(settings, selected)
        if further is None:
            break
        try:
            run = open_run(replace(request, settings=further), folder, told, loaded)
        except (ModelError, SettingsError) as error:  # no matrix has that rank, or it fits no memory
            told.notice(f"not extended: {error}")
            break
        if set(run.settings.ranks) == set(settings.ranks) and further.ranks != settings.ranks:
            break  # the next rank does not fit the memory
        why = selected.answers["adapter_sentence"] if selected.decided is None else selected.decided.sentence
        rank = next(iter(sorted(set(further.ranks) - set(settings.ranks))), None)
        rate = next(iter(sorted(set(further.learning_rates) - set(settings.learning_rates))), 0.0)
        what = f"rank {rank}" if rank is not None else f"learning rate {rate:.3g}"
        run.notes = [*run.notes, f"extending: {why} Adding {what}."]
        selected = complete(run)
        if selected.cost["trainings"] == before:
            break  # the budget is spent
    return selected


def extended(settings: SelectSettings, selected: Selected) -> SelectSettings | None:
    """The settings with the rank above, or the learning rate beyond the edge; None where nothing is to be extended."""
    if not (settings.budget_hours is not None if settings.extend is None else settings.extend):
        return None
    answer = selected.answers.get("adapter_answer")
    if answer is not None and AdapterAnswer.model_validate(answer).keeps_the_top:
        return settings.model_copy(update={"ranks": (*settings.ranks, 2 * max(settings.ranks))})
    decision = selected.decided
    if decision is None or not (decision.verdict == "rising" or "lr_edge" in decision.flags):
        return None
    wanted = next((run for run in decision.next_runs if run.action in ("rank", "rates")), None)
    if wanted is None:
        return None
    name = "ranks" if wanted.action == "rank" else "learning_rates"
    both = tuple(sorted({*getattr(settings, name), *getattr(wanted, name)}))
    further = settings.model_copy(update={name: both})
    return None if further == settings else further
