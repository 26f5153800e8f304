"""The export of a run: a target is a pure function from a recipe to files, the command that uses them, and notes on what it
lacks; `write_export` writes them."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from rightrank.data.files import replace_folder
from rightrank.data.rows import parse_split_name
from rightrank.interop.recipe import Recipe
from rightrank.models.adapter_folders import WEIGHTS_FILE
from rightrank.models.loading_code import format_loading_code
from rightrank.models.ranks import (
    SERVER_RANKS,
    SERVING_COSTS,
    compute_slot_bytes,
    find_server_rank,
    format_rank,
    format_rank_change,
    format_rate_warning,
)
from rightrank.models.safetensors_files import read_header
from rightrank.report.format import format_bytes
from rightrank.schema.errors import ResultsError, SettingsError, suggest_name
from rightrank.schema.settings import TRAINER_FIELDS

PATTERNS = ("rank_pattern", "alpha_pattern")
LAYER_SELECTORS = ("layers_to_transform", "exclude_modules", "layers_pattern")  # said by the full names of the modules
BASE_LOADING_SETTINGS = ("load_in_4bit", "load_in_8bit", "trust_remote_code")
SERVERS = ("vllm", "sglang")  # they load an adapter of one rank and one scale
ADAPTER_TARGETS = ("peft", *SERVERS)  # targets for the adapter itself; the others train
SERVED_FOLDER = "adapter"
MERGED = "merged"  # a model without an adapter: `interop.merge`
MAX_PARENT_FOLDERS = 4  # folders around an adapter: trials, the run, and two around the run
LOOPBACK = "127.0.0.1"  # vLLM's default is every interface; the others default to this one
SERVED_NAME = "rightrank"
# A trainer's words for what is not as by default; for what is not here it has none.
TRL_NAMES = {name: f"lora_{name}" for name in ("modules_to_save", "use_dora", "target_parameters")}
TRL_NAMES |= {name: name for name in ("use_dora", "load_in_4bit", "load_in_8bit")}
AXOLOTL_NAMES = {"layers_to_transform": "peft_layers_to_transform"}
AXOLOTL_NAMES |= {name: f"lora_{name}" for name in ("modules_to_save", *PATTERNS)}
AXOLOTL_NAMES |= {name: f"peft_{name}" for name in ("use_dora", "init_lora_weights")}
AXOLOTL_NAMES |= {"target_parameters": "lora_target_parameters", **{name: name for name in BASE_LOADING_SETTINGS}}
STRING_COLUMNS_NOTE = "the file is for a `prompt`, `chosen` and `rejected` of text"
PREFERENCE_COLUMNS = ("prompt", "chosen", "rejected")
# The entry of the data set by the shape of its rows, where a trainer knows it, else by their form.
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
    """The files of a target by name, the command that uses them, and what the target cannot express."""

    files: dict[str, str]
    command: str
    notes: list[str] = field(default_factory=list)
    with_adapter: bool = False  # copy the files of the adapter too


@dataclass(frozen=True, slots=True)
class ExportResult:
    """The written files, the command that uses them from inside the folder, and what the target cannot express."""

    target: str
    folder: Path
    files: list[str]
    command: str
    notes: list[str]
    check: dict[str, Any] | None = None  # of a merged model: the comparison with the adapter
    address: str | None = None  # of a repository of the hub that it was pushed to


def require_target(name: str) -> None:
    """Refuse an unknown target, before anything is read.

    Raises:
        SettingsError: such a target, with the nearest known one.
    """
    target_names = [*TARGETS, MERGED]
    if name not in target_names:
        raise SettingsError(
            f"export target {name!r} is not known{suggest_name(name, target_names)}; allowed: {', '.join(target_names)}"
        )


def write_export(name: str, recipe: Recipe, folder: Path) -> ExportResult:
    """Write a target's files into `folder`, which is replaced.

    Raises:
        ResultsError: a rank that the server does not serve.
    """
    if name != "peft":  # its folder may be published, and needs neither the model nor the data
        model, data = (resolve_path(name, recipe.adapter) for name in (recipe.model, recipe.data))
        recipe = replace(recipe, model=model, data=data)
    if name in SERVERS and recipe.has_patterns:
        recipe = replace(recipe, served=folder.resolve() / SERVED_FOLDER)
    recipe_to_export = (
        recipe if name in ADAPTER_TARGETS else replace(recipe.training(), data=_find_train_file(recipe.data))
    )
    target_files, comments = TARGETS[name](recipe_to_export), recipe.comments()
    with replace_folder(folder) as temporary:
        if target_files.with_adapter:
            for path in sorted(path for path in recipe.adapter.iterdir() if path.is_file()):
                shutil.copy2(path, temporary / path.name)
        if recipe.served is not None:
            _write_served_adapter(recipe.adapter, temporary / SERVED_FOLDER)
        for file, text in target_files.files.items():
            (temporary / file).write_text(_add_comments(file, text, comments), encoding="utf-8")
    files = sorted(path.name for path in folder.iterdir())
    held_out_note = f"the run held out {recipe.held_out:,} rows of {recipe.data}; this file trains on them too"
    held_out_notes = [held_out_note] if recipe.held_out and name not in ADAPTER_TARGETS else []
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
    """Write the adapter with one rank and one scale for all modules."""
    from rightrank.adapters.resize import write_uniform_adapter  # these bring torch, which other exports do not need
    from rightrank.models.adapter_reader import open_adapter

    write_uniform_adapter(open_adapter(adapter), out)


def resolve_path(name: str, adapter: Path) -> str:
    """The absolute path of a file or folder; a name on the hub as it is.

    A relative path starts at the current folder, or else at one around the run: the selection may have run there.
    """
    path = Path(name).expanduser()
    candidates = [path, *(folder / path for folder in list(adapter.resolve().parents)[:MAX_PARENT_FOLDERS])]
    return next((str(candidate.resolve()) for candidate in candidates if candidate.exists()), name)


def _find_train_file(data: str) -> str:
    """The file of the train split in a folder of files; else what was given."""
    files = [path for path in sorted(Path(data).iterdir()) if path.is_file()] if Path(data).is_dir() else []
    return next((str(path) for path in files if parse_split_name(path.stem) == "train"), data)


def _add_comments(file: str, text: str, comments: Sequence[str]) -> str:
    """The text of a file with comments at its start, below the interpreter's line; JSON has none."""
    if file.endswith(".json") or not comments:
        return text
    lines = "".join(f"# {' '.join(comment.splitlines())}\n" for comment in comments)  # a name may hold a line's end
    first, newline, remainder = text.partition("\n")
    return f"{first}{newline}{lines}{remainder}" if first.startswith("#!") else lines + text


def _build_peft_files(recipe: Recipe) -> TargetFiles:
    """The adapter folder, and the `LoraConfig` that creates an adapter like it."""
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
    """A config of TRL's command line: `trl sft --config trl_sft.yaml`, or `trl dpo` for preference pairs."""
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
    """A config of axolotl: `axolotl train axolotl.yaml`."""
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
    if recipe.exclude_modules:  # the names of the modules say it
        values.pop("peft_layers_to_transform", None)
    if recipe.form == "preference":
        values |= {"rl": "dpo", "rl_beta": recipe.settings.beta}
        notes.append(
            f"axolotl: {STRING_COLUMNS_NOTE}; for messages, set the data set's type to `chat_template.default`"
        )
    return TargetFiles({"axolotl.yaml": _dump_yaml(values)}, "axolotl train axolotl.yaml", notes)


def _build_llamafactory_files(recipe: Recipe) -> TargetFiles:
    """A config of LLaMA-Factory with the data set's entry: `llamafactory-cli train llamafactory.yaml`."""
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
    is_pissa = recipe.init_lora_weights == "pissa"
    values |= {"pissa_init": True, "pissa_iter": -1, "pissa_convert": True} if is_pissa else {}
    supported_names = [
        *LAYER_SELECTORS,
        "modules_to_save",
        "use_dora",
        *BASE_LOADING_SETTINGS,
        *["init_lora_weights"] * is_pissa,
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
    """A snippet for Unsloth."""
    layers = list(recipe.layers_to_transform) if recipe.layers_to_transform is not None else None
    module_suffixes = {name.rsplit(".", 1)[-1] for name in recipe.target_modules}  # Unsloth matches these alone
    dtype = "None" if recipe.settings.dtype == "float32" else f"torch.{recipe.settings.dtype}"
    is_init_supported = recipe.init_lora_weights in (True, "gaussian")  # Unsloth refuses other names
    supported_names = (
        "layers_to_transform",
        "modules_to_save",
        *BASE_LOADING_SETTINGS,
        *["init_lora_weights"] * is_init_supported,
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
    init_lora_weights={recipe.init_lora_weights if is_init_supported else True!r},
    use_rslora={recipe.use_rslora},
    random_state={recipe.seed},
)
{_format_arguments(recipe)}"""
    notes = _describe_missing_features(recipe, "this snippet", supported_names, reader="your trainer")
    return TargetFiles({"unsloth_lora.py": code}, "python unsloth_lora.py", notes)


def _build_vllm_files(recipe: Recipe) -> TargetFiles:
    """`vllm serve` with the adapter; vLLM reserves the next of its own ranks."""
    shapes, ranks = _read_served_shapes(recipe)
    rank = max(ranks)
    if rank > SERVER_RANKS[-1]:
        raise ResultsError(
            f"vLLM serves ranks up to {SERVER_RANKS[-1]}, got {rank}: resize the adapter, or merge it into the base"
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
    """SGLang's server with the adapter; its default address is this machine."""
    _, ranks = _read_served_shapes(recipe)
    arguments = ["python", "-m", "sglang.launch_server", "--model-path", recipe.model, "--enable-lora"]
    arguments += ["--max-lora-rank", str(max(ranks)), "--lora-paths", _format_served_adapter(recipe)]
    return _build_server_files("sglang", arguments, [SERVING_COSTS, *_describe_serving_limits(recipe, ranks)])


def _build_server_files(server: str, arguments: Sequence[str], notes: list[str]) -> TargetFiles:
    return TargetFiles({f"{server}.sh": f"#!/bin/sh\nexec {shlex.join(arguments)}\n"}, f"sh {server}.sh", notes)


def _format_served_adapter(recipe: Recipe) -> str:
    return f"{SERVED_NAME}={recipe.served or recipe.adapter.resolve()}"


def _read_served_shapes(recipe: Recipe) -> tuple[list[tuple[int, int]], list[int]]:
    """`(rows and columns, ranks)` of the adapted matrices: only the header is read, and no torch is loaded for it."""
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
    """What every trainer asks, by names that differ in that of the rank alone."""
    return {rank: recipe.r, "lora_alpha": recipe.alpha, "lora_dropout": recipe.lora_dropout}


def _translate_settings(recipe: Recipe, translations: Mapping[str, str]) -> dict[str, Any]:
    """What is not as by default, in a trainer's words."""
    return {
        word: _to_plain(recipe.non_default[name]) for name, word in translations.items() if name in recipe.non_default
    }


def _get_loader_name(path: str) -> str:
    """The `datasets` loader of a file."""
    ending = path.rsplit(".", 1)[-1].lower()
    return {"csv": "csv", "tsv": "csv", "parquet": "parquet"}.get(ending, "json")


def _dump_yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)


def _select_data_entry(
    recipe: Recipe, entries: Mapping[str, dict[str, Any]], prompt_entry: dict[str, Any]
) -> dict[str, Any]:
    """What a trainer reads of the data, `prompted` for prompts and completions."""
    if recipe.shape is not None and recipe.shape in entries:
        return entries[recipe.shape]
    return prompt_entry if recipe.form == "prompt_completion" else entries.get(recipe.form, entries["text"])


def _to_plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value


def _describe_fractional_alpha(recipe: Recipe, program: str) -> list[str]:
    note = f"{program} takes a whole number for lora_alpha, and this adapter has {recipe.alpha}; train with TRL or PEFT"
    return [] if isinstance(recipe.alpha, int) else [note]


def _format_arguments(recipe: Recipe) -> str:
    """The training as keywords of transformers' `TrainingArguments`, in Python."""
    lines = "".join(f"    {name}={value!r},\n" for name, value in _build_training_arguments(recipe).items())
    extra_lines = f"max_length = {recipe.settings.seq_len}\n"
    extra_lines += f"beta = {recipe.settings.beta!r}\n" if recipe.form == "preference" else ""
    return f"training_arguments = dict(\n{lines})\n{extra_lines}"


def _build_training_arguments(
    recipe: Recipe, batch_size: str = "per_device_train_batch_size", scheduler: str = "lr_scheduler_type"
) -> dict[str, Any]:
    """The arguments of the training, in the names of transformers' TrainingArguments but for two."""
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
    """Notes on what the target lacks: a classifier's head, and each setting that is not as by default and not among `has`.

    Where `reader` knows the columns of a form alone, a note says what to do with others.
    """
    missing_names = [name for name in recipe.non_default if name not in supported_names]
    consequences = {
        "; training it needs a script of your own": ["classification head"] * (recipe.form == "classification"),
        "; the file has one rank for all modules": [name for name in missing_names if name in PATTERNS],
        ": give it when you load the base": [name for name in missing_names if name in BASE_LOADING_SETTINGS],
        ": it trains another adapter than the run did": [
            name for name in missing_names if name not in (*PATTERNS, *BASE_LOADING_SETTINGS)
        ],
    }
    notes = [
        f"{program} has no {' and no '.join(names)}{consequence}"
        for consequence, names in consequences.items()
        if names
    ]
    columns = (
        f"reads the columns of the form {recipe.form}; change those of {recipe.data} as select did ({recipe.shape})"
    )
    return [*notes, f"{reader} {columns}"] if reader and recipe.shape is not None else notes


def _describe_serving_limits(recipe: Recipe, ranks: Sequence[int]) -> list[str]:
    """What servers do not load, and what was made of it."""
    notes = []
    if recipe.served is not None:
        text = format_rank(recipe.r, min(ranks), max(ranks))
        notes.append(
            f"the adapter has rank {text}, and servers load one rank and one scale for all modules: {SERVED_FOLDER}/ here is the same function "
            f"at rank {max(ranks)}, padded with zeros"
        )
    if recipe.modules_to_save:
        notes.append(
            f"servers do not load modules_to_save ({', '.join(recipe.modules_to_save)}): merge the adapter instead"
        )
    if recipe.kind:
        notes.append(f"servers load plain LoRA; this adapter has {' and '.join(recipe.kind)}: merge it instead")
    if recipe.task_type != "CAUSAL_LM":
        notes.append(f"servers load adapters of causal language models; the task of this one is {recipe.task_type}")
    return notes
