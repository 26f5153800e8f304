"""A worker of several processes, each of which computes its share of every batch (see `engine.distributed`).

All processes of a group receive the same commands; only the first sends messages. They find each other through a torch
store that the driver holds, and then communicate directly.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from rightrank.executors.messages import Group, WorkerSetup

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

LOOPBACK = "127.0.0.1"


class Rendezvous:
    """The store, at one address of this machine, where the processes of a crew's groups find each other."""

    def __init__(self, host: str, size: int, on_cuda: bool) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self._size = size
        self._backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        listener = socket.create_server((host, 0))  # a socket made by torch would listen on every address
        self._host, self._port = host, int(listener.getsockname()[1])
        self._store: TCPStore = TCPStore(
            host, self._port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def setups(self, setup: WorkerSetup, worker: str) -> list[WorkerSetup]:
        """One setup for each process of a worker; the first is for the process that sends messages."""
        groups = [
            Group(name=worker, number=number, size=self._size, host=self._host, port=self._port, backend=self._backend)
            for number in range(self._size)
        ]
        return [setup.model_copy(update={"group": group}) for group in groups]


def join(group: Group) -> None:
    """Wait for the other processes of the group and start `torch.distributed` with them."""
    import torch.distributed as dist
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    store = PrefixStore(group.name, TCPStore(group.host, group.port, is_master=False))
    dist.init_process_group(group.backend, store=store, rank=group.number, world_size=group.size)
