"""Several processes that are one worker: each takes its share of every batch of an arm (see `engine.distributed`).

All of a group are told the same; only the first is listened to. They find each other at a store of torch's that the
driver keeps, and from then on talk among themselves.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from rightrank.executors.messages import Group, WorkerSetup

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

LOOPBACK = "127.0.0.1"


class Rendezvous:
    """The driver's side: a store at one address of this machine's, where the groups of a crew meet."""

    def __init__(self, host: str, size: int, on_cuda: bool) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self._size = size
        self._backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        listener = socket.create_server((host, 0))  # torch's own would listen on every address
        self._host, self._port = host, int(listener.getsockname()[1])
        self._store: TCPStore = TCPStore(
            host, self._port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def setups(self, setup: WorkerSetup, worker: str) -> list[WorkerSetup]:
        """What each of a worker's processes is told, the first that of the one who is listened to."""
        groups = [
            Group(name=worker, number=number, size=self._size, host=self._host, port=self._port, backend=self._backend)
            for number in range(self._size)
        ]
        return [setup.model_copy(update={"group": group}) for group in groups]


def join(group: Group) -> None:
    """Wait for the others of the group, and be one of them from now on."""
    import torch.distributed as dist
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    store = PrefixStore(group.name, TCPStore(group.host, group.port, is_master=False))
    dist.init_process_group(group.backend, store=store, rank=group.number, world_size=group.size)
