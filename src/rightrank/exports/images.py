"""LoRA files for image tools: diffusers' pipelines, and kohya's keys as sd-scripts, ComfyUI and others read them."""

from __future__ import annotations

from rightrank.exports.recipe import Recipe
from rightrank.exports.trainers import Written

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
KOHYA_FILE = "adapter.safetensors"


def diffusers(recipe: Recipe) -> Written:
    """A file that `load_lora_weights` of a diffusers pipeline reads, with PEFT's configuration in its header."""
    command = f'pipeline.load_lora_weights(".", weight_name="{DIFFUSERS_FILE}")'
    return Written({}, command, lora_files={DIFFUSERS_FILE: ("diffusers", model_part(recipe))})


def kohya(recipe: Recipe) -> Written:
    """A file with kohya's keys and an alpha for each module."""
    part = model_part(recipe)
    notes = [f"kohya's names of SDXL's U-Net are those of its original code; these are diffusers' names of the {part}"]
    return Written({}, f"copy {KOHYA_FILE} to models/loras", notes, lora_files={KOHYA_FILE: ("kohya", part)})


def model_part(recipe: Recipe) -> str:
    """The part of a pipeline that the adapter is for, in diffusers' names, by the names of its modules."""
    first = recipe.module_names[0] if recipe.module_names else ""
    if first.startswith(("text_model.", "encoder.block")):
        return "text_encoder"
    return "transformer" if first.startswith(("transformer_blocks.", "single_transformer_blocks.")) else "unet"
