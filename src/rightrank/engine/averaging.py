"""The running mean of an adapter's A and of its B over the last steps of a training.

Early in a training the loss of the current weights favors low learning rates: high ones are still oscillating. The mean over
steps removes the oscillation (Polyak and Juditsky 1992). A and B are averaged separately, so the mean has the adapter's
rank; it is measured and never trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

PREFIX, COUNT = "average.", "average_count"


class RunningMean:
    """The mean of named parameters over the steps after `start`, in float32."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], start: int) -> None:
        self._parameters = parameters
        self._start = start
        self._sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in parameters.items()}
        self._count = 0

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Count the parameters as they are after `step` steps; steps up to `start` are left out."""
        if step <= self._start:
            return
        for name, value in self._parameters.items():
            self._sums[name] += value
        self._count += 1

    @property
    def is_empty(self) -> bool:
        return self._count == 0

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold their mean inside the block, and their own values after it."""
        before = {name: value.detach().clone() for name, value in self._parameters.items()}
        with torch.no_grad():
            for name, value in self._parameters.items():
                value.copy_(self._sums[name] / self._count)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in self._parameters.items():
                    value.copy_(before[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        sums = {f"{PREFIX}{name}": value for name, value in self._sums.items()}
        return {**sums, COUNT: torch.tensor(self._count)}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Resume from a checkpoint's tensors; one written without a mean leaves it empty."""
        if COUNT not in tensors:
            return
        for name, value in self._sums.items():
            value.copy_(tensors[f"{PREFIX}{name}"])
        self._count = int(tensors[COUNT])
