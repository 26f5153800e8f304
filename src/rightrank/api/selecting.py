"""Select a rank: `select_rank`, and its preflight."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, get_args

from rightrank.bases.model_sources import require_model
from rightrank.cluster.workers import open_pool
from rightrank.data.rows import require_data_source
from rightrank.runs.hooks import Hook, Hooks
from rightrank.runs.selection import Rows, Selected, SelectionRequest
from rightrank.schema.errors import InterruptedRun, MissingExtraError, SettingsError, quote_value
from rightrank.schema.events import Notice
from rightrank.schema.keywords import SelectKeywords
from rightrank.schema.results import Preflight
from rightrank.schema.setting_table import find_setting, get_explicit_values, is_list_type, require_no_secret
from rightrank.schema.settings import PEFT_OPTIONS, SelectSettings
from rightrank.search.protocol import build_space
from rightrank.search.strategies import make_strategy

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

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


def select_rank(
    model: str | PreTrainedModel,
    data: str | Path | Rows | Mapping[str, Rows],
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: SelectSettings | None = None,
    callbacks: Sequence[Hook] = (),
    progress: bool = False,
    peft_config: LoraConfig | None = None,
    args: TrainingArguments | None = None,
    **keywords: Unpack[SelectKeywords],
) -> Selected:
    """Train a range of ranks on `data`, decide which is enough, and export its adapter.

    Args:
        model: a model folder, a GGUF file, a hub name, or a transformers model in memory. A model in memory is frozen
            and moved to the device; its weights stay as they are.
        data: a file, a folder, an in-memory `datasets` object, an iterable of mappings, or a mapping of splits.
        out: the run folder. A second call with the same arguments resumes an unfinished run.
        tokenizer: the tokenizer of a model in memory.
        settings: see `SelectSettings`; None for the defaults.
        callbacks: hooks that watch the selection and can stop it; see `rightrank.runs.hooks.Hook`.
        progress: show the progress on stderr.
        peft_config: the configuration of your current adapter. Its values override `settings`. The ranks replace `r`; values that
            a selection can't honour are refused by name.
        args: the arguments of your current training, of transformers or TRL (`SFTConfig`); used like `peft_config`.
        keywords: the command's options by name, such as `ranks=(4, 16, 64), margin=0.01`; they override all others.

    Raises:
        InputError: model, data, settings or folder can't be used; nothing was started.
        RunError: the selection started and could not finish.
        InterruptedRun: `should_stop` of a callback returned True.
        KeyboardInterrupt: Ctrl-C; the step ended and checkpoints were written. The same call resumes.
    """
    from rightrank.data.files import report_disk_errors
    from rightrank.runs.folder import RunFolder
    from rightrank.runs.hooks import SignalHandler, make_view
    from rightrank.runs.trackers import Trackers

    request = SelectionRequest(model, tokenizer, data, _merge_settings(settings, keywords, peft_config, args))
    _validate_request(request)
    trackers, folder = Trackers(request.settings.report_to), RunFolder(Path(out))
    with folder.lock(), report_disk_errors(folder.path), ExitStack() as stack:
        views = [stack.enter_context(make_view(quiet=False))] if progress else []
        tell = Hooks([*views, *callbacks]).send_notice
        stop = stack.enter_context(SignalHandler(tell))
        tell(f"run folder {out}: loading model and data")
        # These imports bring torch. They follow the lock, so that an unusable folder is refused at once.
        from rightrank.runs.hooks import Report
        from rightrank.runs.preflight import PreflightHook
        from rightrank.runs.prepare import prepare_run
        from rightrank.runs.run import select

        hooks = [*views, stop, PreflightHook(), trackers, Report(), *callbacks]
        open_workers = open_pool if request.settings.has_workers else None
        try:
            prepare = partial(prepare_run, request, open_workers=open_workers, announce=Hooks(hooks).send_notice)
            return select(prepare, folder, hooks)
        except InterruptedRun as interruption:
            if not stop.requested:
                raise
            raise KeyboardInterrupt(f"{interruption}; the same call resumes the run") from None


def preflight(
    model: str | PreTrainedModel,
    data: str | Path | Rows | Mapping[str, Rows],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: SelectSettings | None = None,
    peft_config: LoraConfig | None = None,
    args: TrainingArguments | None = None,
    on_event: Callable[[Notice], None] = lambda _: None,
    **keywords: Unpack[SelectKeywords],
) -> Preflight:
    """Report what `select_rank` with the same arguments will do, cost and be able to show. Train and write nothing.

    Args:
        model: as in `select_rank`, like all other arguments.
        on_event: receives what is being done, before each step that takes long.

    Raises:
        InputError: model, data or settings can't be used.
    """
    from rightrank.runs.trackers import resolve_trackers

    request = SelectionRequest(model, tokenizer, data, _merge_settings(settings, keywords, peft_config, args))
    _validate_request(request)  # before the imports that bring torch
    resolve_trackers(request.settings.report_to)

    def announce(text: str) -> None:
        on_event(Notice(text=text))

    announce("loading model and data")
    from rightrank.runs.preflight import run_preflight
    from rightrank.runs.prepare import prepare_selection

    with tempfile.TemporaryDirectory(prefix="rightrank-") as folder:
        prepared = prepare_selection(request, Path(folder) / "cache", announce)
        estimate = run_preflight(prepared, announce)
    return estimate.model_copy(update={"notes": [*prepared.notes, *estimate.notes]})


def _validate_request(request: SelectionRequest) -> None:
    """Refuse a request with which a selection can't work. It needs no torch.

    Raises:
        SettingsError: an unknown strategy, one that can't work within its budget, or workers
            that can't read a model or data in memory.
        MissingExtraError: the package that starts workers is not installed.
        DataError: a data file that is missing or of a type that is not supported.
        ModelError: a model folder that is missing or holds no model, a name that the hub does not have.
    """
    settings = request.settings
    try:
        require_no_secret("model", request.model_name)
        require_no_secret("data", request.data_name)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    make_strategy(settings.strategy, build_space(settings, settings.max_steps or 1))
    for source in (request.data, settings.validation or None):
        if isinstance(source, str | Path):
            require_data_source(Path(source))
    if isinstance(request.model, str):
        require_model(request.model)
    for label, value in (("model", request.model), ("data", request.data)):
        if settings.has_workers and not isinstance(value, str | Path):
            raise SettingsError(
                f"workers: the {label} is in memory, which workers can't read; give a path or a name, or leave workers out"
            )
    extra, package = ("workers", "loky") if settings.ray is None else ("ray", "ray")
    if settings.has_workers and find_spec(package) is None:
        raise MissingExtraError(f"{extra} needs the package {package}: pip install 'rightrank[{extra}]'")


def _merge_settings(
    settings: SelectSettings | None,
    keywords: SelectKeywords,
    peft_config: LoraConfig | None,
    args: TrainingArguments | None,
) -> SelectSettings:
    return SelectSettings(**get_explicit_values(settings) | read_configs(peft_config, args) | dict(keywords))


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
