"""Build the model without weights: on the meta device, from its configuration, with adapters that PEFT itself attaches.

Only `config.json` (or a GGUF header) is downloaded or read, and a model's own code runs only with `trust_remote_code`.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from rightrank.bases.base_models import DTYPES, build_meta_model, load_model_config
from rightrank.bases.model_sources import require_model
from rightrank.schema.errors import ModelError, get_first_line
from rightrank.schema.plan_settings import PlanSettings
from rightrank.training.targets import (
    ALL_LINEAR,
    TargetModule,
    build_common_fields,
    find_adapted_matrices,
    find_target_parameters,
    find_unadaptable_names,
    require_targets,
    resolve_target_names,
)

MAX_SIZE = 2**40
# Counts that the plan iterates over: layers, experts, and the vocabulary, which a chunked loss processes in pieces.
MAX_COUNTS = {re.compile(r"num_.*layers"): 1000, re.compile(r".*experts"): 2**14, re.compile(r"vocab_size"): 2**22}
SAFETENSORS_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.int8: "I8",
}


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A PEFT model on the meta device."""

    model: Any  # PeftModel
    targets: tuple[TargetModule, ...]
    arms: tuple[str, ...]  # adapter names
    base_parameters: int  # of the model without adapters
    quantised_bytes: Mapping[torch.Tensor, int]  # of the weights in 4 or 8 bits, which the model itself has in full

    @property
    def base(self) -> Any:
        return self.model.get_base_model()

    def list_trainable_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def read_config(reference: str, trust_remote_code: bool, classification: bool = False) -> Any:
    """Read the configuration of a model folder, a GGUF file or a hub name."""
    require_model(reference)
    config = load_model_config(reference, trust_remote_code, classification)
    text = config.get_text_config()
    _require_sane_sizes(reference, config, text)
    text.use_cache = False  # as the Trainer of transformers sets it
    return config


def _require_sane_sizes(reference: str, config: Any, text: Any) -> None:
    """Raise if the configuration is so large that building it would never end."""
    heads, groups = getattr(text, "num_attention_heads", 1), getattr(text, "num_key_value_heads", None) or 1
    if isinstance(heads, int) and isinstance(groups, int) and (heads < 1 or groups < 1 or heads % min(heads, groups)):
        raise ModelError(
            f"{reference}: {heads} heads are not a multiple of {groups} key-value heads; restore config.json"
        )
    aliases = {name: getattr(text, name, None) for name in ("num_hidden_layers", "vocab_size")}
    for name, value in _iterate_integers(config.to_dict() | {"text": aliases}):
        limit = min([MAX_SIZE, *(max_count for pattern, max_count in MAX_COUNTS.items() if pattern.fullmatch(name))])
        if abs(value) > limit:
            raise ModelError(
                f"{reference}: {name} is {value}, more than any model has (at most {limit}); restore config.json"
            )


def _iterate_integers(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the integers of a configuration and of nested configurations, such as the one of an image encoder."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _iterate_integers(value)
        elif isinstance(value, int):
            yield str(name), value


def build_skeleton(config: Any, settings: PlanSettings, rank: int, arms: int = 1) -> Skeleton:
    """Build the model of a configuration with an adapter of `rank` for each arm, attached by PEFT.

    Raises:
        ModelError: transformers cannot build the model, a target matches no module, or PEFT cannot adapt a target.
    """
    model = _build_base(config, settings)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    quantised = _quantise(model, settings)
    require_targets(model, settings, settings.num_labels is not None)
    names = ("default", *(f"arm_{number}" for number in range(1, arms)))
    try:
        with warnings.catch_warnings(action="ignore"), torch.device("meta"):  # a user cannot act on them
            config = _build_lora_config(model, settings, rank)
            config.init_lora_weights = False  # meta tensors have no values to initialise
            adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
            for name in names[1:]:
                adapted.add_adapter(name, copy.deepcopy(config), low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:
        raise ModelError(f"PEFT cannot adapt the model ({get_first_line(error)})") from None
    for name, parameter in adapted.named_parameters():
        if not set(names[1:]).isdisjoint(name.split(".")):
            parameter.requires_grad_(True)  # PEFT trains only the active adapter
    return Skeleton(adapted, tuple(find_adapted_matrices(adapted.get_base_model())), names, parameters, quantised)


def _build_base(config: Any, settings: PlanSettings) -> Any:
    """Build the base model on the meta device, frozen."""
    # With None, transformers chooses: torch's fused attention for the models that support it.
    attention = "eager" if settings.attn_implementation == "eager" else None
    unquantised_config = copy.deepcopy(config)
    if hasattr(unquantised_config, "quantization_config"):
        del unquantised_config.quantization_config  # the bytes follow from `_quantise`
    text = unquantised_config.get_text_config()
    if settings.num_labels is not None and getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = text.vocab_size - 1  # as on loading: batches of several rows need a padding token
    dtype, trust_remote_code = DTYPES[settings.dtype], settings.trust_remote_code
    model = build_meta_model(
        unquantised_config, trust_remote_code, settings.num_labels, dtype=dtype, attn_implementation=attention
    )
    model.requires_grad_(False)
    return model


def _build_lora_config(model: Any, settings: PlanSettings, rank: int) -> LoraConfig:
    """Build PEFT's configuration of an adapter of `rank` under these settings."""
    targets = settings.target_modules
    classification = settings.num_labels is not None
    # PEFT needs module names to choose layers, and `select` excludes experts.
    by_name = settings.loss == "chunked" or settings.packed or settings.layers_to_transform is not None
    if by_name or find_unadaptable_names(model, classification):
        targets, _ = resolve_target_names(model, settings, classification)
    parameters = find_target_parameters(model, settings)
    return LoraConfig(
        r=rank,
        target_modules=ALL_LINEAR if targets == (ALL_LINEAR,) else (list(targets) or None),
        target_parameters=parameters or None,
        **build_common_fields(settings, settings.num_labels is not None),
    )


BLOCK, CODE_BYTES = 64, 64  # weights that share a 4-bit constant, and the table of 16 values
CLASSIFICATION_HEADS = ("score", "classifier")  # fully trained, which is PEFT's default for classification


class _QuantisedLinear(torch.nn.Linear):
    """A linear layer whose weight is stored in 4 or 8 bits. With 8, bitsandbytes keeps the input rows, even where blocks are recomputed."""

    keeps_rows = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.rows = input.detach() if self.keeps_rows and torch.is_grad_enabled() else None
        return super().forward(input)


def _quantise(model: Any, settings: PlanSettings) -> dict[torch.Tensor, int]:
    """Replace the model's linear modules, except the output head, if the settings request 4 or 8 bits.

    Returns:
        The bytes in which bitsandbytes 0.50 stores each of their weights. With 4 bits, a byte stores two weights, and every 64 weights share a
        float32 constant. With 8 bits, a byte stores one weight, and every row has a float32 constant.
    """
    bits, head = settings.weight_bits, model.get_output_embeddings()
    whole_modules = {*settings.modules_to_save, *(CLASSIFICATION_HEADS if settings.num_labels is not None else ())}
    stored_bytes: dict[torch.Tensor, int] = {}
    for name, module in list(model.named_modules()) if bits is not None else ():
        is_transposed = type(module).__name__ == "Conv1D"
        if not (is_transposed or isinstance(module, torch.nn.Linear)) or module is head:
            continue
        if not whole_modules.isdisjoint(name.split(".")):
            continue
        rows, columns = reversed(module.weight.shape) if is_transposed else module.weight.shape
        layer = _QuantisedLinear(columns, rows, bias=False, device="meta", dtype=module.weight.dtype)
        layer.bias, layer.keeps_rows = module.bias, bits == 8
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.requires_grad_(False))
        packed_bytes = math.ceil(rows * columns / 2) + 4 * math.ceil(rows * columns / BLOCK) + CODE_BYTES
        stored_bytes[layer.weight] = packed_bytes if bits == 4 else rows * columns + 4 * rows
    return stored_bytes
