"""The trials of a run as an Optuna study (extra `optuna`), for its dashboard and its plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rightrank.decision.run import Records
from rightrank.errors import MissingExtraError, ResultsError
from rightrank.exports.targets import Exported
from rightrank.io.files import replacing_folder
from rightrank.records import Decision, TrialCollapsed, TrialFinished, TrialOutcome

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

TARGET = "optuna"
FILE = "study.db"


def write_study(records: Records, decision: Decision | None, folder: Path) -> Exported:
    """Write `study.db` into `folder`, which is replaced. An unfinished run has a study too.

    Raises:
        MissingExtraError: optuna is not installed.
        ResultsError: no training has ended.
    """
    trained = [outcome for outcome in records.outcomes if outcome.rank > 0]
    if not trained:
        raise ResultsError("no training has ended yet; a study needs at least one")
    try:
        import optuna
    except ImportError:
        raise MissingExtraError("an Optuna study needs an extra: pip install 'rightrank[optuna]'") from None
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with replacing_folder(folder) as temporary:
        storage = optuna.storages.RDBStorage(f"sqlite:///{temporary.resolve() / FILE}")
        study = optuna.create_study(
            storage=storage,
            study_name="rightrank",
            direction="maximize" if records.started.higher_is_better else "minimize",
        )
        for name, value in _study_attributes(records, decision).items():
            study.set_user_attr(name, value)
        study.add_trials([_frozen(outcome, trained, records.started.metric) for outcome in trained])
        storage.remove_session()  # the file is moved next
        storage.engine.dispose()
    optuna.logging.set_verbosity(before)
    notes = ["trainings that were stopped early and truncated adapters have the state pruned"]
    return Exported(TARGET, folder, [FILE], f"optuna-dashboard sqlite:///{FILE}", notes)


def _study_attributes(records: Records, decision: Decision | None) -> dict[str, Any]:
    base = next((trial for trial in records.finished() if trial.rank == 0), None)
    attributes: dict[str, Any] = {
        "metric": records.started.metric,
        "model": records.started.settings.get("model"),
        "data": records.started.settings.get("data"),
    }
    if base is not None:
        attributes["base"] = base.metrics
    if decision is not None:
        attributes |= {
            "rank": decision.rank,
            "verdict": decision.verdict,
            "margin": decision.margin,
            "answer": decision.sentence,
        }
    return attributes


def _frozen(outcome: TrialOutcome, trained: list[TrialOutcome], metric: str) -> FrozenTrial:
    """One trial: complete, pruned if it was stopped early or truncated, failed without a result."""
    from optuna.trial import TrialState, create_trial

    arm = outcome.arm
    attributes: dict[str, Any] = {
        "trial_id": outcome.trial_id,
        "lora_alpha": arm.lora_alpha,
        "stage": arm.stage() or "whole",
    }
    points: Mapping[int, float] = {}
    state, value = TrialState.FAIL, None
    if isinstance(outcome, TrialFinished):
        whole = arm.is_direct and metric in outcome.metrics
        state = TrialState.COMPLETE if whole else TrialState.PRUNED
        value = outcome.metrics[metric] if whole else None
        points = {point.step: point.value for point in outcome.points}
        attributes |= {"metrics": outcome.metrics, "train_seconds": outcome.train_seconds}
    else:
        attributes["reason"] = outcome.reason
        if isinstance(outcome, TrialCollapsed):
            points = {point.step: point.value for point in outcome.points}
    return create_trial(
        state=state,
        value=value,
        params={"rank": arm.rank, "learning_rate": arm.learning_rate, "seed": arm.seed},
        distributions=_distributions(trained),
        user_attrs=attributes,
        intermediate_values=dict(points),
    )


def _distributions(trained: list[TrialOutcome]) -> dict[str, Any]:
    from optuna.distributions import FloatDistribution, IntDistribution

    ranks = [outcome.rank for outcome in trained]
    learning_rates = [outcome.learning_rate for outcome in trained]
    seeds = [outcome.seed for outcome in trained]
    return {
        "rank": IntDistribution(min(ranks), max(ranks), log=True),
        "learning_rate": FloatDistribution(min(learning_rates), max(learning_rates), log=min(learning_rates) > 0),
        "seed": IntDistribution(0, max(seeds)),
    }
