"""The target modules of each arm of a run."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig

from rightrank.engine.targets import Targets, find_targets, lora_config
from rightrank.errors import ModelError
from rightrank.maths.counts import rank_of_equal_parameters
from rightrank.records import Arm
from rightrank.settings import SelectSettings
from rightrank.variants import modules_of, target_sets, variants_of


class ArmTargets:
    """The target modules of each arm of a run: the settings' own set, or a set that the sweep names.

    Raises:
        ModelError: a set that PEFT can't adapt, or one that can't hold as many parameters as the settings' own.
    """

    def __init__(self, model: Any, settings: SelectSettings, classification: bool) -> None:
        self._settings = settings
        self._classification = classification
        self._sets = {
            names: find_targets(model, settings.model_copy(update={"target_modules": names}), classification)
            for names in target_sets(settings)
        }
        self.shared = self._sets[settings.target_modules]
        self._require_equal_ranks()
        self._require_starts()

    @property
    def adapted(self) -> set[str]:
        """The names of all modules that some arm adapts."""
        return {module.name for targets in self._sets.values() for module in targets.modules}

    @property
    def why_alone(self) -> str | None:
        """Why no two adapters of the run share a pass, by their kind; None where kinds allow it."""
        kinds = dict.fromkeys(kind for targets in self._sets.values() for kind in targets.kinds)
        alone = [kind for kind in kinds if kind.why_alone is not None]
        if not alone:
            return None
        return f"{alone[0].label} runs through PEFT's own forward pass, one adapter at a time ({alone[0].why_alone})"

    @property
    def why_not_truncated(self) -> str | None:
        """Why no adapter of the run can be truncated, by their kind; None where all can."""
        return next(
            (f"{kind.label}: {kind.why_not_truncated}" for kind in self.shared.kinds if kind.why_not_truncated), None
        )

    def of(self, arm: Arm) -> Targets:
        return self.shared if arm.target_modules is None else self._sets[arm.target_modules]

    def config(self, arm: Arm) -> LoraConfig:
        """PEFT's configuration of the arm, at the rank that keeps the parameter count where the arm asks for that."""
        targets, rank = self.of(arm), arm.rank
        if arm.equal_parameters:
            rank = rank_of_equal_parameters(rank, self.shared.shapes, targets.shapes)
        held = arm.model_copy(update={"rank": rank})
        return lora_config(
            self._settings, held, self._classification, targets.names, targets.parameters, targets.experts
        )

    def _require_equal_ranks(self) -> None:
        settings = self._settings
        for variant in variants_of(settings):
            if variant.axis != "equal_targets":
                continue
            if settings.divide_rank_by_experts:
                raise ModelError(
                    f"sweep {variant.label} is not possible with divide_rank_by_experts; leave out one of them"
                )
            other = self._sets[modules_of(variant.value)]
            limit = min(module.max_rank for module in other.modules)
            for rank in settings.ranks:
                needed = rank_of_equal_parameters(rank, self.shared.shapes, other.shapes)
                if needed > limit:
                    raise ModelError(
                        f"sweep {variant.label}: as many parameters as rank {rank} has over {'+'.join(settings.target_modules)} "
                        f"take rank {needed} there, and these modules can have {limit}; name more modules, or smaller ranks"
                    )

    def _require_starts(self) -> None:
        """Refuse a sweep over initialisations for a kind that has one of its own."""
        kinds = {kind for targets in self._sets.values() for kind in targets.kinds if kind.why_own_start is not None}
        variant = next((one for one in variants_of(self._settings) if one.axis == "init"), None)
        if kinds and variant is not None:
            kind = kinds.pop()
            raise ModelError(
                f"sweep {variant.label} is not possible with {kind.label}: {kind.why_own_start}; leave it out"
            )
