"""What every record is: frozen, typed, one JSON object."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue

# Of the journal: 2 closes each line with its length and checksum, 3 renames pack_size and selection_fraction.
SCHEMA_VERSION = 3
IDENTITY_VERSION = 1  # of what a trial id is a hash of: a change gives every trial another id

# Whole numbers that a float holds exactly: a larger one in a file is damage, and would break what computes with it.
MAX_WHOLE = 2**53
Whole: TypeAlias = Annotated[int, Field(ge=-MAX_WHOLE, le=MAX_WHOLE)]

MetricName: TypeAlias = str  # `loss`, `accuracy`, or what a metric of the settings is called


SplitName: TypeAlias = Literal["train", "selection", "test"]


class Record(BaseModel):
    """A frozen value; equal when its fields are."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def content_hash(value: JsonValue | dict[str, Any]) -> str:
    """SHA-256 in hex of a JSON value with sorted keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
