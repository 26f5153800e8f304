"""The kernels of a device, for a step that runs on meta tensors.

On the meta device torch takes the slow composite path of attention and cannot answer a branch on a value. A function mode
answers for the device: attention goes to the fused kernel that the device would choose (flash without a mask,
memory-efficient with one, the CPU's flash kernel there), and a branch on a mask takes the path with padding or without, as
the settings have it.

Source: torch's `aten/src/ATen/native/transformers` (choice of kernel, conversion of boolean masks, workspace of the
backward kernels), torch 2.x.

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

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from rightrank.models.base_models import DTYPES
from rightrank.schema.plan_settings import PlanSettings

DeviceKind: TypeAlias = Literal["cuda", "cpu"]

FLASH_HEAD_LIMIT = 256  # widest head that the flash kernel takes
FLASH_TYPES = (torch.float16, torch.bfloat16)

aten = torch.ops.aten

# Rows of several experts times the matrix of each expert, where this torch has it.
_GROUPED: frozenset[Any] = frozenset(
    getattr(home, name) for home, name in ((F, "grouped_mm"), (torch, "_grouped_mm")) if hasattr(home, name)
)


@dataclass(slots=True)
class DeviceKernels(TorchFunctionMode):
    """Active around a traced step."""

    device: DeviceKind
    padded: bool

    def __post_init__(self) -> None:
        TorchFunctionMode.__init__(self)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if func is F.scaled_dot_product_attention:
            if self.device == "cpu" and keywords.get("dropout_p"):
                return func(*args, **keywords)  # the CPU has no fused kernel with dropout: torch's composite one runs
            return _attention(self.device, *args, **keywords)
        if func in _GROUPED:
            product: Any = _GroupedProduct.apply  # untyped in torch
            return product(args[0], args[1])
        if func is torch.Tensor.__bool__:
            return not self.padded  # the only branches ask whether there is no padding
        return func(*args, **keywords)


def _attention(
    device: DeviceKind,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    bias = _additive(attn_mask, query)
    if device == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale
        )[0]
    if bias is None and query.dtype in FLASH_TYPES and query.shape[-1] <= FLASH_HEAD_LIMIT:
        return _flash(query, key, value, dropout_p, is_causal, scale)
    if enable_gqa and key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if bias is not None:
        bias = _aligned(bias).expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]


class _GroupedProduct(torch.autograd.Function):
    """A grouped product in any type; torch has it on meta tensors in bfloat16 only."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows if weights.requires_grad else None, weights)  # frozen experts do not need the rows
        return torch.mm(rows, weights[0])  # each row is multiplied by the matrix of one expert

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        _, weights = ctx.saved_tensors
        of_rows = torch.mm(gradients[0], weights[0].t()) if ctx.needs_input_grad[0] else None
        return of_rows, torch.empty_like(weights) if ctx.needs_input_grad[1] else None


def _flash(query: Any, key: Any, value: Any, dropout_p: float, is_causal: bool, scale: float | None) -> Any:
    """The flash kernel works on heads padded to a multiple of 8."""
    width = query.shape[-1]
    missing = -width % 8
    if missing:
        scale = scale or 1 / math.sqrt(width)
        query, key, value = (F.pad(tensor, [0, missing]) for tensor in (query, key, value))
    out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    return out[..., :width] if missing else out


def _additive(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """The additive mask that torch makes of a boolean one in every call."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(mask, zero, zero)


def _aligned(bias: torch.Tensor) -> torch.Tensor:
    """The bias in rows of a multiple of 16 elements, which the memory-efficient kernel copies where necessary."""
    length = bias.shape[-1]
    missing = -length % 16
    return F.pad(bias, [0, missing])[..., :length] if missing else bias


def scratch_bytes(func: Any, args: Any, device: DeviceKind) -> tuple[int, ...]:
    """Workspace that a kernel allocates and frees while it runs, bytes."""
    if device != "cuda":
        return ()
    if func is aten._scaled_dot_product_flash_attention_backward.default:
        return _flash_backward_scratch(args[1], args[2])
    if func is aten._scaled_dot_product_efficient_attention_backward.default:
        batch, heads, length, width = args[1].shape
        rows = batch * heads * length
        return (rows * 4, rows * width * 4)  # delta, and the float32 accumulator of the query's gradient
    return ()


def _flash_backward_scratch(query: torch.Tensor, key: torch.Tensor) -> tuple[int, ...]:
    """softmax_d and dq_accum in float32, rows padded to 128; and, for grouped heads, expanded dk and dv."""
    batch, heads, length, width = query.shape
    rows = batch * heads * (-(-length // 128) * 128)
    sizes = [rows * 4, rows * (-(-width // 32) * 32) * 4]
    if key.shape[1] != heads:
        sizes += [batch * heads * key.shape[2] * width * query.element_size()] * 2
    return tuple(sizes)


BLOCK = 64  # weights that share a 4-bit constant
CLASSIFICATION_HEADS = ("score", "classifier")  # trained whole: PEFT's default for classification


class _QuantisedLinear(torch.nn.Linear):
    """A linear module on the meta device with a weight in 4 or 8 bits."""

    def __init__(self, features: tuple[int, int], bias: Any, kind: _QuantisedKind) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = features
        self.bits = bits = kind.bits
        self.compute_dtype = kind.compute_dtype
        self.on_cpu = kind.on_cpu
        self.copies_output = False  # PEFT clones the output of an adapted 4-bit module
        weights = self.in_features * self.out_features
        packed = (math.ceil(weights / 2), 1) if bits == 4 else (self.out_features, self.in_features)
        code = torch.uint8 if bits == 4 else torch.int8
        self.weight = torch.nn.Parameter(torch.empty(packed, dtype=code, device="meta"), requires_grad=False)
        self.bias = bias
        for number, (size, constant) in enumerate(_constants(self.out_features, weights, bits)):
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
        return torch.empty((self.out_features, self.in_features), dtype=self.compute_dtype, device="meta")


@dataclass(frozen=True, slots=True)
class _QuantisedKind:
    """How the matrices of a model are quantised."""

    bits: int
    compute_dtype: torch.dtype
    on_cpu: bool


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


def _constants(rows: int, weights: int, bits: int) -> list[tuple[int, torch.dtype]]:
    """`(count, type)` of each tensor of quantisation constants of one matrix."""
    if bits == 8:
        return [(rows, torch.float32)]
    return [(math.ceil(weights / BLOCK), torch.float32), (16, torch.float32)]


def quantise(model: Any, settings: PlanSettings) -> None:
    """Replace the model's linear modules, except the output head, by 4-bit or 8-bit ones."""
    bits = 4 if settings.load_in_4bit else 8 if settings.load_in_8bit else None
    if bits is None:
        return
    kind = _QuantisedKind(bits, DTYPES[settings.dtype], settings.device == "cpu")
    head = model.get_output_embeddings()
    whole = (*settings.modules_to_save, *(CLASSIFICATION_HEADS if settings.num_labels is not None else ()))
    for name, module in list(model.named_modules()):
        linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        if not linear or module is head or any(part in whole for part in name.split(".")):
            continue
        rows, columns = module.weight.shape
        features = (columns, rows) if isinstance(module, torch.nn.Linear) else (rows, columns)
        replacement = _QuantisedLinear(features, module.bias, kind)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, replacement)


def mark_adapted(model: Any, by_peft: bool) -> None:
    """Set whether adapted 4-bit modules clone their output: PEFT's forward pass does, the multi-LoRA one does not."""
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, _QuantisedLinear) and base.bits == 4:
            base.copies_output = by_peft


def count_parameters(model: Any) -> int:
    """Parameters of a model; a quantised weight counts its unquantised elements."""
    total: int = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, _QuantisedLinear):
            total += module.in_features * module.out_features - module.weight.numel()
    return total
