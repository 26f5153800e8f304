"""LoRA files for image tools: diffusers' pipelines, and kohya's keys as sd-scripts, ComfyUI and others read them."""

from __future__ import annotations

import json

from rightrank.exports.recipe import Recipe
from rightrank.exports.written import Written

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
KOHYA_FILE = "adapter.safetensors"


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
