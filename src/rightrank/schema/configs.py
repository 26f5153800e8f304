"""Convert PEFT's `LoraConfig` and the `TrainingArguments` of transformers or TRL to settings.

The values are those of the training that the two describe. The ranks of the selection replace `r`. A value that a selection
cannot honour is refused by its name. Arguments that only control logging, saving and evaluation are ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

from rightrank.schema.errors import SettingsError, quote_value
from rightrank.schema.setting_table import find_setting, is_list_type
from rightrank.schema.settings import PEFT_CHECKED_FIELDS, PEFT_OPTIONS, PEFT_REPLACED_FIELDS, SelectSettings

REPLACED_FIELDS = PEFT_REPLACED_FIELDS | {"r"}  # replaced by the ranks
CHECKED_FIELDS = (*PEFT_CHECKED_FIELDS, "peft_type", "inference_mode")  # compared with the run
SPECIAL_ARGUMENTS = {
    "warmup_steps",
    "bf16",
    "fp16",
    "use_cpu",
    "dataset_text_field",
    "max_steps",
    "num_train_epochs",
    "optim",
}
IGNORED_PREFIXES = (  # prefixes of ignored arguments
    *(
        "output_dir",
        "logging_",
        "log_",
        "save_",
        "eval_",
        "hub_",
        "push_to_hub",
        "run_name",
        "project",
        "trackio_",
        "per_device_eval_",
    ),
    *("do_", "disable_tqdm", "dataloader_", "load_best_model", "metric_for_best", "greater_is_better", "skip_memory"),
    *(
        "remove_unused",
        "dataset_num_proc",
        "resume_from",
        "local_rank",
        "ddp_",
        "fsdp",
        "deepspeed",
        "include_",
        "prediction_loss",
    ),
)


def read_configs(peft_config: Any = None, args: Any = None) -> dict[str, Any]:
    """Return the settings in `LoraConfig` and `TrainingArguments`, and the fields that the run must agree with, by name.

    Either argument may be None.

    Raises:
        SettingsError: a value that a selection cannot honour; the message names it.
    """
    settings, refusals = _separate_refusals(peft_config, args)
    if refusals:
        raise SettingsError(refusals[0].message)
    checked_fields = {name: getattr(peft_config, name) for name in CHECKED_FIELDS} if peft_config is not None else {}
    return settings | {
        name: getattr(value, "value", value) for name, value in checked_fields.items() if value is not None
    }


def convert_configs(peft_config: Any, args: Any = None, **overrides: Any) -> tuple[dict[str, Any], list[str]]:
    """Convert both configurations to settings for JSON, and list the values that no setting supports.

    Settings in `overrides` replace those of the configurations.
    """
    settings, refusals = _separate_refusals(peft_config, args)
    values, unsupported = settings | overrides, [refusal.value for refusal in refusals]
    for name, value in list(values.items()):
        try:
            SelectSettings(**{name: value})
        except SettingsError:
            unsupported.append(f"{name}={quote_value(values.pop(name))}")
    return SelectSettings(**values).model_dump(mode="json", include={*values}), unsupported


def _separate_refusals(peft_config: Any, args: Any) -> tuple[dict[str, Any], list[_Refusal]]:
    statements = [] if peft_config is None else [*_convert_lora_config(peft_config)]
    statements += [] if args is None else [*_convert_training_arguments(args)]
    settings = dict(statement for statement in statements if not isinstance(statement, _Refusal))
    return settings, [statement for statement in statements if isinstance(statement, _Refusal)]


@dataclasses.dataclass(frozen=True, slots=True)
class _Refusal:
    """A value that a selection cannot honour."""

    value: str  # such as `optim='sgd'`
    message: str


def _convert_lora_config(config: Any) -> Iterator[tuple[str, Any] | _Refusal]:
    default = type(config)()
    for name, value in _iterate_fields(config):
        changed = value != getattr(default, name)
        if name in REPLACED_FIELDS or value is None:
            continue
        if name == "use_rslora":
            yield "scaling", "alpha/sqrt(r)" if value else "alpha/r"
        elif name == "init_lora_weights":
            initialization = "default" if value is True else value
            is_supported = initialization in get_args(SelectSettings.model_fields[name].annotation)
            yield (name, initialization) if is_supported else _build_refusal("peft_config", name, value)
        elif name == "target_modules" and isinstance(value, str) and value != "all-linear":
            yield _build_refusal("peft_config", name, value, "is a pattern; give a list of names or 'all-linear'")
        elif name in SelectSettings.model_fields:
            yield name, _convert_value(name, value)
        elif changed and name in PEFT_OPTIONS:
            yield name, value
        elif changed:
            yield _build_refusal("peft_config", name, value)


def _convert_training_arguments(args: Any) -> Iterator[tuple[str, Any] | _Refusal]:
    yield from _convert_special_arguments(args)
    for field in dataclasses.fields(args):
        name, value = field.name, getattr(args, field.name)
        setting = find_setting(SelectSettings, name)
        if name in SPECIAL_ARGUMENTS or name.startswith(IGNORED_PREFIXES) or value is None:
            continue
        if setting is not None:
            yield setting, _convert_value(setting, value)
        elif not _is_default(field, value):
            yield _build_refusal("args", name, value)


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    """Return whether an argument has its default value.

    For some empty defaults transformers creates an empty list or a default configuration.
    """
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    is_made = default in (None, "") and (isinstance(value, list | dict) or dataclasses.is_dataclass(value))
    return bool(value == (type(value)() if is_made else default))


def _convert_special_arguments(args: Any) -> Iterator[tuple[str, Any] | _Refusal]:
    """Convert the arguments that have another unit than their setting, or that share a setting."""
    if args.max_steps > 0:
        yield "max_steps", args.max_steps
    else:
        yield "num_train_epochs", args.num_train_epochs
    warmup = args.warmup_steps
    if warmup >= 1 and args.max_steps <= 0:
        yield _build_refusal(
            "args", "warmup_steps", warmup, "needs max_steps: give max_steps too, or a share of the steps below 1"
        )
    else:
        yield "warmup_ratio", warmup / args.max_steps if warmup >= 1 else float(warmup)
    if args.optim not in ("adamw_torch", "adamw_torch_fused"):
        yield _build_refusal("args", "optim", args.optim)
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if getattr(args, name):
            yield "dtype", dtype
    if args.use_cpu:
        yield "device", "cpu"
    if getattr(args, "dataset_text_field", "text") != "text":
        yield "columns", [f"text={args.dataset_text_field}"]


def _iterate_fields(config: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        yield field.name, getattr(config, field.name)


def _convert_value(name: str, value: Any) -> Any:
    """Convert a value to the type of the setting: a single value to a list, a set to a sorted list, an enumeration to its text."""
    if isinstance(value, set):
        return sorted(value)
    if is_list_type(SelectSettings.model_fields[name].annotation) and not isinstance(value, list | tuple):
        return [value]
    return getattr(value, "value", value)


def _build_refusal(source: str, name: str, value: Any, reason: str = "") -> _Refusal:
    value = getattr(value, "value", value)  # of an enumeration
    text = (
        f"{name} {quote_value(value)} {reason}"
        if reason
        else f"a selection does not support {name}={quote_value(value)}; leave it out"
    )
    return _Refusal(f"{name}={quote_value(value)}", f"{source}: {text}")
