"""The results of a sweep over alpha, scaling rule, initialisation or target modules."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rightrank.schema.decision import SweepRow
from rightrank.schema.errors import SettingsError
from rightrank.schema.events import RunStarted
from rightrank.schema.settings import SelectSettings, stored_settings
from rightrank.schema.trials import Arm, TrialFinished, TrialOutcome
from rightrank.schema.variants import Variant, variants_of


def sweep_rows(started: RunStarted, outcomes: Sequence[TrialOutcome]) -> list[SweepRow]:
    """A row for each variant and rank. Empty without a sweep, or if none of its trials finished."""
    try:
        settings = stored_settings(started.settings)
        variants = variants_of(settings)
    except SettingsError:
        return []  # a run of another version's settings
    trials = [o for o in outcomes if isinstance(o, TrialFinished) and o.rank > 0 and o.arm.is_direct]
    plain = [trial for trial in trials if trial.is_plain(settings.lora_alpha)]
    rows: list[SweepRow] = []
    for variant in variants:
        swept = [trial for trial in trials if _is_of(trial.arm, variant, settings)]
        for rank in sorted({trial.rank for trial in swept}):
            found, shared = _best(swept, rank, started), _best(plain, rank, started)
            if found is not None and shared is not None:
                sign = 1 if started.higher_is_better else -1
                rows.append(
                    SweepRow(
                        setting=variant.label,
                        rank=rank,
                        learning_rate=found[0],
                        value=found[1],
                        gain=sign * (found[1] - shared[1]),
                        parameters=_parameters(swept, rank),
                        shared_parameters=_parameters(plain, rank),
                    )
                )
    return rows


def _parameters(trials: Sequence[TrialFinished], rank: int) -> int:
    return next(trial.trainable_parameters for trial in trials if trial.rank == rank)


def _is_of(arm: Arm, variant: Variant, settings: SelectSettings) -> bool:
    plain = {
        "lora_alpha": settings.lora_alpha,
        "init_lora_weights": None,
        "target_modules": None,
        "equal_parameters": None,
    }
    shared = arm.model_copy(update=plain)
    return variant.of(shared, settings.scaling) == arm and arm != shared


def _best(trials: Sequence[TrialFinished], rank: int, started: RunStarted) -> tuple[float, float] | None:
    """(learning rate, value) of the rank's best learning rate."""
    tried = sorted({trial.learning_rate for trial in trials if trial.rank == rank})
    means = [(lr, fmean(t.value for t in trials if (t.rank, t.learning_rate) == (rank, lr))) for lr in tried]
    pick = max if started.higher_is_better else min
    return pick(means, key=lambda pair: pair[1], default=None)
