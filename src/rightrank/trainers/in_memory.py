"""The model that another program trains: its processes, its adapter, and its state, which is restored after each evaluation.

If several processes train the model, all of them must make the same calls with the same data.
"""

from __future__ import annotations

import copy
import logging
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from rightrank.adapters.adapter_files import AdapterFolder, open_adapter
from rightrank.adapters.resize import list_candidate_ranks, require_plain_update
from rightrank.bases.base_models import require_named_base
from rightrank.evaluation.device import set_training_mode
from rightrank.evaluation.peft_models import find_lora_modules, save_adapter, use_adapter
from rightrank.schema.errors import ModelError, RunError, get_first_line, log_traceback
from rightrank.training.multi_lora import Linear, find_kind

log = logging.getLogger("rightrank")

SHARED_ERROR_FLAG = "is_known_to_all"  # an attribute of an error that every process has raised
GENERATORS = (torch.Generator, random.Random, np.random.Generator)
# The attributes through which a loader reaches what may hold a generator: its samplers, its data set and its collator.
LOADER_ATTRIBUTES = ("sampler", "batch_sampler", "dataset", "collate_fn", "data_collator")


@contextmanager
def sync_errors() -> Iterator[None]:
    """Raise in all processes if one of them fails within the block, so that none waits for the others.

    Raises:
        RunError: Another process failed.
    """
    try:
        yield
    except Exception as error:
        if not hasattr(error, SHARED_ERROR_FLAG):  # else raised in a block within this one
            gather_objects(True)
            setattr(error, SHARED_ERROR_FLAG, True)
        raise
    if any(gather_objects(False)):
        failure = RunError("another process of the training failed")
        setattr(failure, SHARED_ERROR_FLAG, True)
        raise failure


@contextmanager
def log_failure(description: str, advise: Callable[[], str] = str) -> Iterator[None]:
    """Log an error of the block in one line, with its traceback at debug level. The training around it has ended well and continues.

    Args:
        advise: returns the end of the line.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the program must be able to save its model
        log.warning("rightrank: %s: %s%s", description, get_first_line(error), advise())
        log_traceback(error)


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all processes, in the order of their numbers."""
    values = [value] * get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def get_process_index() -> int:
    """Return the number of this process. Process 0 writes files."""
    return dist.get_rank() if get_world_size() > 1 else 0


def find_base_name(model: Any, name: str) -> str:
    """Return the folder or the hub name of the base model, as the adapter's configuration or the model states it."""
    return model.peft_config[name].base_model_name_or_path or model.get_base_model().config.name_or_path or ""


def save_trained_adapter(model: Any, name: str, folder: Path) -> AdapterFolder:
    """Save an adapter of a model in memory, and check that the saved one is the same.

    Raises:
        ModelError: PEFT saves an adapter with another scale, or one that can't be truncated.
    """
    save_adapter(model, folder, find_base_name(model, name), name)
    adapter, layers = open_adapter(folder), find_lora_modules(model)
    require_plain_update(adapter)
    for module in adapter.modules:
        scale = layers[module.name].scaling[name]
        if not math.isclose(scale, module.scaling, rel_tol=1e-6):
            raise ModelError(
                f"{module.name}: its scale is {scale:g} (set_scale, scale_layer) and PEFT saves {module.scaling:g}, so the saved "
                "adapter would differ; set lora_alpha before the training"
            )
    return adapter


def validate_trained_adapter(model: Any, ranks: Sequence[int] | None = None) -> str:
    """Return the name of the adapter in training, after every check of the final measurement that needs no examples.

    Raises:
        ModelError: The adapter can't be truncated, or the base model is not the one that the adapter would name.
        SettingsError: A rank is not a possible truncation.
    """
    name = find_trained_adapter(model)
    with sync_errors(), tempfile.TemporaryDirectory(prefix="rightrank-") as folder:
        list_candidate_ranks(save_trained_adapter(model, name, Path(folder) / "begin"), ranks)
        base_name = find_base_name(model, name)
        require_named_base(model.get_base_model(), base_name, get_process_index(), get_world_size())
    return name


def find_trained_adapter(model: Any) -> str:
    """Return the name of the adapter in training, which must be the only active one.

    Raises:
        ModelError: The model is no PEFT model or uses FSDP or ZeRO-3, or the adapter is one of several active ones, no LoRA of linear layers, or merged.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    active: list[str] = sorted({name for layer in layers for name in layer.active_adapters}) or ["default"]
    if len(active) > 1:
        raise ModelError(
            f"the adapters {', '.join(active)} are active at the same time, and only one adapter can be truncated: "
            "merge the others into the base model, and train on that"
        )
    name = active[0]
    config = getattr(model, "peft_config", {}).get(name)
    if config is None:
        raise ModelError("the model has no PEFT adapter; give a model that PEFT has wrapped")
    modules = {module: layer for module, layer in find_lora_modules(model).items() if name in layer.r}
    unsupported = [module for module, layer in modules.items() if not isinstance(find_kind(layer), Linear)]
    if not modules or unsupported or config.use_dora:
        name_or_type = unsupported[0] if unsupported else config.peft_type
        raise ModelError(
            f"{name_or_type}: only LoRA of linear layers can be truncated in memory; save the adapter and use rightrank resize --data"
        )
    if any(layer.merged for layer in modules.values()):
        raise ModelError(f"the adapter {name!r} is merged into the base; call unmerge_adapter() before the measurement")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters()
    ):
        raise ModelError(
            "with FSDP and DeepSpeed's ZeRO-3 no process holds complete factors: use ZeRO-2, or use rightrank resize --data after the training"
        )
    return name


def copy_factors(model: Any, name: str, adapter: AdapterFolder) -> None:
    """Copy the factors of an adapter folder into the leading rows and columns of an adapter in memory; the others become zero.

    The module in memory multiplies by its own scale s, the folder's adapter by s'. B is therefore multiplied by s'/s.
    """
    layers = find_lora_modules(model)
    for module in adapter.modules:
        layer = layers[module.name]
        b, a = (torch.from_numpy(factor) for factor in adapter.load_factors(module))
        ratio = module.scaling / layer.scaling[name]
        for weight, factor in ((layer.lora_B[name].weight, b * ratio), (layer.lora_A[name].weight, a)):
            padded = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
            padded[: factor.shape[0], : factor.shape[1]].copy_(factor)
            with torch.no_grad():
                weight.copy_(padded)


@contextmanager
def preserve_state(model: Any, name: str, *loaders: Any) -> Iterator[None]:
    """Evaluate the model with the adapter `name` within the block, and restore the model and random states exactly after it."""
    layers = [layer for layer in find_lora_modules(model).values() if name in layer.lora_A]
    factors = [factors[name].weight for layer in layers for factors in (layer.lora_A, layer.lora_B)]
    weights = [(factor, factor.detach().clone()) for factor in factors]
    # Setting each module's mode restores exactly what it was; `model.eval()` also sets the mode of kernels (transformers 5.25).
    training_modules = [module for module in model.modules() if module.training]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None
        with set_training_mode(False, training_modules), use_adapter(model, name), preserve_random_states(*loaders):
            yield
    finally:
        with torch.no_grad():
            for weight, value in weights:
                weight.copy_(value)
        for parameter, required, gradient in parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient


@contextmanager
def preserve_random_states(*loaders: Any) -> Iterator[None]:
    """Restore the global random states after the block, and the attributes of the loaders and of what they read through.

    Within the block, generators among these attributes are copies.
    """
    with ExitStack() as restored:
        restored.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        restored.callback(np.random.set_state, np.random.get_state())
        restored.callback(random.setstate, random.getstate())
        sources, pending, copies = dict[int, Any](), list(loaders), dict[int, Any]()
        while pending:
            source = pending.pop()
            if id(source) not in sources and isinstance(getattr(source, "__dict__", None), dict):
                sources[id(source)] = source
                pending += [getattr(source, name, None) for name in LOADER_ATTRIBUTES]
        for source in sources.values():
            attributes = dict(vars(source))
            restored.callback(vars(source).update, attributes)
            restored.callback(vars(source).clear)
            generators = {name: value for name, value in attributes.items() if isinstance(value, GENERATORS)}
            vars(source).update(copy.deepcopy(generators, copies))
        yield
