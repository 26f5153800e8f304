"""An adapter in a model that another program trained: saved, and its truncations scored with the model as it is in memory.

Each truncation is put in the place of the trained factors for one evaluation. The model is given back as it came: parameters, modes,
gradients, hooks, configurations and random states. Where several processes train it, all of them make the same calls with the same data.
"""

from __future__ import annotations

import copy
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedTokenizerBase

from rightrank.adapters.live_scores import BETA, Batch, batch_loss, is_partitioned, positions, together
from rightrank.adapters.resize import candidate_ranks, require_plain_update
from rightrank.models.adapter_files import AdapterFolder, open_adapter, save_adapter
from rightrank.models.kinds import kind_of
from rightrank.models.kinds.linear import Linear
from rightrank.schema.errors import LIBRARY_ERRORS, DataError, ModelError, first_line
from rightrank.train.covariances import MOMENT_TOKENS, Gathered, gather_passes
from rightrank.train.loss import with_adapter
from rightrank.train.multi_lora import lora_modules

HELD_DEPTH, HELD_PARTS = 5, 64  # how far generators are looked for: steps from a data set, entries of a list
MAX_COPIED_OBJECTS = 10_000  # of a data set or collator; what holds more is not copied


@dataclass(frozen=True, slots=True)
class LiveAdapter:
    """What is measured."""

    model: Any  # PEFT's, with a LoRA adapter of linear layers
    held_out: Sequence[Batch]  # of examples that the training did not see
    # Of training examples, for second moments; without them truncation is by singular values.
    train: Sequence[Batch] = ()
    # How much worse is still enough, in nats a token (or accuracy); None: the metric's default.
    margin: float | None = None
    ranks: Sequence[int] | None = None  # candidates; None: the powers of two below the adapter's rank
    name: str = "default"  # of the adapter in PEFT
    metric: str = "loss"  # or `accuracy` of a classifier
    beta: float = BETA  # of the loss of preference pairs
    moment_tokens: int = MOMENT_TOKENS  # of `train` that are read at most
    write_beside: Callable[[Path], object] | None = None  # writes the tokenizer into the adapter's folder


def save_trained(model: Any, name: str, folder: Path) -> AdapterFolder:
    """An adapter as it is in memory.

    Raises:
        ModelError: what PEFT saves is another adapter, or none that can be truncated.
    """
    base = model.peft_config[name].base_model_name_or_path or model.get_base_model().config.name_or_path
    save_adapter(model, folder, base or "", name)
    adapter, layers = open_adapter(folder), lora_modules(model)
    require_plain_update(adapter)
    for module in adapter.modules:
        scale = layers[module.name].scaling[name]
        if not math.isclose(scale, module.scaling, rel_tol=1e-6):
            raise ModelError(
                f"{module.name}: its scale is {scale:g} (set_scale, scale_layer) and PEFT saves {module.scaling:g}, so that the saved "
                "adapter is another one; set lora_alpha before the training"
            )
    return adapter


def require_end(model: Any, ranks: Sequence[int] | None = None) -> str:
    """The name of the adapter that trains, whose end is gone through as far as that needs no examples.

    Raises:
        ModelError: no truncation can be made of it.
        SettingsError: a rank that is no truncation of it.
    """
    name = trained_adapter(model)
    if not is_partitioned(model):  # a fresh process measures that
        with together(), tempfile.TemporaryDirectory(prefix="rightrank-") as folder:
            candidate_ranks(save_trained(model, name, Path(folder) / "begin"), ranks)
    return name


def trained_adapter(model: Any) -> str:
    """The name of the adapter that trains, which is the only active one.

    Raises:
        ModelError: no PEFT model, several active adapters, another kind than LoRA of linear layers, a merged one, rank 1, or FSDP1.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    active: list[str] = sorted({name for layer in layers for name in layer.active_adapters}) or ["default"]
    if len(active) > 1:
        raise ModelError(
            f"the adapters {', '.join(active)} are active together, so that each alone is another model than the trained one; one adapter is "
            "truncated at a time: merge the others into the base, and train on that"
        )
    name = active[0]
    config = getattr(model, "peft_config", {}).get(name)
    if config is None:
        raise ModelError("the model has no PEFT adapter; give a model that PEFT has wrapped")
    modules = {module: layer for module, layer in lora_modules(model).items() if name in layer.r}
    odd = [module for module, layer in modules.items() if not isinstance(kind_of(layer), Linear)]
    if not modules or odd or config.use_dora:
        what = odd[0] if odd else config.peft_type
        raise ModelError(
            f"{what}: only LoRA of linear layers is truncated in memory; save it and use rightrank resize --data"
        )
    if any(layer.merged for layer in modules.values()):
        raise ModelError(f"the adapter {name!r} is merged into the base; call unmerge_adapter() before the measurement")
    if config.r < 2:
        raise ModelError("the adapter has rank 1: there is no lower rank")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ModelError(
            "FSDP1 holds the factors in flat parameters; shard by FSDP2 (fsdp_version 2), or use rightrank resize --data"
        )
    return name


def put_in_place(model: Any, name: str, adapter: AdapterFolder) -> None:
    """Write the factors of an adapter folder over the leading rows and columns of a live adapter; the others become zero.

    The live module multiplies by its own scale s, the folder's by s': B takes s'/s.
    """
    layers = lora_modules(model)
    for module in adapter.modules:
        layer = layers[module.name]
        b, a = (torch.from_numpy(part) for part in adapter.factors(module))
        ratio = module.scaling / layer.scaling[name]
        for weight, part in ((layer.lora_B[name].weight, b * ratio), (layer.lora_A[name].weight, a)):
            whole = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
            whole[: part.shape[0], : part.shape[1]].copy_(part)
            if isinstance(weight, DTensor):
                whole = distribute_tensor(whole, weight.device_mesh, weight.placements)
            with torch.no_grad():
                weight.copy_(whole)


@contextmanager
def random_states(*sources: Any) -> Iterator[None]:
    """After the block every random state is as before: the global ones, and those of generators that the sources hold."""
    held = {id(generator): generator for source in sources for generator in _generators(source)}.values()
    with ExitStack() as restored:
        restored.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        restored.callback(np.random.set_state, np.random.get_state())
        restored.callback(random.setstate, random.getstate())
        for generator in held:
            if isinstance(generator, np.random.Generator):
                restored.callback(setattr, generator.bit_generator, "state", generator.bit_generator.state)
            elif isinstance(generator, random.Random):
                restored.callback(generator.setstate, generator.getstate())
            else:
                restored.callback(generator.set_state, generator.get_state())
        yield


def _generators(source: Any, depth: int = HELD_DEPTH) -> Iterator[Any]:
    """The random generators in an object's attributes, in what these hold, and in what a function was defined or bound with."""
    if isinstance(source, np.random.Generator | np.random.RandomState | torch.Generator | random.Random):
        yield source
    if depth == 0 or isinstance(source, torch.nn.Module | torch.Tensor | np.ndarray | type | ModuleType):
        return
    parts = list(getattr(source, "__dict__", {}).values())
    parts += [getattr(type(source), called, None) for called in ("__getitem__", "__call__", "__iter__")]
    if isinstance(source, list | tuple | dict) and len(source) <= HELD_PARTS:
        parts += list(source.values() if isinstance(source, dict) else source)
    elif isinstance(source, FunctionType):
        parts += [source.__globals__.get(called) for called in source.__code__.co_names]
        parts += [getattr(cell, "cell_contents", None) for cell in source.__closure__ or ()]
    elif isinstance(source, MethodType | partial):
        parts += [source.__self__] if isinstance(source, MethodType) else [source.func, source.args, source.keywords]
    for part in parts:
        yield from _generators(part, depth - 1)


def copy_reader(source: Any) -> Any:
    """Return a copy of a data set, loader or collator, so that reading through the copy leaves the original as it is.

    A random generator that is created at first use is then created in the copy alone. Rows, tensors, tables, models and tokenizers are shared.
    A function is copied with what its closure, its defaults and the global variables that it names hold; methods see their module's own.

    Raises:
        DataError: it cannot be copied, as an open file or a stream cannot.
    """
    if isinstance(source, list | tuple):
        return source  # rows themselves, which run no code when they are read
    try:
        functions, shared = _walk(source)
        memo = {id(value): value for value in shared}
        variables = {id(function.__globals__): dict(function.__globals__) for function in functions}
        for function in functions:
            cells = tuple(CellType() for _ in function.__closure__ or ())
            memo[id(function)] = FunctionType(
                function.__code__, variables[id(function.__globals__)], function.__name__, None, cells or None
            )
        for function in functions:
            copied = memo[id(function)]
            copied.__defaults__ = copy.deepcopy(function.__defaults__, memo)
            copied.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
            for cell, held in zip(copied.__closure__ or (), function.__closure__ or (), strict=True):
                cell.cell_contents = copy.deepcopy(held.cell_contents, memo)
            for name, value in _named_globals(function).items():
                copied.__globals__[name] = copy.deepcopy(value, memo)
        return copy.deepcopy(source, memo)
    except (copy.Error, *LIBRARY_ERRORS) as error:
        raise DataError(f"{type(source).__name__} cannot be copied ({first_line(error)})") from None


def _walk(source: Any) -> tuple[list[FunctionType], list[Any]]:
    """Return the functions that a copy of a data set or collator has copies of, and the values that it shares.

    Raises:
        ValueError: it holds too many objects.
    """
    functions: list[FunctionType] = []
    shared: list[Any] = []
    pending, seen = [source], {id(source)}
    while pending:
        value = pending.pop()
        if len(seen) > MAX_COPIED_OBJECTS:
            raise ValueError(f"it holds more than {MAX_COPIED_OBJECTS:,} objects")
        is_long = isinstance(value, list | tuple | dict | set | frozenset) and len(value) > HELD_PARTS
        if is_long or isinstance(value, torch.nn.Module | ModuleType | PreTrainedTokenizerBase) or _is_array(value):
            shared.append(value)
            continue
        if isinstance(value, FunctionType):
            functions.append(value)
            parts = [cell.cell_contents for cell in value.__closure__ or ()]
            parts += [value.__defaults__, value.__kwdefaults__, *_named_globals(value).values()]
        else:
            parts = [] if isinstance(value, type) else list(getattr(value, "__dict__", {}).values())
            names = (name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ()))
            parts += [getattr(value, name, None) for name in names]
        if isinstance(value, list | tuple | dict):
            parts += list(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, MethodType | partial):
            parts += [value.__self__] if isinstance(value, MethodType) else [value.func, value.args, value.keywords]
        for part in parts:
            if id(part) not in seen and not isinstance(part, str | bytes | int | float | None):
                seen.add(id(part))
                pending.append(part)
    return functions, shared


def _named_globals(function: FunctionType) -> dict[str, Any]:
    """Return the global variables that a function's code names, without modules, classes, and the functions of other modules."""
    codes, names = [function.__code__], set[str]()
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    values = {name: function.__globals__[name] for name in names if name in function.__globals__}
    return {
        name: value
        for name, value in values.items()
        if not isinstance(value, ModuleType | type)
        and getattr(value, "__globals__", function.__globals__) is function.__globals__
    }


def _is_array(value: Any) -> bool:
    """Whether a value is a tensor, array, table or data frame, of any library."""
    return not isinstance(value, type) and hasattr(value, "__array__")


@contextmanager
def as_it_came(model: Any, name: str, *sources: Any) -> Iterator[None]:
    """In the block the model evaluates with the adapter `name`; afterwards it and random states are as before, to the bit."""
    layers = lora_modules(model).values()
    factors = [part[name].weight for layer in layers for part in (layer.lora_A, layer.lora_B) if name in part]
    weights = [(factor, factor.detach().clone()) for factor in factors]
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None
        model.eval()
        with with_adapter(model, name), random_states(*sources):
            yield
    finally:
        with torch.no_grad():
            for weight, value in weights:
                weight.copy_(value)
        for parameter, required, gradient in parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


def gather(live: LiveAdapter) -> Gathered:
    """Second moments of about `moment_tokens` tokens of training examples."""
    if not live.train:
        return Gathered({}, 0, 0, ("truncated by singular values: no training examples were given for second moments",))
    names = [name for name, layer in lora_modules(live.model).items() if live.name in layer.lora_A]
    return gather_passes(live.model, names, _passes(live), live.name)


def _passes(live: LiveAdapter) -> Iterator[tuple[int, int, int]]:
    """Forward and backward over training batches; yields the rows, the positions and the labels of each."""
    read = 0
    for batch in live.train:
        if read >= live.moment_tokens:
            return
        loss = batch_loss(live.model, batch, live.beta)
        torch.autograd.backward(loss.total)
        read += positions(batch)
        yield len(loss.example_losses), positions(batch), int(loss.example_tokens.sum())
