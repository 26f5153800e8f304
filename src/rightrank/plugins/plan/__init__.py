"""What fits, before any weight is loaded: the memory of every rank.

skeleton (the model without weights) → step, trace and device (what the real step allocates there) → estimate (every rank
from two traces) → allocator (the peak) → planner (the plan), and selection (the memory and the time of a `select`, which leaves out the ranks that don't fit).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from rightrank.runs.plugins import MemoryPlan, Plugin
from rightrank.schema.table import given_values

if TYPE_CHECKING:
    import click

    from rightrank.models.base_models import LoadedModel
    from rightrank.schema.keywords import PlanKeywords
    from rightrank.schema.plan_settings import PlanSettings
    from rightrank.schema.results import Plan
    from rightrank.schema.settings import SelectSettings
    from rightrank.train.tokens import EncodedData


class PlanPlugin(Plugin):
    name = "plan"

    def commands(self) -> Sequence[click.Command]:
        from rightrank.plugins.plan import commands

        return [commands.plan]

    def functions(self) -> Mapping[str, Callable[..., Any]]:
        return {"plan": plan}

    def memory_plan(
        self,
        loaded: LoadedModel,
        encoded: EncodedData,
        classes: int | None,
        settings: SelectSettings,
        notice: Callable[[str], None],
    ) -> MemoryPlan | None:
        from rightrank.plugins.plan.selection import plan_loaded

        return plan_loaded(loaded, encoded, classes, settings, notice)


PLUGIN = PlanPlugin()


def plan(model: str, *, settings: PlanSettings | None = None, **keywords: Unpack[PlanKeywords]) -> Plan:
    """Predict parameters and memory of every rank, without weights and before any training.

    Args:
        model: a folder that holds at least `config.json`, a GGUF file, or a hub name.
        settings: see `PlanSettings`; None for the defaults. Without `memory_bytes` the budget is the memory of the
            CUDA device, if there is one.
        keywords: the command's options by name, such as `ranks=(8, 16), memory_bytes="24GiB"`; they override `settings`.

    Raises:
        InputError: the model, its modules, a rank or a length can't be used.
    """
    from rightrank.models.places import require_model
    from rightrank.schema.plan_settings import make_plan_settings

    settings = make_plan_settings(given_values(settings) | keywords)
    require_model(model)  # before what brings torch
    from rightrank.models.base_models import device_memory
    from rightrank.plugins.plan.planner import make_plan

    if settings.memory_bytes is None and settings.device == "cuda":
        settings = settings.model_copy(update={"memory_bytes": device_memory()})
    return make_plan(model, settings)
