"""The labels of a classifier's adapter: their number, names and order, in `classifier.json` beside its weights.

PEFT's configuration has no room for them, and a base without them gets a head of two labels. The file holds the arguments of
`from_pretrained` with which the base gets the head that was trained: `num_labels`, `id2label`, `label2id` and `pad_token_id`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from rightrank.data.files import UnreadableError, read_json_object, write_text
from rightrank.models.places import BASE, CONFIG_FILE, read_header
from rightrank.schema.errors import ModelError

CLASSIFIER_FILE = "classifier.json"
HEADS = ("score", "classifier", "classifier.out_proj", "out_proj", "head", "summary", "logits_proj", "vocab_classifier")


def write_classifier(folder: Path, config: Any) -> None:
    """Write the file for a classifier with this configuration of transformers."""
    names = {int(number): str(label) for number, label in config.id2label.items()}
    arguments = {
        "num_labels": len(names),
        "id2label": {str(number): names[number] for number in sorted(names)},
        "label2id": {names[number]: number for number in sorted(names)},
    }
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    arguments |= {} if pad is None else {"pad_token_id": pad}  # the last token of a shorter row is found by it
    write_text(folder / CLASSIFIER_FILE, json.dumps(arguments, indent=2, ensure_ascii=False) + "\n")


def loading_lines(folder: str, base: str | None, is_classifier: bool) -> list[str]:
    """Python that loads a model with the adapter in `folder`: PEFT finds the base, but for one in a GGUF file."""
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
    loaded = f"base = {plain}.from_pretrained({base_arguments(base)}{more})"
    return [*imports, *head, loaded, f"model = PeftModel.from_pretrained(base, {folder!r})"]


def base_arguments(base: str) -> str:
    """What `from_pretrained` takes for a base: its name, or the folder and the name of a GGUF file."""
    path = PurePath(base)
    return f"{str(path.parent)!r}, gguf_file={path.name!r}" if path.suffix.lower() == ".gguf" else repr(base)


def _stored_labels(folder: Path) -> list[str] | None:
    """The labels in the order of the logits, as the adapter's folder states them; None where it does not.

    Raises:
        ModelError: a file that names no labels.
    """
    file = folder / CLASSIFIER_FILE
    if not file.is_file():
        return None
    try:
        return _in_order(read_json_object(file).get("id2label"))
    except (UnreadableError, ValueError) as error:
        raise ModelError(
            f"{file}: no labels ({error}); give id2label as {{'0': 'first label', '1': …}}, in the order of the logits"
        ) from None


def labels_of_side(side: str) -> list[str] | None:
    """The labels of an adapter or of a whole model, without loading it; None for no classifier, and for `base`.

    Where nothing names them, they are the numbers of the head's rows.
    """
    folder = Path(side)
    if side == BASE:
        return None
    if (folder / CONFIG_FILE).is_file():
        stored = _stored_labels(folder)
        count = None if stored is not None else _rows_of_head(folder)
        return stored if count is None else [str(number) for number in range(count)]
    return _labels_of_model(folder / "config.json")


def _rows_of_head(folder: Path) -> int | None:
    """The rows of the classification head in an adapter's weights; None where it has none."""
    task = read_json_object(folder / CONFIG_FILE).get("task_type")
    weights = folder / "adapter_model.safetensors"
    if task != "SEQ_CLS" or not weights.is_file():
        return None
    shapes = read_header(weights)[0]
    ends = tuple(f".{head}{saved}.weight" for head in HEADS for saved in ("", ".modules_to_save"))
    found = [shape[0] for name, shape in shapes.items() if name.endswith(ends) and ".lora_" not in name]
    return found[-1] if found else None


def _labels_of_model(file: Path) -> list[str] | None:
    config = read_json_object(file) if file.is_file() else {}
    if not any("SequenceClassification" in str(name) for name in config.get("architectures") or ()):
        return None
    try:
        names = _in_order(config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"})
    except ValueError:
        return None
    return [str(number) for number in range(len(names))] if _are_unnamed(names) else names


def _are_unnamed(names: Sequence[str]) -> bool:
    return all(name == f"LABEL_{number}" for number, name in enumerate(names))


def _in_order(id2label: Any) -> list[str]:
    if not isinstance(id2label, Mapping) or not id2label:
        raise ValueError("id2label is missing")
    by_number = {int(number): str(label) for number, label in id2label.items()}
    if sorted(by_number) != list(range(len(by_number))):
        raise ValueError(f"id2label numbers {', '.join(map(str, sorted(by_number)))}")
    return [by_number[number] for number in range(len(by_number))]


def adopted_labels(config: Any, classes: Sequence[str]) -> list[str]:
    """The labels in the order of the head of a model in memory: its own names, else the data's, which it then gets.

    Raises:
        ModelError: the model names other labels than the data.
    """
    names = [str(config.id2label[number]) for number in sorted(config.id2label)]
    if len(names) != len(classes) and not set(classes) <= set(names):
        return list(classes)  # `adopt_model` refuses the number
    if _are_unnamed(names):
        config.id2label = dict(enumerate(classes))
        config.label2id = {label: number for number, label in enumerate(classes)}
        return list(classes)
    if set(classes) <= set(names):
        return names
    if list(classes) == [str(number) for number in range(len(names))]:
        return list(classes)
    raise ModelError(
        f"model: its labels are {', '.join(names)}, and those of the data {', '.join(classes)}; give data with the model's "
        "labels, or with the numbers of its logits"
    )


def shared_labels(sides: Sequence[str]) -> list[str] | None:
    """The labels that both sides of a comparison have; None where neither is a classifier.

    Raises:
        ModelError: two classifiers of other labels, or of another order.
    """
    known = [(side, found) for side in sides if (found := labels_of_side(side)) is not None]
    if not known:
        return None
    (first, labels), *others = known
    for side, theirs in others:
        if theirs != labels:
            raise ModelError(
                f"{side}: its labels are {', '.join(theirs)}, and those of {first} are {', '.join(labels)}: classifiers are "
                "compared with the same labels in the same order"
            )
    return labels
