"""The hand-over: the chosen trial's adapter with its card and figures, and the decision in the journal."""

from __future__ import annotations

from pathlib import Path

from rightrank.decision.run import best_trial
from rightrank.exports.adapter_folder import hand_over
from rightrank.records import Decision, DecisionRecorded
from rightrank.report.figures import figures_of
from rightrank.report.files import write_figures
from rightrank.selection.loop import Selection
from rightrank.views import further_figures


def hand_over_trained(selection: Selection, decision: Decision) -> None:
    """Write the adapter of the chosen trial, its card, the report and the figures; drop the working files."""
    records, folder = selection.records, selection.folder
    chosen = best_trial(records, decision, decision.fallback_rank)
    write_figures(folder.figures, figures_of(records, decision))
    saved = folder.finished_adapter(chosen.trial_id)
    hand_over(saved, folder.adapter, records.started, chosen, decision, records.tests, folder.figures)
    folder.journal.append(DecisionRecorded(decision=decision, adapter_trial_id=chosen.trial_id))
    selection.write_views(decision)
    write_figures(folder.figures, further_figures(records, folder.adapter))
    folder.drop_working_files()


def hand_over_saved(selection: Selection, decision: Decision) -> Path | None:
    """Hand over what a custom trainer saved for the chosen trial, and write the report and the figures.

    Returns:
        The adapter's folder; None if the trainer saved nothing.
    """
    records, folder = selection.records, selection.folder
    chosen = best_trial(records, decision, decision.fallback_rank)
    saved = folder.trial_adapter(chosen.trial_id)
    adapter = folder.adapter if any(path.is_file() for path in saved.iterdir()) else None
    write_figures(folder.figures, figures_of(records, decision))
    if adapter is not None:
        hand_over(saved, adapter, records.started, chosen, decision, [], folder.figures)
    folder.journal.append(DecisionRecorded(decision=decision, adapter_trial_id=chosen.trial_id))
    selection.write_views(decision)
    return adapter
