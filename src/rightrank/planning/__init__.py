"""Predict the memory of every rank before any weight is loaded.

trace (the model without weights, and the allocations of a training step) → estimate (the peak of every rank from two
traces) → planner (the plan, and the ranks of a `select` that fit).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from rightrank.schema.setting_table import get_explicit_values
from rightrank.schema.settings import PlanSettings

if TYPE_CHECKING:
    from rightrank.schema.keywords import PlanKeywords
    from rightrank.schema.results import Plan


def plan(
    model: str | Path,
    *,
    settings: PlanSettings | None = None,
    **keywords: Unpack[PlanKeywords],
) -> Plan:
    """Predict parameters and memory of every rank, without weights and before any training.

    Args:
        model: a folder that holds at least `config.json`, a GGUF file, or a hub name.
        settings: see `PlanSettings`; None for the defaults. Without `memory_bytes` the budget is the memory of the
            CUDA device, if there is one.
        keywords: the command's options by name, such as `ranks=(8, 16), memory_bytes="24GiB"`; they override `settings`.

    Raises:
        InputError: the model, its modules, a rank or a length is not supported.
    """
    from rightrank.bases.model_sources import require_model

    model, settings = str(model), PlanSettings(**get_explicit_values(settings) | keywords)
    require_model(model)  # before the imports that load torch
    from rightrank.bases.base_models import read_device_memory
    from rightrank.planning.planner import plan_config
    from rightrank.planning.trace import read_config

    if settings.memory_bytes is None and settings.device == "cuda":
        settings = settings.model_copy(update={"memory_bytes": read_device_memory()})
    config = read_config(model, settings.trust_remote_code, settings.num_labels is not None)
    return plan_config(config, model, settings)
