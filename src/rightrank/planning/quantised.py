"""Weights in 4 or 8 bits, as bitsandbytes keeps them, in shapes and types alone.

4 bits: two weights a byte; a float32 constant for every 64 weights, or with double quantisation one byte for every 64
and a float32 for every 256 of those. 8 bits: a byte a weight and a float32 a row. A forward or backward product
decompresses the whole matrix into the compute type, uses it and drops it; nothing of it is kept for the backward pass.
Embeddings, norms and the output head stay as they are. Source: bitsandbytes' `autograd/_functions.py`, `functional.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from rightrank.io.models import DTYPES
from rightrank.settings import PlanSettings

BLOCK = 64  # weights that share a 4-bit constant
DOUBLE_BLOCK = 256  # constants that share a constant


class QuantisedLinear(torch.nn.Linear):
    """A linear module on the meta device whose weight takes 4 or 8 bits."""

    def __init__(self, features: tuple[int, int], bias: Any, bits: int, dtype: torch.dtype, double: bool) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = features
        self.bits = bits
        self.compute_dtype = dtype
        self.copies_output = False  # PEFT clones what an adapted 4-bit module gives
        weights = self.in_features * self.out_features
        packed = (math.ceil(weights / 2), 1) if bits == 4 else (self.out_features, self.in_features)
        kind = torch.uint8 if bits == 4 else torch.int8
        self.weight = torch.nn.Parameter(torch.empty(packed, dtype=kind, device="meta"), requires_grad=False)
        self.bias = bias
        for number, (size, constant) in enumerate(constants(self.out_features, weights, bits, double)):
            self.register_buffer(f"constants_{number}", torch.empty(size, dtype=constant, device="meta"))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        product: Any = _QuantisedProduct.apply  # untyped in torch
        out: torch.Tensor = product(input.to(self.compute_dtype), self)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.clone() if self.copies_output else out

    def decompressed(self) -> torch.Tensor:
        return torch.empty((self.out_features, self.in_features), dtype=self.compute_dtype, device="meta")


class _QuantisedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, module: QuantisedLinear) -> torch.Tensor:
        ctx.module = module
        if module.bits == 4:
            return input @ module.decompressed().t()
        rows = input.numel() // module.in_features
        _codes = torch.empty((rows, module.in_features), dtype=torch.int8, device="meta")
        _sums = torch.empty((rows, module.out_features), dtype=torch.int32, device="meta")
        return torch.empty((*input.shape[:-1], module.out_features), dtype=input.dtype, device="meta")

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] @ ctx.module.decompressed(), None


def constants(rows: int, weights: int, bits: int, double: bool) -> list[tuple[int, torch.dtype]]:
    """`(count, type)` of each tensor of quantisation constants of one matrix."""
    if bits == 8:
        return [(rows, torch.float32)]
    blocks = math.ceil(weights / BLOCK)
    code = (16, torch.float32)
    if not double:
        return [(blocks, torch.float32), code]
    return [(blocks, torch.uint8), (math.ceil(blocks / DOUBLE_BLOCK), torch.float32), (256, torch.float32), code]


def quantise(model: Any, settings: PlanSettings) -> None:
    """Put 4-bit or 8-bit modules in the place of the model's linear ones, the output head left out."""
    bits = 4 if settings.load_in_4bit else 8 if settings.load_in_8bit else None
    if bits is None:
        return
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        if not linear or module is head or any(part in settings.modules_to_save for part in name.split(".")):
            continue
        rows, columns = module.weight.shape
        features = (columns, rows) if isinstance(module, torch.nn.Linear) else (rows, columns)
        replacement = QuantisedLinear(
            features, module.bias, bits, DTYPES[settings.dtype], settings.bnb_4bit_use_double_quant
        )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, replacement)


def mark_adapted(model: Any) -> None:
    """Tell adapted 4-bit modules that PEFT clones what they give."""
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, QuantisedLinear) and base.bits == 4:
            base.copies_output = True


def count_parameters(model: Any) -> int:
    """Parameters of a model, a 4-bit or 8-bit weight counted as what it stands for."""
    total: int = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            total += module.in_features * module.out_features - module.weight.numel()
    return total
