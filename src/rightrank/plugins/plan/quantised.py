"""Weights in 4 or 8 bits, in the shapes and types in which bitsandbytes stores them.

4 bits: two weights a byte, and a float32 constant for every 64 weights; with double quantisation one byte for every 64,
a float32 for every 256 of those and one for the matrix. 8 bits: a byte a weight and a float32 a row. A product in 4
bits decompresses the whole matrix into the compute type, forward and backward, and drops it. A product in 8 bits
quantises the input rows too, keeps the original rows for the backward pass, and decompresses there; on a CPU in training
mode it also decompresses forward. Embeddings, norms and the output head are not quantised.

Source: bitsandbytes 0.50, `autograd/_functions.py`, `functional.py`, `backends/default/ops.py`. A test compares the bytes
with those of its own modules. Its fused 4-bit kernel on CUDA, which takes no workspace, is not modelled: it runs for few
rows only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from rightrank.models.base_models import DTYPES
from rightrank.schema.plan_settings import PlanSettings

BLOCK = 64  # weights that share a 4-bit constant
DOUBLE_BLOCK = 256  # constants that share a constant
TABLE = 256  # values of the table that decodes the constants of double quantisation; every matrix has its own
CLASSIFICATION_HEADS = ("score", "classifier")  # trained whole: PEFT's default for classification


class QuantisedLinear(torch.nn.Linear):
    """A linear module on the meta device with a weight in 4 or 8 bits."""

    def __init__(self, features: tuple[int, int], bias: Any, kind: QuantisedKind) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = features
        self.bits = bits = kind.bits
        self.compute_dtype = kind.compute_dtype
        self.nested = kind.nested
        self.on_cpu = kind.on_cpu
        self.copies_output = False  # PEFT clones the output of an adapted 4-bit module
        weights = self.in_features * self.out_features
        packed = (math.ceil(weights / 2), 1) if bits == 4 else (self.out_features, self.in_features)
        code = torch.uint8 if bits == 4 else torch.int8
        self.weight = torch.nn.Parameter(torch.empty(packed, dtype=code, device="meta"), requires_grad=False)
        self.bias = bias
        for number, (size, constant) in enumerate(constants(self.out_features, weights, bits, self.nested)):
            self.register_buffer(f"constants_{number}", torch.empty(size, dtype=constant, device="meta"))

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
        if self.nested:  # decompresses the constants first
            blocks = math.ceil(self.in_features * self.out_features / BLOCK)
            _constants = torch.empty(blocks, dtype=torch.float32, device="meta") + 0
        return torch.empty((self.out_features, self.in_features), dtype=self.compute_dtype, device="meta")


@dataclass(frozen=True, slots=True)
class QuantisedKind:
    """How the matrices of a model are quantised."""

    bits: int
    compute_dtype: torch.dtype
    nested: bool  # 4 bits: the constants are quantised too
    on_cpu: bool


class _QuantisedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, module: QuantisedLinear) -> torch.Tensor:
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


def constants(rows: int, weights: int, bits: int, double: bool) -> list[tuple[int, torch.dtype]]:
    """`(count, type)` of each tensor of quantisation constants of one matrix."""
    if bits == 8:
        return [(rows, torch.float32)]
    blocks = math.ceil(weights / BLOCK)
    code = (16, torch.float32)
    if not double:
        return [(blocks, torch.float32), code]
    of_constants = [(math.ceil(blocks / DOUBLE_BLOCK), torch.float32), (1, torch.float32), (TABLE, torch.float32)]
    return [(blocks, torch.uint8), *of_constants, code]


def quantise(model: Any, settings: PlanSettings) -> None:
    """Replace the model's linear modules, except the output head, by 4-bit or 8-bit ones."""
    bits = 4 if settings.load_in_4bit else 8 if settings.load_in_8bit else None
    if bits is None:
        return
    double = bits == 4 and settings.bnb_4bit_use_double_quant
    kind = QuantisedKind(bits, DTYPES[settings.dtype], double, settings.device == "cpu")
    head = model.get_output_embeddings()
    whole = (*settings.modules_to_save, *(CLASSIFICATION_HEADS if settings.num_labels is not None else ()))
    for name, module in list(model.named_modules()):
        linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        if not linear or module is head or any(part in whole for part in name.split(".")):
            continue
        rows, columns = module.weight.shape
        features = (columns, rows) if isinstance(module, torch.nn.Linear) else (rows, columns)
        replacement = QuantisedLinear(features, module.bias, kind)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, replacement)


def mark_adapted(model: Any, by_peft: bool) -> None:
    """Set whether adapted 4-bit modules clone their output: PEFT's forward pass does, the multi-LoRA one does not."""
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, QuantisedLinear) and base.bits == 4:
            base.copies_output = by_peft


def count_parameters(model: Any) -> int:
    """Parameters of a model; a quantised weight counts its unquantised elements."""
    total: int = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            total += module.in_features * module.out_features - module.weight.numel()
    return total
