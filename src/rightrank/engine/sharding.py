"""A base too large for one device: every process keeps a shard of each block (torch's FSDP, `fully_shard`).

A block's weights are gathered for its forward and backward passes and freed after each. The base is frozen, so its gradients
are never reduced. Adapters are whole in every process, and `distributed.py` sums their gradients. Embeddings, the last norm
and the output head stay whole, because the loss calls the head outside the model's own forward pass.
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
