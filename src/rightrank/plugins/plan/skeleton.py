"""The model without weights: built on the meta device from its configuration, with adapters attached by PEFT itself.

Only `config.json` (or a GGUF header) is downloaded or read, and a model's own code runs only with `trust_remote_code`.

Weights in 4 or 8 bits, in the shapes and types in which bitsandbytes stores them.

4 bits: two weights a byte, and a float32 constant for every 64 weights. 8 bits: a byte a weight and a float32 a row. A product in 4
bits decompresses the whole matrix into the compute type, forward and backward, and drops it. A product in 8 bits
quantises the input rows too, keeps the original rows for the backward pass, and decompresses there; on a CPU in training
mode it also decompresses forward. Embeddings, norms and the output head are not quantised.

Source: bitsandbytes 0.50, `autograd/_functions.py`, `functional.py`, `backends/default/ops.py`. A test compares the bytes
with those of its own modules. Its fused 4-bit kernel on CUDA, which takes no workspace, is not modelled: it runs for few
rows only.
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
from peft.tuners.lora import LoraLayer

from rightrank.models.base_models import DTYPES, model_config, model_skeleton
from rightrank.models.kinds.linear import keep_start
from rightrank.models.places import require_model
from rightrank.schema.errors import ModelError, first_line
from rightrank.schema.plan_settings import PlanSettings
from rightrank.schema.settings import TAKEN_FROM_BASE
from rightrank.train.targets import (
    ALL_LINEAR,
    TargetModule,
    adapted_matrices,
    all_linear_leaves_out,
    common_fields,
    in_layers,
    named_targets,
    require_targets,
)

MAX_SIZE = 2**40
# Counts that the plan iterates over: layers, experts, and the vocabulary, of which a chunked loss takes a piece at a time.
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
    base_parameters: int  # of the model without them; a quantised weight counts its unquantised elements

    @property
    def base(self) -> Any:
        return self.model.get_base_model()

    def trainable(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def read_config(reference: str, trust_remote_code: bool, classification: bool = False) -> Any:
    """The configuration of a model folder, a GGUF file or a hub name."""
    require_model(reference)
    config = model_config(reference, trust_remote_code, classification)
    text = config.get_text_config()
    _require_sane_sizes(reference, config, text)
    text.use_cache = False  # as Trainer trains
    return config


def _require_sane_sizes(reference: str, config: Any, text: Any) -> None:
    """Refuse a configuration that would take for ever to build."""
    heads, groups = getattr(text, "num_attention_heads", 1), getattr(text, "num_key_value_heads", None) or 1
    if isinstance(heads, int) and isinstance(groups, int) and (heads < 1 or groups < 1 or heads % min(heads, groups)):
        raise ModelError(
            f"{reference}: {heads} heads are not a multiple of {groups} key-value heads; restore config.json"
        )
    aliases = {name: getattr(text, name, None) for name in ("num_hidden_layers", "vocab_size")}
    for name, value in _numbers_in(config.to_dict() | {"text": aliases}):
        limit = min([MAX_SIZE, *(most for pattern, most in MAX_COUNTS.items() if pattern.fullmatch(name))])
        if abs(value) > limit:
            raise ModelError(
                f"{reference}: {name} is {value}, more than any model has (at most {limit}); restore config.json"
            )


def _numbers_in(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the whole numbers of a configuration and of those inside it, such as that of an image encoder."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers_in(value)
        elif isinstance(value, int):
            yield str(name), value


def build_skeleton(config: Any, settings: PlanSettings, rank: int, arms: int = 1) -> Skeleton:
    """The model of a configuration with an adapter of `rank` for each arm, attached by PEFT.

    Raises:
        ModelError: transformers cannot build it, a target that matches nothing, or one that PEFT cannot adapt.
    """
    model = _build_base(config, settings)
    quantised = [module for module in model.modules() if isinstance(module, _QuantisedLinear)]
    packed = sum(module.in_features * module.out_features - module.weight.numel() for module in quantised)
    parameters = sum(parameter.numel() for parameter in model.parameters()) + packed
    require_targets(model, settings, settings.num_labels is not None)
    names = ("default", *(f"arm_{number}" for number in range(1, arms)))
    try:
        with warnings.catch_warnings(action="ignore"), torch.device("meta"):  # a user cannot act on them
            config = _lora_config(model, settings, rank)
            config.init_lora_weights = False  # meta tensors have no values to initialise
            adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
            for name in names[1:]:
                adapted.add_adapter(name, copy.deepcopy(config), low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:
        raise ModelError(f"PEFT cannot adapt the model ({first_line(error)})") from None
    # Others take it from the base's own weights.
    if settings.is_packed and settings.init_lora_weights in TAKEN_FROM_BASE:
        for module in (module for module in adapted.modules() if isinstance(module, LoraLayer)):
            for name in module.lora_A:
                keep_start(module.lora_A[name], module.lora_B[name])
    for name, parameter in adapted.named_parameters():
        if not set(names[1:]).isdisjoint(name.split(".")):
            parameter.requires_grad_(True)  # PEFT trains only the active adapter
    return Skeleton(adapted, tuple(adapted_matrices(adapted.get_base_model())), names, parameters)


def _build_base(config: Any, settings: PlanSettings) -> Any:
    """The base model on the meta device, frozen, and quantised where the settings say so."""
    # None is transformers' own choice: torch's fused attention, for the models that can take it.
    attention = "eager" if settings.attn_implementation == "eager" else None
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config  # `_quantise` below does it in shapes
    text = plain.get_text_config()
    if settings.num_labels is not None and getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = text.vocab_size - 1  # as on loading: batches of several rows need one
    dtype, trusted = DTYPES[settings.dtype], settings.trust_remote_code
    model = model_skeleton(plain, trusted, settings.num_labels, dtype=dtype, attn_implementation=attention)
    model.requires_grad_(False)
    _quantise(model, settings)
    return model


def _lora_config(model: Any, settings: PlanSettings, rank: int) -> LoraConfig:
    """PEFT's configuration of an adapter of `rank` under these settings."""
    targets = settings.target_modules
    classification = settings.num_labels is not None
    # PEFT needs names for layers, and `select` leaves experts out.
    by_name = settings.loss == "chunked" or settings.packed or settings.layers_to_transform is not None
    if by_name or all_linear_leaves_out(model, classification):
        targets, _ = named_targets(model, settings, classification)
    parameters = in_layers(model, settings)
    return LoraConfig(
        r=rank,
        target_modules=ALL_LINEAR if targets == (ALL_LINEAR,) else (list(targets) or None),
        target_parameters=parameters or None,
        **common_fields(settings, settings.num_labels is not None),
    )


BLOCK = 64  # weights that share a 4-bit constant
CLASSIFICATION_HEADS = ("score", "classifier")  # trained whole: PEFT's default for classification


class _QuantisedLinear(torch.nn.Linear):
    """A linear module on the meta device with a weight in 4 or 8 bits."""

    def __init__(self, features: tuple[int, int], bias: Any, bits: int, dtype: torch.dtype, on_cpu: bool) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = features
        self.bits, self.compute_dtype, self.on_cpu = bits, dtype, on_cpu
        self.copies_output = False  # PEFT clones the output of an adapted 4-bit module
        weights = self.in_features * self.out_features
        packed = (math.ceil(weights / 2), 1) if bits == 4 else (self.out_features, self.in_features)
        code = torch.uint8 if bits == 4 else torch.int8
        self.weight = torch.nn.Parameter(torch.empty(packed, dtype=code, device="meta"), requires_grad=False)
        self.bias = bias
        # the constants of quantisation, in float32
        for number, size in enumerate([self.out_features] if bits == 8 else [math.ceil(weights / BLOCK), 16]):
            self.register_buffer(f"constants_{number}", torch.empty(size, dtype=torch.float32, device="meta"))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        product: Any = _QuantisedProduct.apply  # untyped in torch
        out: torch.Tensor = product(input.to(self.compute_dtype), self)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.clone() if self.copies_output else out

    @property
    def W_q(self) -> torch.Tensor:  # noqa: N802 - PEFT's DoRA asks `dequantize` for the weight where there is one
        return self.weight

    def dequantize(self) -> torch.Tensor:
        return torch.empty((self.out_features, self.in_features), dtype=self.compute_dtype, device="meta")


class _QuantisedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, module: _QuantisedLinear) -> torch.Tensor:
        ctx.module = module
        if module.bits == 4:
            return input @ module.dequantize().t()
        ctx.rows = input  # kept for the backward pass
        if module.on_cpu and module.training:
            return input @ module.dequantize().t()
        rows = input.numel() // module.in_features
        _halves = input.to(torch.float16)
        _codes = torch.empty((rows, module.in_features), dtype=torch.int8, device="meta")
        _sums = torch.empty((rows, module.out_features), dtype=torch.int32, device="meta")
        return torch.empty((*input.shape[:-1], module.out_features), dtype=input.dtype, device="meta")

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] @ ctx.module.dequantize(), None


def _quantise(model: Any, settings: PlanSettings) -> None:
    """Replace the model's linear modules, except the output head, by 4-bit or 8-bit ones."""
    bits = settings.weight_bits
    if bits is None:
        return
    dtype, on_cpu = DTYPES[settings.dtype], settings.device == "cpu"
    head = model.get_output_embeddings()
    whole = (*settings.modules_to_save, *(CLASSIFICATION_HEADS if settings.num_labels is not None else ()))
    for name, module in list(model.named_modules()):
        linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        if not linear or module is head or any(part in whole for part in name.split(".")):
            continue
        rows, columns = module.weight.shape
        features = (columns, rows) if isinstance(module, torch.nn.Linear) else (rows, columns)
        replacement = _QuantisedLinear(features, module.bias, bits, dtype, on_cpu)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, replacement)


def mark_adapted(model: Any, by_peft: bool) -> None:
    """Set whether adapted 4-bit modules clone their output: PEFT's forward pass does, the multi-LoRA one does not."""
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, _QuantisedLinear) and base.bits == 4:
            base.copies_output = by_peft
