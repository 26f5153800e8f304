"""Several devices: what each of them holds, by formula and not by trace.

DDP: every device holds everything, and buckets as large as all gradients, in which they are summed. FSDP (full
sharding, one unit a block) over n devices: parameters, gradients and optimizer states take 1/n each, and the frozen
weights of two blocks are whole at a time, the block that runs and the one that is prefetched. Source: torch's DDP and
FSDP notes.
"""

from __future__ import annotations

from collections.abc import Sequence

from rightrank.planning.optimizer import OptimizerMemory
from rightrank.planning.simulate import Resident
from rightrank.settings import PlanSettings

WHOLE_BLOCKS = 2


def sharded(
    residents: Sequence[Resident], optimizer: OptimizerMemory, settings: PlanSettings, block_bytes: int = 0
) -> tuple[list[Resident], OptimizerMemory]:
    """What one of the devices holds, `block_bytes` being the weights of the largest block."""
    count = settings.num_devices
    if settings.sharding == "none":
        return list(residents), optimizer
    if settings.sharding == "ddp":
        buckets = sum(resident.size for resident in residents if resident.component == "adapter")
        return [*residents, Resident(buckets, "buckets")], optimizer
    split = [
        Resident(-(-resident.size // count), resident.component)
        if resident.component in ("weights", "adapter")
        else resident
        for resident in residents
    ]
    states = OptimizerMemory(
        tuple(-(-size // count) for size in optimizer.states),
        tuple(tuple(-(-size // count) for size in stage) for stage in optimizer.work),
    )
    return [*split, Resident(WHOLE_BLOCKS * block_bytes, "gathered_blocks")], states
