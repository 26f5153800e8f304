"""Alpha, scaling rule, initialisation and target modules as axes: held equal while ranks are compared, then varied at the ranks that matter.

`--sweep alpha=16,64` trains the chosen rank and the reference at each alpha too, each at its own best rate, since alpha and
the rate are largely one knob. The answer still rests on the setting that all ranks shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import get_args

from rightrank.errors import SettingsError, did_you_mean
from rightrank.maths.scaling import lora_scale
from rightrank.records import Arm, RunStarted, SweepRow, TrialFinished, TrialOutcome
from rightrank.settings import Scaling, SelectSettings, make_settings

AXES = ("alpha", "scaling", "init", "targets", "equal_targets")
TARGET_AXES = ("targets", "equal_targets")  # at the ranks given; at as many parameters
FROM_WEIGHTS = ("pissa", "olora")  # the adapter carries what they take out of the base, at twice the rank
INITS = ("default", "gaussian", *FROM_WEIGHTS, "eva")
_CHANGES_BASE = "it changes the base's weights by gradients or covariances that all trainings of a run would need"
NOT_OFFERED = {  # PEFT's other initialisations, and why they are no axis here
    "loftq": "it is for a quantised base",
    "corda": _CHANGES_BASE,
    "lora_ga": _CHANGES_BASE,
    "orthogonal": "its rows can't be shared between ranks",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One value of one axis, everything else as the settings say."""

    axis: str
    value: str

    @property
    def label(self) -> str:
        return f"{self.axis}={self.value}"

    def of(self, arm: Arm, scaling: Scaling) -> Arm:
        """`arm` with this value. A scaling rule becomes the alpha that gives its scale under `scaling`."""
        if self.axis in TARGET_AXES:
            equal = self.axis == "equal_targets" or None
            return arm.model_copy(update={"target_modules": modules_of(self.value), "equal_parameters": equal})
        if self.axis == "init":
            return arm.model_copy(update={"init_lora_weights": self.value})
        if self.axis == "alpha":
            return arm.model_copy(update={"lora_alpha": float(self.value)})
        rule = next(rule for rule in get_args(Scaling) if rule == self.value)
        factor = lora_scale(rule, arm.lora_alpha, arm.rank) / lora_scale(scaling, arm.lora_alpha, arm.rank)
        return arm.model_copy(update={"lora_alpha": arm.lora_alpha * factor})


def variants_of(settings: SelectSettings) -> tuple[Variant, ...]:
    """What `settings.sweep` asks for, the settings' own values left out.

    Raises:
        SettingsError: not AXIS=VALUE,…; an unknown axis; or a value that the axis can't have.
    """
    own = {
        "alpha": f"{settings.lora_alpha:g}",
        "scaling": settings.scaling,
        "init": settings.init_lora_weights,
        **{axis: "+".join(sorted(settings.target_modules)) for axis in TARGET_AXES},
    }
    found: list[Variant] = []
    for text in settings.sweep:
        axis, equals, values = text.partition("=")
        if not equals or not values.strip():
            raise SettingsError(f"sweep {text!r}: give AXIS=VALUE,VALUE such as alpha=16,32; axes: {', '.join(AXES)}")
        if axis not in AXES:
            raise SettingsError(
                f"sweep over {axis!r} is not possible{did_you_mean(axis, AXES)}; axes: {', '.join(AXES)}"
            )
        for value in (part.strip() for part in values.split(",")):
            variant = Variant(axis, _checked(axis, value))
            _require_plain_training(variant, settings)
            if variant.value != own[axis] and variant not in found:
                found.append(variant)
    return tuple(found)


def _require_plain_training(variant: Variant, settings: SelectSettings) -> None:
    """What the frozen half of an adapter can't bear.

    Raises:
        SettingsError: dropout, weight decay or a quantised base with an initialisation from the weights.
    """
    if variant.axis != "init" or variant.value not in FROM_WEIGHTS:
        return
    obstacles = {
        f"lora_dropout {settings.lora_dropout:g}": settings.lora_dropout > 0,
        f"weight_decay {settings.weight_decay:g}": settings.weight_decay > 0,
        "a base in 4 or 8 bits": settings.load_in_4bit or settings.load_in_8bit,
    }
    for name, is_there in obstacles.items():
        if is_there:
            raise SettingsError(
                f"sweep {variant.label} is not possible with {name}: the adapter carries a frozen copy of what it takes out "
                f"of the base; leave out one of them"
            )


def stored_rank(init: str, rank: int) -> int:
    """The rank of the adapter that holds an arm of `rank`."""
    return 2 * rank if init in FROM_WEIGHTS else rank


def widest_rank(settings: SelectSettings, rank: int) -> int:
    """The largest rank of an adapter that an arm of `rank` may have, over the settings and the sweep."""
    inits = [variant.value for variant in variants_of(settings) if variant.axis == "init"]
    return max(stored_rank(init, rank) for init in (settings.init_lora_weights, *inits))


def target_sets(settings: SelectSettings) -> tuple[tuple[str, ...], ...]:
    """The sets of modules that arms of the run may adapt: the settings' own first, then those of the sweep."""
    swept = [modules_of(variant.value) for variant in variants_of(settings) if variant.axis in TARGET_AXES]
    return (settings.target_modules, *dict.fromkeys(swept))


def modules_of(value: str) -> tuple[str, ...]:
    return tuple(value.split("+"))


def _checked(axis: str, value: str) -> str:
    if axis in TARGET_AXES:
        names = sorted({name.strip() for name in value.split("+")})
        if not all(names):
            raise SettingsError(f"sweep {axis}={value}: give names joined by +, such as q_proj+v_proj, or all-linear")
        return "+".join(names)
    allowed: Sequence[str] = INITS if axis == "init" else get_args(Scaling)
    if axis == "alpha":
        try:
            alpha = float(value)
        except ValueError:
            alpha = 0.0
        if not 0 < alpha < float("inf"):
            raise SettingsError(f"sweep alpha={value}: alphas are numbers above 0, such as 16")
        return f"{alpha:g}"
    if axis == "init" and value in NOT_OFFERED:
        raise SettingsError(f"sweep init={value}: {NOT_OFFERED[value]}; allowed: {', '.join(allowed)}")
    if value not in allowed:
        raise SettingsError(f"sweep {axis}={value}{did_you_mean(value, allowed)}; allowed: {', '.join(allowed)}")
    return value


def sweep_rows(started: RunStarted, outcomes: Sequence[TrialOutcome]) -> list[SweepRow]:
    """Empty where nothing was swept or nothing of it finished."""
    known = {name: value for name, value in started.settings.items() if name in SelectSettings.model_fields}
    try:
        settings = make_settings(known)
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
    own = {
        "lora_alpha": settings.lora_alpha,
        "init_lora_weights": None,
        "target_modules": None,
        "equal_parameters": None,
    }
    shared = arm.model_copy(update=own)
    return variant.of(shared, settings.scaling) == arm and arm != shared


def _best(trials: Sequence[TrialFinished], rank: int, started: RunStarted) -> tuple[float, float] | None:
    """(rate, value) of the rank's best rate."""
    rates = {trial.learning_rate for trial in trials if trial.rank == rank}
    means = [
        (rate, fmean(t.value for t in trials if (t.rank, t.learning_rate) == (rank, rate))) for rate in sorted(rates)
    ]
    pick = max if started.higher_is_better else min
    return pick(means, key=lambda pair: pair[1], default=None)
