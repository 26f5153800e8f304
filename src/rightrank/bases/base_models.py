"""Load a base model and its tokenizer from a local folder, a hub name, or a GGUF file; identify it, and compare it with a folder."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from pydantic import JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
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

from rightrank.bases.model_sources import find_model
from rightrank.bases.safetensors_files import find_shards
from rightrank.data.files import UnreadableError, read_json_object
from rightrank.schema.errors import (
    DeviceMemoryError,
    MissingExtraError,
    ModelError,
    SettingsError,
    get_first_line,
    is_out_of_memory,
)
from rightrank.schema.settings import AutoDtype, DtypeName, SelectSettings
from rightrank.schema.trials import Record

DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# The errors that transformers raises, depending on the model, for files that it does not know, can't read or can't build from. A
# damaged configuration, for example, gives a ZeroDivisionError for 0 attention heads and an AssertionError for a padding token beyond the
# vocabulary. They are caught only around calls of transformers, and stay the cause of the error of one line.
LOADING_ERRORS = (
    OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, AssertionError,
    ImportError, SafetensorError, StrictDataclassError,
)  # fmt: skip
# Values of a configuration that change a model's output and no shape of a weight.
CONFIG_KEYS = (
    "model_type", "num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps", "layer_norm_eps", "rope_parameters",
    "sliding_window",
)  # fmt: skip
ROUNDING = 2.0**-7  # relative, of a value in bfloat16
IDENTITY_MATRICES = 64  # number of matrices whose values identify a base model
# Fragments of the names of weights that the adapter brings itself, or that it replaces.
ADAPTER_FRAGMENTS = (".lora_", ".modules_to_save.", ".original_module.", "trainable_tokens_")
MIN_SUFFIX_LENGTH = (
    3  # components that a weight's name and its name in a file must share at the end if neither contains the other
)


class BaseIdentity(Record):
    """Values that identify a base model among others of the same shapes: the content of `base.json` beside an adapter."""

    name: str
    config: dict[str, JsonValue]  # values that change the output and no shape
    weights: dict[str, tuple[float, float]]  # values at a quarter and at three quarters of some matrices

    def to_json(self) -> bytes:
        return self.model_dump_json(indent=1).encode()

    def find_difference(self, other_identity: BaseIdentity) -> str | None:
        """Describe the first configuration value or weight in which two base models differ; return None if they are the same.

        Weights may differ by the rounding of a copy in 16 bits.
        """
        for key in CONFIG_KEYS:
            values = [base.config.get(key) for base in (self, other_identity)]
            if None not in values and values[0] != values[1]:
                return f"its {key} is {values[0]}, here it is {values[1]}"
        common = [name for name in self.weights if name in other_identity.weights]
        differing_names = [
            name
            for name in common
            for ours, theirs in zip(self.weights[name], other_identity.weights[name], strict=True)
            if not math.isclose(ours, theirs, rel_tol=ROUNDING, abs_tol=1e-6)
        ]
        num_differing = len(dict.fromkeys(differing_names))
        return (
            f"{differing_names[0]} has other values ({num_differing} of {len(common)} compared weights differ)"
            if differing_names
            else None
        )


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A frozen base model in evaluation mode on its device, with its tokenizer."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    name: str
    fingerprint: str
    device: torch.device
    identity: BaseIdentity  # stored in an adapter's folder


def resolve_dtype(name: AutoDtype, device: str) -> DtypeName:
    """Return the dtype that `auto` means on a device: bfloat16 if it is a CUDA device that computes in it, else float32.

    Raises:
        SettingsError: The device does not exist.
    """
    if name != "auto":
        return name
    torch_device = find_device(device)
    has_bfloat16 = torch_device.type == "cuda" and torch.cuda.get_device_capability(torch_device) >= (8, 0)
    return "bfloat16" if has_bfloat16 else "float32"


def load_base(reference: str, settings: SelectSettings, classes: Sequence[str] | None) -> LoadedModel:
    """Load a causal language model, or a model with a classification head if `classes` are given.

    With 4 or 8 bits, bitsandbytes quantizes the matrices on loading.

    Raises:
        ModelError: There are no weights or no tokenizer, or transformers can't load the model.
        DeviceMemoryError: The device is out of memory.
        SettingsError: The device does not exist, or does not support quantized matrices.
        MissingExtraError: Quantized weights need bitsandbytes.
    """
    trust_remote_code, weight_bits = settings.trust_remote_code, settings.weight_bits
    device, dtype = find_device(settings.device), resolve_dtype(settings.dtype, settings.device)
    source, gguf = find_model(reference)
    if not gguf and Path(source).is_dir():
        find_shards(Path(source))
    config = load_model_config(reference, trust_remote_code, classes is not None)
    quantization: dict[str, Any] = {}
    if weight_bits is not None:
        skeleton = build_meta_model(config, trust_remote_code, None if classes is None else len(classes))
        trained_modules = [
            *settings.modules_to_save,
            *(SEQ_CLS_HEAD_NAMES if classes is not None else ()),
        ]  # PEFT trains these modules in full precision
        quantization = _build_quantisation_arguments(
            weight_bits, dtype, device, [*get_keys_to_not_convert(skeleton), *trained_modules]
        )
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code} | gguf
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **arguments)
    except LOADING_ERRORS as error:
        reason = get_first_line(error)
        raise ModelError(f"{reference}: no usable tokenizer ({reason}); save the tokenizer into the folder") from error
    arguments |= {"dtype": DTYPES[dtype], "use_safetensors": not gguf} | quantization
    try:
        model = _load_weights(source, classes, config, arguments)
    except LOADING_ERRORS as error:
        if is_out_of_memory(error):
            raise DeviceMemoryError(f"{reference}: out of memory while loading ({get_first_line(error)})") from None
        hint = settings.load_error_hint("give a model that it loads")
        raise ModelError(f"{reference}: transformers can't load it ({get_first_line(error)}); {hint}") from error
    local = Path(source).exists()
    name = str(Path(reference).expanduser().resolve()) if local else reference  # adapters name their base by it
    return prepare_model(model, tokenizer, name, device)


def load_model_config(reference: str, trust_remote_code: bool, classification: bool) -> Any:
    """Load the configuration of a trainable model, before any weight is read.

    Raises:
        ModelError: There is no configuration, or the architecture is unknown, an encoder-decoder, or needs its own code.
    """
    source, gguf = find_model(reference)
    logging: Any = transformers_logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **gguf)
    except LOADING_ERRORS as error:
        raise ModelError(f"{reference}: transformers does not know this model ({get_first_line(error)})") from error
    if config.is_encoder_decoder and not classification:
        raise ModelError(
            f"{reference}: an encoder-decoder model such as T5, which select can't train; give a causal model, or use a "
            "custom trainer (select_rank_with)"
        )
    if not is_supported(config, classification) and not trust_remote_code:
        kind = "sequence classification" if classification else "causal language"
        hint = (
            ""
            if not is_supported(config, True)
            else "; `text` and `label` train a classifier, which is planned with num_labels"
        )
        raise ModelError(f"{reference}: {config.model_type!r} is no {kind} model that transformers knows{hint}")
    return config


def is_supported(config: Any, classification: bool) -> bool:
    auto: Any = AutoModelForSequenceClassification if classification else AutoModelForCausalLM
    return type(config) in auto._model_mapping


def build_meta_model(config: Any, trust_remote_code: bool, num_labels: int | None, **options: Any) -> Any:
    """Build the modules of a model on the meta device, without weights; with a classification head if `num_labels` is given.

    Args:
        options: Additional arguments of transformers' `from_config`.

    Raises:
        ModelError: transformers can't build a model from the configuration.
    """
    config = copy.deepcopy(config)
    auto: Any = AutoModelForCausalLM
    if num_labels is not None:
        auto, config.num_labels = AutoModelForSequenceClassification, num_labels
    try:
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=trust_remote_code, **options)
    except LOADING_ERRORS as error:
        raise ModelError(
            f"{config.model_type}: transformers cannot build the model ({get_first_line(error)})"
        ) from error


def _load_weights(name: str, classes: Sequence[str] | None, config: Any, arguments: Mapping[str, Any]) -> Any:
    torch.manual_seed(0)  # the same new classification head in every run
    if classes is None:
        return AutoModelForCausalLM.from_pretrained(name, config=config, **arguments)
    config.id2label = dict(enumerate(classes))
    config.label2id = {label: number for number, label in enumerate(classes)}
    return AutoModelForSequenceClassification.from_pretrained(name, config=config, **arguments)


def prepare_model(model: Any, tokenizer: Any, name: str, device: torch.device) -> LoadedModel:
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
    identity = compute_base_identity(model, name)
    return LoadedModel(model, tokenizer, name, _hash_model(model, identity), device, identity)


def adopt_model(model: Any, tokenizer: Any, device: str, classes: list[str] | None) -> LoadedModel:
    """Freeze a model in memory, put it in evaluation mode, and move it to the device.

    Raises:
        ModelError: It is no transformers model, has no tokenizer, or its head does not match the classes of the data.
        SettingsError: The device does not exist.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"model: got {type(model).__name__}; give a transformers model, a folder, or a hub name")
    if tokenizer is None:
        raise ModelError("model: it is in memory and has no tokenizer; give tokenizer=...")
    if classes is not None and getattr(model.config, "num_labels", None) != len(classes):
        raise ModelError(
            f"model: a head of {getattr(model.config, 'num_labels', 0)} labels for data of {len(classes)} classes "
            f"({', '.join(classes[:5])}); give a sequence classification model with num_labels={len(classes)}"
        )
    name = model.name_or_path or type(model).__name__
    return prepare_model(model, tokenizer, name, find_device(device))


def align_labels(config: Any, classes: Sequence[str]) -> list[str]:
    """Return the labels in the order of the head of a model in memory.

    A head without label names gets those of the data.

    Raises:
        ModelError: The model has other labels than the data.
    """
    names = [str(config.id2label[number]) for number in sorted(config.id2label)]
    if len(names) != len(classes) and not set(classes) <= set(names):
        return list(classes)  # `adopt_model` refuses the number
    if has_default_names(names):
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


def has_default_names(names: Sequence[str]) -> bool:
    return all(name == f"LABEL_{number}" for number, name in enumerate(names))


def _build_quantisation_arguments(
    bits: int, dtype: DtypeName, device: torch.device, unquantised: Sequence[str]
) -> dict[str, Any]:
    """Return the arguments with which transformers quantizes a model on loading.

    With 4 bits the matrices are NF4 with products in `dtype` (QLoRA, Dettmers et al. 2023). With 8 bits they are LLM.int8().

    Args:
        unquantised: Ends of the names of modules that are not quantized.

    Raises:
        SettingsError: The device does not support quantized matrices.
        MissingExtraError: bitsandbytes is not installed.
    """
    if device.type not in ("cuda", "cpu"):
        raise SettingsError(
            f"load_in_{bits}bit: bitsandbytes has no {bits}-bit matrices on {device}; give device cuda or cpu"
        )
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError(f"load_in_{bits}bit needs the `bitsandbytes` package: pip install 'rightrank[bnb]'")

    make: Callable[..., BitsAndBytesConfig] = BitsAndBytesConfig  # untyped in transformers
    options: dict[str, Any] = {"llm_int8_skip_modules": [*unquantised], f"load_in_{bits}bit": True}
    if bits == 4:
        options |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": DTYPES[dtype]}
    return {"quantization_config": make(**options), "device_map": {"": device}}


def find_device(name: str) -> torch.device:
    """Return the device with a name; `auto` is CUDA if there is one, else MPS, else the CPU.

    Raises:
        SettingsError: The device does not exist.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        return torch.device(available[0])
    device = torch.device(name)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in available or (device.index or 0) >= count:
        raise SettingsError(f"device {name!r} does not exist; this machine has {', '.join(available)}")
    return device


def read_device_memory() -> int | None:
    """Return the memory of the first CUDA device in bytes, or None without CUDA."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _hash_model(model: Any, identity: BaseIdentity) -> str:
    """Return a hash of a model's configuration, and of the names, shapes and first values of its parameters."""
    digest = hashlib.sha256(json.dumps(identity.config, sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        values = parameter.detach().reshape(-1)[:64].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def read_identity(file: Path) -> BaseIdentity:
    """Read the `base.json` of an adapter.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        return BaseIdentity.model_validate(read_json_object(file))
    except (UnreadableError, ValidationError) as error:
        raise ModelError(
            f"{file}: this file does not identify a base model ({get_first_line(error)}); copy the adapter again, or remove the file"
        ) from None


def compute_base_identity(model: Any, name: str) -> BaseIdentity:
    """Compute the identity of a base model in memory, with or without an adapter.

    Quantized matrices and classification heads are left out.
    """
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    prefix = f"{model.base_model_prefix}." if is_classifier else ""
    matrices = {
        clean: parameter
        for path, parameter in model.named_parameters()
        if (clean := path.replace(".base_layer.", ".")).startswith(prefix) and ".lora_" not in path
    }
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    embedding_names = [key for key, parameter in matrices.items() if parameter is embedding]
    # The choice does not depend on a head: the embedding, and the matrices whose names have the lowest hashes.
    sorted_names = sorted(
        (name for name, parameter in matrices.items() if parameter.dtype in DTYPES.values() and parameter.dim() > 1),
        key=lambda key: (key not in embedding_names, hashlib.sha256(key.encode()).digest()),
    )
    weights: dict[str, tuple[float, float]] = {}
    for key in sorted_names[:IDENTITY_MATRICES]:
        flat = matrices[key].detach().reshape(-1)
        sample = float(flat[len(flat) // 4]), float(flat[len(flat) * 3 // 4])
        if all(map(math.isfinite, sample)):
            weights[key] = sample
    config = model.config.to_dict()
    config_values = {key: config[key] for key in CONFIG_KEYS if config.get(key) is not None}
    return BaseIdentity(name=name, config=config_values, weights=weights)


def require_named_base(base: Any, name: str, index: int, step: int) -> None:
    """Raise if a base model in memory has other weights than the folder that it names, as far as that holds them under these names.

    Args:
        base: The model, with an adapter injected into it.
        name: The folder, or a name in the cache of the hub.
        index: Number of this process; it compares each `step`-th weight.

    Raises:
        ModelError: A weight differs, by more than the rounding to its type or to 16 bits.
    """
    if not name:
        return
    folder = _find_folder(name, getattr(base.config, "_commit_hash", None))
    weights = {
        key.replace(".base_layer.", "."): parameter
        for key, parameter in base.named_parameters()
        if not parameter.requires_grad and not any(fragment in f".{key}" for fragment in ADAPTER_FRAGMENTS)
    }
    try:
        files = [] if folder is None else find_shards(folder)
    except ModelError:  # weights in another format
        files = []
    with ExitStack() as stack, torch.no_grad():
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        stored = {key: file for file in opened for key in file.keys()}  # noqa: SIM118 - the file is no mapping
        names_by_suffix = _index_suffixes(list(stored))
        for key, value in list(weights.items())[index::step]:
            candidates = _find_candidates(key, names_by_suffix)
            if not candidates or not value.is_floating_point() or value.is_meta:
                continue
            if not any(_is_equal(value, stored[candidate].get_tensor(candidate)) for candidate in candidates):
                raise ModelError(
                    f"the base model in memory has other weights ({key}) than {name}, which its adapter would name; save it by save_pretrained, "
                    "load it from there, and add the adapter then"
                )


def _find_folder(name: str, revision: str | None) -> Path | None:
    """Return the folder that holds the files of a model, or None if it is not on this machine."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _index_suffixes(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the names by each of their endings of whole components."""
    names_by_suffix: dict[str, list[str]] = {}
    for name in names:
        components = name.split(".")
        for start in range(len(components)):
            names_by_suffix.setdefault(".".join(components[start:]), []).append(name)
    return names_by_suffix


def _find_candidates(name: str, names_by_suffix: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """Return the names in a file that share the longest ending with a weight's name. transformers adds and drops prefixes."""
    components = name.split(".")
    for start in range(len(components)):
        suffix = ".".join(components[start:])
        names = names_by_suffix.get(suffix, ())
        if names and (start == 0 or suffix in names or len(components) - start >= MIN_SUFFIX_LENGTH):
            return names
    return ()


def _is_equal(value: torch.Tensor, stored: torch.Tensor) -> bool:
    """Return whether a weight is the stored one in its own type. It may have been rounded to 16 bits when it was loaded."""
    if value.shape != stored.shape:
        return False
    stored = stored.to(value.device)
    rounded = (stored.to(dtype) for dtype in (value.dtype, torch.bfloat16, torch.float16))
    return any(torch.equal(value, each.to(value.dtype)) for each in rounded)
