"""Trainings in workers: processes on this machine, and actors of a Ray cluster.

A worker holds one base and trains one task at a time; a driver gives out trials and takes each outcome exactly once, whatever
workers are lost, hang or don't fit. Adapters and checkpoints go through a shared folder or a store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from rightrank.runs.plugins import Plugin


class Cluster(Plugin):
    name = "cluster"

    def executors(self) -> Mapping[str, Callable[..., AbstractContextManager[Any]]]:
        return {"processes": _workers, "ray": _workers}

    def calls(self) -> Mapping[str, Callable[..., Any]]:
        return {"ray": _on_ray}


PLUGIN = Cluster()


def _workers(*selection: Any) -> AbstractContextManager[Any]:
    from rightrank.plugins.cluster.factory import worker_executor

    return worker_executor(*selection)


def _on_ray(train: Any) -> Callable[..., Any]:
    from rightrank.plugins.cluster.on_ray import call_on_ray

    return call_on_ray(train)
