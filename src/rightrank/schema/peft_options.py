"""Fields of PEFT's LoraConfig that have no setting of their own: passed on as they are, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rightrank.schema.errors import SettingsError

PEFT_OPTIONS = (
    "lora_bias",
    "layers_pattern",
    "use_qalora",
    "qalora_group_size",
    "ensure_weight_tying",
    "fan_in_fan_out",
)
_CHANGES_BASE = "it changes the base, which all trainings of a run share"
REFUSED = {
    "kasa_config": _CHANGES_BASE,
    "layer_replication": _CHANGES_BASE,
    "loftq_config": _CHANGES_BASE,
    "alora_invocation_tokens": "PEFT adds positions to every call of the model",
    "trainable_token_indices": "it trains rows of the embedding, which have no rank",
    "arrow_config": "it routes between finished adapters",
    "velora_config": "its projection, taken from the first batch, is no part of a checkpoint, so that a resumed training differs",
    "monteclora_config": "it adds a term to the loss",
    "use_bdlora": "it is for servers that split layers over devices",
}


def gathered_options(values: Mapping[str, object]) -> dict[str, object]:
    """The values, with those that are fields of LoraConfig alone under `peft_options`.

    Raises:
        SettingsError: a field that a selection does not support, with the reason.
    """
    inner = _parsed(values.get("peft_options") or {})
    if not isinstance(inner, Mapping):
        raise SettingsError(f"peft_options: got {inner!r}; give a mapping of {', '.join(PEFT_OPTIONS)}")
    flat = {name: value for name, value in values.items() if name in PEFT_OPTIONS or name in REFUSED}
    options = {**inner, **flat}
    for name in options:
        if name in REFUSED:
            raise SettingsError(f"{name} is not supported: {REFUSED[name]}; leave it out")
        if name not in PEFT_OPTIONS:
            raise SettingsError(f"peft_options: {name!r} is not among {', '.join(PEFT_OPTIONS)}")
    others = {name: value for name, value in values.items() if name not in flat and name != "peft_options"}
    return {**others, "peft_options": {name: _parsed(value) for name, value in options.items()}} if options else others


def _parsed(value: object) -> object:
    """A value from the command line as JSON where it is that: `true`, `16`."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
