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
from rightrank.schema.settings import PEFT_OPTIONS, SelectSettings

# Fields of LoraConfig that follow from the ranks, the base model and the data.
DERIVED_FIELDS = {"r", "task_type", "base_model_name_or_path", "peft_type", "peft_version", "auto_mapping", "revision"}
DERIVED_FIELDS |= {"runtime_config", "megatron_core"}
SPECIAL_ARGUMENTS = {
    "warmup_steps", "bf16", "fp16", "use_cpu", "dataset_text_field", "max_steps", "num_train_epochs", "optim",
}  # fmt: skip
IGNORED_PREFIXES = (
    "output_dir", "logging_", "log_", "save_", "eval_", "hub_", "push_to_hub", "run_name", "project", "trackio_", "per_device_eval_",
    "do_", "disable_tqdm", "dataloader_", "load_best_model", "metric_for_best", "greater_is_better", "skip_memory", "remove_unused",
    "dataset_num_proc", "resume_from", "local_rank", "ddp_", "fsdp", "deepspeed", "include_", "prediction_loss",
)  # fmt: skip


def read_configs(peft_config: Any = None, args: Any = None) -> dict[str, Any]:
    """Return the settings in `LoraConfig` and `TrainingArguments` by name. Either argument may be None.

    Raises:
        SettingsError: a value that a selection cannot honour; the message names it.
    """
    settings = {} if peft_config is None else dict(_convert_lora_config(peft_config))
    return settings | ({} if args is None else dict(_convert_training_arguments(args)))


def _convert_lora_config(config: Any) -> Iterator[tuple[str, Any]]:
    if (kind := getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise SettingsError(f"peft_config: its peft_type is {kind!r}; a selection trains only 'LORA'")
    default, options = type(config)(), dict[str, Any]()
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if name in DERIVED_FIELDS or value is None:
            continue
        if name == "use_rslora":
            yield "scaling", "alpha/sqrt(r)" if value else "alpha/r"
        elif name == "init_lora_weights":
            initialization = "default" if value is True else value
            if initialization not in get_args(SelectSettings.model_fields[name].annotation):
                raise _build_refusal("peft_config", name, value)
            yield name, initialization
        elif name == "target_modules" and isinstance(value, str) and value != "all-linear":
            raise _build_refusal("peft_config", name, value, "is a pattern; give a list of names or 'all-linear'")
        elif name in SelectSettings.model_fields:
            yield name, _convert_value(name, value)
        elif value != getattr(default, name):
            if name not in PEFT_OPTIONS:
                raise _build_refusal("peft_config", name, value)
            options[name] = value
    if options:
        yield "peft_options", options


def _convert_training_arguments(args: Any) -> Iterator[tuple[str, Any]]:
    yield from _convert_special_arguments(args)
    for field in dataclasses.fields(args):
        name, value = field.name, getattr(args, field.name)
        setting = find_setting(SelectSettings, name)
        if name in SPECIAL_ARGUMENTS or name.startswith(IGNORED_PREFIXES) or value is None:
            continue
        if setting is not None:
            yield setting, _convert_value(setting, value)
        elif not _is_default(field, value):
            raise _build_refusal("args", name, value)


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    """Return whether an argument has its default value.

    For some empty defaults transformers creates an empty list or a default configuration.
    """
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    is_made = default in (None, "") and (isinstance(value, list | dict) or dataclasses.is_dataclass(value))
    return bool(value == (type(value)() if is_made else default))


def _convert_special_arguments(args: Any) -> Iterator[tuple[str, Any]]:
    """Convert the arguments that have another unit than their setting, or that share a setting."""
    if args.max_steps > 0:
        yield "max_steps", args.max_steps
    else:
        yield "num_train_epochs", args.num_train_epochs
    warmup = args.warmup_steps
    if warmup >= 1 and args.max_steps <= 0:
        raise _build_refusal(
            "args", "warmup_steps", warmup, "needs max_steps: give max_steps too, or a share of the steps below 1"
        )
    yield "warmup_ratio", warmup / args.max_steps if warmup >= 1 else float(warmup)
    if args.optim not in ("adamw_torch", "adamw_torch_fused"):
        raise _build_refusal("args", "optim", args.optim)
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if getattr(args, name):
            yield "dtype", dtype
    if args.use_cpu:
        yield "device", "cpu"
    if getattr(args, "dataset_text_field", "text") != "text":
        yield "columns", [f"text={args.dataset_text_field}"]


def _convert_value(name: str, value: Any) -> Any:
    """Convert a value to the type of the setting: a single value to a list, a set to a sorted list, an enumeration to its text."""
    if isinstance(value, set):
        return sorted(value)
    if is_list_type(SelectSettings.model_fields[name].annotation) and not isinstance(value, list | tuple):
        return [value]
    return getattr(value, "value", value)


def _build_refusal(source: str, name: str, value: Any, reason: str = "") -> SettingsError:
    text = quote_value(getattr(value, "value", value))  # of an enumeration
    if reason:
        return SettingsError(f"{source}: {name} {text} {reason}")
    return SettingsError(f"{source}: a selection does not support {name}={text}; leave it out")
