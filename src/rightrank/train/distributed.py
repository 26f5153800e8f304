"""Several processes for one arm: each computes its share of every batch, and gradients are summed.

Every process holds the same adapter and takes the same steps. Whoever starts the processes (torchrun, accelerate or
`torch.multiprocessing`) initialises `torch.distributed`. In a single process these functions do nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rightrank.models.base_models import LoadedModel
from rightrank.schema.errors import ModelError, SettingsError
from rightrank.train.prefix import find_blocks


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """The number of this process; process 0 writes files."""
    return dist.get_rank() if world_size() > 1 else 0


def require_shares(batch_size: int) -> None:
    """Check that every process gets an example of every batch.

    Raises:
        SettingsError: the batch size is below the number of processes.
    """
    if batch_size < world_size():
        raise SettingsError(
            f"batch_size {batch_size} can't be shared by {world_size()} processes; give batch_size {world_size()} or more, or fewer processes"
        )


def my_share(rows: Sequence[int]) -> list[int]:
    """The rows of a batch that this process computes: every `world_size`-th, so that lengths are balanced."""
    return list(rows[process_index() :: world_size()])


def all_reduce(tensors: Iterable[torch.Tensor]) -> None:
    """Sum tensors of one dtype in place over all processes, in one collective."""
    found = list(tensors)
    if world_size() == 1 or not found:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in found])
    dist.all_reduce(flat)
    begin = 0
    for tensor in found:
        tensor.copy_(flat[begin : begin + tensor.numel()].view_as(tensor))
        begin += tensor.numel()


def broadcast(process: int, value: Any) -> Any:
    """The JSON value that process number `process` passes, in every process."""
    if world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    size = torch.tensor([len(text)], device=device)
    dist.broadcast(size, process)
    if process_index() != process:
        text = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(text, process)
    return json.loads(bytes(text.tolist()))


def sharded(loaded: LoadedModel, device: torch.device) -> LoadedModel:
    """The base with its blocks sharded over the processes, this process's shard on `device`.

    `loaded` is whole and on the CPU, so while loading every process needs host memory for the whole base.

    Raises:
        SettingsError: there is one process, or the base is quantised.
        ModelError: the model does not have exactly one stack of blocks.
    """
    if world_size() == 1:
        raise SettingsError(
            "shard_base needs more than one process, started under torch.distributed; leave it out for one"
        )
    if getattr(loaded.model, "is_quantized", False):
        raise SettingsError("shard_base does not go with load_in_4bit or load_in_8bit; give one of them")
    found = find_blocks(loaded.model)
    if found is None:
        raise ModelError(f"{loaded.name}: shard_base needs one stack of blocks, which this model does not have")
    mesh = init_device_mesh(device.type, (world_size(),))
    for block in found[1]:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    blocks = {id(parameter) for parameter in found[1].parameters()}
    for module in loaded.model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in blocks:
                parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return dataclasses.replace(loaded, device=device)
