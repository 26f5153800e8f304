"""Shortcuts that several test files share."""

from __future__ import annotations

from pathlib import Path

from rightrank.data.splits import load_data
from rightrank.models.base_models import load_model
from rightrank.schema.settings import SelectSettings
from rightrank.train.runtime import Runtime
from rightrank.train.tokens import encode


def make_runtime(model: Path, data: Path, settings: SelectSettings, cache: Path) -> Runtime:
    """What `select_rank` builds before the first trial."""
    splits = load_data(data, settings)
    loaded = load_model(str(model), settings.dtype, settings.device, splits.classes, weight_bits=settings.weight_bits)
    encoded = encode(splits, loaded, settings)
    return Runtime(loaded, encoded, settings, settings.training_steps(len(encoded.splits["train"])), cache)
