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

from rightrank.data.files import replacing_folder
from rightrank.data.rows import split_of
from rightrank.interop.recipe import Recipe
from rightrank.models.adapter_folders import WEIGHTS_FILE
from rightrank.models.loading_code import loading_lines
from rightrank.models.ranks import (
    SERVER_RANKS,
    SERVING,
    max_module_rank,
    rank_change_line,
    rank_text,
    rate_warning,
    slot_bytes,
)
from rightrank.models.safetensors_files import read_header
from rightrank.report.format import format_bytes
from rightrank.schema.errors import ResultsError, SettingsError, did_you_mean
from rightrank.schema.settings import TRAINER_FIELDS

PATTERNS = ("rank_pattern", "alpha_pattern")
EXPLICIT = ("layers_to_transform", "exclude_modules", "layers_pattern")  # said by the full names of the modules
OF_LOADING = ("load_in_4bit", "load_in_8bit", "trust_remote_code")
SERVERS = ("vllm", "sglang")  # they load an adapter of one rank and one scale
LOADED = ("peft", *SERVERS)  # targets for the adapter itself; the others train
SERVED_FOLDER = "adapter"
MERGED = "merged"  # a model without an adapter: `interop.merge`
AROUND = 4  # folders around an adapter: trials, the run, and two around the run
LOOPBACK = "127.0.0.1"  # vLLM's default is every interface; the others default to this one
SERVED_NAME = "rightrank"
# A trainer's words for what is not as by default; for what is not here it has none.
TRL_NAMES = {name: f"lora_{name}" for name in ("modules_to_save", "use_dora", "target_parameters")}
TRL_NAMES |= {name: name for name in ("use_dora", "load_in_4bit", "load_in_8bit")}
AXOLOTL_NAMES = {"layers_to_transform": "peft_layers_to_transform"}
AXOLOTL_NAMES |= {name: f"lora_{name}" for name in ("modules_to_save", *PATTERNS)}
AXOLOTL_NAMES |= {name: f"peft_{name}" for name in ("use_dora", "init_lora_weights")}
AXOLOTL_NAMES |= {"target_parameters": "lora_target_parameters", **{name: name for name in OF_LOADING}}
STRINGS = "the file is for a `prompt`, `chosen` and `rejected` of text"
PREFERENCE = ("prompt", "chosen", "rejected")
# The entry of the data set by the shape of its rows, where a trainer knows it, else by their form.
AXOLOTL_DATA: dict[str, dict[str, Any]] = {
    "alpaca": {"type": "alpaca"},
    "sharegpt": {
        "type": "chat_template",
        "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
    },
    "messages": {"type": "chat_template", "field_messages": "messages"},
    "preference": {"split": "train", "type": {f"field_{column}": column for column in PREFERENCE}},
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
    "preference": {"ranking": True, "columns": {column: column for column in PREFERENCE}},
    "text": {"columns": {"prompt": "text"}},
}


@dataclass(frozen=True, slots=True)
class Written:
    """The files of a target by name, the command that uses them, and what the target cannot express."""

    files: dict[str, str]
    command: str
    notes: list[str] = field(default_factory=list)
    with_adapter: bool = False  # copy the files of the adapter too


@dataclass(frozen=True, slots=True)
class Exported:
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
    known = [*TARGETS, MERGED]
    if name not in known:
        raise SettingsError(
            f"export target {name!r} is not known{did_you_mean(name, known)}; allowed: {', '.join(known)}"
        )


def write_export(name: str, recipe: Recipe, folder: Path) -> Exported:
    """Write a target's files into `folder`, which is replaced.

    Raises:
        ResultsError: a rank that the server does not serve.
    """
    if name != "peft":  # its folder may be published, and needs neither the model nor the data
        model, data = (absolute(name, recipe.adapter) for name in (recipe.model, recipe.data))
        recipe = replace(recipe, model=model, data=data)
    if name in SERVERS and recipe.has_patterns:
        recipe = replace(recipe, served=folder.resolve() / SERVED_FOLDER)
    exported = recipe if name in LOADED else replace(recipe.training(), data=_train_file(recipe.data))
    written, comments = TARGETS[name](exported), recipe.comments()
    with replacing_folder(folder) as temporary:
        if written.with_adapter:
            for path in sorted(path for path in recipe.adapter.iterdir() if path.is_file()):
                shutil.copy2(path, temporary / path.name)
        if recipe.served is not None:
            _write_served(recipe.adapter, temporary / SERVED_FOLDER)
        for file, text in written.files.items():
            (temporary / file).write_text(_commented(file, text, comments), encoding="utf-8")
    files = sorted(path.name for path in folder.iterdir())
    rows = f"the run held out {recipe.held_out:,} rows of {recipe.data}; this file trains on them too"
    held_out = [rows] if recipe.held_out and name not in LOADED else []
    rates = [rate_warning(exported.r, exported.lora_alpha, exported.learning_rate)]
    if name not in LOADED:
        rates.append(
            f"for another rank: {rank_change_line(exported.r, 4 * exported.r, exported.lora_alpha, exported.settings.scaling)}"
        )
    return Exported(name, folder, files, written.command, [*written.notes, *held_out, *comments, *filter(None, rates)])


def _write_served(adapter: Path, out: Path) -> None:
    """Write the adapter with one rank and one scale for all modules."""
    from rightrank.adapters.resize import write_uniform  # these bring torch, which other exports do not need
    from rightrank.models.adapter_reader import open_adapter

    write_uniform(open_adapter(adapter), out)


def absolute(name: str, adapter: Path) -> str:
    """The absolute path of a file or folder; a name on the hub as it is.

    A relative path starts at the current folder, or else at one around the run: the selection may have run there.
    """
    path = Path(name).expanduser()
    places = [path, *(folder / path for folder in list(adapter.resolve().parents)[:AROUND])]
    return next((str(place.resolve()) for place in places if place.exists()), name)


def _train_file(data: str) -> str:
    """The file of the train split in a folder of files; else what was given."""
    files = [path for path in sorted(Path(data).iterdir()) if path.is_file()] if Path(data).is_dir() else []
    return next((str(path) for path in files if split_of(path.stem) == "train"), data)


def _commented(file: str, text: str, comments: Sequence[str]) -> str:
    """The text of a file with comments at its start, below the interpreter's line; JSON has none."""
    if file.endswith(".json") or not comments:
        return text
    lines = "".join(f"# {' '.join(comment.splitlines())}\n" for comment in comments)  # a name may hold a line's end
    first, newline, rest = text.partition("\n")
    return f"{first}{newline}{lines}{rest}" if first.startswith("#!") else lines + text


def _peft(recipe: Recipe) -> Written:
    """The adapter folder, and the `LoraConfig` that creates an adapter like it."""
    arguments: dict[str, Any] = {"task_type": recipe.task_type, **_lora(recipe, "r")}
    arguments |= {"use_rslora": recipe.use_rslora, "target_modules": list(recipe.target_modules)}
    own = {name: _plain(value) for name, value in recipe.unusual.items() if name not in OF_LOADING}
    arguments |= own
    lines = "".join(f"    {name}={value!r},\n" for name, value in arguments.items())
    code = f"from peft import LoraConfig\n\nlora_config = LoraConfig(\n{lines})\n{_arguments_as_code(recipe)}"
    command = f'python -c "{"; ".join(loading_lines(".", recipe.model, recipe.task_type == "SEQ_CLS"))}"'
    notes = _lacking(recipe, "LoraConfig", [*own])
    return Written({"lora_config.py": code}, command, notes, with_adapter=True)


def _trl(recipe: Recipe) -> Written:
    """A config of TRL's command line: `trl sft --config trl_sft.yaml`, or `trl dpo` for preference pairs."""
    job = "dpo" if recipe.form == "preference" else "sft"
    values: dict[str, Any] = {
        "model_name_or_path": recipe.model,
        "datasets": [{"path": _loader(recipe.data), "data_files": recipe.data}],
        "output_dir": "trl-output",
        "use_peft": True,
        **_lora(recipe, "lora_r"),
        "use_rslora": recipe.use_rslora,
        "lora_target_modules": recipe.explicit_targets,
        "lora_task_type": recipe.task_type,
        "dtype": recipe.settings.dtype,
        "max_length": recipe.settings.seq_len,
        "gradient_checkpointing": recipe.settings.gradient_checkpointing,
        **_training_arguments(recipe),
    }
    values |= _unusual(recipe, TRL_NAMES)
    values |= {"prompt_completion": {"completion_only_loss": True}, "messages": {"assistant_only_loss": True}}.get(
        recipe.form, {}
    )
    if recipe.form == "preference":
        values |= {"beta": recipe.settings.beta, "loss_type": ["sigmoid"]}
    notes = _lacking(recipe, "TRL's command line", (*EXPLICIT, *TRL_NAMES), reader="TRL")
    if recipe.form == "messages":
        notes.append("TRL: assistant_only_loss needs a chat template with `{% generation %}`, or one that TRL knows")
    return Written({f"trl_{job}.yaml": _yaml(values)}, f"trl {job} --config trl_{job}.yaml", notes)


def _axolotl(recipe: Recipe) -> Written:
    """A config of axolotl: `axolotl train axolotl.yaml`."""
    prompted = {
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
            {"path": recipe.data, "ds_type": _loader(recipe.data), **_data_entry(recipe, AXOLOTL_DATA, prompted)}
        ],
        "output_dir": "axolotl-output",
        "adapter": "qlora" if recipe.settings.load_in_4bit else "lora",
        **_lora(recipe, "lora_r"),
        "lora_target_modules": recipe.explicit_targets if recipe.exclude_modules else list(recipe.target_modules),
        "peft_use_rslora": recipe.use_rslora,
        "sequence_len": recipe.settings.seq_len,
        "optimizer": "adamw_torch",
        "train_on_inputs": recipe.form == "text",
        "gradient_checkpointing": recipe.settings.gradient_checkpointing,
        **_training_arguments(recipe, batch_size="micro_batch_size", scheduler="lr_scheduler"),
    }
    whole = all(float(alpha).is_integer() for alpha in recipe.alpha_pattern.values())
    names = {name: word for name, word in AXOLOTL_NAMES.items() if whole or name != "alpha_pattern"}
    notes = _lacking(recipe, "axolotl", (*EXPLICIT, *names)) + _whole_alpha(recipe, "axolotl")
    values |= _unusual(recipe, names)
    if "lora_alpha_pattern" in values:
        values["lora_alpha_pattern"] = {name: int(alpha) for name, alpha in recipe.alpha_pattern.items()}
    if recipe.exclude_modules:  # the names of the modules say it
        values.pop("peft_layers_to_transform", None)
    if recipe.form == "preference":
        values |= {"rl": "dpo", "rl_beta": recipe.settings.beta}
        notes.append(f"axolotl: {STRINGS}; for messages, set the data set's type to `chat_template.default`")
    return Written({"axolotl.yaml": _yaml(values)}, "axolotl train axolotl.yaml", notes)


def _llamafactory(recipe: Recipe) -> Written:
    """A config of LLaMA-Factory with the data set's entry: `llamafactory-cli train llamafactory.yaml`."""
    values = {
        "model_name_or_path": recipe.model,
        "stage": {"text": "pt", "preference": "dpo"}.get(recipe.form, "sft"),
        "do_train": True,
        "finetuning_type": "lora",
        **_lora(recipe, "lora_rank"),
        "use_rslora": recipe.use_rslora,
        "lora_target": ",".join(recipe.explicit_targets),
        "dataset": "rightrank_data",
        "dataset_dir": ".",
        "template": "empty" if recipe.form != "messages" else "default",
        "cutoff_len": recipe.settings.seq_len,
        "output_dir": "llamafactory-output",
        **_training_arguments(recipe),
    }
    values |= {"additional_target": ",".join(recipe.modules_to_save)} if recipe.modules_to_save else {}
    values |= _unusual(recipe, {"use_dora": "use_dora"})
    values |= {"quantization_bit": recipe.settings.weight_bits} if recipe.settings.weight_bits else {}
    values |= _unusual(recipe, {"trust_remote_code": "trust_remote_code"})
    is_pissa = recipe.init_lora_weights == "pissa"
    values |= {"pissa_init": True, "pissa_iter": -1, "pissa_convert": True} if is_pissa else {}
    has = [*EXPLICIT, "modules_to_save", "use_dora", *OF_LOADING, *["init_lora_weights"] * is_pissa]
    notes = _lacking(recipe, "LLaMA-Factory", has)
    notes += _whole_alpha(recipe, "LLaMA-Factory")
    if recipe.form == "preference":
        values |= {"pref_beta": recipe.settings.beta, "pref_loss": "sigmoid"}
        notes.append(
            f"LLaMA-Factory: {STRINGS}; for messages, set `formatting` to `sharegpt`, with one message an answer"
        )
    if recipe.form == "messages":
        notes.append("replace the template `default` with the name of your model's template in LLaMA-Factory")
    names = {"prompt": "prompt", "response": "completion"}
    prompted = {"columns": {theirs: recipe.columns.get(ours, ours) for theirs, ours in names.items()}}
    entry = {"rightrank_data": {"file_name": recipe.data, **_data_entry(recipe, LLAMAFACTORY_DATA, prompted)}}
    info = json.dumps(entry, indent=2, ensure_ascii=False) + "\n"
    files = {"llamafactory.yaml": _yaml(values), "dataset_info.json": info}
    return Written(files, "llamafactory-cli train llamafactory.yaml", notes)


def _unsloth(recipe: Recipe) -> Written:
    """A snippet for Unsloth."""
    layers = list(recipe.layers_to_transform) if recipe.layers_to_transform is not None else None
    last_parts = {name.rsplit(".", 1)[-1] for name in recipe.target_modules}  # Unsloth matches these alone
    dtype = "None" if recipe.settings.dtype == "float32" else f"torch.{recipe.settings.dtype}"
    knows_init = recipe.init_lora_weights in (True, "gaussian")  # Unsloth refuses other names
    has = ("layers_to_transform", "modules_to_save", *OF_LOADING, *["init_lora_weights"] * knows_init)
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
    target_modules={sorted(last_parts)!r},
    layers_to_transform={layers!r},
    modules_to_save={list(recipe.modules_to_save) or None!r},
    init_lora_weights={recipe.init_lora_weights if knows_init else True!r},
    use_rslora={recipe.use_rslora},
    random_state={recipe.seed},
)
{_arguments_as_code(recipe)}"""
    notes = _lacking(recipe, "this snippet", has, reader="your trainer")
    return Written({"unsloth_lora.py": code}, "python unsloth_lora.py", notes)


def _vllm(recipe: Recipe) -> Written:
    """`vllm serve` with the adapter; vLLM reserves the next of its own ranks."""
    shapes, ranks = _served_shapes(recipe)
    rank = max(ranks)
    if rank > SERVER_RANKS[-1]:
        raise ResultsError(
            f"vLLM serves ranks up to {SERVER_RANKS[-1]}, got {rank}: resize the adapter, or merge it into the base"
        )
    served = max_module_rank(rank)
    slot = (
        f"a slot takes {format_bytes(slot_bytes(shapes, served))} at --max-lora-rank {served} (16 bits), whatever the rank of the adapter in it: this one "
        f"fills {recipe.r / served:.0%}, and the largest rank of all adapters of the server counts"
    )
    arguments = ["vllm", "serve", recipe.model, "--host", LOOPBACK, "--enable-lora"]
    arguments += ["--max-lora-rank", str(served), "--lora-modules", _served_adapter(recipe)]
    return _serving("vllm", arguments, [slot, SERVING, *_serving_notes(recipe, ranks)])


def _sglang(recipe: Recipe) -> Written:
    """SGLang's server with the adapter; its default address is this machine."""
    _, ranks = _served_shapes(recipe)
    arguments = ["python", "-m", "sglang.launch_server", "--model-path", recipe.model, "--enable-lora"]
    arguments += ["--max-lora-rank", str(max(ranks)), "--lora-paths", _served_adapter(recipe)]
    return _serving("sglang", arguments, [SERVING, *_serving_notes(recipe, ranks)])


def _serving(server: str, arguments: Sequence[str], notes: list[str]) -> Written:
    return Written({f"{server}.sh": f"#!/bin/sh\nexec {shlex.join(arguments)}\n"}, f"sh {server}.sh", notes)


def _served_adapter(recipe: Recipe) -> str:
    return f"{SERVED_NAME}={recipe.served or recipe.adapter.resolve()}"


def _served_shapes(recipe: Recipe) -> tuple[list[tuple[int, int]], list[int]]:
    """`(rows and columns, ranks)` of the adapted matrices: only the header is read, and no torch is loaded for it."""
    header = read_header(recipe.adapter / WEIGHTS_FILE)[0]
    factors = {name: shape for name, shape in header.items() if ".lora_" in name and len(shape) == 2}
    sides = [(factors[name.replace("lora_A", "lora_B")], a) for name, a in factors.items() if "lora_A" in name]
    return [(b[0], a[1]) for b, a in sides], [recipe.r, *recipe.rank_pattern.values()]


TARGETS: dict[str, Callable[[Recipe], Written]] = {
    "peft": _peft,
    "trl": _trl,
    "axolotl": _axolotl,
    "llamafactory": _llamafactory,
    "unsloth": _unsloth,
    "vllm": _vllm,
    "sglang": _sglang,
}


def _lora(recipe: Recipe, rank: str) -> dict[str, Any]:
    """What every trainer asks, by names that differ in that of the rank alone."""
    return {rank: recipe.r, "lora_alpha": recipe.alpha, "lora_dropout": recipe.lora_dropout}


def _unusual(recipe: Recipe, names: Mapping[str, str]) -> dict[str, Any]:
    """What is not as by default, in a trainer's words."""
    return {word: _plain(recipe.unusual[name]) for name, word in names.items() if name in recipe.unusual}


def _loader(path: str) -> str:
    """The `datasets` loader of a file."""
    ending = path.rsplit(".", 1)[-1].lower()
    return {"csv": "csv", "tsv": "csv", "parquet": "parquet"}.get(ending, "json")


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)


def _data_entry(recipe: Recipe, known: Mapping[str, dict[str, Any]], prompted: dict[str, Any]) -> dict[str, Any]:
    """What a trainer reads of the data, `prompted` for prompts and completions."""
    if recipe.shape is not None and recipe.shape in known:
        return known[recipe.shape]
    return prompted if recipe.form == "prompt_completion" else known.get(recipe.form, known["text"])


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value


def _whole_alpha(recipe: Recipe, who: str) -> list[str]:
    whole = f"{who} takes a whole number for lora_alpha, and this adapter has {recipe.alpha}; train with TRL or PEFT"
    return [] if isinstance(recipe.alpha, int) else [whole]


def _arguments_as_code(recipe: Recipe) -> str:
    """The training as keywords of transformers' `TrainingArguments`, in Python."""
    lines = "".join(f"    {name}={value!r},\n" for name, value in _training_arguments(recipe).items())
    extra = f"max_length = {recipe.settings.seq_len}\n"
    extra += f"beta = {recipe.settings.beta!r}\n" if recipe.form == "preference" else ""
    return f"training_arguments = dict(\n{lines})\n{extra}"


def _training_arguments(
    recipe: Recipe, batch_size: str = "per_device_train_batch_size", scheduler: str = "lr_scheduler_type"
) -> dict[str, Any]:
    """The arguments of the training, in the names of transformers' TrainingArguments but for two."""
    settings, words = recipe.settings, {"lr_scheduler_type": scheduler, "warmup_ratio": "warmup_steps"}
    passed_on = settings.model_dump(include=TRAINER_FIELDS) | {"warmup_ratio": recipe.warmup_steps}
    return {
        "learning_rate": recipe.learning_rate,
        "max_steps": recipe.max_steps,
        batch_size: settings.batch_size,
        **{words.get(name, name): value for name, value in passed_on.items()},
        "bf16": settings.dtype == "bfloat16",
        "fp16": settings.dtype == "float16",
        "seed": recipe.seed,
    }


def _lacking(recipe: Recipe, who: str, has: Sequence[str] = (), reader: str = "") -> list[str]:
    """Notes on what the target lacks: a classifier's head, and each setting that is not as by default and not among `has`.

    Where `reader` knows the columns of a form alone, a note says what to do with others.
    """
    lacks = [name for name in recipe.unusual if name not in has]
    consequences = {
        "; training it needs a script of your own": ["classification head"] * (recipe.form == "classification"),
        "; the file has one rank for all modules": [name for name in lacks if name in PATTERNS],
        ": give it when you load the base": [name for name in lacks if name in OF_LOADING],
        ": it trains another adapter than the run did": [
            name for name in lacks if name not in (*PATTERNS, *OF_LOADING)
        ],
    }
    notes = [f"{who} has no {' and no '.join(names)}{what}" for what, names in consequences.items() if names]
    columns = (
        f"reads the columns of the form {recipe.form}; change those of {recipe.data} as select did ({recipe.shape})"
    )
    return [*notes, f"{reader} {columns}"] if reader and recipe.shape is not None else notes


def _serving_notes(recipe: Recipe, ranks: Sequence[int]) -> list[str]:
    """What servers do not load, and what was made of it."""
    notes = []
    if recipe.served is not None:
        text = rank_text(recipe.r, min(ranks), max(ranks))
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
