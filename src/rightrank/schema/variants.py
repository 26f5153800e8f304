"""The axes of a sweep: alpha, scaling rule, initialisation and target modules.

All ranks are compared at one setting of these. `--sweep alpha=16,64` then also trains the chosen rank and the reference
at each alpha, each at its own best learning rate, because alpha and the learning rate act nearly as one hyperparameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from rightrank.schema.errors import SettingsError, did_you_mean
from rightrank.schema.settings import CONSTANT_SCALING_RANK, Scaling, SelectSettings
from rightrank.schema.trials import Arm

# The best rate goes as rank to this power at scale alpha/r with alpha fixed: the medians of our and of public grids; with alpha = r
# (arXiv 2602.04998: 12 rates, 3 seeds).
RATE_EXPONENTS, TIED_EXPONENT = (0.03, 0.23), -0.41
LARGE_RANK, LARGE_RATE = 256, 2e-4


def lora_scale(scaling: Scaling, lora_alpha: float, rank: int) -> float:
    """The scale s that multiplies B·A.

    `alpha/r` is LoRA (Hu et al. 2021), `alpha/sqrt(r)` is rsLoRA (Kalajdzievski 2023), and `constant` is alpha/16 at every
    rank.
    """
    if scaling == "alpha/r":
        return lora_alpha / rank
    if scaling == "alpha/sqrt(r)":
        return lora_alpha / math.sqrt(rank)
    return lora_alpha / CONSTANT_SCALING_RANK


def peft_scaling(scaling: Scaling, lora_alpha: float, rank: int) -> tuple[float, bool]:
    """`(lora_alpha, use_rslora)` of the PEFT config whose scale is `lora_scale(...)`."""
    if scaling == "alpha/sqrt(r)":
        return lora_alpha, True
    return lora_scale(scaling, lora_alpha, rank) * rank, False


def rank_change_line(rank: int, to: int, alpha: float = 32) -> str:
    """What becomes of alpha and the learning rate when the rank changes; the figures are of `benchmarks/atlas/rates.json`."""
    ratio = to / rank
    ours, public, tied = ratio ** RATE_EXPONENTS[0], ratio ** RATE_EXPONENTS[1], ratio**TIED_EXPONENT
    return (
        f"from rank {rank} to {to}: keep alpha at {alpha:g} and the learning rate (scale alpha/r: the best rate moves by "
        f"×{ours:.2f} in our grids, ×{public:.2f} in public ones); with alpha = r multiply it by {tied:.2f}"
    )


def rate_warning(rank: int = LARGE_RANK, alpha: float = 2 * LARGE_RANK, rate: float = LARGE_RATE) -> str:
    """A warning where a combination is known to diverge; empty elsewhere."""
    if rank < LARGE_RANK or alpha < 2 * rank or rate < LARGE_RATE:
        return ""
    return f"rank {LARGE_RANK} at {LARGE_RATE:g} with alpha = 2r diverged in a public trace: take alpha 32, or a lower rate"


AXES = ("alpha", "scaling", "init", "targets", "equal_targets")
TARGET_AXES = ("targets", "equal_targets")  # at the same rank; at the same number of parameters
FROM_WEIGHTS = ("pissa", "olora")  # initialised from the base's weights; stored at twice the rank (engine.inits)
INITS = ("default", "gaussian", *FROM_WEIGHTS, "eva")
_CHANGES_BASE = "it changes the base's weights by gradients or covariances that all trainings of a run would need"
NOT_OFFERED = {  # PEFT's other initialisations, and why they are not supported
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
    """The variants that `settings.sweep` lists, without the values that the settings already have.

    Raises:
        SettingsError: an entry is not AXIS=VALUE,…, names an unknown axis, or has a value that its axis does not allow.
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
    """Refuse settings under which the frozen half of an adapter would change."""
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
    """The largest stored rank of an arm of `rank`, over the settings and the sweep."""
    inits = [variant.value for variant in variants_of(settings) if variant.axis == "init"]
    return max(stored_rank(init, rank) for init in (settings.init_lora_weights, *inits))


def target_sets(settings: SelectSettings) -> tuple[tuple[str, ...], ...]:
    """The sets of target modules of a run: the settings' set first, then those of the sweep."""
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
