"""Export a run: each target is a pure function from a recipe to files, a command that uses them, and notes on missing features.

`write_export` writes them.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from rightrank.adapters.adapter_folders import WEIGHTS_FILE
from rightrank.adapters.loading_code import format_loading_code
from rightrank.adapters.rank_math import (
    SERVER_RANKS,
    SERVING_COSTS,
    compute_slot_bytes,
    find_server_rank,
    format_rank,
    format_rank_change,
    format_rate_warning,
)
from rightrank.bases.safetensors_files import read_header
from rightrank.data.files import replace_folder
from rightrank.data.rows import parse_split_name
from rightrank.exports.recipe import Recipe
from rightrank.report.format import format_bytes
from rightrank.schema.errors import ResultsError, SettingsError, suggest_name
from rightrank.schema.settings import TRAINER_FIELDS

PATTERNS = ("rank_pattern", "alpha_pattern")
LAYER_SELECTORS = (
    "layers_to_transform",
    "exclude_modules",
    "layers_pattern",
)  # replaced by the full names of the modules
BASE_LOADING_SETTINGS = ("load_in_4bit", "load_in_8bit", "trust_remote_code")
SERVERS = ("vllm", "sglang")  # They require the same rank and scale in all modules.
ADAPTER_TARGETS = ("peft", *SERVERS)  # targets that use the adapter; the others train a new one
SERVED_FOLDER = "adapter"
MERGED = "merged"  # a model without an adapter, written by `exports.merge`
MAX_PARENT_FOLDERS = 4  # parents of an adapter: the trials folder, the run, and two above the run
LOOPBACK = "127.0.0.1"  # vLLM listens on every interface by default, other servers only on this one
SERVED_NAME = "rightrank"
# A trainer's names for settings without default values. It lacks settings that are not listed here.
TRL_NAMES = {name: f"lora_{name}" for name in ("modules_to_save", "use_dora", "target_parameters")}
TRL_NAMES |= {name: name for name in ("use_dora", "load_in_4bit", "load_in_8bit")}
AXOLOTL_NAMES = {"layers_to_transform": "peft_layers_to_transform"}
AXOLOTL_NAMES |= {name: f"lora_{name}" for name in ("modules_to_save", *PATTERNS)}
AXOLOTL_NAMES |= {name: f"peft_{name}" for name in ("use_dora", "init_lora_weights")}
AXOLOTL_NAMES |= {"target_parameters": "lora_target_parameters", **{name: name for name in BASE_LOADING_SETTINGS}}
STRING_COLUMNS_NOTE = "the file expects `prompt`, `chosen` and `rejected` to be text"
PREFERENCE_COLUMNS = ("prompt", "chosen", "rejected")
# Entries of the data set by the shape of its rows if a trainer supports it, else by their form.
AXOLOTL_DATA: dict[str, dict[str, Any]] = {
    "alpaca": {"type": "alpaca"},
    "sharegpt": {
        "type": "chat_template",
        "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
    },
    "messages": {"type": "chat_template", "field_messages": "messages"},
    "preference": {"split": "train", "type": {f"field_{column}": column for column in PREFERENCE_COLUMNS}},
    "text": {"type": "completion", "field": "text"},
}
LLAMAFACTORY_DATA: dict[str, dict[str, Any]] = {
    "alpaca": {"columns": {"prompt": "instruction", "query": "input", "response": "output"}},
    "sharegpt": {"formatting": "sharegpt", "columns": {"messages": "conversations"}},
    "messages": {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {f"{role}_tag": role for role in ("role", "content", "user", "assistant", "system")},
    },
    "preference": {"ranking": True, "columns": {column: column for column in PREFERENCE_COLUMNS}},
    "text": {"columns": {"prompt": "text"}},
}


@dataclass(frozen=True, slots=True)
class TargetFiles:
    """The files of a target by name, the command that uses them, and notes on what the target cannot express."""

    files: dict[str, str]
    command: str
    notes: list[str] = field(default_factory=list)
    with_adapter: bool = False  # whether the adapter's files are copied too


@dataclass(frozen=True, slots=True)
class ExportResult:
    """The written files, the command to run inside the folder, and notes on what the target cannot express."""

    target: str
    folder: Path
    files: list[str]
    command: str
    notes: list[str]
    check: dict[str, Any] | None = None  # for a merged model, the comparison with the adapter
    address: str | None = None  # of the hub repository that it was pushed to


def require_target(name: str) -> None:
    """Raise if an export target is unknown, before anything is read.

    Raises:
        SettingsError: an unknown target; the message suggests the nearest one.
    """
    target_names = [*TARGETS, MERGED]
    if name not in target_names:
        raise SettingsError(
            f"unknown export target {name!r}{suggest_name(name, target_names)}; allowed: {', '.join(target_names)}"
        )


def write_export(name: str, recipe: Recipe, folder: Path) -> ExportResult:
    """Write a target's files into `folder`, which is replaced.

    Raises:
        ResultsError: a rank that the server does not support.
    """
    if name != "peft":  # This folder may be published, so it contains no local paths.
        model, data = (resolve_path(name, recipe.adapter) for name in (recipe.model, recipe.data))
        recipe = replace(recipe, model=model, data=data)
    if name in SERVERS and recipe.has_patterns:
        recipe = replace(recipe, served_folder=folder.resolve() / SERVED_FOLDER)
    recipe_to_export = (
        recipe
        if name in ADAPTER_TARGETS
        else replace(recipe.build_training_recipe(), data=_find_train_file(recipe.data))
    )
    target_files, comments = TARGETS[name](recipe_to_export), recipe.format_rebuild_comments()
    with replace_folder(folder) as temporary:
        if target_files.with_adapter:
            for path in sorted(path for path in recipe.adapter.iterdir() if path.is_file()):
                shutil.copy2(path, temporary / path.name)
        if recipe.served_folder is not None:
            _write_served_adapter(recipe.adapter, temporary / SERVED_FOLDER)
        for file, text in target_files.files.items():
            (temporary / file).write_text(_add_comments(file, text, comments), encoding="utf-8")
    files = sorted(path.name for path in folder.iterdir())
    held_out_note = f"the run held out {recipe.num_held_out:,} rows of {recipe.data}; this file trains on them too"
    held_out_notes = [held_out_note] if recipe.num_held_out and name not in ADAPTER_TARGETS else []
    rate_notes = [format_rate_warning(recipe_to_export.r, recipe_to_export.lora_alpha, recipe_to_export.learning_rate)]
    if name not in ADAPTER_TARGETS:
        rate_notes.append(
            f"for another rank: {format_rank_change(recipe_to_export.r, 4 * recipe_to_export.r, recipe_to_export.lora_alpha, recipe_to_export.settings.scaling)}"
        )
    return ExportResult(
        name,
        folder,
        files,
        target_files.command,
        [*target_files.notes, *held_out_notes, *comments, *filter(None, rate_notes)],
    )


def _write_served_adapter(adapter: Path, out: Path) -> None:
    """Write the adapter with the same rank and scale for all modules."""
    from rightrank.adapters.adapter_reader import open_adapter
    from rightrank.adapters.resizing import write_uniform_adapter  # imports torch, which other exports do not need

    write_uniform_adapter(open_adapter(adapter), out)


def resolve_path(name: str, adapter: Path) -> str:
    """Return the absolute path of a file or folder. Names on the hub are returned unchanged.

    A relative path is looked up in the current folder, and then in the folders that contain the run, because the selection may have run there.
    """
    path = Path(name).expanduser()
    candidates = [path, *(folder / path for folder in list(adapter.resolve().parents)[:MAX_PARENT_FOLDERS])]
    return next((str(candidate.resolve()) for candidate in candidates if candidate.exists()), name)


def _find_train_file(data: str) -> str:
    """Return the file of the train split if `data` is a folder of files, else `data`."""
    files = [path for path in sorted(Path(data).iterdir()) if path.is_file()] if Path(data).is_dir() else []
    return next((str(path) for path in files if parse_split_name(path.stem) == "train"), data)


def _add_comments(file: str, text: str, comments: Sequence[str]) -> str:
    """Add comments at the beginning of a file's text, below a `#!` line. JSON has no comments and is returned unchanged."""
    if file.endswith(".json") or not comments:
        return text
    lines = "".join(f"# {' '.join(comment.splitlines())}\n" for comment in comments)  # A name may contain a line break.
    first, newline, remainder = text.partition("\n")
    return f"{first}{newline}{lines}{remainder}" if first.startswith("#!") else lines + text


def _build_peft_files(recipe: Recipe) -> TargetFiles:
    """Return the adapter folder, and the `LoraConfig` that creates such an adapter."""
    arguments: dict[str, Any] = {"task_type": recipe.task_type, **_build_lora_settings(recipe, "r")}
    arguments |= {"use_rslora": recipe.use_rslora, "target_modules": list(recipe.target_modules)}
    extra_arguments = {
        name: _to_plain(value) for name, value in recipe.non_default.items() if name not in BASE_LOADING_SETTINGS
    }
    arguments |= extra_arguments
    lines = "".join(f"    {name}={value!r},\n" for name, value in arguments.items())
    code = f"from peft import LoraConfig\n\nlora_config = LoraConfig(\n{lines})\n{_format_arguments(recipe)}"
    command = f'python -c "{"; ".join(format_loading_code(".", recipe.model, recipe.task_type == "SEQ_CLS"))}"'
    notes = _describe_missing_features(recipe, "LoraConfig", [*extra_arguments])
    return TargetFiles({"lora_config.py": code}, command, notes, with_adapter=True)


def _build_trl_files(recipe: Recipe) -> TargetFiles:
    """Return a config for TRL's command line: `trl sft --config trl_sft.yaml`, or `trl dpo` for preference pairs."""
    job = "dpo" if recipe.form == "preference" else "sft"
    values: dict[str, Any] = {
        "model_name_or_path": recipe.model,
        "datasets": [{"path": _get_loader_name(recipe.data), "data_files": recipe.data}],
        "output_dir": "trl-output",
        "use_peft": True,
        **_build_lora_settings(recipe, "lora_r"),
        "use_rslora": recipe.use_rslora,
        "lora_target_modules": recipe.explicit_targets,
        "lora_task_type": recipe.task_type,
        "dtype": recipe.settings.dtype,
        "max_length": recipe.settings.seq_len,
        "gradient_checkpointing": recipe.settings.gradient_checkpointing,
        **_build_training_arguments(recipe),
    }
    values |= _translate_settings(recipe, TRL_NAMES)
    values |= {"prompt_completion": {"completion_only_loss": True}, "messages": {"assistant_only_loss": True}}.get(
        recipe.form, {}
    )
    if recipe.form == "preference":
        values |= {"beta": recipe.settings.beta, "loss_type": ["sigmoid"]}
    notes = _describe_missing_features(recipe, "TRL's command line", (*LAYER_SELECTORS, *TRL_NAMES), reader="TRL")
    if recipe.form == "messages":
        notes.append("TRL: assistant_only_loss needs a chat template with `{% generation %}`, or one that TRL knows")
    return TargetFiles({f"trl_{job}.yaml": _dump_yaml(values)}, f"trl {job} --config trl_{job}.yaml", notes)


def _build_axolotl_files(recipe: Recipe) -> TargetFiles:
    """Return a config for axolotl: `axolotl train axolotl.yaml`."""
    prompt_entry = {
        "type": {
            "field_instruction": recipe.columns.get("prompt", "prompt"),
            "field_output": recipe.columns.get("completion", "completion"),
            "format": "{instruction}",
            "no_input_format": "{instruction}",
        }
    }
    values: dict[str, Any] = {
        "base_model": recipe.model,
        "datasets": [
            {
                "path": recipe.data,
                "ds_type": _get_loader_name(recipe.data),
                **_select_data_entry(recipe, AXOLOTL_DATA, prompt_entry),
            }
        ],
        "output_dir": "axolotl-output",
        "adapter": "qlora" if recipe.settings.load_in_4bit else "lora",
        **_build_lora_settings(recipe, "lora_r"),
        "lora_target_modules": recipe.explicit_targets if recipe.exclude_modules else list(recipe.target_modules),
        "peft_use_rslora": recipe.use_rslora,
        "sequence_len": recipe.settings.seq_len,
        "optimizer": "adamw_torch",
        "train_on_inputs": recipe.form == "text",
        "gradient_checkpointing": recipe.settings.gradient_checkpointing,
        **_build_training_arguments(recipe, batch_size="micro_batch_size", scheduler="lr_scheduler"),
    }
    are_alphas_integers = all(float(alpha).is_integer() for alpha in recipe.alpha_pattern.values())
    names = {name: word for name, word in AXOLOTL_NAMES.items() if are_alphas_integers or name != "alpha_pattern"}
    notes = _describe_missing_features(recipe, "axolotl", (*LAYER_SELECTORS, *names)) + _describe_fractional_alpha(
        recipe, "axolotl"
    )
    values |= _translate_settings(recipe, names)
    if "lora_alpha_pattern" in values:
        values["lora_alpha_pattern"] = {name: int(alpha) for name, alpha in recipe.alpha_pattern.items()}
    if recipe.exclude_modules:  # The module names already select the layers.
        values.pop("peft_layers_to_transform", None)
    if recipe.form == "preference":
        values |= {"rl": "dpo", "rl_beta": recipe.settings.beta}
        notes.append(
            f"axolotl: {STRING_COLUMNS_NOTE}; for messages, set the type of the data set to `chat_template.default`"
        )
    return TargetFiles({"axolotl.yaml": _dump_yaml(values)}, "axolotl train axolotl.yaml", notes)


def _build_llamafactory_files(recipe: Recipe) -> TargetFiles:
    """Return a config for LLaMA-Factory with an entry for the data set: `llamafactory-cli train llamafactory.yaml`."""
    values = {
        "model_name_or_path": recipe.model,
        "stage": {"text": "pt", "preference": "dpo"}.get(recipe.form, "sft"),
        "do_train": True,
        "finetuning_type": "lora",
        **_build_lora_settings(recipe, "lora_rank"),
        "use_rslora": recipe.use_rslora,
        "lora_target": ",".join(recipe.explicit_targets),
        "dataset": "rightrank_data",
        "dataset_dir": ".",
        "template": "empty" if recipe.form != "messages" else "default",
        "cutoff_len": recipe.settings.seq_len,
        "output_dir": "llamafactory-output",
        **_build_training_arguments(recipe),
    }
    values |= {"additional_target": ",".join(recipe.modules_to_save)} if recipe.modules_to_save else {}
    values |= _translate_settings(recipe, {"use_dora": "use_dora"})
    values |= {"quantization_bit": recipe.settings.weight_bits} if recipe.settings.weight_bits else {}
    values |= _translate_settings(recipe, {"trust_remote_code": "trust_remote_code"})
    supported_names = [
        *LAYER_SELECTORS,
        "modules_to_save",
        "use_dora",
        *BASE_LOADING_SETTINGS,
    ]
    notes = _describe_missing_features(recipe, "LLaMA-Factory", supported_names)
    notes += _describe_fractional_alpha(recipe, "LLaMA-Factory")
    if recipe.form == "preference":
        values |= {"pref_beta": recipe.settings.beta, "pref_loss": "sigmoid"}
        notes.append(
            f"LLaMA-Factory: {STRING_COLUMNS_NOTE}; for messages, set `formatting` to `sharegpt`, with one message an answer"
        )
    if recipe.form == "messages":
        notes.append("replace the template `default` with the name of your model's template in LLaMA-Factory")
    names = {"prompt": "prompt", "response": "completion"}
    prompt_entry = {"columns": {theirs: recipe.columns.get(ours, ours) for theirs, ours in names.items()}}
    entry = {
        "rightrank_data": {"file_name": recipe.data, **_select_data_entry(recipe, LLAMAFACTORY_DATA, prompt_entry)}
    }
    info = json.dumps(entry, indent=2, ensure_ascii=False) + "\n"
    files = {"llamafactory.yaml": _dump_yaml(values), "dataset_info.json": info}
    return TargetFiles(files, "llamafactory-cli train llamafactory.yaml", notes)


def _build_unsloth_files(recipe: Recipe) -> TargetFiles:
    """Return a code snippet for Unsloth."""
    layers = list(recipe.layers_to_transform) if recipe.layers_to_transform is not None else None
    module_suffixes = {name.rsplit(".", 1)[-1] for name in recipe.target_modules}  # Unsloth only matches these.
    dtype = "None" if recipe.settings.dtype == "float32" else f"torch.{recipe.settings.dtype}"
    supported_names = (
        "layers_to_transform",
        "modules_to_save",
        *BASE_LOADING_SETTINGS,
        "init_lora_weights",
    )
    code = f"""import torch
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name={recipe.model!r},
    max_seq_length={recipe.settings.seq_len},
    dtype={dtype},
    load_in_4bit={recipe.settings.load_in_4bit},
    load_in_8bit={recipe.settings.load_in_8bit},
    trust_remote_code={recipe.settings.trust_remote_code},
)
model = FastLanguageModel.get_peft_model(
    model,
    r={recipe.r},
    lora_alpha={recipe.alpha!r},
    lora_dropout={recipe.lora_dropout!r},
    target_modules={sorted(module_suffixes)!r},
    layers_to_transform={layers!r},
    modules_to_save={list(recipe.modules_to_save) or None!r},
    init_lora_weights={recipe.init_lora_weights!r},
    use_rslora={recipe.use_rslora},
    random_state={recipe.seed},
)
{_format_arguments(recipe)}"""
    notes = _describe_missing_features(recipe, "this snippet", supported_names, reader="your trainer")
    return TargetFiles({"unsloth_lora.py": code}, "python unsloth_lora.py", notes)


def _build_vllm_files(recipe: Recipe) -> TargetFiles:
    """Return a script that runs `vllm serve` with the adapter. vLLM rounds the rank up to one that it supports."""
    shapes, ranks = _read_served_shapes(recipe)
    rank = max(ranks)
    if rank > SERVER_RANKS[-1]:
        raise ResultsError(
            f"vLLM supports ranks up to {SERVER_RANKS[-1]}, and this adapter has {rank}: resize it, or merge it into the base"
        )
    max_lora_rank = find_server_rank(rank)
    slot_note = (
        f"a slot takes {format_bytes(compute_slot_bytes(shapes, max_lora_rank))} at --max-lora-rank {max_lora_rank} (16 bits), whatever the rank of the adapter in it: this one "
        f"fills {recipe.r / max_lora_rank:.0%}, and the largest rank of all adapters of the server counts"
    )
    arguments = ["vllm", "serve", recipe.model, "--host", LOOPBACK, "--enable-lora"]
    arguments += ["--max-lora-rank", str(max_lora_rank), "--lora-modules", _format_served_adapter(recipe)]
    return _build_server_files("vllm", arguments, [slot_note, SERVING_COSTS, *_describe_serving_limits(recipe, ranks)])


def _build_sglang_files(recipe: Recipe) -> TargetFiles:
    """Return a script that runs SGLang's server with the adapter. Its default address is the local machine."""
    _, ranks = _read_served_shapes(recipe)
    arguments = ["python", "-m", "sglang.launch_server", "--model-path", recipe.model, "--enable-lora"]
    arguments += ["--max-lora-rank", str(max(ranks)), "--lora-paths", _format_served_adapter(recipe)]
    return _build_server_files("sglang", arguments, [SERVING_COSTS, *_describe_serving_limits(recipe, ranks)])


def _build_server_files(server: str, arguments: Sequence[str], notes: list[str]) -> TargetFiles:
    return TargetFiles({f"{server}.sh": f"#!/bin/sh\nexec {shlex.join(arguments)}\n"}, f"sh {server}.sh", notes)


def _format_served_adapter(recipe: Recipe) -> str:
    return f"{SERVED_NAME}={recipe.served_folder or recipe.adapter.resolve()}"


def _read_served_shapes(recipe: Recipe) -> tuple[list[tuple[int, int]], list[int]]:
    """Return `(rows and columns, ranks)` of the adapted matrices from the file's header, without loading torch."""
    header = read_header(recipe.adapter / WEIGHTS_FILE)[0]
    factors = {name: shape for name, shape in header.items() if ".lora_" in name and len(shape) == 2}
    sides = [(factors[name.replace("lora_A", "lora_B")], a) for name, a in factors.items() if "lora_A" in name]
    return [(b[0], a[1]) for b, a in sides], [recipe.r, *recipe.rank_pattern.values()]


TARGETS: dict[str, Callable[[Recipe], TargetFiles]] = {
    "peft": _build_peft_files,
    "trl": _build_trl_files,
    "axolotl": _build_axolotl_files,
    "llamafactory": _build_llamafactory_files,
    "unsloth": _build_unsloth_files,
    "vllm": _build_vllm_files,
    "sglang": _build_sglang_files,
}


def _build_lora_settings(recipe: Recipe, rank: str) -> dict[str, Any]:
    """Return the settings that every trainer has. Only the name of the rank differs."""
    return {rank: recipe.r, "lora_alpha": recipe.alpha, "lora_dropout": recipe.lora_dropout}


def _translate_settings(recipe: Recipe, translations: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings without default values, in a trainer's names."""
    return {
        word: _to_plain(recipe.non_default[name]) for name, word in translations.items() if name in recipe.non_default
    }


def _get_loader_name(path: str) -> str:
    """Return the name of the `datasets` loader for a file."""
    ending = path.rsplit(".", 1)[-1].lower()
    return {"csv": "csv", "tsv": "csv", "parquet": "parquet"}.get(ending, "json")


def _dump_yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)


def _select_data_entry(
    recipe: Recipe, entries: Mapping[str, dict[str, Any]], prompt_entry: dict[str, Any]
) -> dict[str, Any]:
    """Return the entry that describes the data to a trainer; `prompt_entry` is used for prompts and completions."""
    if recipe.shape is not None and recipe.shape in entries:
        return entries[recipe.shape]
    return prompt_entry if recipe.form == "prompt_completion" else entries.get(recipe.form, entries["text"])


def _to_plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value


def _describe_fractional_alpha(recipe: Recipe, program: str) -> list[str]:
    note = f"{program} requires an integer lora_alpha, but this adapter has {recipe.alpha}; train with TRL or PEFT"
    return [] if isinstance(recipe.alpha, int) else [note]


def _format_arguments(recipe: Recipe) -> str:
    """Format the training as keywords of transformers' `TrainingArguments`, in Python."""
    lines = "".join(f"    {name}={value!r},\n" for name, value in _build_training_arguments(recipe).items())
    extra_lines = f"max_length = {recipe.settings.seq_len}\n"
    extra_lines += f"beta = {recipe.settings.beta!r}\n" if recipe.form == "preference" else ""
    return f"training_arguments = dict(\n{lines})\n{extra_lines}"


def _build_training_arguments(
    recipe: Recipe, batch_size: str = "per_device_train_batch_size", scheduler: str = "lr_scheduler_type"
) -> dict[str, Any]:
    """Return the training's arguments in the names of transformers' TrainingArguments, except for two."""
    settings, translations = recipe.settings, {"lr_scheduler_type": scheduler, "warmup_ratio": "warmup_steps"}
    trainer_settings = settings.model_dump(include=TRAINER_FIELDS) | {"warmup_ratio": recipe.warmup_steps}
    return {
        "learning_rate": recipe.learning_rate,
        "max_steps": recipe.max_steps,
        batch_size: settings.batch_size,
        **{translations.get(name, name): value for name, value in trainer_settings.items()},
        "bf16": settings.dtype == "bfloat16",
        "fp16": settings.dtype == "float16",
        "seed": recipe.seed,
    }


def _describe_missing_features(
    recipe: Recipe, program: str, supported_names: Sequence[str] = (), reader: str = ""
) -> list[str]:
    """Return notes on features that the target lacks: a classification head, and non-default settings not in `supported_names`.

    If `reader` only supports the columns of a form, a note explains how to convert other columns.
    """
    missing_names = [name for name in recipe.non_default if name not in supported_names]
    consequences = {
        "; training one needs a custom script": ["classification head"] * (recipe.form == "classification"),
        "; the file has one rank for all modules": [name for name in missing_names if name in PATTERNS],
        ": give it when you load the base": [name for name in missing_names if name in BASE_LOADING_SETTINGS],
        ", so it trains another adapter than the run did": [
            name for name in missing_names if name not in (*PATTERNS, *BASE_LOADING_SETTINGS)
        ],
    }
    notes = [
        f"{program} has no {' and no '.join(names)}{consequence}"
        for consequence, names in consequences.items()
        if names
    ]
    columns = (
        f"reads the columns of the form {recipe.form}; convert those of {recipe.data} as select did ({recipe.shape})"
    )
    return [*notes, f"{reader} {columns}"] if reader and recipe.shape is not None else notes


def _describe_serving_limits(recipe: Recipe, ranks: Sequence[int]) -> list[str]:
    """Return notes on what servers cannot load, and on how the adapter was changed for them."""
    notes = []
    if recipe.served_folder is not None:
        text = format_rank(recipe.r, min(ranks), max(ranks))
        notes.append(
            f"the adapter has rank {text}, and servers require the same rank and scale in all modules: {SERVED_FOLDER}/ contains the same function "
            f"at rank {max(ranks)}, padded with zeros"
        )
    if recipe.modules_to_save:
        notes.append(
            f"servers do not load modules_to_save ({', '.join(recipe.modules_to_save)}): merge the adapter instead"
        )
    if recipe.non_plain_options:
        notes.append(
            f"servers load plain LoRA; this adapter has {' and '.join(recipe.non_plain_options)}: merge it instead"
        )
    if recipe.task_type != "CAUSAL_LM":
        notes.append(f"servers load adapters of causal language models; the task of this one is {recipe.task_type}")
    return notes
