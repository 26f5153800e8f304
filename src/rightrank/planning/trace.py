"""Build a model without weights, run one training step or evaluation batch of it, and record its allocations and operations.

The model is built on the meta device from its configuration, with adapters that PEFT itself attaches. Only `config.json` (or a GGUF header) is
downloaded or read, and a model's own code runs only with `trust_remote_code`.

On the meta device torch takes the slow composite path of attention and cannot evaluate a branch on a value. A function mode
therefore imitates the device: attention uses the fused kernel that the device would choose (flash without a mask,
memory-efficient with one, the CPU's flash kernel there), and a branch on a mask follows the settings, with or without
padding.

Source: torch's `aten/src/ATen/native/transformers` (choice of kernel, conversion of boolean masks, workspace of the
backward kernels), torch 2.x.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rightrank.bases.base_models import DTYPES, build_meta_model, load_model_config
from rightrank.evaluation.device import enable_gradient_checkpointing
from rightrank.evaluation.loss import OutputHead, chunked_cross_entropy
from rightrank.schema.errors import ModelError, get_first_line
from rightrank.schema.settings import PlanSettings
from rightrank.training.multi_lora import Routing, install_forward
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


DeviceKind: TypeAlias = Literal["cuda", "cpu"]

# torch's FLOP table lists these operations only under their out-of-place variants.
_IN_PLACE: dict[Any, Any] = {
    torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm,
    torch.ops.aten.addmm_: torch.ops.aten.addmm,
}


@dataclass(slots=True)
class StepTrace:
    """Allocations of a step, in order: +n is the birth and −n the death of allocation n−1. Without a death it lives until the step ends."""

    sizes: list[int] = field(default_factory=list)  # bytes, not rounded
    have_vocabulary: list[bool] = field(default_factory=list)  # whether one of the dimensions is the vocabulary size
    events: list[int] = field(default_factory=list)
    forward_events: int = 0  # events up to the end of the forward pass
    flops: int = 0  # a multiply and an add are two
    gradients: frozenset[int] = frozenset()  # allocations that hold gradients of trained parameters at the end

    def add(self, size: int, has_vocabulary: bool) -> int:
        """Record a birth, and return its number."""
        self.sizes.append(size)
        self.have_vocabulary.append(has_vocabulary)
        self.events.append(len(self.sizes))
        return len(self.sizes)


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__
    """A dispatch mode that fills a `StepTrace` while it is active. The storages of `existing_tensors` are not recorded."""

    def __init__(self, existing_tensors: Iterable[torch.Tensor], vocabulary: int, device: DeviceKind) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = StepTrace()
        self._vocabulary = vocabulary
        self._device: DeviceKind = device
        self._existing_storages = {tensor.untyped_storage()._cdata for tensor in existing_tensors}
        self.alive: dict[int, int] = {}
        self.deaths: list[weakref.ref[Any]] = []  # a weak reference that is dropped calls nothing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return 0  # Meta tensors have no values; `_DeviceKernels` decides branches on values.
        # In the backward pass, function modes would intercept every tensor access in this block.
        with torch._C.DisableTorchFunction():
            out = func(*args, **(kwargs or {}))
            scratch = _compute_scratch_bytes(func, args, self._device)
            numbers = [self.trace.add(size, False) for size in scratch]
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self._record_tensor(tensor)
            self.trace.flops += _count_flops(func, args, kwargs or {}, out)
        self.trace.events += [-number for number in reversed(numbers)]
        return out

    def _record_tensor(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._existing_storages or key in self.alive:
            return
        self.alive[key] = self.trace.add(storage.nbytes(), self._vocabulary in tensor.shape)
        self.deaths.append(weakref.ref(storage, lambda _: self.trace.events.append(-self.alive.pop(key))))


def _count_flops(func: Any, args: Any, keywords: Any, out: Any) -> int:
    formula = flop_registry.get(_IN_PLACE.get(func._overloadpacket, func._overloadpacket))
    return 0 if formula is None else int(formula(*args, **keywords, out_val=out))


def trace_step(skeleton: Skeleton, settings: PlanSettings, training: bool = True) -> StepTrace:
    """Trace the allocations of a training step, or of an evaluation batch if `training` is false."""
    model, device = skeleton.model, settings.device
    tracer = _Tracer([*model.parameters(), *model.buffers()], skeleton.base.config.get_text_config().vocab_size, device)
    batch = settings.batch_size if training else settings.eval_batch_size or settings.batch_size
    model.train(training and settings.loss == "full" and not settings.is_packed)  # `select` trains in evaluation mode
    with ExitStack() as stack:
        stack.enter_context(_install_multi_lora(skeleton, settings, batch))
        if not training:
            stack.enter_context(torch.no_grad())
        elif settings.gradient_checkpointing:
            stack.enter_context(enable_gradient_checkpointing(skeleton.base))
        library: Any = torch
        stack.callback(setattr, torch, "autocast", torch.autocast)
        library.autocast = lambda *_, **__: nullcontext()  # PEFT uses it for experts; meta tensors do not support it.
        for mode in (tracer, _DeviceKernels(device, settings.padding), torch.device("meta")):
            stack.enter_context(mode)
        loss = _compute_loss(skeleton, settings, batch * len(skeleton.arms))
        tracer.trace.forward_events = len(tracer.trace.events)
        if training:
            # Equivalent to `loss.backward()`, but with the function modes active. Torch disables them inside
            # `Tensor.backward`, so checkpointed blocks would run on other kernels than in the forward pass.
            engine: Any = torch.autograd.graph._engine_run_backward
            loss_gradients = (torch.ones_like(loss),)
            engine((loss,), loss_gradients, False, False, (), allow_unreachable=True, accumulate_grad=True)
            gradients = (
                parameter.grad for parameter in skeleton.list_trainable_parameters() if parameter.grad is not None
            )
            storages = (gradient.untyped_storage()._cdata for gradient in gradients)
            tracer.trace.gradients = frozenset(tracer.alive[storage] - 1 for storage in storages)
    tracer.deaths.clear()  # The remaining allocations live until the step ends.
    for parameter in skeleton.list_trainable_parameters():
        parameter.grad = None
    return tracer.trace


def _compute_loss(skeleton: Skeleton, settings: PlanSettings, rows: int) -> torch.Tensor:
    ids = torch.empty((rows, settings.seq_len), dtype=torch.long)
    mask = {"attention_mask": torch.empty_like(ids)} if settings.padding else {}
    if settings.num_labels is not None:
        out = skeleton.model(input_ids=ids, **mask)
        labels = torch.empty((rows,), dtype=torch.long)
        return F.cross_entropy(out.logits.float(), labels)
    if settings.loss == "full":
        loss: torch.Tensor = skeleton.model(input_ids=ids, labels=torch.empty_like(ids), use_cache=False, **mask).loss
        return loss
    base = skeleton.base
    hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
    predicting_states = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets = ids[:, 1:].reshape(-1)
    return chunked_cross_entropy(predicting_states, targets, OutputHead(base), 1.0)[0].sum()


@contextmanager
def _install_multi_lora(skeleton: Skeleton, settings: PlanSettings, rows: int) -> Iterator[None]:
    """Let adapted layers run PEFT's forward pass or, for packed arms, the multi-LoRA one, inside the context.

    Args:
        rows: number of rows of each arm.
    """
    if not settings.is_packed:
        yield
        return
    count = len(skeleton.arms)
    seed = 0 if settings.lora_dropout else None
    routing = Routing.from_padded(skeleton.arms, [seed] * count, [rows] * count, [settings.seq_len] * count)
    adapted: list[tuple[str, Any]] = [
        (name, module)
        for name, module in skeleton.base.named_modules()
        if isinstance(module, LoraLayer | ModulesToSaveWrapper)
    ]
    for name, module in adapted:
        install_forward(name, module, lambda: routing)
    try:
        yield
    finally:
        for _, module in adapted:
            del module.__dict__["forward"]


FLASH_HEAD_LIMIT = 256  # largest head width that the flash kernel supports
FLASH_TYPES = (torch.float16, torch.bfloat16)

aten = torch.ops.aten

# The products of rows with the matrix of each row's expert, if this torch version has them.
_GROUPED: frozenset[Any] = frozenset(
    getattr(home, name) for home, name in ((F, "grouped_mm"), (torch, "_grouped_mm")) if hasattr(home, name)
)


@dataclass(slots=True)
class _DeviceKernels(TorchFunctionMode):
    """A function mode that selects the device's kernels during a traced step."""

    device: DeviceKind
    padded: bool

    def __post_init__(self) -> None:
        TorchFunctionMode.__init__(self)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _run_attention(self.device, *args, **keywords)
        if func in _GROUPED:
            product: Any = _GroupedProduct.apply  # untyped in torch
            return product(args[0], args[1])
        if func is torch.tensor and isinstance(args[0], int):  # a size that the model computes, such as DeBERTa's span
            return func(*args, **keywords | {"device": "cpu"})
        if func is torch.Tensor.__bool__:
            return not self.padded  # The only branches test for the absence of padding.
        return func(*args, **keywords)


def _run_attention(
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
    widths_differ = query.shape[-1] != value.shape[-1]
    if device == "cpu" and (dropout_p or widths_differ):  # There is no fused kernel; torch runs the composite one.
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    bias = attn_mask
    if attn_mask is not None and attn_mask.dtype is torch.bool:  # Torch converts it to an additive mask in every call.
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        bias = torch.where(attn_mask, zero, zero)
    if device == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale
        )[0]
    is_flash = query.dtype in FLASH_TYPES and query.shape[-1] <= FLASH_HEAD_LIMIT and not widths_differ
    if bias is None and is_flash:
        return _run_flash_attention(query, key, value, dropout_p, is_causal, scale)
    if enable_gqa and key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if bias is not None:  # The kernel needs rows of a multiple of 16 elements and copies the mask if necessary.
        length = bias.shape[-1]
        bias = F.pad(bias, [0, -length % 16])[..., :length] if length % 16 else bias
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]


class _GroupedProduct(torch.autograd.Function):
    """A grouped product in any type. Torch supports meta tensors only in bfloat16."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows if weights.requires_grad else None, weights)  # Frozen experts do not need the rows.
        return torch.mm(rows, weights[0])  # each row is multiplied by the matrix of one expert

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        _, weights = ctx.saved_tensors
        row_gradients = torch.mm(gradients[0], weights[0].t()) if ctx.needs_input_grad[0] else None
        return row_gradients, torch.empty_like(weights) if ctx.needs_input_grad[1] else None


def _run_flash_attention(
    query: Any, key: Any, value: Any, dropout_p: float, is_causal: bool, scale: float | None
) -> Any:
    """Run the flash kernel, which pads heads to a multiple of 8."""
    width = query.shape[-1]
    missing = -width % 8
    if missing:
        scale = scale or 1 / math.sqrt(width)
        query, key, value = (F.pad(tensor, [0, missing]) for tensor in (query, key, value))
    out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    return out[..., :width] if missing else out


def _compute_scratch_bytes(func: Any, args: Any, device: DeviceKind) -> tuple[int, ...]:
    """Return the workspace in bytes that a kernel allocates and frees while it runs."""
    if device != "cuda":
        return ()
    if func is aten._scaled_dot_product_flash_attention_backward.default:
        return _compute_flash_scratch_bytes(args[1], args[2])
    if func is aten._scaled_dot_product_efficient_attention_backward.default:
        batch, heads, length, width = args[1].shape
        rows = batch * heads * length
        return (rows * 4, rows * width * 4)  # delta, and the float32 accumulator of the query's gradient
    return ()


def _compute_flash_scratch_bytes(query: torch.Tensor, key: torch.Tensor) -> tuple[int, ...]:
    """Return the bytes of softmax_d and dq_accum (float32, rows padded to 128) and, for grouped heads, of expanded dk and dv."""
    batch, heads, length, width = query.shape
    rows = batch * heads * (-(-length // 128) * 128)
    sizes = [rows * 4, rows * (-(-width // 32) * 32) * 4]
    if key.shape[1] != heads:
        sizes += [batch * heads * key.shape[2] * width * query.element_size()] * 2
    return tuple(sizes)
