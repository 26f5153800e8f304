"""The types of settings, and the message for a wrong value."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from rightrank.errors import SettingsError, did_you_mean
from rightrank.records.base import MAX_WHOLE
from rightrank.settings.habits import HABITS

AnySettings = TypeVar("AnySettings", bound=BaseModel)
FileFormat: TypeAlias = Literal["kohya", "diffusers"]  # of LoRA files
DtypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]
DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _dtype(name: object) -> object:
    return DTYPE_ALIASES.get(name, name) if isinstance(name, str) else name


ChosenDtype: TypeAlias = Annotated[DtypeName, BeforeValidator(_dtype)]
# auto: bfloat16 on a CUDA device that computes in it, else float32
AutoDtype: TypeAlias = Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_dtype)]

OPTIMIZER_ALIASES = {  # transformers' further names of the two
    "adamw": "adamw_torch",
    "adamw_fused": "adamw_torch",
    "adamw_torch_fused": "adamw_torch",
    "adamw_bnb_8bit": "adamw_8bit",
}


def _optimizer(name: object) -> object:
    return OPTIMIZER_ALIASES.get(name, name) if isinstance(name, str) else name


Optim: TypeAlias = Annotated[Literal["adamw_torch", "adamw_8bit"], BeforeValidator(_optimizer)]

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
MAX_BYTES = MAX_WHOLE
NEAREST_NAMES = 3  # that answer an unknown setting


def parse_bytes(text: str) -> int:
    """`24GiB` as bytes.

    Raises:
        SettingsError: no number, no unit, or an unknown unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): size for name, size in UNITS.items()}
    if match is None or match[2].lower() not in units:
        known = ", ".join(UNITS)
        reason = "has no unit" if match is not None and not match[2] else "is not a size"
        raise SettingsError(f"memory {text!r} {reason}: give a number and one of {known}, such as 24GiB")
    amount = float(match[1]) * units[match[2].lower()]
    if amount > MAX_BYTES:
        raise SettingsError(f"memory {text!r} is too large: give at most {MAX_BYTES // 2**50} PiB")
    size = round(amount)
    if size == 0:
        raise SettingsError(f"memory {text!r} is zero: give a size above 0, such as 24GiB")
    return size


def _bytes(memory: object) -> object:
    return parse_bytes(memory) if isinstance(memory, str) else memory


MemoryBytes: TypeAlias = Annotated[int, BeforeValidator(_bytes), Field(gt=0)]  # a number, or with a unit


def checked(kind: type[AnySettings], values: Mapping[str, object]) -> AnySettings:
    """Settings of a kind from plain values.

    Raises:
        SettingsError: an unknown name (with the nearest known one) or a value that is not allowed.
    """
    unknown = [name for name in values if name not in kind.model_fields]
    if unknown:
        meant = HABITS.get(unknown[0], "")
        near = (
            f" (did you mean {meant!r}?)" if meant in kind.model_fields else did_you_mean(unknown[0], kind.model_fields)
        )
        nearest = ", ".join(get_close_matches(unknown[0], kind.model_fields, n=NEAREST_NAMES, cutoff=0.0))
        raise SettingsError(f"unknown setting {unknown[0]!r}{near or '; the nearest: ' + nearest}")
    try:
        settings = kind.model_validate(dict(values))
    except ValidationError as error:
        raise SettingsError(_first_line(error)) from None
    for name in kind.model_fields:
        _exact(name, getattr(settings, name))
    return settings


def _exact(name: str, value: object) -> None:
    if isinstance(value, list | tuple):
        for inner in value:
            _exact(name, inner)
    if isinstance(value, int) and abs(value) > MAX_WHOLE:
        raise SettingsError(f"{name}: got {_QUOTED.repr(value)}; whole numbers are at most 2**53 ({MAX_WHOLE})")


_QUOTED = reprlib.Repr()
_QUOTED.maxstring = _QUOTED.maxother = 120  # what is longer, or nested, is shortened: never written out whole


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ").partition(", unable to parse")[0]
    if first["type"] == "value_error":
        return message
    where = str(first["loc"][0]) if first["loc"] else "settings"
    return f"{where}: got {_QUOTED.repr(first['input'])}; {message[0].lower()}{message[1:]}"
