"""The base of every record: frozen, typed, one JSON object."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue

SCHEMA_VERSION = 4  # of the journal: no other is read
IDENTITY_VERSION = 1  # of the content that a trial id is a hash of; a change gives every trial a new id

# The integers that a float holds exactly. A larger one in a file is damage.
MAX_WHOLE = 2**53
Whole: TypeAlias = Annotated[int, Field(ge=-MAX_WHOLE, le=MAX_WHOLE)]

MetricName: TypeAlias = str  # `loss`, `accuracy`, or the name of a metric in the settings
SplitName: TypeAlias = Literal["train", "selection", "test"]  # as stored; `split_name` gives the name that is shown


class Record(BaseModel):
    """A frozen value; equal when its fields are."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def split_name(stored: str) -> str:
    """The split's name for readers: the validation split is stored as `selection`."""
    return "validation" if stored == "selection" else stored


def content_hash(value: JsonValue | dict[str, Any]) -> str:
    """SHA-256 in hex of a JSON value, with sorted keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
