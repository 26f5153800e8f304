"""Configurations of axolotl and LLaMA-Factory, which know the columns of the data."""

from __future__ import annotations

import json
from typing import Any

from rightrank.exports.recipe import Recipe
from rightrank.exports.written import (
    STRINGS,
    Written,
    as_yaml,
    given,
    kind_notes,
    loader,
    pattern_notes,
    transformers_arguments,
)

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
