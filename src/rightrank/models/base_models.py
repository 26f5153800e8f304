"""Loads a base model and its tokenizer from a local folder, a hub name, or a GGUF file."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from pydantic import JsonValue
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils import logging as transformers_logging

from rightrank.models.model_sources import ModelSource, find_model
from rightrank.models.safetensors_files import safe_shards
from rightrank.schema.errors import (
    LIBRARY_ERRORS,
    DeviceMemoryError,
    MissingExtraError,
    ModelError,
    SettingsError,
    first_line,
    is_out_of_memory,
)
from rightrank.schema.settings import AutoDtype, DtypeName, SelectSettings
from rightrank.schema.trials import Record

DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What transformers raises, depending on the model, for files that it does not know, can't read or can't build from.
LOADING_ERRORS = (*LIBRARY_ERRORS, ImportError, SafetensorError, StrictDataclassError)
# Values of a configuration that change a model's output and no shape of a weight.
CONFIG_KEYS = (
    "model_type", "num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps", "layer_norm_eps", "rope_parameters",
    "sliding_window",
)  # fmt: skip
MATRICES = 64  # of a base that are looked at
_FINGERPRINT_BYTES = 2**20  # at the beginning and end of each weight file


class BaseIdentity(Record):
    """What tells a base from another of the same shapes, whatever its folder is called: `base.json` beside an adapter."""

    name: str
    config: dict[str, JsonValue]  # what changes its output and no shape
    weights: dict[str, tuple[float, float]]  # values at a quarter and at three quarters of some matrices

    def content(self) -> bytes:
        """Of `base.json`."""
        return self.model_dump_json(indent=1).encode()

    def difference(self, other: BaseIdentity) -> str | None:
        """The first configuration value or weight in which two bases differ, in words; None where they are one.

        Weights of one precision are equal; of a copy in 16 bits they may differ by its rounding.
        """
        for key in CONFIG_KEYS:
            values = [base.config.get(key) for base in (self, other)]
            if None not in values and values[0] != values[1]:
                return f"its {key} is {values[0]}, here it is {values[1]}"
        common = [name for name in self.weights if name in other.weights]
        precisions = {_precision([value for name in common for value in base.weights[name]]) for base in (self, other)}
        relative, absolute = (2.0**-7, 1e-6) if len(precisions) > 1 else (0.0, 0.0)
        odd = [
            name
            for name in common
            for mine, theirs in zip(self.weights[name], other.weights[name], strict=True)
            if not math.isclose(mine, theirs, rel_tol=relative, abs_tol=absolute)
        ]
        others = len(dict.fromkeys(odd))
        return (
            f"{odd[0]} has other values, as have {others} of {len(common)} weights that were looked at" if odd else None
        )


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A frozen base model in evaluation mode on its device, with its tokenizer."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    name: str
    fingerprint: str
    device: torch.device
    identity: BaseIdentity  # what an adapter's folder keeps of it


def resolve_dtype(name: AutoDtype, device: str) -> DtypeName:
    """The type that `auto` means on this device: bfloat16 where a CUDA device computes in it, else float32.

    Raises:
        SettingsError: the device does not exist.
    """
    if name != "auto":
        return name
    place = find_device(device)
    with_bfloat16 = place.type == "cuda" and torch.cuda.get_device_capability(place) >= (8, 0)
    return "bfloat16" if with_bfloat16 else "float32"


def load_base(reference: str, settings: SelectSettings, classes: Sequence[str] | None) -> LoadedModel:
    """Load for causal language modelling, or with a classification head when `classes` are given, as the settings say.

    In 4 or 8 bits the matrices are quantised on loading, with bitsandbytes.

    Raises:
        ModelError: no weights, no tokenizer, or a model that transformers can't load.
        DeviceMemoryError: out of memory while loading.
        SettingsError: the device does not exist, or does not support quantised matrices.
        MissingExtraError: quantised weights without bitsandbytes.
    """
    trust_remote_code, weight_bits = settings.trust_remote_code, settings.weight_bits
    device, dtype = find_device(settings.device), resolve_dtype(settings.dtype, settings.device)
    source = find_model(reference)
    if source.gguf_file is None and Path(source.name).is_dir():
        safe_shards(Path(source.name))
    config = model_config(reference, trust_remote_code, classes is not None)
    quantised: dict[str, Any] = {}
    if weight_bits is not None:
        skeleton = model_skeleton(config, trust_remote_code, None if classes is None else len(classes))
        trained = [*settings.modules_to_save, *(SEQ_CLS_HEAD_NAMES if classes is not None else ())]  # whole, by PEFT
        quantised = _quantisation(weight_bits, dtype, device, [*get_keys_to_not_convert(skeleton), *trained])
    arguments = source.loading_arguments(trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name, **arguments)
    except LOADING_ERRORS as error:
        reason = first_line(error)
        raise ModelError(f"{reference}: no usable tokenizer ({reason}); save the tokenizer into the folder") from None
    arguments |= {"dtype": DTYPES[dtype], "use_safetensors": source.gguf_file is None} | quantised
    try:
        model = _loaded(source.name, classes, config, arguments)
    except LOADING_ERRORS as error:
        if is_out_of_memory(error):
            raise DeviceMemoryError(f"{reference}: out of memory while loading ({first_line(error)})") from None
        fault = settings.load_error_hint("give a model that it loads")
        raise ModelError(f"{reference}: transformers can't load it ({first_line(error)}); {fault}") from None
    local = Path(source.name).exists()
    name = str(Path(reference).expanduser().resolve()) if local else reference  # adapters name their base by it
    return prepare_model(model, tokenizer, name, device, _file_fingerprint(source))


def model_config(reference: str, trust_remote_code: bool, classification: bool) -> Any:
    """The configuration of a model that can be trained, before any weight is read.

    Raises:
        ModelError: no configuration, an unknown architecture, an encoder-decoder, or one that needs its own code.
    """
    source = find_model(reference)
    logging: Any = transformers_logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(source.name, **source.loading_arguments(trust_remote_code))
    except LOADING_ERRORS as error:
        raise ModelError(f"{reference}: transformers knows no such model ({first_line(error)})") from None
    if config.is_encoder_decoder and not classification:
        raise ModelError(
            f"{reference}: an encoder-decoder, as T5, which select does not train; give a causal model, or train it in a "
            "function of your own (select_rank_with)"
        )
    if not is_known(config, classification) and not trust_remote_code:
        kind = "sequence classification" if classification else "causal language"
        other = (
            ""
            if not is_known(config, True)
            else "; `text` and `label` train a classifier, which is planned with num_labels"
        )
        raise ModelError(f"{reference}: {config.model_type!r} is no {kind} model that transformers knows{other}")
    return config


def is_known(config: Any, classification: bool) -> bool:
    """Whether transformers has a causal language (or classification) model for this configuration."""
    auto: Any = AutoModelForSequenceClassification if classification else AutoModelForCausalLM
    return type(config) in auto._model_mapping


def model_skeleton(config: Any, trust_remote_code: bool, num_labels: int | None, **options: Any) -> Any:
    """The model's modules on the meta device, without weights; with a classification head for `num_labels`.

    Args:
        options: of transformers' `from_config`.

    Raises:
        ModelError: a configuration that transformers can't build from.
    """
    config = copy.deepcopy(config)
    auto: Any = AutoModelForCausalLM
    if num_labels is not None:
        auto, config.num_labels = AutoModelForSequenceClassification, num_labels
    try:
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=trust_remote_code, **options)
    except LOADING_ERRORS as error:
        raise ModelError(f"{config.model_type}: transformers cannot build the model ({first_line(error)})") from None


def _loaded(name: str, classes: Sequence[str] | None, config: Any, arguments: Mapping[str, Any]) -> Any:
    torch.manual_seed(0)  # the same new classification head in every run
    if classes is None:
        return AutoModelForCausalLM.from_pretrained(name, config=config, **arguments)
    config.id2label = dict(enumerate(classes))
    config.label2id = {label: number for number, label in enumerate(classes)}
    return AutoModelForSequenceClassification.from_pretrained(name, config=config, **arguments)


def prepare_model(
    model: Any, tokenizer: Any, name: str, device: torch.device, fingerprint: str | None = None
) -> LoadedModel:
    """Freeze a model, put it in evaluation mode and move it to `device`."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"{name}: the tokenizer has no padding, end or unknown token to pad with; set tokenizer.pad_token"
        )
    model.requires_grad_(False)
    model.eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On a CPU, bitsandbytes repacks 4-bit weights in evaluation mode for a product without a gradient:
            # adapters would then silently learn nothing.
            module.support_avx512bf16_for_cpu = False
    if not getattr(model, "is_quantized", False):  # quantised models are loaded on their device and can't be moved
        model.to(device)
    identity = base_identity(model, name)
    return LoadedModel(model, tokenizer, name, fingerprint or _parameter_fingerprint(model), device, identity)


def adopt_model(model: Any, tokenizer: Any, device: str, classes: list[str] | None) -> LoadedModel:
    """Use a model and tokenizer from memory. The model is frozen, put in evaluation mode and moved to the device.

    Raises:
        ModelError: not a transformers model, no tokenizer, or a head that does not match the data's classes.
        SettingsError: the device does not exist.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"model: got a {type(model).__name__}; give a transformers model, a folder, or a hub name")
    if tokenizer is None:
        raise ModelError("model: it is in memory and has no tokenizer; give tokenizer=...")
    if classes is not None and getattr(model.config, "num_labels", None) != len(classes):
        raise ModelError(
            f"model: a head of {getattr(model.config, 'num_labels', 0)} labels for data of {len(classes)} classes "
            f"({', '.join(classes[:5])}); give a sequence classification model with num_labels={len(classes)}"
        )
    name = model.name_or_path or type(model).__name__
    return prepare_model(model, tokenizer, name, find_device(device))


def adopted_labels(config: Any, classes: Sequence[str]) -> list[str]:
    """The labels in the order of the head of a model in memory: its own names, else the data's, which it then gets.

    Raises:
        ModelError: the model names other labels than the data.
    """
    names = [str(config.id2label[number]) for number in sorted(config.id2label)]
    if len(names) != len(classes) and not set(classes) <= set(names):
        return list(classes)  # `adopt_model` refuses the number
    if are_unnamed(names):
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


def are_unnamed(names: Sequence[str]) -> bool:
    return all(name == f"LABEL_{number}" for number, name in enumerate(names))


def _quantisation(bits: int, dtype: DtypeName, device: torch.device, whole: Sequence[str]) -> dict[str, Any]:
    """transformers' arguments. 4 bits: NF4 with products in `dtype` (QLoRA, Dettmers et al. 2023). 8 bits: LLM.int8().

    Modules whose names end with one of `whole` stay as they are.

    Raises:
        SettingsError: the device does not support quantised matrices.
        MissingExtraError: without bitsandbytes.
    """
    if device.type not in ("cuda", "cpu"):
        raise SettingsError(
            f"load_in_{bits}bit: bitsandbytes has no {bits}-bit matrices on {device}; give device cuda or cpu"
        )
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError(f"load_in_{bits}bit needs the `bitsandbytes` package: pip install 'rightrank[bnb]'")

    make: Callable[..., BitsAndBytesConfig] = BitsAndBytesConfig  # untyped in transformers
    options: dict[str, Any] = {"llm_int8_skip_modules": [*whole], f"load_in_{bits}bit": True}
    if bits == 4:
        options |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": DTYPES[dtype]}
    return {"quantization_config": make(**options), "device_map": {"": device}}


def find_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA, else MPS, else the CPU.

    Raises:
        SettingsError: unknown or not there.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        return torch.device(available[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingsError(f"device {name!r} is not known; this machine has {', '.join(available)}") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in available or (device.index or 0) >= count:
        raise SettingsError(f"device {name!r} does not exist; this machine has {', '.join(available)}")
    return device


def device_memory() -> int | None:
    """Memory of the first CUDA device in bytes; None without CUDA."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _parameter_fingerprint(model: Any) -> str:
    """A hash of the names, shapes and first values of a model's parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().reshape(-1)[:64].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def base_identity(model: Any, name: str) -> BaseIdentity:
    """Of a model in memory, with or without an adapter around it. Quantised matrices and a head of classes are left out."""
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    prefix = f"{model.base_model_prefix}." if is_classifier else ""
    matrices = {
        clean: parameter
        for path, parameter in model.named_parameters()
        if (clean := path.replace(".base_layer.", ".")).startswith(prefix) and ".lora_" not in path
    }
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    first = [key for key, parameter in matrices.items() if parameter is embedding]
    # the same of a model with and without a head: the embedding, and those whose names have the lowest hashes
    order = sorted(
        (name for name, parameter in matrices.items() if parameter.dtype in DTYPES.values() and parameter.dim() > 1),
        key=lambda key: (key not in first, hashlib.sha256(key.encode()).digest()),
    )
    weights: dict[str, tuple[float, float]] = {}
    for key in order[:MATRICES]:
        whole: Any = getattr(matrices[key], "full_tensor", None)  # of a sharded one
        flat = (matrices[key] if whole is None else whole()).detach().reshape(-1)
        pair = float(flat[len(flat) // 4]), float(flat[len(flat) * 3 // 4])
        if all(map(math.isfinite, pair)):
            weights[key] = pair
    config = model.config.to_dict()
    known = {key: config[key] for key in CONFIG_KEYS if config.get(key) is not None}
    return BaseIdentity(name=name, config=known, weights=weights)


def _precision(values: Sequence[float]) -> torch.dtype:
    """The coarsest type that holds all values."""
    exact = torch.tensor(values, dtype=torch.float64)
    types = (torch.bfloat16, torch.float16)
    return next((dtype for dtype in types if torch.equal(exact.to(dtype).double(), exact)), torch.float32)


def _file_fingerprint(source: ModelSource) -> str | None:
    """A hash of the configuration and of each weight file's size, beginning and end; None for a hub name."""
    folder = Path(source.name)
    if not folder.is_dir():
        return None
    if source.gguf_file is not None:
        files = [folder / source.gguf_file]
    else:
        files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(json.dumps([path.name, size]).encode())
        with path.open("rb") as file:
            digest.update(file.read(_FINGERPRINT_BYTES))
            file.seek(max(0, size - _FINGERPRINT_BYTES))
            digest.update(file.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()
