"""Preserve the state of another program: the model that it trains, its random generators, and its data sets."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rightrank.schema.errors import DataError, get_first_line
from rightrank.training.loss import use_adapter
from rightrank.training.multi_lora import find_lora_modules

MAX_SEARCHED_ENTRIES = 64  # a longer list is shared with the copy
MAX_COPIED_OBJECTS = 10_000  # a data set or collator with more objects is not copied
# The errors of objects that cannot be copied: no support for it, an open file or stream, a tensor with a graph, an empty variable.
COPY_ERRORS = (copy.Error, AttributeError, OSError, RuntimeError, TypeError, ValueError)


@contextmanager
def preserve_random_states(*loaders: Any) -> Iterator[None]:
    """Restore the global random states after the block, and those of the loaders' generators."""
    samplers = [getattr(loader, name, None) for loader in loaders for name in ("sampler", "batch_sampler")]
    samplers += [getattr(sampler, "sampler", None) for sampler in samplers]
    generators = {getattr(owner, "generator", None) for owner in (*loaders, *samplers)}
    with ExitStack() as restored:
        restored.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        restored.callback(np.random.set_state, np.random.get_state())
        restored.callback(random.setstate, random.getstate())
        for generator in generators:
            if isinstance(generator, torch.Generator):
                restored.callback(generator.set_state, generator.get_state())
        yield


def copy_data_source(source: Any) -> Any:
    """Return a copy of a data set, loader or collator, so that reading the copy does not change the original.

    A random generator that is created at first use is then created in the copy alone. Rows, tensors, tables, models and tokenizers are shared.
    A function is copied with the values of its closure, its defaults and the global variables that it names. Methods use their module's own.

    Raises:
        DataError: The source cannot be copied, for example because it holds an open file or a stream.
    """
    if isinstance(source, list | tuple):
        return source  # rows themselves, which run no code when they are read
    try:
        functions, shared = _collect_copied_objects(source)
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
            for cell, original_cell in zip(copied.__closure__ or (), function.__closure__ or (), strict=True):
                cell.cell_contents = copy.deepcopy(original_cell.cell_contents, memo)
            for name, value in _collect_globals(function).items():
                copied.__globals__[name] = copy.deepcopy(value, memo)
        return copy.deepcopy(source, memo)
    except COPY_ERRORS as error:
        raise DataError(f"{type(source).__name__} cannot be copied ({get_first_line(error)})") from error


def _collect_copied_objects(source: Any) -> tuple[list[FunctionType], list[Any]]:
    """Return the functions that a copy of a data set or collator copies, and the values that it shares.

    Raises:
        ValueError: The source holds too many objects.
    """
    functions: list[FunctionType] = []
    shared: list[Any] = []
    pending, seen_ids = [source], {id(source)}
    while pending:
        value = pending.pop()
        if len(seen_ids) > MAX_COPIED_OBJECTS:
            raise ValueError(f"it holds more than {MAX_COPIED_OBJECTS:,} objects")
        is_long = isinstance(value, list | tuple | dict | set | frozenset) and len(value) > MAX_SEARCHED_ENTRIES
        if is_long or isinstance(value, torch.nn.Module | ModuleType | PreTrainedTokenizerBase) or _is_array(value):
            shared.append(value)
            continue
        if isinstance(value, FunctionType):
            functions.append(value)
            members = [cell.cell_contents for cell in value.__closure__ or ()]
            members += [value.__defaults__, value.__kwdefaults__, *_collect_globals(value).values()]
        else:
            members = [] if isinstance(value, type) else list(getattr(value, "__dict__", {}).values())
            names = (name for class_ in type(value).__mro__ for name in vars(class_).get("__slots__", ()))
            members += [getattr(value, name, None) for name in names]
        if isinstance(value, list | tuple | dict):
            members += list(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, MethodType | partial):
            members += [value.__self__] if isinstance(value, MethodType) else [value.func, value.args, value.keywords]
        for member in members:
            if id(member) not in seen_ids and not isinstance(member, str | bytes | int | float | None):
                seen_ids.add(id(member))
                pending.append(member)
    return functions, shared


def _collect_globals(function: FunctionType) -> dict[str, Any]:
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
    """Return whether a value is a tensor, array, table or data frame of any library."""
    return not isinstance(value, type) and hasattr(value, "__array__")


@contextmanager
def preserve_state(model: Any, name: str, *loaders: Any) -> Iterator[None]:
    """Evaluate the model with the adapter `name` within the block, and restore the model and random states exactly after it."""
    layers = find_lora_modules(model).values()
    factors = [
        factor_dict[name].weight
        for layer in layers
        for factor_dict in (layer.lora_A, layer.lora_B)
        if name in factor_dict
    ]
    weights = [(factor, factor.detach().clone()) for factor in factors]
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None
        model.eval()
        with use_adapter(model, name), preserve_random_states(*loaders):
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
