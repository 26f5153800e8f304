"""Measure the truncations of an adapter that another program has trained, at once or in a fresh process."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainingArguments

from rightrank.adapters.distributed import get_process_index, is_partitioned, sync_errors
from rightrank.adapters.in_memory import InMemoryAdapter
from rightrank.data.files import read_json_object
from rightrank.decision.records import read_records
from rightrank.hooks.report import Report
from rightrank.interop.truncation_run import (
    RESUME_FILE,
    TrainingSummary,
    TruncationResult,
    begin_run,
    compute_training_id,
    finish_run,
)
from rightrank.models.adapter_folders import BASE_FILE
from rightrank.models.adapter_reader import AdapterFolder, open_adapter
from rightrank.models.base_models import compute_base_identity, read_identity
from rightrank.runs import plugins
from rightrank.runs.folder import RunFolder
from rightrank.runs.hook import Hook
from rightrank.runs.values import Selected
from rightrank.schema.command import build_resume_command
from rightrank.schema.configs import convert_configs
from rightrank.schema.errors import ModelError, RunFolderError, SettingsError, get_first_line
from rightrank.schema.settings import SelectSettings
from rightrank.train.targets import suppress_peft_warnings

log = logging.getLogger("rightrank")


def find_smallest_adapter(
    in_memory_adapter: InMemoryAdapter, out: Path, training: TrainingSummary, measure_here: bool = True
) -> TruncationResult | None:
    """Begin the run and finish it. Return None if a fresh process has to finish it.

    If there are several processes, only the first one writes files and logs warnings.
    """
    level = logging.DEBUG if get_process_index() else logging.WARNING
    with tempfile.TemporaryDirectory(prefix="rightrank-") as scratch_folder:
        with sync_errors():
            folder = begin_run(
                in_memory_adapter, Path(scratch_folder) / "run" if get_process_index() else out, training
            )
        command = build_resume_command(str(out))
        if not measure_here or is_partitioned(in_memory_adapter.model):
            log.log(
                level, "rightrank: the adapter and the held-out rows are saved; to measure truncations: %s", command
            )
            return None
        advice = "" if in_memory_adapter.trainer_loss is not None else f"; to measure again: {command}"
        log.log(level, "rightrank: measuring truncations on %d batches%s", len(in_memory_adapter.held_out), advice)
        result, _ = finish_run(in_memory_adapter, folder, training, load_hooks())
    for note in result.answer.notes:
        log.log(level, "rightrank: %s", note)
    log.log(level, "%s %s", result.answer.sentence, out / "adapter")
    return result


def load_hooks() -> list[Hook]:
    """Return the hooks that report the result, or none in other processes than the first."""
    return [] if get_process_index() else [Report(), *plugins.collect_items(lambda plugin: plugin.hooks())]


def resume_measurement(out: Path, hooks: Sequence[Hook] = ()) -> Selected:
    """Finish a run that `begin_run` began in another process.

    Raises:
        ModelError: the folder is incomplete, or the base model cannot be loaded or differs from the one in training.
        RunFolderError: there is no unfinished run.
    """
    folder = RunFolder.open_existing(out)
    if not (folder.cache / RESUME_FILE).is_file():
        raise RunFolderError(
            f"{out}: there is no cache/{RESUME_FILE}; either the measurement is finished, or the training did not reach its end"
        )
    resume_values = read_json_object(folder.cache / RESUME_FILE)
    # The training's peak memory was measured in another process and cannot be compared.
    training = TrainingSummary(**resume_values["training"] | {"peak_bytes": 0})
    started = read_records(folder.journal.read(), str(out)).started
    adapter = open_adapter(folder.get_trial_folder(compute_training_id(started, training.steps)))
    base = _load_base(started.model_name or "", folder, resume_values, adapter)
    with suppress_peft_warnings():
        model: Any = PeftModel.from_pretrained(base, str(adapter.path))
    splits: dict[str, dict[int, dict[str, torch.Tensor]]] = {"held_out": {}, "train": {}}
    for name, tensor in load_file(folder.cache / "batches.safetensors").items():
        split, number, key = name.split(".", 2)
        splits[split].setdefault(int(number), {})[key] = tensor
    held_out, train = ([batches[number] for number in sorted(batches)] for batches in splits.values())
    in_memory_adapter = InMemoryAdapter(model, held_out, train, **resume_values["in_memory_adapter"])
    _, selected = finish_run(in_memory_adapter, folder, training, [*hooks, *load_hooks()])
    return selected


def _load_base(name: str, folder: RunFolder, resume_values: Mapping[str, Any], adapter: AdapterFolder) -> Any:
    if not name:
        raise ModelError("the base model cannot be loaded, because it has no name: the training created it in memory")
    try:
        config = transformers.AutoConfig.from_pretrained(folder.cache / "base")
        base_class = getattr(transformers, resume_values["base_class"])
        base = base_class.from_pretrained(name, config=config, dtype=getattr(torch, resume_values["dtype"]))
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise ModelError(f"{name}: the base model cannot be loaded ({get_first_line(error)})") from None
    difference = read_identity(adapter.path / BASE_FILE).find_difference(compute_base_identity(base, name))
    if difference is not None:
        raise ModelError(f"{name}: this is not the base model of the training ({difference})")
    return base


def build_settings(margin: float | None, ranks: Sequence[int] | int | None, metric: str | None) -> SelectSettings:
    """Build the settings of a truncation search. None selects the default.

    Raises:
        SettingsError: an invalid value.
    """
    if metric not in (None, "loss", "accuracy"):
        raise SettingsError(f"metric {metric!r}: allowed are loss and accuracy")
    values = {"margin": margin, "ranks": ranks, "metric": metric}
    return SelectSettings(**{name: value for name, value in values.items() if value is not None})


def collect_stated_settings(
    in_memory_adapter: InMemoryAdapter, args: TrainingArguments | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of `select` that the training states, and a note that lists missing ones."""
    lengths = [
        batch["input_ids"].shape[1]
        for batch in (*in_memory_adapter.train, *in_memory_adapter.held_out)
        if "input_ids" in batch
    ]
    extra_kwargs: dict[str, Any] = (
        {"seq_len": max(lengths)} if lengths and not getattr(args, "max_length", None) else {}
    )
    if args is not None:
        extra_kwargs["gradient_accumulation_steps"] = args.gradient_accumulation_steps * args.world_size
    settings, unstated = convert_configs(
        in_memory_adapter.model.peft_config[in_memory_adapter.name], args, **extra_kwargs
    )
    unstated += [] if args is not None else ["the learning rate", "the steps", "the batch size of your loop"]
    return settings, [f"the select command does not include {', '.join(unstated)}"] if unstated else []
