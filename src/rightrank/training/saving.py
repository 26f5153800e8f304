"""Save an adapter of a PEFT model in memory as a folder, with the labels of a classifier."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from rightrank.adapters.adapter_folders import CLASSIFIER_FILE, find_base_changing_init
from rightrank.data.files import replace_folder, write_text


def save_adapter(peft_model: Any, folder: Path, base_name: str, adapter: str = "default") -> None:
    """Save the configuration and weights of an adapter, and the labels of a classifier.

    Args:
        base_name: An absolute path or a hub name, which the adapter's configuration refers to.
    """
    config = peft_model.peft_config[adapter]
    sharded_parameters = {
        name: parameter
        for name, parameter in peft_model.named_parameters()
        if isinstance(parameter, DTensor) and ("lora_" in name or parameter.requires_grad)
    }
    state_dict = {
        name: parameter.full_tensor().detach().cpu() for name, parameter in sharded_parameters.items()
    } or None
    saved_config = peft_model.peft_config[adapter] = copy.deepcopy(
        config
    )  # PEFT modifies the configuration that it saves
    saved_config.base_model_name_or_path = base_name
    if find_base_changing_init(vars(saved_config)) is None:
        # Loading replaces the first values, and other names of PEFT do not take every rank.
        saved_config.init_lora_weights, saved_config.eva_config = True, None
    with replace_folder(folder) as temporary, warnings.catch_warnings():
        # PEFT takes the biases of lora_bias for factors of a wrong shape.
        warnings.filterwarnings("ignore", message=r"Adapter .* LoRA tensor\(s\) have invalid shape: \S+lora_B\.bias")
        try:
            peft_model.save_pretrained(
                str(temporary),
                safe_serialization=True,
                selected_adapters=[adapter],
                save_embedding_layers=False,
                state_dict=state_dict,
            )
        finally:
            peft_model.peft_config[adapter] = config
        if adapter != "default":  # PEFT saves a named adapter in a subfolder
            for path in list((temporary / adapter).iterdir()):
                path.replace(temporary / path.name)
            (temporary / adapter).rmdir()
        if config.task_type == "SEQ_CLS":
            _write_classifier_labels(temporary, peft_model.config)
        readme = temporary / "README.md"  # PEFT's empty template; the final adapter gets a model card of its own
        readme.unlink(missing_ok=True)


def _write_classifier_labels(folder: Path, config: Any) -> None:
    """Write the number, names and order of a classifier's labels.

    PEFT's configuration has no field for them, and a base model that is loaded without them gets a head of two labels. The file holds the
    arguments of `from_pretrained` that create the trained head: `num_labels`, `id2label`, `label2id` and `pad_token_id`.
    """
    names = {int(number): str(label) for number, label in config.id2label.items()}
    arguments = {
        "num_labels": len(names),
        "id2label": {str(number): names[number] for number in sorted(names)},
        "label2id": {names[number]: number for number in sorted(names)},
    }
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    arguments |= {} if pad is None else {"pad_token_id": pad}  # needed to find the last token of a shorter row
    write_text(folder / CLASSIFIER_FILE, json.dumps(arguments, indent=2, ensure_ascii=False) + "\n")
