"""Python code that loads a model with an adapter, for model cards and exports."""

from __future__ import annotations

from pathlib import PurePath

from rightrank.adapters.adapter_folders import CLASSIFIER_FILE


def format_loading_code(folder: str, base: str | None, is_classifier: bool) -> list[str]:
    """Return lines of Python that load a model with the adapter in `folder`.

    PEFT finds the base model by itself, unless it is in a GGUF file.
    """
    kind, more = "AutoPeftModelFor" + ("SequenceClassification" if is_classifier else "CausalLM"), ""
    head: list[str] = []
    if is_classifier:
        more = ", **head"
        head = [
            f"head = json.load(open({f'{folder}/{CLASSIFIER_FILE}'!r}, encoding='utf-8'))",
            "head['id2label'] = {int(number): label for number, label in head['id2label'].items()}",  # JSON has no numbers as keys
        ]
    imports = ["import json"] if is_classifier else []
    if base is None or not base.lower().endswith(".gguf"):
        return [*imports, f"from peft import {kind}", *head, f"model = {kind}.from_pretrained({folder!r}{more})"]
    plain = kind.replace("AutoPeft", "Auto")
    imports += ["from peft import PeftModel", f"from transformers import {plain}"]
    loaded = f"base = {plain}.from_pretrained({format_base_arguments(base)}{more})"
    return [*imports, *head, loaded, f"model = PeftModel.from_pretrained(base, {folder!r})"]


def format_base_arguments(base: str) -> str:
    """Return the arguments of `from_pretrained` for a base model: its name, or the folder and the name of a GGUF file."""
    path = PurePath(base)
    return f"{str(path.parent)!r}, gguf_file={path.name!r}" if path.suffix.lower() == ".gguf" else repr(base)
