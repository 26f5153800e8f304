"""One training step, or one evaluation batch, run on the meta device: its allocations and its operations.

On the meta device torch takes the slow composite path of attention and cannot answer a branch on a value. A function mode
answers for the device: attention goes to the fused kernel that the device would choose (flash without a mask,
memory-efficient with one, the CPU's flash kernel there), and a branch on a mask takes the path with padding or without, as
the settings have it.

Source: torch's `aten/src/ATen/native/transformers` (choice of kernel, conversion of boolean masks, workspace of the
backward kernels), torch 2.x.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rightrank.models.kinds.base import Routing
from rightrank.plugins.plan.skeleton import Skeleton, mark_adapted
from rightrank.schema.plan_settings import PlanSettings
from rightrank.train.device import gradient_checkpointing_on
from rightrank.train.loss import OutputHead, chunked_cross_entropy
from rightrank.train.multi_lora import install

DeviceKind: TypeAlias = Literal["cuda", "cpu"]
Phase: TypeAlias = Literal["forward", "backward"]

# torch's table of operation counts lists these under the variants that do not write in place.
_IN_PLACE: dict[Any, Any] = {
    torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm,
    torch.ops.aten.addmm_: torch.ops.aten.addmm,
}


class Origin(NamedTuple):
    """The place in the step where a storage is allocated."""

    op: str
    module: str  # name of the module that ran; empty outside every module
    phase: Phase
    has_vocabulary: bool  # one of its dimensions is the vocabulary size


@dataclass(slots=True)
class StepTrace:
    """Births (+n) and deaths (−n) of allocation n−1, in order; an allocation without a death lives until the step ends."""

    sizes: list[int] = field(default_factory=list)  # bytes, not rounded
    origins: list[Origin] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    flops: int = 0  # a multiply and an add are two
    gradients: frozenset[int] = frozenset()  # allocations that hold gradients of trained parameters at the end

    def add(self, size: int, origin: Origin) -> int:
        """Record a birth, and return its number."""
        self.sizes.append(size)
        self.origins.append(origin)
        self.events.append(len(self.sizes))
        return len(self.sizes)


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__
    """Fills a `StepTrace` while it is active; storages of `known` tensors existed before."""

    def __init__(self, known: Iterable[torch.Tensor], vocabulary: int, device: DeviceKind) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = StepTrace()
        self.phase: Phase = "forward"
        self._vocabulary = vocabulary
        self._device: DeviceKind = device
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, int] = {}
        self._modules: list[str] = []
        self.deaths: list[weakref.ref[Any]] = []  # a weak reference that is dropped calls nothing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return 0  # no value is known; `kernels` answers branches on values
        with torch._C.DisableTorchFunction():  # in the backward pass function modes would see each use of a tensor here
            out, flops = _called(func, args, kwargs or {})
            scratch = _scratch_bytes(func, args, self._device)
            numbers = [self.trace.add(size, self._origin(func, False)) for size in scratch]
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self._see(tensor, func)
        self.trace.events += [-number for number in reversed(numbers)]
        self.trace.flops += flops
        return out

    @contextmanager
    def named_modules(self, model: torch.nn.Module) -> Iterator[None]:
        """Within the block, each storage records the module that runs."""
        names = {id(module): name for name, module in model.named_modules()}

        def enter(module: torch.nn.Module, _inputs: Any) -> None:
            self._modules.append(names.get(id(module), ""))

        def leave(_module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
            self._modules.pop()

        hooks = (
            torch.nn.modules.module.register_module_forward_pre_hook(enter),
            torch.nn.modules.module.register_module_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, tensor: torch.Tensor, func: Any) -> None:
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self.alive:
            return
        origin = self._origin(func, self._vocabulary in tensor.shape)
        self.alive[key] = self.trace.add(storage.nbytes(), origin)
        self.deaths.append(weakref.ref(storage, lambda _: self.trace.events.append(-self.alive.pop(key))))

    def _origin(self, func: Any, has_vocabulary: bool) -> Origin:
        module = self._modules[-1] if self._modules else ""
        return Origin(func.__name__, module, self.phase, has_vocabulary)


# What an operation on tensors of these forms makes, the size, stride and type of a new tensor, and its operations.
_MADE: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype, int]] = {}
MAX_MADE = 4096  # forms kept


@cache
def _facts(func: Any) -> tuple[bool, Any]:
    """Whether the operation's results are new tensors, and what counts its operations, if it is a product."""
    schema, packet = func._schema, func._overloadpacket
    makes_new = not schema.is_mutable and all(result.alias_info is None for result in schema.returns)
    return makes_new, flop_registry.get(_IN_PLACE.get(packet, packet))


def _called(func: Any, args: Any, keywords: Any) -> tuple[Any, int]:
    """The operation's result and count. One that makes a new tensor runs once for each form of its arguments: blocks are alike."""
    makes_new, formula = _facts(func)
    key = (func, _form(args), _form(tuple(keywords.items()))) if makes_new else None
    try:
        if key in _MADE:
            size, stride, dtype, flops = _MADE[key]
            return torch.empty_strided(size, stride, dtype=dtype, device="meta"), flops
    except TypeError:  # an argument that is compared by its identity
        key = None
    out = func(*args, **keywords)
    flops = int(formula(*args, **keywords, out_val=out)) if formula is not None else 0
    if key is not None and isinstance(out, torch.Tensor) and out.device.type == "meta" and len(_MADE) < MAX_MADE:
        storage = out.untyped_storage()
        tensors = (argument for argument in args if isinstance(argument, torch.Tensor))
        # A view is made anew each time, as `_unsafe_view`, whose schema does not say so.
        if all(storage._cdata != tensor.untyped_storage()._cdata for tensor in tensors):
            whole = torch.empty_strided(out.size(), out.stride(), dtype=out.dtype, device="meta")
            if storage.nbytes() == whole.untyped_storage().nbytes():
                _MADE[key] = out.size(), out.stride(), out.dtype, flops
    return out, flops


def _form(value: Any) -> Any:
    """The value with the form of each tensor in its place."""
    if isinstance(value, torch.Tensor):
        return value.size(), value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(map(_form, value))
    return type(value), value


def trace_step(skeleton: Skeleton, settings: PlanSettings, training: bool = True) -> StepTrace:
    """The allocations of a step (or, without `training`, of an evaluation batch) of `settings` on the device."""
    model, device = skeleton.model, settings.device
    tracer = _Tracer([*model.parameters(), *model.buffers()], skeleton.base.config.get_text_config().vocab_size, device)
    batch = settings.batch_size if training else settings.eval_batch_size or settings.batch_size
    model.train(training and settings.loss == "full" and not settings.is_packed)  # `select` trains in evaluation mode
    with ExitStack() as stack:
        stack.enter_context(_multi_lora_forward(skeleton, settings, batch))
        if not training:
            stack.enter_context(torch.no_grad())
        elif settings.gradient_checkpointing:
            stack.enter_context(gradient_checkpointing_on(skeleton.base))
        stack.enter_context(tracer.named_modules(model))
        library: Any = torch
        stack.callback(setattr, torch, "autocast", torch.autocast)
        library.autocast = lambda *_, **__: nullcontext()  # PEFT's, for experts; meta tensors do not know it
        for mode in (tracer, _DeviceKernels(device, settings.padding), torch.device("meta")):
            stack.enter_context(mode)
        loss = _loss(skeleton, settings, batch * len(skeleton.arms))
        tracer.phase = "backward"
        if training:
            # `loss.backward()` with the function modes on: torch disables them inside `Tensor.backward`, where checkpointed
            # blocks would then run on other kernels than in the forward pass.
            engine: Any = torch.autograd.graph._engine_run_backward
            ones = (torch.ones_like(loss),)
            engine((loss,), ones, False, False, (), allow_unreachable=True, accumulate_grad=True)
            gradients = (parameter.grad for parameter in skeleton.trainable() if parameter.grad is not None)
            storages = (gradient.untyped_storage()._cdata for gradient in gradients)
            tracer.trace.gradients = frozenset(tracer.alive[storage] - 1 for storage in storages)
    tracer.deaths.clear()  # what is alive now lives until the step ends
    for parameter in skeleton.trainable():
        parameter.grad = None
    return tracer.trace


def _loss(skeleton: Skeleton, settings: PlanSettings, rows: int) -> torch.Tensor:
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
    kept = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets = ids[:, 1:].reshape(-1)
    return chunked_cross_entropy(kept, targets, OutputHead(base), 1.0)[0].sum()


@contextmanager
def _multi_lora_forward(skeleton: Skeleton, settings: PlanSettings, rows: int) -> Iterator[None]:
    """Within the block, adapted layers run PEFT's forward pass or the multi-LoRA one, with `rows` rows for each arm."""
    by_peft = not settings.is_packed or any(target.kind.why_alone for target in skeleton.targets)
    mark_adapted(skeleton.model, by_peft=by_peft)
    if not settings.is_packed:
        yield
        return
    count = len(skeleton.arms)
    seed = 0 if settings.lora_dropout else None
    routing = Routing.padded(skeleton.arms, [seed] * count, [rows] * count, [settings.seq_len] * count)
    adapted: list[tuple[str, Any]] = [
        (name, module)
        for name, module in skeleton.base.named_modules()
        if isinstance(module, LoraLayer | ModulesToSaveWrapper)
    ]
    for name, module in adapted:
        install(name, module, lambda: routing)
    try:
        yield
    finally:
        for _, module in adapted:
            del module.__dict__["forward"]


FLASH_HEAD_LIMIT = 256  # widest head that the flash kernel takes
FLASH_TYPES = (torch.float16, torch.bfloat16)

aten = torch.ops.aten

# Rows of several experts times the matrix of each expert, where this torch has it.
_GROUPED: frozenset[Any] = frozenset(
    getattr(home, name) for home, name in ((F, "grouped_mm"), (torch, "_grouped_mm")) if hasattr(home, name)
)


@dataclass(slots=True)
class _DeviceKernels(TorchFunctionMode):
    """Active around a traced step."""

    device: DeviceKind
    padded: bool

    def __post_init__(self) -> None:
        TorchFunctionMode.__init__(self)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(self.device, *args, **keywords)
        if func in _GROUPED:
            product: Any = _GroupedProduct.apply  # untyped in torch
            return product(args[0], args[1])
        if func is torch.tensor and isinstance(args[0], int):  # a size that the model computes, as DeBERTa's span
            return func(*args, **keywords | {"device": "cpu"})
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
    widths_differ = query.shape[-1] != value.shape[-1]
    if device == "cpu" and (dropout_p or widths_differ):  # no fused kernel there: torch's composite one runs
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    bias = attn_mask
    if attn_mask is not None and attn_mask.dtype is torch.bool:  # torch makes an additive mask of it in every call
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        bias = torch.where(attn_mask, zero, zero)
    if device == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale
        )[0]
    is_flash = query.dtype in FLASH_TYPES and query.shape[-1] <= FLASH_HEAD_LIMIT and not widths_differ
    if bias is None and is_flash:
        return _flash(query, key, value, dropout_p, is_causal, scale)
    if enable_gqa and key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if bias is not None:  # in rows of a multiple of 16 elements, which the kernel copies where necessary
        length = bias.shape[-1]
        bias = F.pad(bias, [0, -length % 16])[..., :length] if length % 16 else bias
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
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


def _scratch_bytes(func: Any, args: Any, device: DeviceKind) -> tuple[int, ...]:
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
