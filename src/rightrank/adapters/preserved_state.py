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

from rightrank.schema.errors import LIBRARY_ERRORS, DataError, first_line
from rightrank.train.loss import use_adapter
from rightrank.train.multi_lora import find_lora_modules

HELD_DEPTH, HELD_PARTS = 5, 64  # how far generators are looked for: steps from a data set, entries of a list
MAX_COPIED_OBJECTS = 10_000  # of a data set or collator; what holds more is not copied


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
    layers = find_lora_modules(model).values()
    factors = [part[name].weight for layer in layers for part in (layer.lora_A, layer.lora_B) if name in part]
    weights = [(factor, factor.detach().clone()) for factor in factors]
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None
        model.eval()
        with use_adapter(model, name), random_states(*sources):
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
