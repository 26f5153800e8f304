"""A base that one device can't hold: every process keeps its share of each block (torch's FSDP, `fully_shard`).

A block's weights are gathered when it runs, forward and backward, and let go after it. The base is frozen, so nothing
of it is ever reduced; adapters are whole in every process, and their gradients are summed in `distributed.py`. Embeddings,
the last norm and the output head stay whole: the loss takes the head without the model's own forward.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rightrank.engine.distributed import world_size
from rightrank.engine.prefix import find_blocks
from rightrank.errors import ModelError, SettingsError
from rightrank.io.models import LoadedModel


def sharded(loaded: LoadedModel, device: torch.device) -> LoadedModel:
    """The base with its blocks shared out over the processes, each process's share on `device`.

    `loaded` is whole and on the CPU: while it is loaded every process needs that much of the host's memory.

    Raises:
        SettingsError: one process alone, or a quantised base.
        ModelError: no single stack of blocks.
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
