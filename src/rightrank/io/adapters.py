"""Adapters in PEFT's format, safetensors only."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from rightrank.io.files import replacing_folder


def save_adapter(peft_model: Any, folder: Path, base_name: str, adapter: str = "default") -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; `base_name` is an absolute path or a hub name."""
    config = peft_model.peft_config[adapter]
    config.base_model_name_or_path = base_name
    with replacing_folder(folder) as temporary, warnings.catch_warnings():
        # PEFT takes the biases of lora_bias for factors of a wrong shape.
        warnings.filterwarnings("ignore", message=r"Adapter .* LoRA tensor\(s\) have invalid shape: \S+lora_B\.bias")
        peft_model.save_pretrained(
            str(temporary), safe_serialization=True, selected_adapters=[adapter], save_embedding_layers=False
        )
        if adapter != "default":  # PEFT saves a named adapter in a subfolder
            for path in list((temporary / adapter).iterdir()):
                path.replace(temporary / path.name)
            (temporary / adapter).rmdir()
        readme = temporary / "README.md"  # PEFT's empty template; the final adapter gets a model card of its own
        readme.unlink(missing_ok=True)


def restore_adapter(peft_model: Any, folder: Path) -> None:
    """Load the saved tensors of `folder` into the adapter, of the same shapes."""
    set_peft_model_state_dict(peft_model, load_file(folder / "adapter_model.safetensors"))
