"""Settings for trainers, and LoRA files for image tools. Each target is a pure function from a recipe to its files and to notes on what it lacks."""

from __future__ import annotations

import json
import shlex
from typing import Any

from rightrank.interop.recipe import Recipe
from rightrank.interop.written import (
    STRINGS,
    Written,
    as_yaml,
    column_notes,
    given,
    kind_notes,
    loader,
    pattern_notes,
    transformers_arguments,
)

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
KOHYA_FILE = "adapter.safetensors"


def peft(recipe: Recipe) -> Written:
    """The adapter folder, and the `LoraConfig` that creates an adapter like it."""
    arguments: dict[str, Any] = {
        "task_type": recipe.task_type,
        "r": recipe.r,
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.lora_dropout,
        "use_rslora": recipe.use_rslora,
        "bias": recipe.bias,
        "target_modules": list(recipe.target_modules),
    }
    arguments |= given(
        layers_to_transform=recipe.layers_to_transform and list(recipe.layers_to_transform),
        modules_to_save=list(recipe.modules_to_save),
        rank_pattern=dict(recipe.rank_pattern),
        alpha_pattern=dict(recipe.alpha_pattern),
        **recipe.kind,
    )
    lines = "".join(f"    {name}={value!r},\n" for name, value in arguments.items())
    kind = "AutoPeftModelForSequenceClassification" if recipe.task_type == "SEQ_CLS" else "AutoPeftModelForCausalLM"
    code = f"from peft import LoraConfig\n\nlora_config = LoraConfig(\n{lines})\nlearning_rate = {recipe.learning_rate!r}\n"
    if recipe.loraplus_lr_ratio is not None:
        code += f"loraplus_lr_ratio = {recipe.loraplus_lr_ratio!r}  # of peft.optimizers.create_loraplus_optimizer\n"
    if recipe.optim != "adamw_torch":
        code += f"optim = {recipe.optim!r}  # of transformers.TrainingArguments\n"
    return Written(
        {"lora_config.py": code},
        f"python -c \"from peft import {kind}; {kind}.from_pretrained('.')\"",
        with_adapter=True,
    )


def trl(recipe: Recipe) -> Written:
    """A config of TRL's command line: `trl sft --config trl_sft.yaml`, or `trl dpo` for preference pairs."""
    job = "dpo" if recipe.is_preference else "sft"
    values: dict[str, Any] = {
        "model_name_or_path": recipe.model,
        "datasets": [{"path": loader(recipe.data), "data_files": recipe.data}],
        "output_dir": "trl-output",
        "use_peft": True,
        "lora_r": recipe.r,
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.lora_dropout,
        "use_rslora": recipe.use_rslora,
        "lora_target_modules": recipe.explicit_targets,
        "lora_task_type": recipe.task_type,
        "max_length": recipe.max_length,
        **transformers_arguments(recipe),
    }
    values |= given(
        lora_modules_to_save=list(recipe.modules_to_save),
        use_dora=recipe.use_dora,
        lora_target_parameters=list(recipe.target_parameters),
    )
    if recipe.is_preference:
        values |= {"beta": recipe.beta, "loss_type": ["sigmoid"]}
    notes = pattern_notes(recipe, "TRL's command line")
    notes += kind_notes(recipe, "TRL's command line", ("use_dora", "target_parameters"))
    notes += column_notes(recipe, "TRL")
    if recipe.form == "classification":
        notes.append("TRL's sft trains on text; a classification head needs a separate script")
    return Written({f"trl_{job}.yaml": as_yaml(values)}, f"trl {job} --config trl_{job}.yaml", notes)


def unsloth(recipe: Recipe) -> Written:
    """A snippet for Unsloth."""
    layers = list(recipe.layers_to_transform) if recipe.layers_to_transform is not None else None
    bare_names = sorted(
        {name.rsplit(".", 1)[-1] for name in recipe.target_modules}
    )  # Unsloth matches the last part alone
    dtype = "None" if recipe.dtype == "float32" else f"torch.{recipe.dtype}"
    code = f"""import torch
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name={recipe.model!r},
    max_seq_length={recipe.max_length},
    dtype={dtype},
    load_in_4bit=False,
)
model = FastLanguageModel.get_peft_model(
    model,
    r={recipe.r},
    lora_alpha={recipe.alpha!r},
    lora_dropout={recipe.lora_dropout!r},
    target_modules={bare_names!r},
    layers_to_transform={layers!r},
    use_rslora={recipe.use_rslora},
    bias={recipe.bias!r},
    random_state={recipe.seed},
)
optim = {recipe.optim!r}
learning_rate = {recipe.learning_rate!r}  # for the trainer, with {recipe.max_steps} steps of {recipe.batch_size * recipe.gradient_accumulation_steps} examples
"""
    notes = pattern_notes(recipe, "this snippet") + column_notes(recipe, "your trainer")
    return Written({"unsloth_lora.py": code}, "python unsloth_lora.py", notes)


def ms_swift(recipe: Recipe) -> Written:
    """A command of ms-swift."""
    job = ["rlhf", "--rlhf_type", "dpo", "--beta", str(recipe.beta)] if recipe.is_preference else ["sft"]
    arguments = ["swift", *job, "--model", recipe.model, "--dataset", recipe.data, "--tuner_type", "lora"]
    arguments += ["--lora_rank", str(recipe.r), "--lora_alpha", str(recipe.alpha)]
    arguments += ["--lora_dropout", str(recipe.lora_dropout), "--use_rslora", str(recipe.use_rslora).lower()]
    arguments += ["--target_modules", *recipe.explicit_targets, "--max_length", str(recipe.max_length)]
    arguments += ["--torch_dtype", recipe.dtype, "--output_dir", "swift-output"]
    if recipe.modules_to_save:
        arguments += ["--modules_to_save", *recipe.modules_to_save]
    if recipe.use_dora:
        arguments += ["--use_dora", "true"]
    if recipe.loraplus_lr_ratio is not None:
        arguments += ["--lorap_lr_ratio", str(recipe.loraplus_lr_ratio)]
    for name, value in transformers_arguments(recipe).items():
        if name not in ("bf16", "fp16"):
            arguments += [f"--{name}", str(value)]
    command = shlex.join(arguments)
    notes = pattern_notes(recipe, "ms-swift's command line")
    notes += kind_notes(recipe, "ms-swift's command line", ("use_dora", "loraplus_lr_ratio"))
    columns = "`messages` and `rejected_response`" if recipe.is_preference else "`messages` or `query` and `response`"
    notes.append(f"ms-swift reads {columns}; rename the columns of your data to match")
    return Written({"ms_swift.sh": f"#!/bin/sh\nexec {command}\n"}, "sh ms_swift.sh", notes)


def diffusers(recipe: Recipe) -> Written:
    """A file that `load_lora_weights` of a diffusers pipeline reads, with PEFT's configuration in its header."""
    script = f'''"""Load the adapter of this folder, trained at rank {recipe.r} with alpha {recipe.alpha}."""
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({recipe.model!r})
pipeline.load_lora_weights(".", weight_name="{DIFFUSERS_FILE}")
'''
    return Written(
        {"load_lora.py": script},
        "python -i load_lora.py",
        lora_files={DIFFUSERS_FILE: ("diffusers", model_part(recipe))},
    )


def kohya(recipe: Recipe) -> Written:
    """A file with kohya's keys and an alpha for each module, and settings with which sd-scripts trains as the run did."""
    part = model_part(recipe)
    settings = {
        "network_module": "networks.lora",
        "network_dim": recipe.r,
        "network_alpha": recipe.alpha,
        "learning_rate": recipe.learning_rate,
        "max_train_steps": recipe.max_steps,
        "train_batch_size": recipe.batch_size,
        "seed": recipe.seed,
    }
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    notes = [f"kohya's names of SDXL's U-Net are those of its original code; these are diffusers' names of the {part}"]
    command = (
        f"copy {KOHYA_FILE} to the folder of LoRA files; to train again: train_network.py --config_file kohya.toml"
    )
    return Written({"kohya.toml": text}, command, notes, lora_files={KOHYA_FILE: ("kohya", part)})


def model_part(recipe: Recipe) -> str:
    """The part of a pipeline that the adapter is for, in diffusers' names, by the names of its modules."""
    first = recipe.module_names[0] if recipe.module_names else ""
    if first.startswith(("text_model.", "encoder.block")):
        return "text_encoder"
    return "transformer" if first.startswith(("transformer_blocks.", "single_transformer_blocks.")) else "unet"


# Data of other columns that a trainer knows by name; see `io.shapes`.
AXOLOTL_SHAPES: dict[str, dict[str, Any]] = {
    "alpaca": {"type": "alpaca"},
    "sharegpt": {
        "type": "chat_template",
        "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
    },
}
LLAMAFACTORY_SHAPES: dict[str, dict[str, Any]] = {
    "alpaca": {"columns": {"prompt": "instruction", "query": "input", "response": "output"}},
    "sharegpt": {"formatting": "sharegpt", "columns": {"messages": "conversations"}},
}


def axolotl(recipe: Recipe) -> Written:
    """A config of axolotl: `axolotl train axolotl.yaml`."""
    values: dict[str, Any] = {
        "base_model": recipe.model,
        "datasets": [_axolotl_data(recipe)],
        "output_dir": "axolotl-output",
        "adapter": "lora",
        "lora_r": recipe.r,
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.lora_dropout,
        "lora_target_modules": list(recipe.target_modules),
        "peft_use_rslora": recipe.use_rslora,
        "sequence_len": recipe.max_length,
        "micro_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "max_steps": recipe.max_steps,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler": recipe.lr_scheduler_type,
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "optimizer": recipe.optim,
        "bf16": recipe.dtype == "bfloat16",
        "fp16": recipe.dtype == "float16",
        "train_on_inputs": recipe.form == "text",
        "seed": recipe.seed,
    }
    values |= given(
        peft_layers_to_transform=recipe.layers_to_transform and list(recipe.layers_to_transform),
        lora_modules_to_save=list(recipe.modules_to_save),
        lora_rank_pattern=dict(recipe.rank_pattern),
        lora_alpha_pattern={name: int(alpha) for name, alpha in recipe.alpha_pattern.items()},
        peft_use_dora=recipe.use_dora,
        lora_target_parameters=list(recipe.target_parameters),
        loraplus_lr_ratio=recipe.loraplus_lr_ratio,
    )
    notes = kind_notes(recipe, "axolotl", ("use_dora", "target_parameters", "loraplus_lr_ratio"))
    notes += ["axolotl trains no classification head on this data"] if recipe.form == "classification" else []
    if recipe.is_preference:
        values |= {"rl": "dpo", "rl_beta": recipe.beta}
        notes.append(f"axolotl: {STRINGS}; for messages, set the data set's type to `chat_template.default`")
    return Written({"axolotl.yaml": as_yaml(values)}, "axolotl train axolotl.yaml", notes)


def _axolotl_data(recipe: Recipe) -> dict[str, Any]:
    """The entry of the data set, by its shape or form."""
    kinds: dict[str, dict[str, Any]] = {
        "messages": {"type": "chat_template", "field_messages": "messages"},
        "text": {"type": "completion", "field": "text"},
        "prompt_completion": {
            "type": {
                "field_instruction": recipe.columns.get("prompt", "prompt"),
                "field_output": recipe.columns.get("completion", "completion"),
                "format": "{instruction}",
                "no_input_format": "{instruction}",
            }
        },
        "preference": {
            "split": "train",
            "type": {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"},
        },
    }
    found = AXOLOTL_SHAPES.get(recipe.shape or "") or kinds.get(recipe.form, kinds["text"])
    return {"path": recipe.data, "ds_type": loader(recipe.data), **found}


def llamafactory(recipe: Recipe) -> Written:
    """A config of LLaMA-Factory with the data set's entry: `llamafactory-cli train llamafactory.yaml`."""
    values = {
        "model_name_or_path": recipe.model,
        "stage": {"text": "pt", "preference": "dpo"}.get(recipe.form, "sft"),
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": recipe.r,
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.lora_dropout,
        "use_rslora": recipe.use_rslora,
        "lora_target": ",".join(recipe.explicit_targets),
        "dataset": "rightrank_data",
        "dataset_dir": ".",
        "template": "empty" if recipe.form != "messages" else "default",
        "cutoff_len": recipe.max_length,
        "output_dir": "llamafactory-output",
        **transformers_arguments(recipe),
    }
    values |= given(
        additional_target=",".join(recipe.modules_to_save),
        use_dora=recipe.use_dora,
        loraplus_lr_ratio=recipe.loraplus_lr_ratio,
    )
    if recipe.is_preference:
        values |= {"pref_beta": recipe.beta, "pref_loss": "sigmoid"}
    files = {
        "llamafactory.yaml": as_yaml(values),
        "dataset_info.json": json.dumps({"rightrank_data": _llamafactory_data(recipe)}, indent=2, ensure_ascii=False)
        + "\n",
    }
    return Written(files, "llamafactory-cli train llamafactory.yaml", _llamafactory_notes(recipe))


def _llamafactory_data(recipe: Recipe) -> dict[str, Any]:
    """The entry of the data set, by its shape or form."""
    columns: dict[str, dict[str, Any]] = {
        "messages": {
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
                "system_tag": "system",
            },
        },
        "text": {"columns": {"prompt": "text"}},
        "prompt_completion": {
            "columns": {
                "prompt": recipe.columns.get("prompt", "prompt"),
                "response": recipe.columns.get("completion", "completion"),
            }
        },
        "preference": {
            "ranking": True,
            "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
        },
    }
    found = LLAMAFACTORY_SHAPES.get(recipe.shape or "") or columns.get(recipe.form, columns["text"])
    return {"file_name": recipe.data, **found}


def _llamafactory_notes(recipe: Recipe) -> list[str]:
    notes = pattern_notes(recipe, "LLaMA-Factory")
    notes += kind_notes(recipe, "LLaMA-Factory", ("use_dora", "loraplus_lr_ratio"))
    if recipe.is_preference:
        notes.append(
            f"LLaMA-Factory: {STRINGS}; for messages, set `formatting` to `sharegpt`, with one message an answer"
        )
    if recipe.form == "messages":
        notes.append("replace the template `default` with the name of your model's template in LLaMA-Factory")
    if recipe.form == "classification":
        notes.append("LLaMA-Factory trains no classification head")
    return notes
